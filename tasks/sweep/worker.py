"""The process in which a cell of a sweep is computed: `python -m tasks.sweep.worker`, jobs as JSON lines in, events as JSON lines out.

It uses neither Prefect nor MLflow, so the loss of either cannot stop it, and it ends when its parent does: that closes its stdin. One
worker takes one job after another; after a failure it is replaced by a new one, so that no job sees what another one left. stderr is
its log.
"""

from __future__ import annotations

import os
import queue
import re
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from gptq_core.errors import one_line
from tasks.outcome.job import JOB, Event, Job, OriginalJob, Outcome, RunJob, Status
from tasks.outcome.parts import Screened
from tasks.progress import Advance

PARENT_GONE = 70


class EventReporter:
    """Writes to the parent how far a job is; a tasks.run.Reporter."""

    def __init__(self, write: Callable[[Event], None]) -> None:
        self.write = write

    def note(self, text: str) -> None:
        self.write(Event(event="note", text=text))

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        self.write(Event(event="stage", text=name))

        def advance(done: int, text: str = "") -> None:
            if text:
                self.write(Event(event="progress", text=text))

        yield advance


def main() -> None:
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print goes to the log

    def write(event: Event) -> None:
        out.write(event.line())
        out.flush()

    lines = _lines()
    write(Event(event="ready", pid=os.getpid()))
    while True:
        write(Event(event="outcome", outcome=_outcome(_job(lines.get()), EventReporter(write))))


def _lines() -> queue.Queue[str]:
    """Jobs as they come; a thread reads them, so that the end of stdin ends the process in the middle of a computation."""
    found: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            found.put(line)
        os._exit(PARENT_GONE)

    threading.Thread(target=read, daemon=True).start()
    return found


def _job(line: str) -> Job:
    try:
        return JOB.validate_json(line)
    except ValidationError as error:  # in one line: the last of the log is what the parent reports
        raise ValueError(f"job: {error.errors()[0]['msg']}") from None


def _outcome(job: Job, report: EventReporter) -> Outcome:
    """Carry out one job. Errors of a request, a device or a disk come back; a bug ends the worker with its traceback."""
    import torch

    from gptq_core.errors import GPTQError, InputError, OutputHeldError

    try:
        return Outcome(status="done", screened=carry_out(job, report))
    except OutputHeldError as error:
        return _failure("held", error)
    except InputError as error:
        return _failure("invalid", error)
    except (MemoryError, torch.OutOfMemoryError) as error:
        return _failure("memory", error)
    except RuntimeError as error:
        if not re.search("can(no|')t allocate memory", str(error), re.IGNORECASE):  # how torch and safetensors say it for main memory
            raise
        return _failure("memory", error)
    except (GPTQError, OSError) as error:
        return _failure("failed", error)


def _failure(status: Status, error: Exception) -> Outcome:
    return Outcome(status=status, error=f"{type(error).__name__}: {one_line(error, 500)}")


def carry_out(job: Job, report: EventReporter) -> dict[str, Screened]:
    """Do the job; the figures of a ScreeningJob, {} of any other: their results lie on disk."""
    import torch

    from gptq_core import screen
    from gptq_core.checkpoint import reader
    from gptq_core.data.windows import Windows
    from gptq_core.inference.evaluation import store_original
    from gptq_core.model.opened import open_model
    from tasks.evaluation.scores import Measures
    from tasks.outcome.load import Sampler
    from tasks.outcome.machine import reset_peak_memory
    from tasks.request.request import Request, Requests
    from tasks.request.texts import RunTexts
    from tasks.run import Steps, compute

    # after all imports: the limit is for the work
    reset_peak_memory()
    torch.set_num_threads(job.threads)
    reader.known_sha256.update(job.known_sha256)
    if isinstance(job, RunJob):
        with Sampler() as sampler:  # before the limit: Python waits without end for a thread that has no memory to come up
            _limit_memory(job)
            request = Request(job.config, Requests(), RunTexts.load(job.texts))
            compute(request, report, steps=Steps.plain(), original=job.original, sampler=sampler)
        return {}
    _limit_memory(job)
    if isinstance(job, OriginalJob):
        model = open_model(job.model, job.revision)
        store_original(model, Windows.load(job.windows), Path(job.file), device=job.device)
        if job.config:
            Measures(job.config, model).score_original()
        return {}
    texts = RunTexts.load(job.texts)
    with report.stage("screen blocks") as tick:
        found = screen(
            job.model.path,
            job.cells,
            texts.calibration,
            texts.evaluation,
            revision=job.model.revision,
            device=job.model.device,
            dtype=job.model.dtype,
            on_block=lambda done, total: tick(done, f"block {done}/{total} of {len(job.cells)} cells"),
        )
    return {key: Screened.model_validate(screened.record()) for key, screened in found.items()}


def _limit_memory(job: Job) -> None:
    if job.memory_gb:
        size = int(job.memory_gb * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (size, resource.getrlimit(resource.RLIMIT_DATA)[1]))


if __name__ == "__main__":
    main()
