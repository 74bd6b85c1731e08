"""The report as the last stage of a run: what cannot be drawn costs a note and never the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptq_core.errors import one_line

if TYPE_CHECKING:
    from tasks.report.parts import Page
    from tasks.run import Reporter


def written(kind: str, content: dict[str, Any], report: Reporter) -> Path | None:
    """The report of a finished run or sweep, in its place; None, and a note, where it cannot be drawn or written."""
    from jinja2 import TemplateError

    from tasks.report.find import run_report, sweep_report

    try:
        path = run_report(content["out"]) if kind == "run" else sweep_report(content["folder"])
        return write(path, page_of(kind, content))
    # a disk that is full, a record that lacks what it should hold, a number that plotly does not take
    except (OSError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError, ImportError, TemplateError) as error:
        report.note(f"no report: {type(error).__name__}: {one_line(error)}; `python -m flows report` tries again")
        return None


def page_of(kind: str, content: dict[str, Any]) -> Page:
    from tasks.report import run, sweep

    draw: Callable[[dict[str, Any]], Page] = run.page if kind == "run" else sweep.page
    return draw(content)


def write(path: Path, page: Page) -> Path:
    """Write a page; jinja2 and plotly are imported no sooner."""
    from tasks.report import page as pages

    return pages.write(path, page)
