"""The cells of a sweep between config and result: what is done, what they share, and the jobs that are missing.

Shared by content key are the token windows, the digests of the model's shards and the original's log-probabilities. The first block's
inputs are not stored for exact cells: making them is one per cent of a cell's time (0.04 s of 4.4 s on the embedded model), and a
file of them would be read for as long. In a screening they are made once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptq_core.checkpoint.writer import replace_file
from gptq_core.errors import GPTQError, InputError, OutputHeldError
from gptq_core.runtime.lock import hold
from tasks.config.run import RunConfig
from tasks.config.sweep import Cell, SweepConfig
from tasks.outcome import record as records
from tasks.outcome.gate import judge
from tasks.request.capacity import fits
from tasks.request.request import Request, Requests
from tasks.run import evaluated
from tasks.sweep.workers import Outcome


@dataclass(frozen=True)
class State:
    """A cell as it stands: done (record), missing, or invalid or held (error)."""

    cell: Cell
    status: str
    error: str | None = None
    record: dict[str, Any] | None = None
    """A run record; of a screened cell its figures."""
    key: str | None = None
    opened: Request | None = None
    """Its request; None where its config is invalid."""

    @property
    def request(self) -> Request:
        assert self.opened is not None
        return self.opened

    @property
    def config(self) -> RunConfig:
        return self.request.config


# -- what is done ---------------------------------------------------------------------------------------------------------


def examine(config: SweepConfig) -> list[State]:
    """Every cell: is it valid, and is it done. Reads the texts once for all that share them; computes nothing."""
    requests, screened = Requests.current(), _screened(config) if config.mode == "screening" else {}
    found = []
    for cell in config.expanded():
        if cell.config is None:
            found.append(State(cell, "invalid", cell.error))
            continue
        state = State(cell, "missing", opened=requests.of(cell.config))
        found.append(_examine_exact(state) if config.mode == "exact" else _examine_screening(state, screened))
    return found


def _examine_exact(state: State) -> State:
    """A cell as it stands on disk now."""
    config, request = state.config, state.request
    try:
        texts = request.texts
        with request:
            key, finished = request.job.key, request.job.finished
        if not finished:
            fits(config, request.foreseen)
            request.measures.check(texts.calibration)
        record = records.read(config.out)
    except OutputHeldError as error:
        return replace(state, status="held", error=str(error))
    except InputError as error:
        return replace(state, status="invalid", error=str(error))
    except (GPTQError, OSError, ValueError) as error:  # a damaged manifest or record, a folder that cannot be read
        return replace(state, status="failed", error=f"{config.out}: {type(error).__name__}: {error}")
    if finished and record and record.get("key") == key and evaluated(record, request):
        record |= {"gate": judge(config.gate, record) if config.gate else None}
        return replace(state, status="done", record=record, key=key)
    return replace(state, status="missing", key=key)


def _examine_screening(state: State, screened: dict[str, Any]) -> State:
    config, request = state.config.quantization, state.request
    try:
        heldout = request.texts.evaluation.digest
        if config.allocate:
            raise InputError("quantization.allocate: widths are chosen for a run of its own; set mode: exact")
        request.model.select(config)  # refuses what this model cannot be quantized to
        key = hashlib.sha256(f"{request.key} {heldout}".encode()).hexdigest()
    except InputError as error:
        return replace(state, status="invalid", error=str(error))
    record = screened.get(key)
    return replace(state, status="done" if record else "missing", record=record, key=key)


def _screened(config: SweepConfig) -> dict[str, Any]:
    return _read(config.folder / "screening.json", "its cells are screened again")


@contextmanager
def alone(config: SweepConfig) -> Iterator[None]:
    """Hold the sweep's folder. Raises OutputHeldError if another process sweeps there."""
    shared = config.folder / "shared"
    with hold(shared / "lock", f"dir = {str(config.folder)!r}"):
        for draft in shared.glob(".*-original-*.npy"):  # of a sweep that was killed
            draft.unlink()
        yield


def keep_screened(config: SweepConfig, found: dict[str, dict[str, Any]]) -> None:
    """Add figures by content key to those that the folder holds."""
    _write(config.folder / "screening.json", _screened(config) | found)


# -- what came out --------------------------------------------------------------------------------------------------------


def after(state: State, outcome: Outcome) -> State:
    """A cell after its job: what lies on disk decides; the outcome says why nothing lies there."""
    found = _examine_exact(state) if outcome["status"] != "held" else state
    if found.status == "done":
        return found
    status = outcome["status"] if outcome["status"] != "done" else "failed"
    record = records.read(state.config.out) or {}
    error = outcome["error"] or record.get("evaluation_error") or "ended without a result"
    return replace(found, status=status, error=error)


def _read(path: Path, without: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise InputError(f"{path} cannot be read ({error}): remove it; {without}") from error


def _write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
    return path
