"""prepare_dataset: the texts of a run as token windows in files that are named by their content."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.outcome.parts import Texts
from tasks.outcome.record import beside
from tasks.request.request import Request
from tasks.steps.opaque import Opaque


@task(name="prepare_dataset", cache_policy=NO_CACHE)
def prepare_dataset(request: Opaque[Request]) -> Texts:
    """Write the texts beside the checkpoint."""
    return request.value.texts.save(beside(request.value.config.out, ".work"))
