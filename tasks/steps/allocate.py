"""The choice of widths as a Prefect task: once for each request, kept beside the work."""

from __future__ import annotations

import json
import time

from prefect import task
from prefect.cache_policies import NO_CACHE

from gptq_core.checkpoint.writer import replace_file
from gptq_core.search import allocation
from gptq_core.search.allocation import Progress
from tasks.request.request import Request
from tasks.steps.opaque import Opaque


@task(name="allocate", cache_policy=NO_CACHE)
def allocate(request: Opaque[Request], progress: Opaque[Progress]) -> None:
    """Choose the widths and write them to the request's allocation file: an Allocation's record, with key, shares and seconds."""
    run, started = request.value, time.perf_counter()
    model = run.config.model
    chosen = allocation.allocate(
        run.model, run.config.quantization, run.texts.calibration, device=model.device, dtype=model.dtype, progress=progress.value
    )
    record = {"key": run.key, "seconds": time.perf_counter() - started, "shares": chosen.shares, **chosen.record()}
    run.allocation_file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(run.allocation_file, (json.dumps(record, indent=2) + "\n").encode())
