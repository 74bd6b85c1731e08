"""Prefect artifacts of a run, and the links between it and its run in MLflow.

Prefect going away never costs a run: what it does not take is dropped after the first refusal.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, create_table_artifact, update_progress_artifact
from prefect.runtime import flow_run
from prefect.utilities.urls import url_for

from flows import progress
from tasks.config.run import without_password

LATER = "`python -m flows track-pending` makes up for it"


def prefect_run() -> dict[str, str | None]:
    """This flow run as records name it, with its page where Prefect's settings tell one."""
    name = flow_run.get_id()
    page = url_for("flow-run", obj_id=name) if name else None
    return {"prefect_flow_run_id": name, "prefect_flow_run_url": page and without_password(page)}


MOST_BYTES = 300_000
"""Of a picture that is stored in Prefect's database, in the text of its artifact."""


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

    def tracked(self, logged: dict[str, Any]) -> None:
        """Where MLflow has the run: the link from here to there."""
        if logged["error"]:
            text = f"Not in MLflow yet ({logged['error']}); {LATER}."
        elif logged["url"]:
            text = f"[MLflow run {logged['run_id']}]({logged['url']})"
        else:
            text = f"MLflow run `{logged['run_id']}` of experiment `{logged['experiment']}` in `{logged['uri']}`"
        self._try(create_markdown_artifact, text, key=f"{self.name}-mlflow", description="the run in MLflow")

    def table(self, rows: dict[str, Any], text: str) -> None:
        self.lines([{"what": key, "value": value} for key, value in rows.items()], text)

    def lines(self, rows: list[dict[str, Any]], text: str) -> None:
        self._try(create_table_artifact, rows, key=f"{self.name}-results", description=text)

    def figure(self, draw: Callable[[], Any], title: str, report: Path | None) -> None:
        """A matplotlib figure as a picture (None: nothing to draw), and where the whole report lies."""
        text = [f"# {title}"]
        try:
            drawn = draw()
            if drawn is not None:
                picture = io.BytesIO()
                drawn.savefig(picture, format="png", dpi=90)
                if picture.tell() <= MOST_BYTES:
                    text.append(f"![{title}](data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()})")
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:  # what a record may lack, and what matplotlib refuses
            progress.reporter().note(f"no picture of the {title}: {type(error).__name__}: {error}")
        text += [f"The whole report: `{report.resolve()}`"] if report else []
        if len(text) > 1:
            self._try(create_markdown_artifact, "\n\n".join(text), key=f"{self.name}-figures", description=title)

    def _try(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        if self.lost:
            return None
        try:
            return call(*args, **kwargs)
        except httpx.HTTPError as error:
            self.lost = True
            progress.reporter().note(f"Prefect does not answer ({type(error).__name__}): the run goes on and is not shown there")
            return None
