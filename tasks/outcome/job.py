"""Jobs of a sweep's workers, and what comes of them: JSON lines between two processes, which may be on two machines."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from gptq_core.config import QuantizeConfig
from tasks.config.run import ModelConfig, RunConfig
from tasks.outcome.parts import Part, Screened, Texts

Version = Literal[2]
Status = Literal["done", "failed", "invalid", "held", "memory", "time", "ended", "died"]


class _Job(Part):
    schema_version: Version = 2
    threads: int
    memory_gb: float | None = None
    """Limit of the worker's memory; None: no limit."""
    known_sha256: dict[str, str] = Field(default_factory=dict)
    """Digests of model files that the parent has computed, by path and stamp."""


class RunJob(_Job):
    """Compute a cell into its folder."""

    kind: Literal["run"] = "run"
    config: RunConfig
    texts: Texts
    original: str | None
    """File of the original's log-probabilities; None: the cell runs the original itself."""


class OriginalJob(_Job):
    """Run the original once, into a file for several cells."""

    kind: Literal["original"] = "original"
    model: str
    revision: str | None
    device: str
    windows: str
    """File of the held-out windows."""
    file: str
    config: RunConfig | None = None
    """Whose measures are run on the original too; None: none are."""


class ScreeningJob(_Job):
    """Screen all cells that share model and texts."""

    kind: Literal["screening"] = "screening"
    model: ModelConfig
    cells: dict[str, QuantizeConfig]
    """By content key."""
    texts: Texts


Job = RunJob | OriginalJob | ScreeningJob
JOB: TypeAdapter[Job] = TypeAdapter(Annotated[Job, Field(discriminator="kind")])


class Outcome(Part):
    """What came of a job."""

    schema_version: Version = 2
    status: Status
    error: str | None = None
    """Why it is not done, in one line."""
    screened: dict[str, Screened] = Field(default_factory=dict)
    """Of a ScreeningJob, by content key."""
    attempts: int = 1
    seconds: float = 0.0

    @property
    def done(self) -> bool:
        return self.status == "done"


class Event(Part):
    """A line from a worker: how far its job is, or the outcome."""

    event: Literal["ready", "note", "stage", "progress", "outcome"]
    text: str = ""
    pid: int | None = None
    outcome: Outcome | None = None

    def line(self) -> str:
        return self.model_dump_json(exclude_defaults=True) + "\n"


def without_passwords(config: RunConfig) -> RunConfig:
    """The config as files have it: with stars for a password in tracking.uri, which no worker needs."""
    return RunConfig.model_validate(config.model_dump(mode="json"))
