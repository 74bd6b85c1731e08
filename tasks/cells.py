"""The cells of a sweep between config and result: what is done, what they share, and the jobs that are missing.

Shared by content key are the token windows, the digests of the model's shards and the original's log-probabilities. The first block's
inputs are not stored for exact cells: making them is one per cent of a cell's time (0.04 s of 4.4 s on the embedded model), and a
file of them would be read for as long. In a screening they are made once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptq_core.checkpoint import reader
from gptq_core.checkpoint.writer import replace_file
from gptq_core.errors import GPTQError, InputError, OutputHeldError
from gptq_core.inference.evaluation import original_bytes
from gptq_core.search import allocation
from tasks import record as records
from tasks.choose import front, recommend
from tasks.config import RunConfig
from tasks.data import overlap_record, save
from tasks.fields import model_name
from tasks.gate import judge, measured
from tasks.measuring import check_measures
from tasks.prepare import Prepared, available_memory, existing, fits, foresee, open_quantization, prepare
from tasks.run import evaluated
from tasks.supervise import Outcome
from tasks.sweep import Cell, SweepConfig, cores, devices_of
from tasks.worker import Job

STORED_ORIGINAL = 4_000_000_000
"""Bytes of the original's log-probabilities that are kept on disk for the cells. Beyond that every cell runs the original itself."""


@dataclass(frozen=True)
class State:
    """A cell as it stands: done (record), missing, or invalid or held (error)."""

    cell: Cell
    status: str
    error: str | None = None
    record: dict[str, Any] | None = None
    """A run record; of a screened cell its figures."""
    key: str | None = None

    @property
    def config(self) -> RunConfig:
        assert self.cell.config is not None
        return self.cell.config


# -- what is done ---------------------------------------------------------------------------------------------------------


def examine(config: SweepConfig) -> list[State]:
    """Every cell: is it valid, and is it done. Reads the texts once for all that share them; computes nothing."""
    screened = _screened(config) if config.mode == "screening" else {}
    return [examine_cell(cell) if config.mode == "exact" else _examine_screening(cell, screened) for cell in config.expanded()]


def examine_cell(cell: Cell) -> State:
    """A cell of an exact sweep, looked at on disk."""
    if cell.config is None:
        return State(cell, "invalid", cell.error)
    try:
        prepared = prepare(cell.config)
        with open_quantization(cell.config, prepared.calibration) as job:
            key, finished = job.key, job.finished
        if not finished:
            fits(cell.config)
            check_measures(cell.config, prepared.calibration)
        record = records.read(cell.config.out)
    except OutputHeldError as error:
        return State(cell, "held", str(error))
    except InputError as error:
        return State(cell, "invalid", str(error))
    except (GPTQError, OSError, ValueError) as error:  # a damaged manifest or record, a folder that cannot be read
        return State(cell, "failed", f"{cell.config.out}: {type(error).__name__}: {error}")
    if finished and record and record.get("key") == key and evaluated(record, cell.config, prepared.evaluation.digest):
        return State(cell, "done", record=record | {"gate": judge(cell.config.gate, record) if cell.config.gate else None}, key=key)
    return State(cell, "missing", key=key)


def _examine_screening(cell: Cell, screened: dict[str, Any]) -> State:
    if cell.config is None:
        return State(cell, "invalid", cell.error)
    try:
        prepared, model = prepare(cell.config), cell.config.model
        if cell.config.quantization.allocate:
            raise InputError("quantization.allocate: widths are chosen for a run of its own; set mode: exact")
        key = allocation.key(
            model.path, cell.config.quantization, prepared.calibration, device=model.device, dtype=model.dtype, revision=model.revision
        )
    except InputError as error:
        return State(cell, "invalid", str(error))
    key = hashlib.sha256(f"{key} {prepared.evaluation.digest}".encode()).hexdigest()
    return State(cell, "done", record=screened[key], key=key) if key in screened else State(cell, "missing", key=key)


def _screened(config: SweepConfig) -> dict[str, Any]:
    return _read(config.folder / "screening.json", "its cells are screened again")


@contextmanager
def alone(config: SweepConfig) -> Iterator[None]:
    """Hold the sweep's folder. OutputHeldError: another process sweeps there."""
    path = config.folder / "shared" / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputHeldError(f"dir = {str(config.folder)!r} is held by another sweep; wait for it or choose another folder") from error
        for draft in path.parent.glob(".*-original-*.npy"):  # of a sweep that was killed
            draft.unlink()
        yield


def keep_screened(config: SweepConfig, found: dict[str, dict[str, Any]]) -> None:
    """Add figures by content key to those that the folder holds."""
    _write(config.folder / "screening.json", _screened(config) | found)


# -- what is missing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Places:
    """Where cells run: `slots` of them at a time on each device, with `threads` each."""

    devices: list[str]
    slots: int
    at_once: int
    threads: int


def places(config: SweepConfig, missing: list[State]) -> Places:
    """As many cells at a time as max_parallel, the cores, and the planned memory of the largest cell allow; one at least."""
    devices = devices_of(config)
    needed = max(_needs(state.config, devices) for state in missing)
    free = _free(devices)
    slots = len(missing) if free is None else max(1, int(free // needed))
    wanted = config.max_parallel or (cores() if devices == ["cpu"] else len(missing))
    slots = min(slots, -(-min(wanted, len(missing)) // len(devices)))
    used = min(len(devices) * slots, wanted)
    return Places(devices[:used], slots, used, config.threads or max(1, cores() // used))


def _needs(config: RunConfig, devices: list[str]) -> int:
    estimate = foresee(config).estimate
    return max(1, estimate.host_bytes if devices == ["cpu"] else estimate.device_bytes)


def _free(devices: list[str]) -> int | None:
    """Memory that the cells of one device may use, in bytes; None where the system does not tell."""
    if devices == ["cpu"]:
        return available_memory()
    import torch

    return min(torch.cuda.mem_get_info(int(device))[0] for device in devices)


def jobs(config: SweepConfig, missing: list[State], threads: int, originals: dict[str, str]) -> dict[str, Job]:
    """A job for each missing cell of an exact sweep, by the cell's name."""
    common = {"kind": "run", "threads": threads, "memory_gb": config.limits.memory_gb, "known_sha256": dict(reader.known_sha256)}
    found = {}
    for state in missing:
        prepared, folder = prepare(state.config), records.beside(state.config.out, ".work")
        data = {
            "calibration": save(prepared.calibration, folder, "calibration"),
            "evaluation": save(prepared.evaluation, folder, "evaluation"),
            "overlap": overlap_record(prepared),
            "notes": list(prepared.notes),
            "seconds": 0.0,
        }
        found[state.cell.name] = common | {
            "config": state.config.model_dump(mode="json"),
            "data": data,
            "original": originals.get(_original_key(state.config, prepared)),
        }
    return found


def screening_jobs(config: SweepConfig, missing: list[State], threads: int) -> list[Job]:
    """A job for all missing cells that share model and texts."""
    found: dict[str, Job] = {}
    for state in missing:
        prepared, model = prepare(state.config), state.config.model
        digests = [prepared.calibration.digest, prepared.evaluation.digest]
        job = found.setdefault(
            json.dumps([model.model_dump(), digests]),
            {
                "kind": "screening",
                "threads": threads,
                "memory_gb": config.limits.memory_gb,
                "model": model.model_dump(),
                "cells": {},
                "known_sha256": dict(reader.known_sha256),
                "calibration": save(prepared.calibration, config.folder / "shared", "calibration"),
                "evaluation": save(prepared.evaluation, config.folder / "shared", "evaluation"),
            },
        )
        job["cells"][state.key] = state.config.quantization.model_dump(mode="json")
    return list(found.values())


def original_jobs(config: SweepConfig, missing: list[State], threads: int) -> tuple[dict[str, Job], dict[str, str]]:
    """Jobs that run an original once for several cells, and the files of those that are stored already; both by content key."""
    wanted: dict[str, list[State]] = {}
    for state in missing:
        wanted.setdefault(_original_key(state.config, prepare(state.config)), []).append(state)
    found, stored = {}, {}
    for key, states in wanted.items():
        model, windows = states[0].config.model, prepare(states[0].config).evaluation
        file = config.folder / "shared" / f"original-{key[:20]}.npy"
        size = original_bytes(model.path, windows, model.revision)
        if file.is_file():
            stored[key] = str(file)
        elif len(states) > 1 and size <= min(STORED_ORIGINAL, shutil.disk_usage(existing(config.folder)).free // 2):
            found[key] = {
                "kind": "original",
                "threads": threads,
                "memory_gb": config.limits.memory_gb,
                "model": model.path,
                "revision": model.revision,
                "device": model.device,
                "file": str(file),
                "windows": save(windows, file.parent, "evaluation")["file"],
                "config": states[0].config.model_dump(mode="json") if states[0].config.evaluation.measures else None,
            }
    return found, stored


def _original_key(config: RunConfig, prepared: Prepared) -> str:
    """sha256 of what decides the original's log-probabilities: its weights, the windows, device and library."""
    import torch
    import transformers

    from gptq_core.model.architecture import choose_device

    model = reader.Checkpoint(reader.resolve(config.model.path, config.model.revision)).digest()
    what = [model, prepared.evaluation.digest, choose_device(config.model.device).type, torch.__version__, transformers.__version__]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


# -- what came out --------------------------------------------------------------------------------------------------------


def after(state: State, outcome: Outcome) -> State:
    """A cell after its job: what lies on disk decides, and the outcome tells why nothing does."""
    found = examine_cell(state.cell) if outcome["status"] != "held" else state
    if found.status == "done":
        return found
    status = outcome["status"] if outcome["status"] != "done" else "failed"
    record = records.read(state.config.out) or {}
    error = outcome["error"] or record.get("evaluation_error") or "ended without a result"
    return replace(found, status=status, error=error)


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
    found["judged_on"] = f"{model.path}@{model.revision or ''} {prepare(state.config).evaluation.digest[:12]}"
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


def _read(path: Path, without: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise InputError(f"{path} cannot be read ({error}): remove it; {without}") from error


def write(config: SweepConfig, found: dict[str, Any]) -> Path:
    return _write(config.folder / "sweep.json", found)


def _write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
    return path
