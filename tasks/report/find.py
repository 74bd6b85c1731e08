"""Find what a report is about: a run by its checkpoint or its record, a sweep by its folder or its sweep.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gptq_core.errors import InputError
from tasks.outcome import record as records
from tasks.outcome.record import SWEEP, RunRecord, SweepRecord

RUN_ENDING = ".run.json"


@dataclass(frozen=True)
class Found:
    record: RunRecord | SweepRecord
    report: Path
    """Where its report belongs."""


def find(name: str | Path) -> Found:
    """Read the record of a run or a sweep. Raises InputError if none is there or it cannot be read."""
    path = Path(name).expanduser()
    if path.is_file():
        if path.name.endswith(RUN_ENDING):
            path = path.with_name(path.name.removesuffix(RUN_ENDING))
        elif path.name == SWEEP:
            path = path.parent
        else:
            raise InputError(f"{path} is no record: give a checkpoint folder, its {RUN_ENDING} file, or the folder of a sweep")
    if sweep := records.read_sweep(path):
        return Found(sweep, sweep_report(path))
    record = records.read(path)
    if record is None:
        raise InputError(
            f"{path} is no run and no sweep: neither {records.record_path(path)} nor {path / SWEEP} is there; give what "
            "`quantize` or `sweep` wrote"
        )
    return Found(record, run_report(path))


def run_report(out: str | Path) -> Path:
    """Where the report of the checkpoint `out` lies: beside it, as its record."""
    return records.beside(out, ".report.html")


def sweep_report(folder: str | Path) -> Path:
    return Path(folder) / "report.html"
