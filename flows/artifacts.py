"""Prefect artifacts of a run. Prefect going away never costs a run: what it does not take is dropped after the first refusal."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, create_table_artifact, update_progress_artifact

from flows import progress


class Board:
    """The progress bar and the results table of one flow run."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lost = False
        self._bar: UUID | None = None

    def progress(self, percent: float, text: str) -> None:
        if self._bar is None:
            self._bar = self._try(create_progress_artifact, percent, key=f"{self.name}-progress", description=text)
        else:
            self._try(update_progress_artifact, self._bar, percent, description=text)

    def table(self, rows: dict[str, Any], text: str) -> None:
        self.lines([{"what": key, "value": value} for key, value in rows.items()], text)

    def lines(self, rows: list[dict[str, Any]], text: str) -> None:
        self._try(create_table_artifact, rows, key=f"{self.name}-results", description=text)

    def _try(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        if self.lost:
            return None
        try:
            return call(*args, **kwargs)
        except httpx.HTTPError as error:
            self.lost = True
            progress.reporter().note(f"Prefect does not answer ({type(error).__name__}): the run goes on and is not shown there")
            return None
