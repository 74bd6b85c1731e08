"""prepare_dataset: the texts of a run as token windows in files that are named by their content."""

from __future__ import annotations

import time
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.outcome.record import beside
from tasks.request.request import Request
from tasks.steps.opaque import Opaque


@task(name="prepare_dataset", cache_policy=NO_CACHE)
def prepare_dataset(request: Opaque[Request]) -> dict[str, Any]:
    """Write the texts beside the checkpoint; what RunTexts.save returns, and seconds."""
    started = time.perf_counter()
    saved = request.value.texts.save(beside(request.value.config.out, ".work"))
    return saved | {"seconds": time.perf_counter() - started}
