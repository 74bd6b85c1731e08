"""Map run and sweep records to MLflow names, params, tags and metrics, without MLflow.

One record gives the same rows whenever it is mapped, times included: what is logged late, or twice, is what was logged at once.
docs/queries.md shows how to query them.

    run name     <model> w<bits>g<group> <recipe>; of a cell <model> <cell>; of a sweep <model> sweep <folder>
    parameters   the expanded config, a key each
    tags         what people filter by: gptq.*, prefect.*, and MLflow's own where it has one
    metrics      of the run with step 0, of blocks and layers with step = block, of the machine (`system/`) with step = sample
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

from tasks.config.run import RunConfig, model_name
from tasks.outcome import record as records
from tasks.outcome.gate import fallbacks
from tasks.outcome.parts import GateResult, MeasureResult, SweepName
from tasks.outcome.record import RunRecord, SweepRecord, short_name


class Point(NamedTuple):
    """A value of a metric."""

    key: str
    value: float
    when: int
    """Milliseconds since 1970."""
    step: int


Numbers = dict[str, float | int | None]
"""Metrics by name; None: not measured."""

EVALUATED = ("original_perplexity", "quantized_perplexity", "kl", "top1_agreement", "flips", "perplexity_increase", "recovery")
COMPARED = ("original", "quantized", "recovery", "lost", "gained", "count")
LONGEST_PARAM, LONGEST_TAG = 6000, 5000
"""Characters that MLflow keeps; what is longer stands whole in config.yaml."""


def safe(name: str) -> str:
    """A name that MLflow takes: word characters, dots, dashes, spaces and slashes."""
    return re.sub(r"[^\w.\- ]", "_", name)


def run_name(config: RunConfig, cell: str | None = None) -> str:
    """cell: name of the cell, where the run is one of a sweep."""
    name, wanted = model_name(config.model.path), config.quantization
    if cell is not None:
        return f"{name} {cell}"
    unusual = ["asym"] * (not wanted.sym) + ["desc_act"] * wanted.desc_act + [wanted.format] * (wanted.format != "gptq")
    return " ".join([name, config.width, wanted.recipe, *unusual])


def params(config: RunConfig) -> dict[str, str]:
    """The expanded config. A value that is too long for MLflow is cut."""
    return {safe(key)[:250]: str(value)[:LONGEST_PARAM] for key, value in config.flat().items()}


# -- tags -----------------------------------------------------------------------------------------------------------------


def tags(config: RunConfig, record: RunRecord) -> dict[str, str]:
    """What runs are found by. Empty: not known, or not so."""
    wanted, cell = config.quantization, record.sweep
    known = {
        "gptq.kind": "cell" if cell else "run",
        "gptq.mode": "exact",
        "gptq.key": record.key,
        "gptq.checkpoint": str(config.out),
        "gptq.model": model_name(config.model.path),
        "gptq.model_revision": config.model.revision,
        "gptq.model_digest": record.model_digest,
        "gptq.bits": "mixed" if wanted.allocate else str(wanted.bits),
        "gptq.group_size": str(wanted.group_size),
        "gptq.recipe": wanted.recipe,
        "gptq.format": wanted.format,
        "gptq.calibration": record.calibration_data.digest,
        "gptq.evaluation": record.evaluation_data.digest,
        "gptq.evaluation_error": record.evaluation_error,
        "gptq.sweep": cell.id if cell else None,
        "gptq.cell": cell.cell if cell else None,
        "gptq.device": record.machine.gpu if record.device == "cuda" else record.device,
        "gptq.kernels": record.kernels,
        **_made_by(record),
        **gate_tags(record.gate),
    }
    return _texts(known)


def _made_by(record: RunRecord | SweepRecord) -> dict[str, str | None]:
    """The machine, the code and the Prefect run."""
    return {
        "gptq.host": record.machine.host,
        "gptq.code_version": record.source.version,
        "mlflow.source.git.commit": record.source.git,
        "prefect.flow_run_id": record.prefect_flow_run_id,
        "prefect.flow_run_url": record.prefect_flow_run_url,
    }


def gate_tags(gate: GateResult | None) -> dict[str, str]:
    """The gate's result, and the limits that were not kept; empty where there is no gate."""
    return {"gptq.gate": gate.word if gate else "", "gptq.gate.failed": (gate.failures if gate else None) or ""}


def _texts(known: dict[str, str | None]) -> dict[str, str]:
    return {key: (value or "")[:LONGEST_TAG] for key, value in known.items()}


# -- metrics --------------------------------------------------------------------------------------------------------------


def metrics(record: RunRecord) -> list[Point]:
    """Every number of the record that was measured."""
    when = record.finished_ms
    if when is None:
        raise ValueError(f"run {record.id} is not evaluated yet: run its command again")
    points = [Point(key, float(value), when, 0) for key, value in _single(record).items() if value is not None]
    for block in record.blocks:
        errors = [layer.relative_error for layer in block.layers if layer.relative_error is not None]
        points.append(Point("block/seconds", float(block.seconds), when, block.block))
        if errors:
            points.append(Point("block/worst_relative_error", float(max(errors)), when, block.block))
        for layer in block.layers:
            name = safe(short_name(layer.name))
            numbers = {"loss": layer.loss, "relative_error": layer.relative_error, "tokens": layer.tokens, "bits": layer.bits}
            points += [Point(f"{key}/{name}", float(value), when, block.block) for key, value in numbers.items() if value is not None]
    return points + _system(record)


def _single(record: RunRecord) -> Numbers:
    evaluation, assembly = record.evaluation, record.assembly
    found: Numbers = {}
    if evaluation:
        found = {key: getattr(evaluation, key) for key in EVALUATED}
        found["overlap_share"] = evaluation.overlap.share if evaluation.overlap else None
    found |= {key: getattr(assembly, key) for key in ("bytes", "original_bytes", "bits_per_weight", "quantized_layers")}
    found["fallback_layers"] = fallbacks(assembly)
    found["predicted_kl"] = record.allocation.predicted_kl if record.allocation else None
    found |= {f"seconds/{safe(stage)}": seconds for stage, seconds in record.stage_seconds.items()}
    found |= {f"peak_memory_bytes/{kind}": size for kind, size in (record.peak_memory_bytes or {}).items()}
    return found | {"seconds/total": record.seconds} | _measures(evaluation.measures if evaluation else [])


def _measures(results: list[MeasureResult]) -> Numbers:
    """measure/<name>/<metric>/<what>; a second result of the same name and metric (another protocol) is <metric>_2."""
    found: Numbers = {}
    for result in results:
        place = first = f"measure/{safe(result.name)}/{safe(result.metric)}"
        count = 1
        while f"{place}/quantized" in found:
            count += 1
            place = f"{first}_{count}"
        low, high = result.interval or (None, None)
        found |= {f"{place}/{key}": getattr(result, key) for key in COMPARED}
        found |= {f"{place}/recovery_low": low, f"{place}/recovery_high": high}
    return found


def _system(record: RunRecord) -> list[Point]:
    load = record.system
    if load is None:
        return []
    return [
        Point(f"system/{safe(name)}", float(value), when, step)
        for name, values in load.metrics.items()
        for step, (when, value) in enumerate(zip(load.times_ms, values, strict=True))
        if value is not None
    ]


# -- sweeps ---------------------------------------------------------------------------------------------------------------


def sweep_name(sweep: SweepName) -> str:
    return f"{sweep.model} sweep {Path(sweep.folder).name}"


def opening_tags(sweep: SweepName) -> dict[str, str]:
    """Tags of a sweep before any cell is computed."""
    return _texts({"gptq.kind": "sweep", "gptq.model": sweep.model, "gptq.mode": sweep.mode, "gptq.folder": sweep.folder})


def sweep_tags(sweep: SweepRecord) -> dict[str, str]:
    choice, grid = sweep.recommended, json.dumps(sweep.config.get("grid") or {}, ensure_ascii=False)
    known = {"gptq.recommended": choice.name, "gptq.rule": choice.rule, "gptq.grid": grid, **_made_by(sweep)}
    return opening_tags(sweep.name) | _texts(known)


def sweep_metrics(sweep: SweepRecord) -> list[Point]:
    """Counts, seconds and the recommended cell's numbers, at the time when the sweep ended."""
    when, best = records.milliseconds(sweep.finished), sweep.chosen
    numbers: Numbers = {
        "cells": len(sweep.cells),
        "cells/failed": sum(not cell.done for cell in sweep.cells),
        "seconds/total": sweep.seconds,
    }
    if best:
        numbers |= {f"recommended/{key}": getattr(best, key) for key in ("perplexity", "kl", "bytes", "bits_per_weight")}
    return [Point(key, float(value), when, 0) for key, value in numbers.items() if value is not None]
