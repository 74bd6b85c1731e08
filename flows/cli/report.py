"""`python -m flows report`: the report of a run or a sweep, or of two runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from flows.cli.launch import outcome
from tasks.report.writing import page_of, write

if TYPE_CHECKING:
    from tasks.report.parts import Page


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
        from tasks.report.find import find

        found = find(run_or_sweep)
        _write(page_of(found.record), out or found.report, open_)


@app.command()
def compare(a: Run, b: Run, out: Out = None, open_: Open = False) -> None:
    """Two runs side by side: numbers, config, error by layer. KL is compared only on the same held-out text."""
    with outcome():
        from gptq_core.errors import InputError
        from tasks.outcome.record import RunRecord
        from tasks.report import compare as comparison
        from tasks.report.find import find

        found, runs = [find(a), find(b)], []
        for name, one in zip((a, b), found, strict=True):
            if not isinstance(one.record, RunRecord):
                raise InputError(f"{name} is a sweep: compare two runs, such as two of its cells")
            runs.append(one.record)
        first, second = (one.report.name.removesuffix(".report.html") for one in found)
        beside = found[0].report.with_name(f"{first}-and-{second}.report.html")
        _write(comparison.page(*runs), out or beside, open_)


def _write(page: Page, path: Path, open_: bool) -> None:
    from gptq_core.errors import InputError

    try:
        write(path, page)
    except OSError as error:
        raise InputError(f"report {path} cannot be written ({error.strerror or error}): give another place with --out FILE") from error
    typer.echo(f"report: {path}")
    if open_:
        import webbrowser

        if not webbrowser.open(path.resolve().as_uri()):
            typer.echo("no browser was found: open the file yourself", err=True)
