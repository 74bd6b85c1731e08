"""sweep.json: the cells of a sweep, its front and its choice."""

from __future__ import annotations

import json
import time
import uuid
from pathlib import Path
from typing import Any

from gptq_core.checkpoint.writer import replace_file
from tasks.config.run import model_name
from tasks.config.sweep import SweepConfig
from tasks.outcome import record as records
from tasks.outcome.gate import judge, measured
from tasks.sweep.cells import State, _read, _write
from tasks.sweep.pareto import front, recommend


def row(state: State) -> dict[str, Any]:
    """What the table, the front and MLflow tell of a cell."""
    found = {
        "name": state.cell.name,
        "settings": state.cell.settings,
        "status": state.status,
        "error": state.error,
        "bytes": None,
        "original_bytes": None,
        "bits_per_weight": None,
        "original_perplexity": None,
        "perplexity": None,
        "kl": None,
        "agreement": None,
        "recovery": None,
        "seconds": None,
        "gate": None,
        "fallback_layers": None,
        "out": None,
        "mlflow_run_id": None,
        "judged_on": None,
    }
    record = state.record
    if state.status != "done":
        return found
    model = state.config.model
    found["judged_on"] = f"{model.path}@{model.revision or ''} {state.request.texts.evaluation.digest[:12]}"
    if record.get("mode") == "screening":
        # in the form of a run's record, so that one gate judges both
        found["set_aside"] = list(record["set_aside"])
        record = {"evaluation": record, "assembly": record | {"skipped": []}, "seconds": record["seconds"]}
    else:
        found |= {"out": str(state.config.out), "mlflow_run_id": (record.get("mlflow") or {}).get("run_id")}
    evaluation, assembly, gate = record["evaluation"], record["assembly"], state.config.gate
    return found | {
        "bytes": assembly["bytes"],
        "original_bytes": assembly.get("original_bytes"),
        "bits_per_weight": assembly["bits_per_weight"],
        "original_perplexity": evaluation["original_perplexity"],
        "perplexity": evaluation["quantized_perplexity"],
        "kl": evaluation["kl"],
        "agreement": evaluation["top1_agreement"],
        "recovery": evaluation.get("recovery"),
        "seconds": record["seconds"],
        "fallback_layers": measured(record)["fallback_layers"],
        "gate": None if gate is None else "passed" if judge(gate, record)["passed"] else "failed",
    }


def opening(config: SweepConfig) -> dict[str, Any]:
    """What names a sweep before any cell is computed: its run in MLflow is made from it."""
    names = dict.fromkeys(model_name(cell.config.model.path) for cell in config.expanded() if cell.config)
    name, started = sweep_id(config), (config.folder / "shared" / "id").stat().st_mtime
    return {
        "id": name,
        "folder": str(config.folder),
        "mode": config.mode,
        "started_ms": int(started * 1000),
        "model": next(iter(names)) if len(names) == 1 else f"{len(names)} models",
    }


def result(config: SweepConfig, states: list[State], computed: list[str], started: float) -> dict[str, Any]:
    """sweep.json: the cells, the front and the choice. It keeps its id, by which MLflow's run is found."""
    rows, choice = [row(state) for state in states], config.choose
    measure = choice.measure if any(r["kl"] is not None for r in rows) else "perplexity"
    gated = any(state.cell.config and state.cell.config.gate for state in states)
    return {
        **opening(config),
        "config": config.model_dump(mode="json"),
        "source": records.source(),
        "machine": records.machine(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": time.perf_counter() - started,
        "computed": computed,
        "measure": measure,
        "cells": rows,
        "front": front(rows, measure),
        "recommended": recommend(
            rows, rule=choice.rule, measure=measure, max_gb=choice.max_gb, gated=gated, max_increase=choice.max_perplexity_increase
        ),
        "registry": None,
        "mlflow": None,
        "notified": None,
    }


def settled(config: SweepConfig, states: list[State]) -> dict[str, Any] | None:
    """sweep.json, where it tells all that there is to tell, and MLflow, registry and hooks know it: then there is nothing to do."""
    before = read(config)
    if any(state.status == "missing" for state in states) or not before.get("mlflow"):
        return None
    told = [before["mlflow"], before.get("registry") or {}, *(before.get("notified") or {}).values()]
    if config.mode == "exact":
        told += [state.record.get("mlflow") or {"error": "not logged"} for state in states if state.status == "done"]
    if any(outcome.get("error") for outcome in told):
        return None
    now = json.loads(json.dumps(result(config, states, [], time.perf_counter())))
    return before | {"computed": []} if all(before[key] == now[key] for key in ("config", "cells", "front", "recommended")) else None


def same(before: dict[str, Any], found: dict[str, Any]) -> bool:
    """Whether a sweep.json tells what another one told; the ids of MLflow's runs aside, which may come later."""

    def told(sweep: dict[str, Any]) -> Any:
        cells = [{key: value for key, value in row.items() if key != "mlflow_run_id"} for row in sweep["cells"]]
        return json.loads(json.dumps([cells, *(sweep[key] for key in ("config", "front", "recommended"))]))

    return bool(before) and told(before) == told(found)


def objection(found: dict[str, Any]) -> str | None:
    """Why a sweep is not a success, in one line: cells failed, or none can be recommended."""
    wrong = [row for row in found["cells"] if row["status"] != "done"]
    if wrong:
        return (
            f"{len(wrong)} of {len(found['cells'])} cells failed ({wrong[0]['name']}: {wrong[0]['error']}): the same command does what "
            "is missing, once the reasons are gone"
        )
    choice = found["recommended"]
    return None if choice["name"] else f"all cells are complete and none can be recommended ({choice['rule']}: {choice['reason']})"


def happened(found: dict[str, Any]) -> list[str]:
    """In the words of notify.on: a sweep has passed if nothing failed and a cell is recommended."""
    return ["done", "failed" if objection(found) else "passed"]


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """A finished sweep as its hooks get it: the same while nothing changes."""
    return {
        "events": happened(found),
        **{key: found[key] for key in ("id", "mode", "folder", "cells", "front", "recommended", "registry")},
        "mlflow_run": (found["mlflow"] or {}).get("run_id"),
    }


def sweep_id(config: SweepConfig) -> str:
    """Of the sweep in this folder, made with the folder: by it MLflow's run is found again."""
    path = config.folder / "shared" / "id"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, uuid.uuid4().hex[:12].encode())
    return path.read_text()


def read(config: SweepConfig) -> dict[str, Any]:
    """sweep.json as it lies in the folder; {} where there is none."""
    return _read(config.folder / "sweep.json", "the cells stay")


def write(config: SweepConfig, found: dict[str, Any]) -> Path:
    return _write(config.folder / "sweep.json", found)
