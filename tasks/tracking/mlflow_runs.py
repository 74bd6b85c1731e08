"""Runs and sweeps in MLflow, which only this module and tasks.tracking.registry import; never a reason for a run to fail.

The local record comes first. Logging is synchronous and may be repeated: a run is found again by the id of its record, one that was
logged completely is only tagged anew, and every number carries the time of the record, so that writing it twice is writing it once.
mlflow_fields.py says what is logged; what the store did not take goes to the outbox, from which replay.py logs it. The first call that
fails ends a try: with a server that is away or hangs, each further one would cost as much.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prefect import task
from prefect.cache_policies import NO_CACHE

from gptq_core.errors import InputError, one_line
from tasks.config.run import RunConfig, TrackingConfig, without_password
from tasks.outcome import record as records
from tasks.tracking import mlflow_fields, outbox
from tasks.tracking.figures import front, relative_errors

TAG, SWEEP_TAG, PARENT_TAG = "gptq.run", "gptq.sweep_id", "mlflow.parentRunId"
ENDED = ("FINISHED", "FAILED")
"""Of a run that was logged completely; failed: its evaluation did."""
OF_THE_STORE = ("mlflow", "registry", "notified", "gate", "unchanged")
"""Of a record, what is no part of the work, or comes after it is logged: run.json in MLflow is without it."""


@task(name="log", cache_policy=NO_CACHE)
def log(config: RunConfig, record: dict[str, Any]) -> dict[str, Any]:
    """Write the run record, log it to MLflow or leave it in the outbox, and note in the record which: log_to_mlflow's outcome."""
    path = records.write(config.out, record)
    outcome = log_to_mlflow(config, record)
    outbox.settle(config.tracking, "run", path, outcome)
    records.write(config.out, {**record, "mlflow": outcome})
    return outcome


def log_to_mlflow(config: RunConfig, record: dict[str, Any], tracking: TrackingConfig | None = None) -> dict[str, Any]:
    """Log `record`; a server or file that does not answer ends in `error`, one line, and no exception.

    {"run_id", "experiment_id", "parent_run_id": of the sweep, "url": of its page, where the address is http(s), "uri", "experiment",
    "error"}. tracking: where to, if not where the config says.
    """
    tracking = tracking or config.tracking
    return guarded(tracking, lambda: _log(_client(tracking), config, record, tracking))


def open_sweep(tracking: TrackingConfig, sweep: dict[str, Any]) -> dict[str, Any]:
    """The run of a sweep, found or made before any cell is computed: so the store is migrated once. sweep: tasks.sweep.results.opening."""
    return guarded(tracking, lambda: _open_sweep(_client(tracking), sweep, tracking))


def log_sweep(tracking: TrackingConfig, sweep: dict[str, Any]) -> dict[str, Any]:
    """What came of a sweep (sweep.json), into its run: counts, the choice, the file itself and the figure of the front."""
    return guarded(tracking, lambda: _log_sweep(_client(tracking), sweep, tracking))


def reachable(tracking: TrackingConfig) -> bool:
    """Whether the store answers at all."""
    return attempt(lambda: _client(tracking).search_experiments(max_results=1))[1] is None


def guarded(tracking: TrackingConfig, log: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `log` tells of its run, with "url", "uri", "experiment" and "error": one line where the store did not take it, else None."""
    found, error = attempt(log)
    name = tracking.model_dump()["uri"]
    if error and name.startswith("env:"):  # the whole address is the secret
        error = error.replace(os.environ.get(name.removeprefix("env:")) or name, name)
    outcome = {"run_id": None, "experiment_id": None, "parent_run_id": None} | (found or {})
    return outcome | {"url": _page(name, outcome), "uri": name, "experiment": tracking.experiment, "error": error}


def _page(uri: str, outcome: dict[str, Any]) -> str | None:
    """Address of a run's page; None where the config does not tell the server's. User and password of the address are left out."""
    if not uri.startswith("http") or not outcome["run_id"]:
        return None
    server = urlsplit(uri)
    place = f"{server.scheme}://{server.netloc.rpartition('@')[2]}{server.path.rstrip('/')}"
    return f"{place}/#/experiments/{outcome['experiment_id']}/runs/{outcome['run_id']}"


def attempt(call: Callable[[], Any]) -> tuple[Any, str | None]:
    """What `call` returns, or None and what MLflow or its store ended with, in one line."""
    # a server that is away would hold the run for four minutes with MLflow's defaults, five seconds with these; one that hangs, twenty
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
        return None, without_password(f"{type(error).__name__}: {one_line(error)}")


def _client(tracking: TrackingConfig) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracking.address)


# -- one run --------------------------------------------------------------------------------------------------------------


def _log(client: Any, config: RunConfig, record: dict[str, Any], tracking: TrackingConfig) -> dict[str, Any]:
    experiment = _experiment(client, tracking)
    parent = _sweep_run(client, experiment, record["sweep"]).info.run_id if record.get("sweep") else None
    run = _run(
        client,
        experiment,
        TAG,
        record["id"],
        run_name=mlflow_fields.run_name(config, record),
        start_time=records.milliseconds(record["started"]),
    )
    run_id, tags = run.info.run_id, mlflow_fields.tags(config, record) | ({PARENT_TAG: parent} if parent else {})
    report = records.beside(config.out, ".report.html")
    if run.info.status in ENDED:
        _update(client, run, tags, report)
    else:
        # a parameter stays what it was: a try that was cut off may have been of a config with another gate
        _batches(
            client,
            run_id,
            tags,
            {key: value for key, value in mlflow_fields.params(config).items() if key not in run.data.params},
            mlflow_fields.metrics(record),
        )
        client.log_inputs(run_id, datasets=_inputs(record))
        _log_artifacts(client, run_id, config, record, report)
        client.set_terminated(run_id, "FAILED" if record["evaluation_error"] else "FINISHED", end_time=record["finished_ms"])
    return {"run_id": run_id, "experiment_id": experiment, "parent_run_id": parent}


def _update(client: Any, run: Any, tags: dict[str, str], report: Path) -> None:
    """Finished work may have been judged anew, belong to a sweep by now, or have its report since."""
    for key, value in tags.items():
        if run.data.tags.get(key, "") != value:
            client.set_tag(run.info.run_id, key, value)
    if report.is_file():
        sizes = {item.path: item.file_size for item in client.list_artifacts(run.info.run_id)}
        if sizes.get(report.name) != report.stat().st_size:
            client.log_artifact(run.info.run_id, str(report))


def _batches(client: Any, run_id: str, tags: dict[str, str], params: dict[str, str], rows: list[mlflow_fields.Row]) -> None:
    from mlflow.entities import Metric, Param, RunTag

    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    values = [Param(key, value) for key, value in params.items()]
    for start in range(0, len(values), 100):  # the most that one call of the REST API takes; of metrics 1000
        client.log_batch(run_id, params=values[start : start + 100])
    for start in range(0, len(rows), 1000):
        client.log_batch(run_id, metrics=[Metric(*row) for row in rows[start : start + 1000]])


def _inputs(record: dict[str, Any]) -> list[Any]:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = []
    for role in ("calibration", "evaluation"):
        data = record[f"{role}_data"]
        # MLflow keeps 36 characters of a digest; the whole one is in the profile, and in the run's tags
        dataset = Dataset(
            name=Path(data["source"]).name[:200] or role,
            digest=data["digest"][:36],
            source_type="gptq_windows",
            source=json.dumps({"source": data["source"]}),
            profile=json.dumps(data),
        )
        inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", role)]))
    return inputs


def _log_artifacts(client: Any, run_id: str, config: RunConfig, record: dict[str, Any], report: Path) -> None:
    for file in (config.out / "manifest.jsonl", report):
        if file.is_file():
            client.log_artifact(run_id, str(file))
    client.log_text(run_id, config.to_yaml(), "config.yaml")
    client.log_dict(run_id, {key: value for key, value in record.items() if key not in OF_THE_STORE}, "run.json")
    if record["blocks"]:
        _log_figure(client, run_id, relative_errors(record["blocks"]), "relative_error.png")


def _log_figure(client: Any, run_id: str, figure: Any, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        figure.savefig(path, dpi=120)
        client.log_artifact(run_id, str(path))


# -- sweeps ---------------------------------------------------------------------------------------------------------------


def _open_sweep(client: Any, sweep: dict[str, Any], tracking: TrackingConfig) -> dict[str, Any]:
    experiment = _experiment(client, tracking)
    return {"run_id": _sweep_run(client, experiment, sweep).info.run_id, "experiment_id": experiment}


def _sweep_run(client: Any, experiment: str, sweep: dict[str, Any]) -> Any:
    return _run(
        client,
        experiment,
        SWEEP_TAG,
        sweep["id"],
        run_name=mlflow_fields.sweep_name(sweep),
        start_time=sweep["started_ms"],
        tags=mlflow_fields.opening_tags(sweep),
    )


def _log_sweep(client: Any, sweep: dict[str, Any], tracking: TrackingConfig) -> dict[str, Any]:
    opened = _open_sweep(client, sweep, tracking)
    run_id = opened["run_id"]
    _batches(client, run_id, mlflow_fields.sweep_tags(sweep), {}, mlflow_fields.sweep_metrics(sweep))
    client.log_dict(run_id, {key: value for key, value in sweep.items() if key not in ("mlflow", "notified")}, "sweep.json")
    _log_figure(client, run_id, front(sweep), "front.png")
    report = Path(sweep["folder"]) / "report.html"
    if report.is_file():
        client.log_artifact(run_id, str(report))
    complete = all(row["status"] == "done" for row in sweep["cells"])
    client.set_terminated(run_id, "FINISHED" if complete else "FAILED", end_time=records.milliseconds(sweep["finished"]))
    return opened


# -- what both need -------------------------------------------------------------------------------------------------------


def _run(client: Any, experiment: str, tag: str, value: str, tags: dict[str, str] | None = None, **new: Any) -> Any:
    """The one run with this tag, made where there is none."""

    def found() -> list[Any]:
        runs = client.search_runs([experiment], f"tags.`{tag}` = '{value}'")
        return sorted(runs, key=lambda run: (run.info.status not in ENDED, run.info.run_id))

    runs = found()
    if not runs:
        client.create_run(experiment, tags={tag: value} | (tags or {}), **new)
        runs = found()
    for other in runs[1:]:
        # a call that MLflow tried again after a timeout may have made two, and so may two processes
        if other.info.status == "RUNNING":
            client.delete_run(other.info.run_id)
    return runs[0]


def _experiment(client: Any, tracking: TrackingConfig) -> str:
    from mlflow.exceptions import MlflowException

    name, uri = tracking.experiment, tracking.address
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
