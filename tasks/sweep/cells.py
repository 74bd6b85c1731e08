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

from pydantic import TypeAdapter, ValidationError

from gptq_core.checkpoint.writer import replace_file
from gptq_core.errors import GPTQError, InputError, OutputHeldError
from gptq_core.runtime.lock import hold
from tasks.config.run import RunConfig
from tasks.config.sweep import Cell, SweepConfig
from tasks.outcome import record as records
from tasks.outcome.gate import judge
from tasks.outcome.job import Outcome
from tasks.outcome.parts import Quality, Screened, Sizes
from tasks.outcome.record import RunRecord, damage
from tasks.request.capacity import fits
from tasks.request.request import Request, Requests
from tasks.run import evaluated


@dataclass(frozen=True)
class State:
    """A cell as it stands: done (record), missing, or invalid or held (error)."""

    cell: Cell
    status: str
    error: str | None = None
    record: RunRecord | None = None
    screened: Screened | None = None
    """In place of a record, where cells are screened."""
    key: str | None = None
    opened: Request | None = None
    """Its request; None where its config is invalid."""

    @property
    def numbers(self) -> tuple[Quality, Sizes, float | None] | None:
        """Quality, sizes and seconds of a cell that is done."""
        if self.screened:
            return self.screened, self.screened, self.screened.seconds
        if self.record and self.record.evaluation:
            return self.record.evaluation, self.record.assembly, self.record.seconds
        return None

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
    if finished and record and record.key == key and evaluated(record, request):
        record.gate = judge(config.gate, record.evaluation, record.assembly) if config.gate else None
        return replace(state, status="done", record=record, key=key)
    return replace(state, status="missing", key=key)


def _examine_screening(state: State, screened: dict[str, Screened]) -> State:
    config, request = state.config.quantization, state.request
    try:
        heldout = request.texts.evaluation.digest
        if config.allocate:
            raise InputError("quantization.allocate: widths are chosen for a run of its own; set mode: exact")
        request.model.select(config)  # refuses what this model cannot be quantized to
        key = hashlib.sha256(f"{request.key} {heldout}".encode()).hexdigest()
    except InputError as error:
        return replace(state, status="invalid", error=str(error))
    return replace(state, status="done" if key in screened else "missing", screened=screened.get(key), key=key)


SCREENED = TypeAdapter(dict[str, Screened])


def _screened(config: SweepConfig) -> dict[str, Screened]:
    """The figures that the folder holds, by content key."""
    path = config.folder / "screening.json"
    try:
        return SCREENED.validate_python(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        why = damage(error) if isinstance(error, ValidationError) else error
        raise InputError(f"{path} cannot be read ({why}): remove it; its cells are screened again") from error


@contextmanager
def alone(config: SweepConfig) -> Iterator[None]:
    """Hold the sweep's folder. Raises OutputHeldError if another process sweeps there."""
    shared = config.folder / "shared"
    with hold(shared / "lock", f"dir = {str(config.folder)!r}"):
        for draft in shared.glob(".*-original-*.npy"):  # of a sweep that was killed
            draft.unlink()
        yield


def keep_screened(config: SweepConfig, found: dict[str, Screened]) -> None:
    """Add figures by content key to those that the folder holds."""
    path = config.folder / "screening.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    values = SCREENED.dump_python(_screened(config) | found, mode="json")
    replace_file(path, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


# -- what came out --------------------------------------------------------------------------------------------------------


def after(state: State, outcome: Outcome) -> State:
    """A cell after its job: what lies on disk decides; the outcome says why nothing lies there."""
    found = _examine_exact(state) if outcome.status != "held" else state
    if found.status == "done":
        return found
    record = records.read(state.config.out)
    error = outcome.error or (record and record.evaluation_error) or "ended without a result"
    return replace(found, status="failed" if outcome.done else outcome.status, error=error)
