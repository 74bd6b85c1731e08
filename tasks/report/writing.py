"""Write the report at the end of a run or a sweep: if it cannot be drawn, that is a note and never a failure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gptq_core.errors import one_line

if TYPE_CHECKING:
    from tasks.outcome.record import RunRecord, SweepRecord
    from tasks.report.parts import Page
    from tasks.run import Reporter


def written(record: RunRecord | SweepRecord, report: Reporter) -> Path | None:
    """The report of a finished run or sweep, in its place; None, and a note, where it cannot be drawn or written."""
    from jinja2 import TemplateError

    from tasks.outcome.record import RunRecord
    from tasks.report.find import run_report, sweep_report

    try:
        path = run_report(record.out) if isinstance(record, RunRecord) else sweep_report(record.folder)
        return write(path, page_of(record))
    # a full disk, a number that plotly does not take, a bug in a figure: none is worth a run of hours
    except (OSError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError, ImportError, TemplateError) as error:
        report.note(f"no report: {type(error).__name__}: {one_line(error)}; `python -m flows report` tries again")
        return None


def page_of(record: RunRecord | SweepRecord) -> Page:
    """The report of a run or a sweep; plotly is imported no sooner."""
    from tasks.outcome.record import RunRecord
    from tasks.report import run, sweep

    return run.page(record) if isinstance(record, RunRecord) else sweep.page(record)


def write(path: Path, page: Page) -> Path:
    """Write a page; jinja2 and plotly are imported no sooner."""
    from tasks.report import page as pages

    return pages.write(path, page)
