"""What lies in the outbox, logged and registered as it would have been at once: `python -m flows track-pending`.

Every entry is tried for itself: a damaged one, or one whose record is gone, is told and stops no other. An entry that MLflow has
already is only cleared. Where a store does not answer, the entries of that store are not tried one by one.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from gptq_core.checkpoint.writer import replace_file
from gptq_core.errors import GPTQError, InputError, one_line
from gptq_core.runtime.lock import hold
from tasks.config.run import TrackingConfig, from_dict
from tasks.outcome import record as records
from tasks.tracking import outbox
from tasks.tracking.mlflow_runs import log_sweep, log_to_mlflow, reachable
from tasks.tracking.outbox import Entry
from tasks.tracking.registry import promote_in_mlflow

Outcome = dict[str, Any]
"""{"entry": file, "kind", "path", "since", "why": None once it is logged, else the reason why it stays, "run_id", "url"}."""


def replay(folder: Path, uri: str | None = None) -> list[Outcome]:
    """Try every entry of an outbox; runs first, since a sweep tells the ids of its cells' runs. uri: of the store, if not as noted.

    Raises OutputHeldError if another replay is at work: it may be making the very run that this one would make.
    """
    if not folder.is_dir():
        return []
    with hold(folder / ".lock", f"outbox {folder}"):
        found, entries = [], []
        away: dict[str, str] = {}
        for file in outbox.files(folder):
            outcome = {"entry": str(file), "kind": None, "path": None, "since": None, "why": None, "run_id": None, "url": None}
            try:
                entries.append((outcome, file.absolute(), outbox.read(file)))
            except InputError as error:
                found.append(outcome | {"why": str(error)})
        for outcome, file, entry in sorted(entries, key=lambda each: (each[2].kind != "run", each[2].since)):
            told = {"kind": entry.kind, "path": entry.path, "since": entry.since}
            found.append(outcome | told | _once(file, entry, uri, away))
        return found


def _once(file: Path, entry: Entry, uri: str | None, away: dict[str, str]) -> Outcome:
    """Log one entry, and remove it once it is logged. away: stores that did not answer, and what they ended with."""
    # relative paths of the record, and of a database, start where the run was started
    try:
        with contextlib.chdir(entry.directory):
            tracking = _tracking(entry, uri)
            store = f"{entry.directory} {tracking.uri}"
            logged = {"error": away[store]} if store in away else (_run if entry.kind == "run" else _sweep)(entry, tracking)
            if logged["error"] and store not in away and not reachable(tracking):
                away[store] = logged["error"]
    # a record of another shape than ours, a folder that is gone or may not be written
    except (GPTQError, OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        logged = {"error": f"{entry.path}: {type(error).__name__}: {one_line(error)}"}
    if logged["error"] is None:
        file.unlink(missing_ok=True)
    return {"why": logged["error"], "run_id": logged.get("run_id"), "url": logged.get("url")}


def _tracking(entry: Entry, uri: str | None) -> TrackingConfig:
    known = TrackingConfig(**entry.tracking)
    if uri is None and ":***@" in known.uri:
        raise InputError(f"{known.uri} had a password, which no file keeps: give the address by --uri env:NAME, and in the config too")
    return known.model_copy(update={"uri": uri}) if uri else known


def _run(entry: Entry, tracking: TrackingConfig) -> Outcome:
    """A run's record, and its registration where that is due."""
    out = Path(entry.path.removesuffix(".run.json"))
    record = records.read(out)
    if record is None:
        raise InputError("the record is gone: remove this entry if that is meant")
    config = from_dict(record["config"] | {"tracking": entry.tracking})
    logged = log_to_mlflow(config, record, tracking)
    record = _note(out, record, {"mlflow": logged})
    verdict = record.get("gate")
    if logged["error"] or not (entry.register and verdict and verdict["passed"] and config.gate and config.gate.register_as):
        return logged
    registered = promote_in_mlflow(config, record, tracking)
    _note(out, record, {"registry": registered})
    return logged | {"error": registered["error"]}


def _note(out: Path, record: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
    """Add to the record on disk, unless it is of other work by now."""
    now = records.read(out)
    if now is None or now["id"] != record["id"]:
        return record | told
    records.write(out, now | told)
    return now | told


def _sweep(entry: Entry, tracking: TrackingConfig) -> Outcome:
    """A sweep.json, with what its cells' records tell by now."""
    path = Path(entry.path)
    if not path.is_file():
        raise InputError("sweep.json is gone: remove this entry if that is meant")
    sweep = json.loads(path.read_text(encoding="utf-8"))
    for row in sweep["cells"]:
        record = records.read(row["out"]) if row["out"] else None
        if record is None:
            continue
        chosen = row["name"] == sweep["recommended"]["name"]
        waits = _error(record["mlflow"] or {"error": "not logged"}) or (chosen and _error(record["registry"]))
        if waits:
            return {"error": f"its cell {row['name']} waits: {waits}"}
        row["mlflow_run_id"] = record["mlflow"]["run_id"]
        if chosen:
            sweep["registry"] = record["registry"]
    sweep["mlflow"] = log_sweep(tracking, sweep)
    replace_file(path, (json.dumps(sweep, indent=2, ensure_ascii=False) + "\n").encode())
    return sweep["mlflow"]


def _error(outcome: dict[str, Any] | None) -> str | None:
    return outcome["error"] if outcome else None
