"""Runs the deployments of prefect.yaml in this process, for a machine without a worker.

Each run is a process of its own. The server enforces the concurrency limit of a deployment, so a run that starts while another is
under way is cancelled here as it is by a worker. `prefect.serve(limit=...)` is not used: it only delays such a run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gptq_core.errors import InputError
from gptq_core.schema import Schema, explain


class Limit(Schema):
    """Concurrency limit of a deployment."""

    limit: Annotated[int, Field(gt=0)]
    """Maximum number of runs at a time."""
    collision_strategy: Literal["ENQUEUE", "CANCEL_NEW"] = "CANCEL_NEW"
    """Treatment of a run above the limit: ENQUEUE delays it, CANCEL_NEW cancels it."""


class CronSpec(Schema):
    """Schedule of a deployment."""

    cron: str
    """Minute, hour, day, month and weekday, as in a crontab."""
    timezone: str
    """Time zone of the schedule, such as UTC or Europe/Berlin."""
    active: bool = True
    """Whether the schedule starts runs."""


class Deployment(BaseModel):
    """Keys of a deployment that `serve` reads; the other keys of Prefect, such as the work pool, are for workers."""

    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)
    name: str
    """Name of the deployment."""
    entrypoint: str
    """Flow to run, as a dotted name such as flows.quantize.quantize."""
    description: str | None = None
    """Text for Prefect's UI."""
    tags: list[str] = []
    """Tags of the deployment and its runs."""
    concurrency_limit: Limit | None = None
    """Limit on runs at a time; null: none."""
    enforce_parameter_schema: bool = True
    """Refuse a run with invalid parameters when it is created."""
    schedules: list[CronSpec] = []
    """Times at which runs start."""
    parameters: dict[str, Any] = {}
    """Parameters of the flow."""


class PrefectFile(BaseModel):
    """The part of prefect.yaml that `serve` reads."""

    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)
    deployments: Annotated[list[Deployment], Field(min_length=1)]
    """Deployments, at least one."""


def read(file: Path, names: list[str] | None = None) -> list[Deployment]:
    """The deployments of a prefect.yaml, or only those with the given names."""
    try:
        found = PrefectFile.model_validate(yaml.safe_load(file.read_text(encoding="utf-8"))).deployments
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}; run the command in the checkout, or give --file") from error
    except yaml.YAMLError as error:
        raise InputError(f"{file} is not valid YAML: {error}") from error
    except ValidationError as error:
        raise InputError(f"{file}: {explain(error)}") from error
    known = [deployment.name for deployment in found]
    for name in names or []:
        if name not in known:
            raise InputError(f"--name {name}: {file} has no such deployment; known are {', '.join(known)}")
    return [deployment for deployment in found if not names or deployment.name in names]


def server() -> str:
    """Address of the Prefect server in use. Raises InputError if PREFECT_API_URL is not set."""
    from prefect.settings import PREFECT_API_URL

    address: str | None = PREFECT_API_URL.value()
    if not address:
        raise InputError(
            "PREFECT_API_URL is not set, and a schedule needs a permanent Prefect server: start one with "
            "`prefect server start`, then `prefect config set PREFECT_API_URL=http://127.0.0.1:4200/api`"
        )
    return address


def runner_deployment(deployment: Deployment) -> Any:
    """Prefect's object for a deployment that this process runs."""
    from prefect.client.schemas.objects import ConcurrencyLimitConfig
    from prefect.deployments.runner import RunnerDeployment
    from prefect.schedules import Cron

    limit = ConcurrencyLimitConfig(**deployment.concurrency_limit.model_dump()) if deployment.concurrency_limit else None
    made = RunnerDeployment.from_entrypoint(
        deployment.entrypoint,
        deployment.name,
        description=deployment.description,
        tags=deployment.tags,
        concurrency_limit=limit,
        parameters=deployment.parameters,
        enforce_parameter_schema=deployment.enforce_parameter_schema,
        schedules=[Cron(spec.cron, timezone=spec.timezone, active=spec.active) for spec in deployment.schedules],
        paused=False,  # `serve` pauses it when it ends
    )
    made.work_pool_name = None  # a worker may have had it before
    return made


def serve(deployments: list[Deployment]) -> None:
    """Register the deployments and run scheduled and requested runs until interrupted; then pause the schedules."""
    import prefect
    from prefect.client.orchestration import get_client

    from flows.serving.dead_runs import PROC, mark

    server()
    if PROC.is_dir():
        with get_client(sync_client=True) as client:
            mark(client)
    prefect.serve(*(runner_deployment(deployment) for deployment in deployments), print_starting_message=False)
