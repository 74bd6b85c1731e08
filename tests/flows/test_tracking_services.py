"""MLflow's server killed or stopped before, in the middle and at the end of real runs and a sweep: the run completes, and what
`track-pending` logs later is what would have been there at once."""

import json
import shutil
import signal
import socket
import threading
import time

import pytest
from mlflow import MlflowClient
from servers import TrackingServer
from tracked import dump, make_config, make_record
from typer.testing import CliRunner

from flows.cli.app import app
from tasks.config.run import from_dict
from tasks.outcome import record as records
from tasks.tracking import outbox
from tasks.tracking.mlflow_runs import log_sweep, log_to_mlflow
from tasks.tracking.registry import promote_in_mlflow

pytestmark = [pytest.mark.services, pytest.mark.usefixtures("prefect_server", "one_thread")]
OVERHEAD = 30
"""Seconds that a run may take longer because MLflow does not answer."""


def more(where: str):
    """A moment more, half a minute each: only by `pytest -m kills`."""
    return pytest.param(where, marks=pytest.mark.kills)


def call(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture
def server(tmp_path, migrated, monkeypatch):
    shutil.copy(migrated, tmp_path / "server.db")
    found = TrackingServer(tmp_path)
    monkeypatch.setenv("GPTQ_STORE", found.address)
    yield found
    found.end()


@pytest.fixture
def run_yaml(tmp_path, tiny_llama, corpus):
    path = tmp_path / "run.yaml"
    path.write_text(
        json.dumps(
            {
                "model": {"path": str(tiny_llama), "device": "cpu"},
                "quantization": {"bits": 4, "group_size": 32, "dataset": str(corpus)},
                "calibration": {"samples": 8, "seqlen": 64},
                "evaluation": {"samples": 4, "seqlen": 64},
                "tracking": {"uri": "env:GPTQ_STORE", "experiment": "e", "outbox": str(tmp_path / "outbox")},
                "gate": {"max_kl": 9, "register_as": "m"},
            }
        )
    )
    return path


def undisturbed(tmp_path, migrated, monkeypatch, address):
    """What a store holds to which the same records were logged with nothing in the way, dumped; over a server too."""
    (tmp_path / "right").mkdir()
    shutil.copy(migrated, tmp_path / "right" / "server.db")
    right = TrackingServer(tmp_path / "right")
    right.start()
    monkeypatch.setenv("GPTQ_STORE", right.address)
    try:
        for path in sorted(tmp_path.rglob("*.run.json")):
            record = records.read(path.with_name(path.name.removesuffix(".run.json")))
            config = from_dict(record.config)
            record.mlflow = log_to_mlflow(config, record)
            assert record.mlflow.error is None
            if record.registry:
                assert promote_in_mlflow(config, record).error is None
        for path in tmp_path.glob("*/sweep.json"):
            assert log_sweep(config.tracking, records.read_sweep(path.parent)).error is None
        found = dump(right.address)
    finally:
        right.end()
        monkeypatch.setenv("GPTQ_STORE", address)
    return json.loads(json.dumps(found).replace(right.address, address))


def without_ids(found):
    """sweep.json in MLflow tells the ids of the cells' runs, which are MLflow's own."""
    text = json.loads(json.dumps(found))
    for run in text.values():
        if isinstance(run, dict) and "sweep.json" in run["artifacts"]:
            told = json.loads(run["artifacts"]["sweep.json"])
            for row in told["cells"]:
                row["mlflow_run_id"] = None
            run["artifacts"]["sweep.json"] = told
    return text


def at(monkeypatch, name, do, count=1):
    """Do something right before the `count`th call of a method of MLflow's client."""
    right, calls = getattr(MlflowClient, name), []

    def call(client, *args, **kwargs):
        calls.append(name)
        if len(calls) == count:
            do()
        return right(client, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, name, call)


@pytest.mark.parametrize("where", ["before", "in the middle of logging", more("stopped at the artifacts"), more("at the registration")])
def test_a_run_completes_and_is_logged_later(server, run_yaml, tmp_path, migrated, monkeypatch, where):
    if where != "before":
        server.start()
    with monkeypatch.context() as patch:
        if where == "in the middle of logging":
            at(patch, "log_inputs", server.kill)
        elif where == "stopped at the artifacts":
            at(patch, "log_artifact", lambda: server.signal(signal.SIGSTOP))
        elif where == "at the registration":
            at(patch, "create_model_version", server.kill)
        started = time.monotonic()
        result = call("quantize", run_yaml, "--out", tmp_path / "OUT")
        took = time.monotonic() - started
    record = records.read(tmp_path / "OUT")
    assert result.exit_code == 0 and "track-pending" in result.output + result.stderr, result.output
    assert took - record.seconds < OVERHEAD + 10, "ten seconds for Prefect, on a busy machine"
    assert record.gate.passed and record.registry.error
    server.kill()
    waiting = call("track-pending", "--outbox", tmp_path / "outbox")
    assert waiting.exit_code == 1 and "1 of 1 stay" in waiting.stderr and len(outbox.files(tmp_path / "outbox")) == 1
    server.start()
    result = call("track-pending", "--outbox", tmp_path / "outbox", "--json")
    assert result.exit_code == 0, result.output
    record = records.read(tmp_path / "OUT")
    assert record.registry.champion and record.mlflow.run_id == json.loads(result.stdout)[0]["run_id"]
    assert without_ids(dump(server.address)) == without_ids(undisturbed(tmp_path, migrated, monkeypatch, server.address))


@pytest.mark.parametrize(
    "where", [more("before"), more("after the parent"), "after a cell", more("stopped after a cell"), more("at the end")]
)
def test_a_sweep_completes_and_is_logged_later(server, run_yaml, tmp_path, migrated, monkeypatch, where):
    if where != "before":
        server.start()
    with monkeypatch.context() as patch:
        if where == "after the parent":
            at(patch, "log_batch", server.kill)
        elif where in ("after a cell", "stopped after a cell"):
            at(patch, "set_terminated", server.kill if where == "after a cell" else lambda: server.signal(signal.SIGSTOP), 2)
        elif where == "at the end":
            at(patch, "set_terminated", server.kill, 3)
        result = call(
            "sweep",
            run_yaml,
            "--grid",
            "bits=3,4",
            "--out",
            tmp_path / "grid",
            "--json",
            "--set",
            "max_parallel=1",
            "--set",
            "choose={rule: best_within_size, max_gb: 1}",
        )
    found = json.loads(result.stdout)
    assert [row["status"] for row in found["cells"]] == ["done", "done"] and found["mlflow"]["error"] and result.exit_code == 0
    server.kill()
    server.start()
    result = call("track-pending", "--outbox", tmp_path / "outbox")
    assert result.exit_code == 0 and outbox.files(tmp_path / "outbox") == [], result.output
    found = json.loads((tmp_path / "grid" / "sweep.json").read_text())
    assert found["mlflow"]["error"] is None and found["registry"]["champion"] and all(row["mlflow_run_id"] for row in found["cells"])
    told = dump(server.address)
    assert without_ids(told) == without_ids(undisturbed(tmp_path, migrated, monkeypatch, server.address))
    again = call(
        "sweep",
        run_yaml,
        "--grid",
        "bits=3,4",
        "--out",
        tmp_path / "grid",
        "--set",
        "max_parallel=1",
        "--set",
        "choose={rule: best_within_size, max_gb: 1}",
    )
    assert again.exit_code == 0 and "unchanged, nothing to do" in again.output + again.stderr, "there is nothing left to tell"


def test_a_server_that_accepts_and_never_answers_is_given_up(tmp_path, monkeypatch):
    config = make_config(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        taken = []
        threading.Thread(target=lambda: [taken.append(silent.accept()) for _ in range(100)], daemon=True).start()
        monkeypatch.setenv("GPTQ_STORE", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        outcome = log_to_mlflow(config, make_record(config))
        assert time.monotonic() - started < OVERHEAD and "ReadTimeoutError" in outcome.error and len(taken) <= 3
