"""Log and register what lies in the outbox, as it would have been at once: `python -m flows track-pending`.

Every entry is tried by itself: a damaged one, or one whose record is gone, is reported and stops no other. An entry that MLflow has
already is only cleared. If a store does not answer, the other entries of that store are not tried.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

from gptq_core.errors import GPTQError, InputError, one_line
from gptq_core.runtime.lock import hold
from tasks.config.run import TrackingConfig, from_dict
from tasks.outcome import record as records
from tasks.outcome.parts import MlflowLink, Registration
from tasks.outcome.record import RunRecord
from tasks.tracking import outbox
from tasks.tracking.mlflow_runs import log_sweep, log_to_mlflow, reachable
from tasks.tracking.outbox import Entry
from tasks.tracking.registry import promote_in_mlflow


@dataclass(frozen=True)
class Replayed:
    """What came of an entry."""

    entry: str
    """Its file."""
    kind: str | None = None
    path: str | None = None
    since: str | None = None
    why: str | None = None
    """Why the entry stays; None: it is logged."""
    run_id: str | None = None
    url: str | None = None


def replay(folder: Path, uri: str | None = None) -> list[Replayed]:
    """Try every entry of an outbox; runs first, since a sweep names the runs of its cells. uri: of the store, if not as noted."""
    if not folder.is_dir():
        return []
    with hold(folder / ".lock", f"outbox {folder}"):
        found, entries = [], []
        away: dict[str, str] = {}
        for file in outbox.files(folder):
            try:
                entries.append((file, outbox.read(file)))
            except InputError as error:
                found.append(Replayed(str(file), why=str(error)))
        for file, entry in sorted(entries, key=lambda each: (each[1].kind != "run", each[1].since)):
            tried = Replayed(str(file), entry.kind, entry.path, entry.since)
            link = _once(file.absolute(), entry, uri, away)
            found.append(replace(tried, why=link.error, run_id=link.run_id, url=link.url))
        return found


def _once(file: Path, entry: Entry, uri: str | None, away: dict[str, str]) -> MlflowLink:
    """Log one entry, and remove it once it is logged. away: stores that did not answer, and their errors."""
    # relative paths of the record, and of a database, start where the run was started
    try:
        with contextlib.chdir(entry.directory):
            tracking = _tracking(entry, uri)
            store = f"{entry.directory} {tracking.uri}"
            link = MlflowLink(error=away[store]) if store in away else (_run if entry.kind == "run" else _sweep)(entry, tracking)
            if link.error and store not in away and not reachable(tracking):
                away[store] = link.error
    # a damaged record, a folder that is gone or may not be written
    except (GPTQError, OSError, ValueError) as error:
        link = MlflowLink(error=f"{entry.path}: {type(error).__name__}: {one_line(error)}")
    if link.error is None:
        file.unlink(missing_ok=True)
    return link


def _tracking(entry: Entry, uri: str | None) -> TrackingConfig:
    known = TrackingConfig(**entry.tracking)
    if uri is None and ":***@" in known.uri:
        raise InputError(f"{known.uri} had a password, which no file keeps: give the address by --uri env:NAME, and in the config too")
    return known.model_copy(update={"uri": uri}) if uri else known


def _run(entry: Entry, tracking: TrackingConfig) -> MlflowLink:
    """Log a run's record, and register the checkpoint where that is due."""
    out = Path(entry.path.removesuffix(".run.json"))
    record = records.read(out)
    if record is None:
        raise InputError("the record is gone: remove this entry if that is meant")
    config = from_dict(record.config | {"tracking": entry.tracking})
    link = log_to_mlflow(config, record, tracking)
    record = _write(out, record, link=link)
    passed = record.gate and record.gate.passed
    if link.error or not (entry.register and passed and config.gate and config.gate.register_as):
        return link
    registration = promote_in_mlflow(config, record, tracking)
    _write(out, record, registration=registration)
    return link.model_copy(update={"error": registration.error})


def _write(out: Path, record: RunRecord, link: MlflowLink | None = None, registration: Registration | None = None) -> RunRecord:
    """Set the link or the registration in the record on disk, unless that is of other work by now; the record with it."""
    now = records.read(out)
    target = now if now and now.id == record.id else record
    target.mlflow, target.registry = link or target.mlflow, registration or target.registry
    if target is now:
        records.write(out, target)
    return target


def _sweep(entry: Entry, tracking: TrackingConfig) -> MlflowLink:
    """Log a sweep, with what the records of its cells say by now."""
    sweep = records.read_sweep(Path(entry.path).parent)
    if sweep is None:
        raise InputError("sweep.json is gone: remove this entry if that is meant")
    cells = []
    for cell in sweep.cells:
        record = records.read(cell.out) if cell.out else None
        if record is not None:
            waits = _waits(record, chosen=cell == sweep.chosen)
            if waits:
                return MlflowLink(error=f"its cell {cell.name} waits: {waits}")
            if cell == sweep.chosen:
                sweep.registry = record.registry
            cell = cell.model_copy(update={"mlflow_run_id": record.mlflow and record.mlflow.run_id})
        cells.append(cell)
    sweep.cells = cells
    sweep.mlflow = log_sweep(tracking, sweep)
    records.write_sweep(Path(entry.path).parent, sweep)
    return sweep.mlflow


def _waits(record: RunRecord, chosen: bool) -> str | None:
    """Why MLflow does not have a cell yet, or the registry the chosen one."""
    if record.mlflow is None:
        return "not logged"
    return record.mlflow.error or (record.registry.error if chosen and record.registry else None)
