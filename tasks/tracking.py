"""A run in MLflow, which only this module and tasks.registry import; never a reason for a run to fail: the local record comes first.

Logging is synchronous and may be repeated: the run is found again by the id of its record, a run that was logged completely
is left alone, and every metric carries the time of the record, so that writing it twice is writing it once.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from gptq_core.errors import InputError
from tasks import record as records
from tasks.config import RunConfig, without_password
from tasks.figures import front, relative_errors, short_name
from tasks.gate import failed, measured

TAG, SWEEP_TAG = "gptq.run", "gptq.sweep_id"
EVALUATED = ("original_perplexity", "quantized_perplexity", "kl", "top1_agreement")


@task(name="log", cache_policy=NO_CACHE)
def log(config: RunConfig, record: dict[str, Any]) -> dict[str, Any]:
    """Write the run record, log it to MLflow, and note in the record where; {"run_id", "uri", "experiment", "error"}."""
    records.write(config.out, record)
    outcome = log_to_mlflow(config, record)
    records.write(config.out, {**record, "mlflow": outcome})
    return outcome


def log_to_mlflow(config: RunConfig, record: dict[str, Any]) -> dict[str, Any]:
    """Log `record`; a server or file that does not answer ends in `error`, one line, and no exception."""
    return guarded(config, lambda: _log(config, record))


def guarded(config: RunConfig, log: Callable[[], str]) -> dict[str, Any]:
    """{"run_id": what `log` returns, "uri", "experiment", "error": one line where the store did not take it, else None}."""
    run_id, error = attempt(log)
    return {"run_id": run_id, "uri": config.flat()["tracking.uri"], "experiment": config.tracking.experiment, "error": error}


def attempt(call: Callable[[], Any]) -> tuple[Any, str | None]:
    """What `call` returns, or None and what MLflow or its store ended with, in one line."""
    # a server that is away would hold the run for four minutes with MLflow's defaults, five seconds with these
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    from alembic.util.exc import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return call(), None
    # requests' errors are OSErrors; a database whose driver is not installed is an ImportError, one of a newer MLflow a CommandError,
    # a setting that stands nowhere an InputError, and an address that cannot be read a ValueError
    except (MlflowException, SQLAlchemyError, CommandError, ImportError, OSError, InputError, ValueError) as error:
        return None, without_password(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _log(config: RunConfig, record: dict[str, Any]) -> str:
    from mlflow import MlflowClient
    from mlflow.entities import Param, RunTag

    client = MlflowClient(tracking_uri=config.tracking.address)
    experiment = _experiment(client, config)
    found = client.search_runs([experiment], f"tags.`{TAG}` = '{record['id']}'", max_results=1)
    if found and found[0].info.status == "FINISHED":
        _mark(client, found[0], record)
        return found[0].info.run_id
    run = found[0] if found else client.create_run(experiment, tags={TAG: record["id"]}, run_name=config.out.name)
    run_id = run.info.run_id
    tags = {"gptq.key": record["key"], "gptq.checkpoint": str(config.out), "prefect.flow_run_id": record["prefect_flow_run_id"] or "",
            **record.get("tags", {}), **gate_tags(record)}  # fmt: skip
    client.log_batch(run_id, params=[Param(key, str(value)) for key, value in config.flat().items()],
                     tags=[RunTag(key, value) for key, value in tags.items()])
    rows = metrics(record)
    for start in range(0, len(rows), 1000):  # the most that one call of the REST API takes
        client.log_batch(run_id, metrics=rows[start:start + 1000])
    _log_inputs(client, run_id, record)
    _log_artifacts(client, run_id, config, record)
    client.set_terminated(run_id, "FINISHED")
    return run_id


def gate_tags(record: dict[str, Any]) -> dict[str, str]:
    """The gate's verdict, and the limits that were not kept."""
    verdict = record.get("gate")
    return {"gptq.gate": "passed" if verdict["passed"] else "failed", "gptq.gate.failed": failed(verdict) or ""} if verdict else {}


def _mark(client: Any, run: Any, record: dict[str, Any]) -> None:
    """Finished work may have been judged anew, or by no gate any more."""
    told = {"gptq.gate": "", "gptq.gate.failed": ""} | gate_tags(record)
    for key, value in told.items():
        if run.data.tags.get(key, "") != value:
            client.set_tag(run.info.run_id, key, value)


# -- sweeps ---------------------------------------------------------------------------------------------------------------


def open_sweep(config: RunConfig, sweep: str, name: str) -> dict[str, Any]:
    """The parent run of the sweep with this id, found or made before any cell is computed: so the store is migrated once."""
    return guarded(config, lambda: _sweep_run(_client(config), config, sweep, name))


def log_sweep(config: RunConfig, found: dict[str, Any], parent: str) -> dict[str, Any]:
    """What came of a sweep, into its parent run: counts, the choice, sweep.json and the figure of the front."""
    return guarded(config, lambda: _log_sweep(_client(config), found, parent))


def _client(config: RunConfig) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=config.tracking.address)


def _sweep_run(client: Any, config: RunConfig, sweep: str, name: str) -> str:
    experiment = _experiment(client, config)
    found = client.search_runs([experiment], f"tags.`{SWEEP_TAG}` = '{sweep}'", max_results=1)
    return (found[0] if found else client.create_run(experiment, tags={SWEEP_TAG: sweep}, run_name=name)).info.run_id


def _log_sweep(client: Any, found: dict[str, Any], parent: str) -> str:
    from mlflow.entities import Metric, RunTag

    choice, cells = found["recommended"], found["cells"]
    tags = {"gptq.mode": found["mode"], "gptq.recommended": choice["name"] or "", "gptq.rule": choice["rule"],
            "gptq.folder": found["folder"]}  # fmt: skip
    numbers = {"cells": len(cells), "cells/failed": sum(row["status"] != "done" for row in cells), "seconds/total": found["seconds"]}
    best = next((row for row in cells if row["name"] == choice["name"]), {})
    numbers |= {f"recommended/{key}": best.get(key) for key in ("perplexity", "kl", "bytes", "bits_per_weight")}
    now = int(time.time() * 1000)
    client.log_batch(parent, tags=[RunTag(key, value) for key, value in tags.items()],
                     metrics=[Metric(key, float(value), now, 0) for key, value in numbers.items() if value is not None])
    client.log_dict(parent, found, "sweep.json")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "front.png"
        front(found).savefig(path, dpi=120)
        client.log_artifact(parent, str(path))
    client.set_terminated(parent, "FINISHED" if all(row["status"] == "done" for row in cells) else "FAILED")
    return parent


# -- one run --------------------------------------------------------------------------------------------------------------


def _experiment(client: Any, config: RunConfig) -> str:
    from mlflow.exceptions import MlflowException

    name, uri = config.tracking.experiment, config.tracking.address
    known = client.get_experiment_by_name(name)
    if known is None:
        # MLflow would put artifacts under the working directory, wherever the database is
        beside = Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts" if uri.startswith("sqlite:///") else None
        try:
            return client.create_experiment(name, artifact_location=beside.as_uri() if beside else None)
        except MlflowException:
            known = client.get_experiment_by_name(name)  # another run made it meanwhile
            if known is None:
                raise
    return known.experiment_id


def metrics(record: dict[str, Any]) -> list[Any]:
    """Every number of the record: of layers with step = block, of the whole run with step 0."""
    from mlflow.entities import Metric

    time_ms = record["finished_ms"]
    single = {key: (record["evaluation"] or {}).get(key) for key in EVALUATED}
    single |= {key: record["assembly"].get(key) for key in ("bytes", "original_bytes", "bits_per_weight", "quantized_layers")}
    single |= {key: value for key, value in measured(record).items() if key in ("perplexity_increase", "recovery", "fallback_layers")}
    single["predicted_kl"] = (record.get("allocation") or {}).get("predicted_kl")
    single |= {f"seconds/{safe(stage)}": seconds for stage, seconds in record["stage_seconds"].items()}
    single |= {f"peak_memory_bytes/{kind}": size for kind, size in (record["peak_memory_bytes"] or {}).items()}
    single["seconds/total"] = record["seconds"]
    rows = [Metric(key, float(value), time_ms, 0) for key, value in single.items() if value is not None]
    for block in record["blocks"]:
        rows.append(Metric("block/seconds", float(block["seconds"]), time_ms, block["block"]))
        for layer in block["layers"]:
            for key in ("loss", "relative_error"):
                if layer[key] is not None:
                    rows.append(Metric(f"{key}/{safe(short_name(layer['name']))}", float(layer[key]), time_ms, block["block"]))
    return rows


def safe(name: str) -> str:
    """A name that MLflow takes: word characters, dots, dashes, spaces and slashes."""
    return re.sub(r"[^\w.\- ]", "_", name)


def _log_inputs(client: Any, run_id: str, record: dict[str, Any]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = []
    for role in ("calibration", "evaluation"):
        data = record[f"{role}_data"]
        # MLflow keeps 36 characters of a digest; the whole one is in the profile
        dataset = Dataset(name=Path(data["source"]).name[:200] or role, digest=data["digest"][:36], source_type="gptq_windows",
                          source=json.dumps({"source": data["source"]}), profile=json.dumps(data))
        inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", role)]))
    client.log_inputs(run_id, datasets=inputs)


def _log_artifacts(client: Any, run_id: str, config: RunConfig, record: dict[str, Any]) -> None:
    manifest = config.out / "manifest.jsonl"
    if manifest.is_file():
        client.log_artifact(run_id, str(manifest))
    client.log_text(run_id, config.to_yaml(), "config.yaml")
    if record["blocks"]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "relative_error.png"
            relative_errors(record["blocks"]).savefig(path, dpi=120)
            client.log_artifact(run_id, str(path))
