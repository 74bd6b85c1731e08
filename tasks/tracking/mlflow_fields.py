"""What MLflow is told of a run or a sweep, out of their records and without MLflow: names, parameters, tags, numbers.

One record gives the same rows whenever they are asked for, times included: what is logged late, or twice, is what was logged at once.
docs/queries.md tells how to ask for them.

    run name     <model> w<bits>g<group> <recipe>; of a cell <model> <cell>; of a sweep <model> sweep <folder>
    parameters   the expanded config, a key each
    tags         what people filter by: gptq.*, prefect.*, and MLflow's own where it has one
    metrics      of the run with step 0, of blocks and layers with step = block, of the machine (`system/`) with step = sample
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tasks.config.run import RunConfig, model_name
from tasks.outcome import record as records
from tasks.outcome.gate import failed, measured
from tasks.outcome.record import short_name

Row = tuple[str, float, int, int]
"""Metric, value, time in milliseconds, step."""

EVALUATED = ("original_perplexity", "quantized_perplexity", "kl", "top1_agreement", "flips")
COMPARED = ("original", "quantized", "recovery", "recovery_low", "recovery_high", "lost", "gained", "count")
LONGEST_PARAM, LONGEST_TAG = 6000, 5000
"""Characters that MLflow keeps; what is longer stands whole in config.yaml."""


def safe(name: str) -> str:
    """A name that MLflow takes: word characters, dots, dashes, spaces and slashes."""
    return re.sub(r"[^\w.\- ]", "_", name)


def run_name(config: RunConfig, record: dict[str, Any]) -> str:
    name, wanted = model_name(config.model.path), config.quantization
    if record.get("sweep"):
        return f"{name} {record['sweep']['cell']}"
    unusual = ["asym"] * (not wanted.sym) + ["desc_act"] * wanted.desc_act + [wanted.format] * (wanted.format != "gptq")
    return " ".join([name, config.width, wanted.recipe, *unusual])


def params(config: RunConfig) -> dict[str, str]:
    """The expanded config. A value that is too long for MLflow is cut."""
    return {safe(key)[:250]: str(value)[:LONGEST_PARAM] for key, value in config.flat().items()}


# -- tags -----------------------------------------------------------------------------------------------------------------


def tags(config: RunConfig, record: dict[str, Any]) -> dict[str, str]:
    """What runs are found by. Empty: not known, or not so."""
    wanted, machine, cell = config.quantization, record["machine"], record.get("sweep") or {}
    device = record.get("device")
    known = {
        "gptq.kind": "cell" if cell else "run",
        "gptq.mode": "exact",
        "gptq.key": record["key"],
        "gptq.checkpoint": str(config.out),
        "gptq.model": model_name(config.model.path),
        "gptq.model_revision": config.model.revision,
        "gptq.model_digest": record.get("model_digest"),
        "gptq.bits": "mixed" if wanted.allocate else str(wanted.bits),
        "gptq.group_size": str(wanted.group_size),
        "gptq.recipe": wanted.recipe,
        "gptq.format": wanted.format,
        "gptq.calibration": record["calibration_data"]["digest"],
        "gptq.evaluation": record["evaluation_data"]["digest"],
        "gptq.evaluation_error": record["evaluation_error"],
        "gptq.sweep": cell.get("id"),
        "gptq.cell": cell.get("cell"),
        "gptq.device": machine["gpu"] if device == "cuda" else device,
        "gptq.kernels": record.get("kernels"),
        **_made_by(record),
        **gate_tags(record),
    }
    return {key: (value or "")[:LONGEST_TAG] for key, value in known.items()}


def _made_by(record: dict[str, Any]) -> dict[str, str | None]:
    """The machine, the code and the Prefect run of a record or of a sweep.json."""
    source = record.get("source") or {}
    return {
        "gptq.host": (record.get("machine") or {}).get("host"),
        "gptq.code_version": source.get("version"),
        "mlflow.source.git.commit": source.get("git"),
        "prefect.flow_run_id": record.get("prefect_flow_run_id"),
        "prefect.flow_run_url": record.get("prefect_flow_run_url"),
    }


def gate_tags(record: dict[str, Any]) -> dict[str, str]:
    """The gate's verdict, and the limits that were not kept; empty where there is no gate."""
    verdict = record.get("gate")
    passed = "passed" if verdict and verdict["passed"] else "failed" if verdict else ""
    return {"gptq.gate": passed, "gptq.gate.failed": failed(verdict) or ""}


# -- numbers --------------------------------------------------------------------------------------------------------------


def metrics(record: dict[str, Any]) -> list[Row]:
    """Every number of the record. What was not measured is not told."""
    when = record["finished_ms"]
    rows = [(key, float(value), when, 0) for key, value in _single(record).items() if value is not None]
    for block in record["blocks"]:
        step, errors = block["block"], [layer["relative_error"] for layer in block["layers"] if layer["relative_error"] is not None]
        rows.append(("block/seconds", float(block["seconds"]), when, step))
        if errors:
            rows.append(("block/worst_relative_error", float(max(errors)), when, step))
        for layer in block["layers"]:
            for key in ("loss", "relative_error", "tokens", "bits"):
                if layer.get(key) is not None:
                    rows.append((f"{key}/{safe(short_name(layer['name']))}", float(layer[key]), when, step))
    return rows + _system(record)


def _single(record: dict[str, Any]) -> dict[str, Any]:
    evaluation, assembly = record["evaluation"] or {}, record["assembly"]
    found = {key: evaluation.get(key) for key in EVALUATED}
    found["overlap_share"] = (evaluation.get("overlap") or {}).get("share")
    found |= {key: assembly.get(key) for key in ("bytes", "original_bytes", "bits_per_weight", "quantized_layers")}
    found |= {key: value for key, value in measured(record).items() if key in ("perplexity_increase", "recovery", "fallback_layers")}
    found["predicted_kl"] = (record.get("allocation") or {}).get("predicted_kl")
    found |= {f"seconds/{safe(stage)}": seconds for stage, seconds in record["stage_seconds"].items()}
    found |= {f"peak_memory_bytes/{kind}": size for kind, size in (record["peak_memory_bytes"] or {}).items()}
    return found | {"seconds/total": record["seconds"]} | _measures(evaluation.get("measures") or [])


def _measures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """measure/<name>/<metric>/<what>; a second row of the same name and metric (another protocol) is <metric>_2."""
    found: dict[str, Any] = {}
    for row in rows:
        place = first = f"measure/{safe(row['name'])}/{safe(row['metric'])}"
        count = 1
        while f"{place}/quantized" in found:
            count += 1
            place = f"{first}_{count}"
        low, high = row.get("interval") or (None, None)
        values = row | {"recovery_low": low, "recovery_high": high}
        found |= {f"{place}/{key}": values.get(key) for key in COMPARED}
    return found


def _system(record: dict[str, Any]) -> list[Row]:
    found = record.get("system") or {"times_ms": [], "metrics": {}}
    return [
        (f"system/{safe(name)}", float(value), when, step)
        for name, values in found["metrics"].items()
        for step, (when, value) in enumerate(zip(found["times_ms"], values, strict=True))
        if value is not None
    ]


# -- sweeps ---------------------------------------------------------------------------------------------------------------


def sweep_name(sweep: dict[str, Any]) -> str:
    """`sweep`: sweep.json, or what tasks.sweep.results.opening tells of one that has only begun."""
    return f"{sweep['model']} sweep {Path(sweep['folder']).name}"


def opening_tags(sweep: dict[str, Any]) -> dict[str, str]:
    known = {"gptq.kind": "sweep", "gptq.model": sweep["model"], "gptq.mode": sweep["mode"], "gptq.folder": sweep["folder"]}
    return {key: value or "" for key, value in known.items()}


def sweep_tags(sweep: dict[str, Any]) -> dict[str, str]:
    choice, grid = sweep["recommended"], json.dumps(sweep["config"].get("grid") or {}, ensure_ascii=False)
    known = {"gptq.recommended": choice["name"], "gptq.rule": choice["rule"], "gptq.grid": grid, **_made_by(sweep)}
    return opening_tags(sweep) | {key: (value or "")[:LONGEST_TAG] for key, value in known.items()}


def sweep_metrics(sweep: dict[str, Any]) -> list[Row]:
    """Counts, seconds and the recommended cell's numbers, at the time when the sweep ended."""
    cells, when = sweep["cells"], records.milliseconds(sweep["finished"])
    numbers = {"cells": len(cells), "cells/failed": sum(row["status"] != "done" for row in cells), "seconds/total": sweep["seconds"]}
    best = next((row for row in cells if row["name"] == sweep["recommended"]["name"]), {})
    numbers |= {f"recommended/{key}": best.get(key) for key in ("perplexity", "kl", "bytes", "bits_per_weight")}
    return [(key, float(value), when, 0) for key, value in numbers.items() if value is not None]
