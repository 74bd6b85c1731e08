"""Report the progress of a run: bars on a terminal, plain lines elsewhere, Prefect's logger where the command line is not used.

Prefect can pass only values to a flow that it can store, so a context variable holds the reporter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from tasks.progress import Advance

if TYPE_CHECKING:
    from rich.console import Console


class Reporter:
    """Reporter that writes to Prefect's run logger; base of the two reporters of the command line."""

    def note(self, text: str) -> None:
        from prefect import get_run_logger

        get_run_logger().info(text)

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """A stage of the run; yields the callback for its progress."""

        def advance(done: int, text: str = "") -> None:
            if text:
                self.note(text)

        started = time.perf_counter()
        yield advance
        self.note(f"{name}: {time.perf_counter() - started:.1f} s")


class Lines(Reporter):
    """Plain lines, for files and pipes."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.write = write

    def note(self, text: str) -> None:
        self.write(text)


class Bars(Lines):
    """One bar a stage, on a terminal."""

    def __init__(self, console: Console) -> None:
        super().__init__(lambda text: console.print(text, highlight=False, markup=False))
        self.console = console

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = [SpinnerColumn(), TextColumn("{task.description:<22}"), BarColumn(bar_width=32)]
        columns += [MofNCompleteColumn()] if total else []
        columns += [TimeElapsedColumn(), TextColumn("{task.fields[text]}", markup=False)]
        with Progress(*columns, console=self.console) as progress:
            bar = progress.add_task(name, total=total, text="")

            def advance(done: int, text: str = "") -> None:
                progress.update(bar, completed=done, text=text)

            yield advance
            if total is None:
                progress.update(bar, total=1, completed=1)


_watching: ContextVar[Reporter | None] = ContextVar("watching", default=None)


def reporter() -> Reporter:
    """The reporter of this run; Prefect's logger by default."""
    return _watching.get() or Reporter()


@contextmanager
def watched_by(watcher: Reporter) -> Iterator[None]:
    """Make `watcher` the reporter of what runs inside."""
    token = _watching.set(watcher)
    try:
        yield
    finally:
        _watching.reset(token)
