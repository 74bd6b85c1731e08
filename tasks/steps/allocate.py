"""The choice of widths as a Prefect task: once for each request, kept beside the work."""

from __future__ import annotations

import json
import time
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from gptq_core.checkpoint.writer import replace_file
from gptq_core.data.windows import Windows
from gptq_core.search import allocation
from tasks.config.run import RunConfig
from tasks.request.checks import allocation_file, request_key
from tasks.steps.evaluate import Progress


@task(name="allocate", cache_policy=NO_CACHE)
def allocate(config: RunConfig, windows_file: str, progress: Progress) -> dict[str, Any]:
    """Choose the widths, write them to allocation.json and return that record: an Allocation's, with key, shares and seconds."""
    started = time.perf_counter()
    windows = Windows.load(windows_file)
    chosen = allocation.allocate(
        config.model.path,
        config.quantization,
        windows,
        device=config.model.device,
        dtype=config.model.dtype,
        revision=config.model.revision,
        progress=progress.call,
    )
    record = {"key": request_key(config, windows), "seconds": time.perf_counter() - started, "shares": chosen.shares, **chosen.record()}
    path = allocation_file(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(record, indent=2) + "\n").encode())
    written: dict[str, Any] = json.loads(path.read_text())
    return written
