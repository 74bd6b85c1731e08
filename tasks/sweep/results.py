"""sweep.json: the cells of a sweep, its front and its choice."""

from __future__ import annotations

import time
import uuid

from gptq_core.checkpoint.writer import replace_file
from tasks.config.run import model_name
from tasks.config.sweep import SweepConfig
from tasks.outcome import record as records
from tasks.outcome.gate import fallbacks, judge
from tasks.outcome.machine import machine, source
from tasks.outcome.parts import Json, MlflowLink, SweepName, SweptCell
from tasks.outcome.record import SweepRecord
from tasks.sweep.cells import State
from tasks.sweep.pareto import pareto_front, recommend


def swept(state: State) -> SweptCell:
    """A cell as the table, the front and MLflow show it."""
    numbers = state.numbers
    if state.status != "done" or numbers is None:
        return SweptCell(name=state.cell.name, settings=state.cell.settings, status=state.status, error=state.error)
    quality, sizes, seconds = numbers
    record, screened, config = state.record, state.screened, state.config
    return SweptCell(
        name=state.cell.name,
        settings=state.cell.settings,
        status=state.status,
        bytes=sizes.bytes,
        original_bytes=sizes.original_bytes,
        bits_per_weight=sizes.bits_per_weight,
        original_perplexity=quality.original_perplexity,
        perplexity=quality.quantized_perplexity,
        kl=quality.kl,
        agreement=quality.top1_agreement,
        recovery=quality.recovery,
        seconds=seconds,
        gate=judge(config.gate, quality, sizes).word if config.gate else None,
        fallback_layers=fallbacks(sizes),
        out=None if screened else str(config.out),
        mlflow_run_id=record.mlflow.run_id if record and record.mlflow else None,
        judged_on=f"{config.model.path}@{config.model.revision or ''} {state.request.texts.evaluation.digest[:12]}",
        set_aside=screened.set_aside if screened else [],
    )


def opening(config: SweepConfig) -> SweepName:
    """The sweep before any cell is computed."""
    names = dict.fromkeys(model_name(cell.config.model.path) for cell in config.expanded() if cell.config)
    name, started = sweep_id(config), (config.folder / "shared" / "id").stat().st_mtime
    return SweepName(
        id=name,
        folder=str(config.folder),
        mode=config.mode,
        started_ms=int(started * 1000),
        model=next(iter(names)) if len(names) == 1 else f"{len(names)} models",
    )


def result(config: SweepConfig, states: list[State], computed: list[str], started: float) -> SweepRecord:
    """The record of the sweep: the cells, the front and the choice. started: by time.perf_counter."""
    cells, choice = [swept(state) for state in states], config.choose
    measure = choice.measure if any(cell.kl is not None for cell in cells) else "perplexity"
    gated = any(state.cell.config and state.cell.config.gate for state in states)
    return SweepRecord(
        **opening(config).model_dump(),
        config=config.model_dump(mode="json"),
        source=source(),
        machine=machine(),
        finished=records.now(),
        seconds=time.perf_counter() - started,
        computed=computed,
        measure=measure,
        cells=cells,
        front=pareto_front(cells, measure),
        recommended=recommend(
            cells, rule=choice.rule, measure=measure, max_gb=choice.max_gb, gated=gated, max_increase=choice.max_perplexity_increase
        ),
    )


def finished(config: SweepConfig, states: list[State]) -> SweepRecord | None:
    """The record on disk, if it is of these cells and MLflow, registry and hooks have it: then there is nothing to do."""
    before = records.read_sweep(config.folder)
    if before is None or before.mlflow is None or any(state.status == "missing" for state in states):
        return None
    steps = [before.mlflow, before.registry, *(before.notified or {}).values()]
    if config.mode == "exact":
        steps += [state.record.mlflow or MlflowLink(error="not logged") for state in states if state.record]
    if any(step and step.error for step in steps):
        return None
    now = result(config, states, [], time.perf_counter())
    if _content(before) != _content(now):
        return None
    before.computed = []
    return before


def same(before: SweepRecord, found: SweepRecord) -> bool:
    """Whether two records of a sweep agree; the ids of MLflow's runs aside, which may come later."""

    def unlogged(sweep: SweepRecord) -> Json:
        return _content(sweep.model_copy(update={"cells": [cell.model_copy(update={"mlflow_run_id": None}) for cell in sweep.cells]}))

    return unlogged(before) == unlogged(found)


def _content(sweep: SweepRecord) -> Json:
    return sweep.model_dump(mode="json", include={"config", "cells", "front", "recommended"})


def failure(sweep: SweepRecord) -> str | None:
    """Why a sweep is not a success, in one line: cells failed, or none can be recommended."""
    wrong = [cell for cell in sweep.cells if not cell.done]
    if wrong:
        return (
            f"{len(wrong)} of {len(sweep.cells)} cells failed ({wrong[0].name}: {wrong[0].error}): the same command does what "
            "is missing, once the reasons are gone"
        )
    choice = sweep.recommended
    return None if choice.name else f"all cells are complete and none can be recommended ({choice.rule}: {choice.reason})"


def happened(sweep: SweepRecord) -> list[str]:
    """The events of a sweep, in the words of notify.when: it has passed if nothing failed and a cell is recommended."""
    return ["done", "failed" if failure(sweep) else "passed"]


def notification(sweep: SweepRecord) -> Json:
    """A finished sweep as its hooks get it: the same while nothing changes."""
    content = sweep.model_dump(mode="json")
    return {
        "events": happened(sweep),
        **{key: content[key] for key in ("id", "mode", "folder", "cells", "front", "recommended", "registry")},
        "mlflow_run": sweep.mlflow and sweep.mlflow.run_id,
    }


def sweep_id(config: SweepConfig) -> str:
    """Id of the sweep in this folder, made with the folder: by it MLflow's run is found again."""
    path = config.folder / "shared" / "id"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, uuid.uuid4().hex[:12].encode())
    return path.read_text()
