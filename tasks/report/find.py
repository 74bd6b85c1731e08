"""What a report is of: a run by its checkpoint or its record, a sweep by its folder or its sweep.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gptq_core.errors import InputError
from tasks.outcome import record as records

RUN_ENDING, SWEEP = ".run.json", "sweep.json"


@dataclass(frozen=True)
class Found:
    kind: Literal["run", "sweep"]
    content: dict[str, Any]
    """The run record, or sweep.json."""
    report: Path
    """Where its report belongs."""


def find(name: str | Path) -> Found:
    """InputError: nothing of a run or a sweep is there, or it cannot be read."""
    path = Path(name).expanduser()
    if path.is_file():
        if path.name.endswith(RUN_ENDING):
            path = path.with_name(path.name.removesuffix(RUN_ENDING))
        elif path.name == SWEEP:
            path = path.parent
        else:
            raise InputError(f"{path} is no record: give a checkpoint folder, its {RUN_ENDING} file, or the folder of a sweep")
    if (path / SWEEP).is_file():
        return Found("sweep", _sweep(path / SWEEP), sweep_report(path))
    record = records.read(path)
    if record is None:
        raise InputError(
            f"{path} is no run and no sweep: neither {records.record_path(path)} nor {path / SWEEP} is there; give what "
            "`quantize` or `sweep` wrote"
        )
    if not isinstance(record.get("config"), dict):
        raise InputError(f"run record {records.record_path(path)} has no config: it is not one that `quantize` wrote")
    return Found("run", record, run_report(path))


def run_report(out: str | Path) -> Path:
    """Where the report of the checkpoint `out` lies: beside it, as its record."""
    return records.beside(out, ".report.html")


def sweep_report(folder: str | Path) -> Path:
    return Path(folder) / "report.html"


def _sweep(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): the same sweep command writes it anew") from error
    if not isinstance(found, dict) or not {"cells", "recommended", "front", "measure"} <= found.keys():
        raise InputError(f"{path} is not one that `sweep` wrote: the same sweep command writes it anew")
    return found
