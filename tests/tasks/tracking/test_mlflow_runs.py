import re
import subprocess

import pytest
from alembic.util.exc import CommandError
from mlflow import MlflowClient

from tasks.config.run import TrackingConfig, from_dict
from tasks.outcome import machine
from tasks.outcome import record as records
from tasks.outcome.parts import Assembly, MlflowLink, Text
from tasks.tracking import mlflow_fields
from tasks.tracking.mlflow_runs import TAG, guarded, log, log_to_mlflow


@pytest.fixture
def config(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.jsonl").write_text('{"kind": "start"}\n')
    return from_dict(
        {
            "model": {"path": "m"},
            "quantization": {"bits": 4, "dataset": "t.txt"},
            "output": {"dir": str(out)},
            "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db", "experiment": "e", "outbox": str(tmp_path / "outbox")},
        }
    )


@pytest.fixture
def record(config):
    def layer(block, name, error):
        return {"name": f"model.layers.{block}.{name}", "loss": 1.5 + block, "relative_error": error}

    data = {"file": "f", "digest": "d" * 64, "source": "t.txt", "windows": 2, "seqlen": 8, "total_windows": 9}
    assembly = Assembly(bytes=10, original_bytes=40, bits_per_weight=4.2, quantized_layers=4)
    found = records.new(config, "k" * 64, "2023-11-14T22:13:10Z", Text(**data), Text(**data | {"digest": "e" * 64}), assembly)
    found.finished_ms, found.seconds, found.prefect_flow_run_id = 1_700_000_000_000, 3.0, "p"
    found.stage_seconds, found.peak_memory_bytes = {"forward": 1.0}, {"host": 5}
    found.evaluation = {"original_perplexity": 2.0, "quantized_perplexity": 2.5, "kl": 0.25, "top1_agreement": None, "digest": "e" * 64}
    found.blocks = [{"block": b, "seconds": 0.5, "layers": [layer(b, "attn.q", 0.1 + b), layer(b, "mlp.up", None)]} for b in range(2)]
    return found


def runs(config):
    client = MlflowClient(tracking_uri=config.tracking.uri)
    return client, client.search_runs([client.get_experiment_by_name("e").experiment_id])


@pytest.mark.slow
def test_everything_is_logged_once_however_often_it_is_tried(config, record):
    first = log_to_mlflow(config, record)
    assert first.error is None
    client, found = runs(config)
    client.update_run(first.run_id, status="RUNNING")  # as if it had been cut off before its end
    assert log_to_mlflow(config, record) == first == log_to_mlflow(config, record)
    client, found = runs(config)
    assert len(found) == 1 and found[0].info.status == "FINISHED" and found[0].data.tags[TAG] == record.id
    assert found[0].data.params == mlflow_fields.params(config)
    values = found[0].data.metrics
    assert values["kl"] == 0.25 and values["original_perplexity"] == 2.0 and values["seconds/forward"] == 1.0
    assert "top1_agreement" not in values and "relative_error/mlp.up" not in values, "what was not measured is not logged"
    history = client.get_metric_history(first.run_id, "relative_error/attn.q")
    assert [(point.step, point.value) for point in history] == [(0, 0.1), (1, 1.1)]
    assert {tag.value for data in found[0].inputs.dataset_inputs for tag in data.tags} == {"calibration", "evaluation"}
    artifacts = {item.path for item in client.list_artifacts(first.run_id)}
    assert artifacts == {"manifest.jsonl", "config.yaml", "run.json", "relative_error.png"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:9", "sqlite:////proc/none/mlflow.db", "nonsense://x", "mysql+no_such_driver://127.0.0.1:1/db"]
)
def test_a_store_that_is_away_costs_only_its_copy(config, record, monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": uri})})
    outcome = log.fn(away, record)
    assert outcome.error and outcome.run_id is None and "\n" not in outcome.error
    kept = records.read(config.out)
    assert kept.evaluation == record.evaluation and kept.mlflow == outcome
    assert log_to_mlflow(config, record).error is None, "a later try records it"


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'psycopg2'"), CommandError("Can't locate revision")])
def test_a_missing_driver_and_a_newer_database_are_told_in_one_line(config, record, monkeypatch, error):
    def fails(*_args, **_kwargs):
        raise error

    monkeypatch.setattr("mlflow.MlflowClient", fails)
    outcome = log_to_mlflow(config, record)
    assert outcome.run_id is None and outcome.error == f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    "uri, page",
    [
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000/#/experiments/7/runs/r"),
        ("https://me:s3cret@host/ml/", "https://host/ml/#/experiments/7/runs/r"),
        ("sqlite:///mlflow.db", None),
        ("env:GPTQ_STORE", None),
    ],
)
def test_the_page_of_a_run_is_told_where_the_config_tells_the_server(uri, page, monkeypatch):
    monkeypatch.setenv("GPTQ_STORE", "http://s3cret")
    outcome = guarded(TrackingConfig(uri=uri), lambda: MlflowLink(run_id="r", experiment_id="7"))
    assert outcome.url == page and "s3cret" not in str(outcome)
    assert guarded(TrackingConfig(uri=uri), MlflowLink).url is None


@pytest.mark.slow
def test_a_report_that_came_later_is_added_and_a_new_one_replaces_it(config, record):
    logged = log_to_mlflow(config, record)
    client, _ = runs(config)
    for text in ("<p>one", "<p>another"):
        (config.out.parent / "out.report.html").write_text(text)
        assert log_to_mlflow(config, record) == logged
        sizes = {item.path: item.file_size for item in client.list_artifacts(logged.run_id)}
        assert sizes["out.report.html"] == len(text)


def test_the_revision_is_that_of_the_checkout_itself(tmp_path):
    def git(*args):
        subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e@x", "-C", str(tmp_path), *args], check=True, capture_output=True)

    assert machine._revision(tmp_path) is None
    git("init")
    (tmp_path / "inner").mkdir()
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "m")
    assert re.fullmatch("[0-9a-f]{40}", machine._revision(tmp_path)) and machine._revision(tmp_path / "inner") is None
    (tmp_path / "file").write_text("2")
    assert machine._revision(tmp_path).endswith("-dirty")
