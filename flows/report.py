"""`python -m flows report`, and the report as the last stage of a run. What cannot be drawn costs a note and never the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from flows.launch import outcome

if TYPE_CHECKING:
    from tasks.report.parts import Page
    from tasks.run import Reporter


class ShowFirst(TyperGroup):
    """`report X` is `report show X`: only `compare` needs its name."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["show", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=ShowFirst,
    no_args_is_help=True,
    help="Write the report of a run or a sweep, or of two runs side by side: `report RUN_OR_SWEEP`, `report compare A B`.",
)

Out = Annotated[Path | None, typer.Option(help="File to write. Default: beside what it is of.", show_default=False)]
Open = Annotated[bool, typer.Option("--open", help="Open it in the browser.")]
RunOrSweep = Annotated[Path, typer.Argument(help="Folder of a checkpoint or a sweep, .run.json, or sweep.json.", show_default=False)]
Run = Annotated[Path, typer.Argument(help="Folder of a checkpoint, or its .run.json.", show_default=False)]


@app.command()
def show(run_or_sweep: RunOrSweep, out: Out = None, open_: Open = False) -> None:
    """One HTML file that opens from disk: summary, quality and size, layers, time, what was left, config. The default command."""
    with outcome():
        from gptq_core.errors import InputError
        from tasks.report.find import find

        found = find(run_or_sweep)
        try:
            page = _page(found.kind, found.content)
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            raise InputError(
                f"the record of {run_or_sweep} is damaged ({type(error).__name__}: {error}): the same command that made it writes it anew"
            ) from error
        _finish(page, out or found.report, open_)


@app.command()
def compare(a: Run, b: Run, out: Out = None, open_: Open = False) -> None:
    """Two runs side by side: numbers, config, error by layer. KL is compared only on the same held-out text."""
    with outcome():
        from gptq_core.errors import InputError
        from tasks.report import compare as comparison
        from tasks.report.find import find

        found = [find(a), find(b)]
        for name, one in zip((a, b), found, strict=True):
            if one.kind == "sweep":
                raise InputError(f"{name} is a sweep: compare two runs, such as two of its cells")
        first, second = (one.report.name.removesuffix(".report.html") for one in found)
        beside = found[0].report.with_name(f"{first}-and-{second}.report.html")
        _finish(comparison.page(found[0].content, found[1].content), out or beside, open_)


def written(kind: str, content: dict[str, Any], report: Reporter) -> Path | None:
    """The report of a finished run or sweep, in its place; None, and a note, where it cannot be drawn or written."""
    from jinja2 import TemplateError

    from tasks.report.find import run_report, sweep_report

    try:
        path = run_report(content["out"]) if kind == "run" else sweep_report(content["folder"])
        return _write(path, _page(kind, content))
    # a disk that is full, a record that lacks what it should hold, a number that plotly does not take
    except (OSError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError, ImportError, TemplateError) as error:
        report.note(f"no report: {type(error).__name__}: {' '.join(str(error).split())[:300]}; `python -m flows report` tries again")
        return None


def _page(kind: str, content: dict[str, Any]) -> Page:
    from tasks.report import run, sweep

    draw: Callable[[dict[str, Any]], Page] = run.page if kind == "run" else sweep.page
    return draw(content)


def _write(path: Path, page: Page) -> Path:
    from tasks.report.page import write

    return write(path, page)


def _finish(page: Page, path: Path, open_: bool) -> None:
    from gptq_core.errors import InputError

    try:
        _write(path, page)
    except OSError as error:
        raise InputError(f"report {path} cannot be written ({error.strerror or error}): give another place with --out FILE") from error
    typer.echo(f"report: {path}")
    if open_:
        import webbrowser

        if not webbrowser.open(path.resolve().as_uri()):
            typer.echo("no browser was found: open the file yourself", err=True)
