"""The outbox: a small file for every record that MLflow did not take, until tasks.tracking.replay has logged it. No MLflow here.

A file names the record and holds nothing of its content; an address in it has stars for its password.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from gptq_core.checkpoint.writer import replace_file
from gptq_core.errors import InputError, one_line
from tasks.config.run import TrackingConfig, without_password
from tasks.outcome.parts import MlflowLink, Registration


@dataclass(frozen=True)
class Entry:
    kind: str
    """run: `path` is a run record; sweep: a sweep.json."""
    path: str
    directory: str
    """Working directory of the run: relative paths of the record start there, also that of a database."""
    since: str
    why: str
    """What the last try ended with, in one line."""
    tracking: dict[str, Any]
    """The run's section of that name, as dumps have it."""
    register: bool = False
    """Whether the checkpoint is still to be registered, as its record's gate says."""


def put(tracking: TrackingConfig, kind: str, path: str | Path, why: str, register: bool = False) -> str | None:
    """Keep `path` for later, with the reason of the last try. One line where the folder cannot be written, else None."""
    file = place(tracking, path)
    try:
        before = read(file) if file.is_file() else None
    except InputError:
        before = None  # damaged: replaced by a whole one
    entry = Entry(
        kind,
        os.path.abspath(path),
        os.getcwd(),
        before.since if before else _now(),
        without_password(why),
        tracking.model_dump(mode="json"),
        register or bool(before and before.register),
    )
    try:
        write(file, entry)
    except OSError as error:
        return f"tracking.outbox = {tracking.outbox!r} cannot be written ({error.strerror}), so track-pending will not know of it"
    return None


def clear(tracking: TrackingConfig, path: str | Path) -> None:
    """MLflow has it."""
    place(tracking, path).unlink(missing_ok=True)


L = TypeVar("L", MlflowLink, Registration)


def update(tracking: TrackingConfig, kind: str, path: str | Path, link: L, register: bool = False) -> L:
    """Clear the entry of `path`, or keep one if the link has an `error`; the link, whose error also says where that failed."""
    if link.error is None:
        clear(tracking, path)
    elif lost := put(tracking, kind, path, link.error, register):
        return link.model_copy(update={"error": f"{link.error}; {lost}"})
    return link


def place(tracking: TrackingConfig, path: str | Path) -> Path:
    """The file of a record: its name, and a digest of where it lies."""
    path = Path(os.path.abspath(path))
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:12]
    return Path(tracking.outbox).expanduser() / f"{path.name.removesuffix('.json')[:100]}-{digest}.json"


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.json") if path.is_file())


def read(file: Path) -> Entry:
    """InputError: it is no entry."""
    try:
        entry = Entry(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"outbox entry {file} cannot be read ({one_line(error, 200)}): remove it, and run the command of its record again"
        ) from error
    if entry.kind not in ("run", "sweep") or not isinstance(entry.path, str) or not isinstance(entry.tracking, dict):
        raise InputError(f"outbox entry {file} is damaged (kind {entry.kind!r}): remove it, and run the command of its record again")
    return entry


def write(file: Path, entry: Entry) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, (json.dumps(asdict(entry), indent=2, ensure_ascii=False) + "\n").encode())


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
