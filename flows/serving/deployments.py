"""The deployments of prefect.yaml, run by this process: for a machine without a worker.

Each run is a process of its own. The limit of a deployment is kept by the server, so a run that comes while another is under way is
cancelled here as it is by a worker. `prefect.serve(limit=...)` is not used: it only delays such a run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gptq_core.errors import InputError
from gptq_core.schema import Schema, explain


class Limit(Schema):
    limit: Annotated[int, Field(gt=0)]
    collision_strategy: Literal["ENQUEUE", "CANCEL_NEW"] = "CANCEL_NEW"


class CronSpec(Schema):
    cron: str
    timezone: str
    active: bool = True


class Deployment(BaseModel):
    """What is read of a deployment; Prefect's other keys, such as the work pool, are for workers."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    name: str
    entrypoint: str
    description: str | None = None
    tags: list[str] = []
    concurrency_limit: Limit | None = None
    enforce_parameter_schema: bool = True
    schedules: list[CronSpec] = []
    parameters: dict[str, Any] = {}


class PrefectFile(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)
    deployments: Annotated[list[Deployment], Field(min_length=1)]


def read(file: Path, names: list[str] | None = None) -> list[Deployment]:
    """The deployments of a prefect.yaml, or those with these names."""
    try:
        found = PrefectFile.model_validate(yaml.safe_load(file.read_text(encoding="utf-8"))).deployments
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}; start it in the checkout, or give --file") from error
    except yaml.YAMLError as error:
        raise InputError(f"{file} is not valid YAML: {error}") from error
    except ValidationError as error:
        raise InputError(f"{file}: {explain(error)}") from error
    known = [deployment.name for deployment in found]
    for name in names or []:
        if name not in known:
            raise InputError(f"--name {name}: {file} has no such deployment; it has {', '.join(known)}")
    return [deployment for deployment in found if not names or deployment.name in names]


def server() -> str:
    """The address of the Prefect server that is in use."""
    from prefect.settings import PREFECT_API_URL

    address: str | None = PREFECT_API_URL.value()
    if not address:
        raise InputError(
            "a schedule needs a Prefect server that stays, and PREFECT_API_URL names none: start one with "
            "`prefect server start`, then `prefect config set PREFECT_API_URL=http://127.0.0.1:4200/api`"
        )
    return address


def runner_deployment(deployment: Deployment) -> Any:
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
        paused=False,  # the end of the last `serve` has paused it
    )
    made.work_pool_name = None  # also where a worker had it before
    return made


def serve(deployments: list[Deployment]) -> None:
    """Register the deployments and run what is due or asked for, until interrupted; then their schedules are paused."""
    import prefect
    from prefect.client.orchestration import get_client

    from flows.serving.dead_runs import PROC, mark

    server()
    if PROC.is_dir():
        with get_client(sync_client=True) as client:
            mark(client)
    prefect.serve(*(runner_deployment(deployment) for deployment in deployments), print_starting_message=False)
