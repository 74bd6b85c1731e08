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
    asked, started = request.value, time.perf_counter()
    config = asked.config
    chosen = allocation.allocate(
        asked.model,
        config.quantization,
        asked.texts.calibration,
        device=config.model.device,
        dtype=config.model.dtype,
        progress=progress.value,
    )
    record = {"key": asked.key, "seconds": time.perf_counter() - started, "shares": chosen.shares, **chosen.record()}
    asked.allocation_file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(asked.allocation_file, (json.dumps(record, indent=2) + "\n").encode())
