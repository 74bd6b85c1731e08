"""Publish Prefect artifacts of a run, with a link to its run in MLflow.

If Prefect's server stops answering the run continues: after the first failure no more artifacts are sent.
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
from tasks.outcome.parts import Json, MlflowLink
from tasks.outcome.record import RunRecord, SweepRecord

LATER = "`python -m flows track-pending` logs it later"


def add_prefect_run(record: RunRecord | SweepRecord) -> None:
    """Fill in this flow run, with its page where Prefect's settings have one."""
    name = flow_run.get_id()
    page = url_for("flow-run", obj_id=name) if name else None
    record.prefect_flow_run_id, record.prefect_flow_run_url = name, page and without_password(page)


MOST_BYTES = 300_000
"""Largest picture that is sent: Prefect's database stores it in the text of an artifact."""


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

    def tracked(self, link: MlflowLink) -> None:
        """The link to the run in MLflow."""
        if link.error:
            text = f"Not in MLflow yet ({link.error}); {LATER}."
        elif link.url:
            text = f"[MLflow run {link.run_id}]({link.url})"
        else:
            text = f"MLflow run `{link.run_id}` of experiment `{link.experiment}` in `{link.uri}`"
        self._try(create_markdown_artifact, text, key=f"{self.name}-mlflow", description="the run in MLflow")

    def table(self, rows: Json, text: str) -> None:
        self.lines([{"what": key, "value": value} for key, value in rows.items()], text)

    def lines(self, rows: list[Json], text: str) -> None:
        self._try(create_table_artifact, rows, key=f"{self.name}-results", description=text)

    def figure(self, draw: Callable[[], Any], title: str, report: Path | None) -> None:
        """Publish a matplotlib figure as a picture, if `draw` returns one, and the path of the report."""
        text = [f"# {title}"]
        try:
            drawn = draw()
            if drawn is not None:
                picture = io.BytesIO()
                drawn.savefig(picture, format="png", dpi=90)
                if picture.tell() <= MOST_BYTES:
                    text.append(f"![{title}](data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()})")
        except (ValueError, ArithmeticError) as error:  # values that matplotlib refuses
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
            progress.reporter().note(f"Prefect does not answer ({type(error).__name__}): the run continues without artifacts")
            return None
