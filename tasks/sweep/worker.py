"""The process that a cell of a sweep is computed in: `python -m tasks.sweep.worker`, jobs as JSON lines in, events as JSON lines out.

It asks neither Prefect nor MLflow, so that neither going away can stop it, and it ends when the process that feeds it does: the end
of its stdin is the end of its parent. One worker takes one job after another; after a failure it is replaced by a new one, so that
no job sees what another one left. stderr is its log.
"""

from __future__ import annotations

import json
import os
import queue
import re
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptq_core.errors import one_line

Job = dict[str, Any]
PARENT_GONE = 70


class Events:
    """Tells the parent how far a job is; a Reporter."""

    def __init__(self, write: Callable[[dict[str, Any]], None]) -> None:
        self.write = write

    def note(self, text: str) -> None:
        self.write({"event": "note", "text": text})

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Callable[[int, str], None]]:
        self.write({"event": "stage", "text": name})
        yield lambda done, text="": self.write({"event": "progress", "text": text or f"{name} {done}/{total}"}) if text else None


def main() -> None:
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print goes to the log

    def write(event: dict[str, Any]) -> None:
        out.write(json.dumps(event) + "\n")
        out.flush()

    jobs = _jobs()
    write({"event": "ready", "pid": os.getpid()})
    while job := jobs.get():
        write(_outcome(job, Events(write)))


def _jobs() -> queue.Queue[Job]:
    """Jobs as they come; a thread reads them, so that the end of stdin ends the process in the middle of a computation."""
    found: queue.Queue[Job] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            found.put(json.loads(line))
        os._exit(PARENT_GONE)

    threading.Thread(target=read, daemon=True).start()
    return found


def _outcome(job: Job, events: Events) -> dict[str, Any]:
    """Carry out one job. What a request, a device or a disk can end with comes back; a bug ends the worker with its traceback."""
    import torch

    from gptq_core.errors import GPTQError, InputError, OutputHeldError

    try:
        return {"event": "done", "result": carry_out(job, events)}
    except OutputHeldError as error:
        kind, reason = "held", error
    except InputError as error:
        kind, reason = "invalid", error
    except (MemoryError, torch.OutOfMemoryError) as error:
        kind, reason = "memory", error
    except RuntimeError as error:
        if not re.search("can(no|')t allocate memory", str(error), re.IGNORECASE):  # how torch and safetensors say it for main memory
            raise
        kind, reason = "memory", error
    except (GPTQError, OSError) as error:
        kind, reason = "failed", error
    return {"event": "failed", "kind": kind, "text": f"{type(reason).__name__}: {one_line(reason, 500)}"}


def carry_out(job: Job, events: Events) -> dict[str, Any]:
    """kind "run": a RunConfig, computed into its folder. "original": the original's log-probabilities, into a file. "screening"."""
    import torch

    from gptq_core import screen
    from gptq_core.checkpoint import reader
    from gptq_core.config import QuantizeConfig
    from gptq_core.data.windows import Windows
    from gptq_core.inference.evaluation import store_original
    from gptq_core.model.opened import open_model
    from tasks.config.run import from_dict
    from tasks.evaluation.scores import Measures
    from tasks.outcome import record as records
    from tasks.outcome.load import Sampler
    from tasks.request.request import Request, Requests
    from tasks.request.texts import RunTexts
    from tasks.run import Steps, compute

    # after all imports: the limit is for the work
    records.forget_peak_memory()
    torch.set_num_threads(job["threads"])
    reader.known_sha256.update(job.get("known_sha256", {}))
    if job["kind"] == "run":
        with Sampler() as sampler:  # before the limit: Python waits without end for a thread that has no memory to come up
            _limit_memory(job)
            request = Request(from_dict(job["config"]), Requests(), RunTexts.load(job["texts"]))
            record = compute(request, events, steps=Steps.plain(), original=job["original"], sampler=sampler)
        return {"record": record}
    _limit_memory(job)
    if job["kind"] == "original":
        windows, model = Windows.load(job["windows"]), open_model(job["model"], job["revision"])
        store_original(model, windows, Path(job["file"]), device=job["device"])
        if job.get("config"):
            Measures(from_dict(job["config"]), model).score_original()
        return {"file": job["file"]}
    if job["kind"] == "screening":
        model, cells = job["model"], {name: QuantizeConfig(**values) for name, values in job["cells"].items()}
        texts = RunTexts.load(job["texts"])
        with events.stage("screen blocks") as tick:
            found = screen(
                model["path"],
                cells,
                texts.calibration,
                texts.evaluation,
                revision=model["revision"],
                device=model["device"],
                dtype=model["dtype"],
                on_block=lambda done, total: tick(done, f"block {done}/{total} of {len(cells)} cells"),
            )
        return {"cells": {name: screened.record() for name, screened in found.items()}}
    raise ValueError(f"kind {job['kind']!r}: must be run, original or screening")


def _limit_memory(job: Job) -> None:
    if job.get("memory_gb"):
        size = int(job["memory_gb"] * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (size, resource.getrlimit(resource.RLIMIT_DATA)[1]))


if __name__ == "__main__":
    main()
