"""Log runs and sweeps to MLflow, which only this module and tasks.tracking.registry import. No failure here fails a run.

The local record comes first. Logging is synchronous and may be repeated: a run is found again by the id of its record, of one that was
logged completely only the tags are set again, and every number carries the time of the record, so that writing it twice is writing it
once. mlflow_fields.py says what is logged; what the store did not take goes to the outbox, from which replay.py logs it. The first call
that fails ends a try: with a server that does not answer or hangs, each further one would cost as much.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from prefect import task
from prefect.cache_policies import NO_CACHE

from gptq_core.errors import InputError, one_line
from tasks.config.run import RunConfig, TrackingConfig, without_password
from tasks.outcome import record as records
from tasks.outcome.parts import CellName, MlflowLink, SweepName
from tasks.outcome.record import RunRecord, SweepRecord
from tasks.tracking import mlflow_fields, outbox
from tasks.tracking.figures import front_figure, relative_errors

TAG, SWEEP_TAG, PARENT_TAG = "gptq.run", "gptq.sweep_id", "mlflow.parentRunId"
ENDED = ("FINISHED", "FAILED")
"""Of a run that was logged completely; failed: its evaluation did."""
LATER = {"mlflow", "registry", "notified", "gate", "unchanged"}
"""Keys of a record that are no part of the work, or come after it is logged: run.json in MLflow is without them."""


@task(name="log", cache_policy=NO_CACHE)
def log(config: RunConfig, record: RunRecord) -> MlflowLink:
    """Write the run record, log it to MLflow or leave it in the outbox, and write it again with the link."""
    path = records.write(config.out, record)
    link = log_to_mlflow(config, record)
    link = outbox.update(config.tracking, "run", path, link)
    records.write(config.out, record.model_copy(update={"mlflow": link}))
    return link


def log_to_mlflow(config: RunConfig, record: RunRecord, tracking: TrackingConfig | None = None) -> MlflowLink:
    """Log `record`; a server or file that does not answer ends in the link's `error` and no exception.

    tracking: where to, if not where the config says.
    """
    tracking = tracking or config.tracking
    return guarded(tracking, lambda: _log(_client(tracking), config, record, tracking))


def open_sweep(tracking: TrackingConfig, sweep: SweepName) -> MlflowLink:
    """The run of a sweep, found or made before any cell is computed: so the store is migrated once. sweep: tasks.sweep.results.opening."""
    return guarded(tracking, lambda: _open_sweep(_client(tracking), sweep, tracking))


def log_sweep(tracking: TrackingConfig, sweep: SweepRecord) -> MlflowLink:
    """Log a finished sweep into its run: counts, the choice, sweep.json and the figure of the front."""
    return guarded(tracking, lambda: _log_sweep(_client(tracking), sweep, tracking))


def reachable(tracking: TrackingConfig) -> bool:
    """Whether the store answers."""
    return attempt(tracking, lambda: _client(tracking).search_experiments(max_results=1))[1] is None


def guarded(tracking: TrackingConfig, log: Callable[[], MlflowLink]) -> MlflowLink:
    """The link that `log` returns, with the store's address and the run's page; with `error` where the store did not take it."""
    found, error = attempt(tracking, log)
    link, uri = found or MlflowLink(), tracking.model_dump()["uri"]
    return link.model_copy(update={"url": _page(uri, link), "uri": uri, "experiment": tracking.experiment, "error": error})


def _page(uri: str, link: MlflowLink) -> str | None:
    """Address of a run's page; None where the config does not name the server. User and password of the address are left out."""
    if not uri.startswith("http") or not link.run_id:
        return None
    server = urlsplit(uri)
    place = f"{server.scheme}://{server.netloc.rpartition('@')[2]}{server.path.rstrip('/')}"
    return f"{place}/#/experiments/{link.experiment_id}/runs/{link.run_id}"


T = TypeVar("T")


def attempt(tracking: TrackingConfig, call: Callable[[], T]) -> tuple[T | None, str | None]:
    """The result of `call`; or None and the error of MLflow or its store, in one line without secrets."""
    # a server that does not answer would hold the run for four minutes with MLflow's defaults, five seconds with these; one that hangs,
    # twenty
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
        text = without_password(f"{type(error).__name__}: {one_line(error)}")
    if tracking.uri.startswith("env:"):  # the whole address is the secret
        text = text.replace(os.environ.get(tracking.uri.removeprefix("env:")) or tracking.uri, tracking.uri)
    return None, text


def _client(tracking: TrackingConfig) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracking.address)


# -- one run --------------------------------------------------------------------------------------------------------------


def _log(client: Any, config: RunConfig, record: RunRecord, tracking: TrackingConfig) -> MlflowLink:
    experiment, cell = _experiment(client, tracking), record.sweep
    parent = _sweep_run(client, experiment, cell).info.run_id if cell else None
    run = _run(
        client,
        experiment,
        TAG,
        record.id,
        run_name=mlflow_fields.run_name(config, cell.cell if cell else None),
        start_time=records.milliseconds(record.started),
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
        client.set_terminated(run_id, "FAILED" if record.evaluation_error else "FINISHED", end_time=record.finished_ms)
    return MlflowLink(run_id=run_id, experiment_id=experiment, parent_run_id=parent)


def _update(client: Any, run: Any, tags: dict[str, str], report: Path) -> None:
    """Set tags and report again: since then the gate may have changed, a sweep begun, or the report been written."""
    for key, value in tags.items():
        if run.data.tags.get(key, "") != value:
            client.set_tag(run.info.run_id, key, value)
    if report.is_file():
        sizes = {item.path: item.file_size for item in client.list_artifacts(run.info.run_id)}
        if sizes.get(report.name) != report.stat().st_size:
            client.log_artifact(run.info.run_id, str(report))


def _batches(client: Any, run_id: str, tags: dict[str, str], params: dict[str, str], points: list[mlflow_fields.Point]) -> None:
    from mlflow.entities import Metric, Param, RunTag

    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    values = [Param(key, value) for key, value in params.items()]
    for start in range(0, len(values), 100):  # the most that one call of the REST API takes; of metrics 1000
        client.log_batch(run_id, params=values[start : start + 100])
    for start in range(0, len(points), 1000):
        client.log_batch(run_id, metrics=[Metric(point.key, point.value, point.when, point.step) for point in points[start : start + 1000]])


def _inputs(record: RunRecord) -> list[Any]:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = []
    for role, text in (("calibration", record.calibration_data), ("evaluation", record.evaluation_data)):
        # MLflow keeps 36 characters of a digest; the whole one is in the profile, and in the run's tags
        dataset = Dataset(
            name=Path(text.source).name[:200] or role,
            digest=text.digest[:36],
            source_type="gptq_windows",
            source=json.dumps({"source": text.source}),
            profile=json.dumps(text.model_dump()),
        )
        inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", role)]))
    return inputs


def _log_artifacts(client: Any, run_id: str, config: RunConfig, record: RunRecord, report: Path) -> None:
    for file in (config.out / "manifest.jsonl", report):
        if file.is_file():
            client.log_artifact(run_id, str(file))
    client.log_text(run_id, config.to_yaml(), "config.yaml")
    client.log_dict(run_id, record.model_dump(mode="json", exclude=LATER), "run.json")
    if record.blocks:
        _log_figure(client, run_id, relative_errors(record.blocks), "relative_error.png")


def _log_figure(client: Any, run_id: str, figure: Any, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        figure.savefig(path, dpi=120)
        client.log_artifact(run_id, str(path))


# -- sweeps ---------------------------------------------------------------------------------------------------------------


def _open_sweep(client: Any, sweep: SweepName, tracking: TrackingConfig) -> MlflowLink:
    experiment = _experiment(client, tracking)
    return MlflowLink(run_id=_sweep_run(client, experiment, sweep).info.run_id, experiment_id=experiment)


def _sweep_run(client: Any, experiment: str, sweep: SweepName | CellName) -> Any:
    return _run(
        client,
        experiment,
        SWEEP_TAG,
        sweep.id,
        run_name=mlflow_fields.sweep_name(sweep),
        start_time=sweep.started_ms,
        tags=mlflow_fields.opening_tags(sweep),
    )


def _log_sweep(client: Any, sweep: SweepRecord, tracking: TrackingConfig) -> MlflowLink:
    experiment = _experiment(client, tracking)
    run_id = _sweep_run(client, experiment, sweep.name).info.run_id
    _batches(client, run_id, mlflow_fields.sweep_tags(sweep), {}, mlflow_fields.sweep_metrics(sweep))
    client.log_dict(run_id, sweep.model_dump(mode="json", exclude={"mlflow", "notified"}), "sweep.json")
    _log_figure(client, run_id, front_figure(sweep), "front.png")
    report = Path(sweep.folder) / "report.html"
    if report.is_file():
        client.log_artifact(run_id, str(report))
    complete = all(cell.done for cell in sweep.cells)
    client.set_terminated(run_id, "FINISHED" if complete else "FAILED", end_time=records.milliseconds(sweep.finished))
    return MlflowLink(run_id=run_id, experiment_id=experiment)


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
            return str(client.create_experiment(name, artifact_location=beside.as_uri() if beside else None))
        except MlflowException:
            known = client.get_experiment_by_name(name)  # another run made it meanwhile
            if known is None:
                raise
    return str(known.experiment_id)
