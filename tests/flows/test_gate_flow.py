"""Gate, registry and hooks by the command line: a 2-bit run fails a strict gate and a 4-bit run takes the alias, in both orders."""

import json
import shutil
import socket
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from typer.testing import CliRunner

from flows.cli.app import app
from tasks.outcome import record as records

pytestmark = pytest.mark.usefixtures("prefect_server", "one_thread")
STRICT = ["gate.max_kl=0.05", "gate.register_as=tiny"]


def call(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("judged")


@pytest.fixture(scope="module")
def quantize(home, tiny_llama, corpus):
    """quantize(folder, bits, *settings): the result of the command."""

    def run(folder, bits, *settings):
        args = [
            "quantize",
            "--model",
            tiny_llama,
            "--dataset",
            corpus,
            "--bits",
            bits,
            "--group-size",
            32,
            "--samples",
            8,
            "--seqlen",
            64,
            "--device",
            "cpu",
            "--out",
            folder,
        ]
        for setting in (f"tracking.uri=sqlite:///{folder.parent}/mlflow.db", "evaluation.samples=4", *settings):
            args += ["--set", setting]
        return call(*args)

    return run


@pytest.fixture(scope="module")
def made(home, quantize):
    """Checkpoints of 2 and 4 bits and a store that knows them, made without a gate once: judging them anew computes nothing."""
    for bits in (2, 4):
        result = quantize(home / f"w{bits}", bits)
        assert result.exit_code == 0, result.output
        assert "\n  gate " not in result.stdout
    assert records.read(home / "w4").evaluation.kl < 0.05 < records.read(home / "w2").evaluation.kl
    return home


@pytest.fixture
def place(made, tmp_path):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def registry(place):
    """Bits of the versions by their numbers, and the number of the champion."""
    client = MlflowClient(tracking_uri=f"sqlite:///{place}/mlflow.db")
    versions = {int(found.version): found.tags["gptq.checkpoint"][-2:] for found in client.search_model_versions("name='tiny'")}
    try:
        return versions, int(client.get_model_version_by_alias("tiny", "champion").version)
    except MlflowException:
        return versions, None


def tags(place, out):
    client = MlflowClient(tracking_uri=f"sqlite:///{place}/mlflow.db")
    return client.get_run(records.read(place / out).mlflow.run_id).data.tags


def fails(result, place):
    assert result.exit_code == 1, result.output
    record = records.read(place / "w2")
    kl = f"{record.evaluation.kl:.6g}"
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert f"gate failed (max_kl: {kl} is above 0.05): the checkpoint {place}/w2 is kept and not registered" in line
    assert f"failed: max_kl: {kl} is above 0.05" in result.stdout and (place / "w2" / "manifest.jsonl").is_file()
    assert record.gate.passed is False and record.registry is None and record.mlflow.error is None
    told = tags(place, "w2")
    assert told["gptq.gate"] == "failed" and told["gptq.gate.failed"].startswith("max_kl: ")


def passes(result, place):
    assert result.exit_code == 0, result.output
    record = records.read(place / "w4")
    assert record.gate.passed and record.registry.champion and tags(place, "w4")["gptq.gate"] == "passed"
    assert f"tiny version {record.registry.version}, is champion" in result.stdout


def test_two_bits_fail_and_four_bits_take_the_alias(place, quantize):
    fails(quantize(place / "w2", 2, *STRICT), place)
    assert registry(place) == ({}, None)
    passes(quantize(place / "w4", 4, *STRICT), place)
    assert registry(place) == ({1: "w4"}, 1)


def test_the_alias_stays_with_four_bits_when_two_bits_fail(place, quantize):
    passes(quantize(place / "w4", 4, *STRICT), place)
    fails(quantize(place / "w2", 2, *STRICT), place)
    assert registry(place) == ({1: "w4"}, 1)
    # a gate that it passes makes a version of it, and still not the champion
    result = quantize(place / "w2", 2, "gate.max_kl=100", "gate.register_as=tiny")
    assert result.exit_code == 0 and registry(place) == ({1: "w4", 2: "w2"}, 1), result.output
    assert "version 1 keeps the alias" in result.stderr and "tiny version 2, not champion" in result.stdout
    assert tags(place, "w2")["gptq.gate"] == "passed", "judged anew on finished work"


def test_a_run_computed_under_its_gate_is_judged_registered_and_told(place, quantize):
    command = f"notify.command=cat >> {place}/told"
    result = quantize(place / "fresh", 4, *STRICT, "gate.max_gb=0.1", command, "notify.when=[passed]")
    assert result.exit_code == 0, result.output
    record, told = records.read(place / "fresh"), json.loads((place / "told").read_text())
    assert told["events"] == ["done", "passed"] and told["checkpoint"] == str(place / "fresh")
    assert told["gate"] == record.gate.model_dump() and told["registry"] == record.registry.model_dump() and told["bits"] == 4
    assert told["evaluation"]["kl"] == record.evaluation.kl and told["mlflow_run"] == record.mlflow.run_id
    assert record.notified["command"].error is None and record.config["gate"]["max_gb"] == 0.1
    # the same command again: nothing is done, nobody is told, no second version
    assert quantize(place / "fresh", 4, *STRICT, "gate.max_gb=0.1", command, "notify.when=[passed]").exit_code == 0
    assert json.loads((place / "told").read_text()) == told and registry(place)[0] == {1: "sh"}
    # a gate that is gone leaves no verdict behind
    assert quantize(place / "fresh", 4).exit_code == 0
    record = records.read(place / "fresh")
    assert record.gate is None and record.registry is None and tags(place, "fresh")["gptq.gate"] == ""


def test_with_a_key_in_the_folder_a_version_keeps_its_files(place, quantize):
    nightly, limits = place / "nightly-{key}", ["gate.max_kl=100", "gate.register_as=tiny"]
    for bits in (8, 4, 4):
        result = quantize(nightly, bits, *limits)
        assert result.exit_code == 0, result.output
    assert "unchanged" in result.stderr
    found = MlflowClient(tracking_uri=f"sqlite:///{place}/mlflow.db").search_model_versions("name='tiny'")
    folders = {str(version.version): Path(version.tags["gptq.checkpoint"]) for version in found}
    assert len(folders) == 2 and len(set(folders.values())) == 2 and all((path / "manifest.jsonl").is_file() for path in folders.values())
    assert all(path.name.startswith("nightly-") and "{" not in path.name for path in folders.values())


def test_hooks_that_fail_cost_a_note(place, quantize):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/hook"
        result = quantize(place / "w4", 4, *STRICT, f"notify.webhook={url}", "notify.seconds=0.3", "notify.command=exit 7")
    passes(result, place)
    assert "notify.webhook does not answer: ReadTimeout" in result.stderr and "ended with code 7" in result.stderr
    assert records.read(place / "w4").notified["webhook"].error


def test_a_webhook_hears_of_a_failed_gate(place, quantize, monkeypatch):
    heard = []
    monkeypatch.setattr("tasks.outcome.notify._post", lambda url, text, seconds: heard.append((url, json.loads(text), seconds)))
    fails(quantize(place / "w2", 2, *STRICT, "notify.webhook=http://127.0.0.1:9/x", "notify.when=[failed]", "notify.seconds=3"), place)
    [(url, told, seconds)] = heard
    assert url.endswith("/x") and seconds == 3 and told["events"] == ["done", "failed"] and told["gate"]["passed"] is False


def test_what_the_registry_did_not_take_is_made_up_for(place, quantize, monkeypatch):
    def away(*_args, **_kwargs):
        raise OSError("the registry is away")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_model_version", away)
        result = quantize(place / "w4", 4, *STRICT)
    assert result.exit_code == 0 and "not registered: OSError: the registry is away" in result.stderr
    assert "not registered; the same command tries again" in result.stdout
    passes(quantize(place / "w4", 4, *STRICT), place)


def test_a_failed_gate_is_exit_1_even_where_prefect_went_away(place, quantize, monkeypatch):
    import httpx

    import flows.quantize
    from tasks.outcome.gate import GateFailedError

    right = flows.quantize.quantize

    def lost(config):
        with pytest.raises(GateFailedError):
            right(config)
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(flows.quantize, "quantize", lost)
    result = quantize(place / "w2", 2, *STRICT)
    assert "computed, not recorded in Prefect" in result.stderr
    fails(result, place)


def test_a_setting_that_stands_nowhere_is_told_before_any_work(place, quantize):
    for setting in ("notify.webhook=env:GPTQ_TEST_NOT_SET", "tracking.uri=env:GPTQ_TEST_NOT_SET"):
        result = quantize(place / "never", 4, setting)
        assert (
            result.exit_code == 2
            and "the environment variable GPTQ_TEST_NOT_SET is not set" in result.stderr
            and not (place / "never").exists()
        )


def test_the_store_may_stand_in_the_environment(place, quantize, monkeypatch):
    monkeypatch.setenv("GPTQ_TEST_STORE", f"sqlite:///{place}/mlflow.db")
    passes(quantize(place / "w4", 4, *STRICT, "tracking.uri=env:GPTQ_TEST_STORE"), place)
    assert records.read(place / "w4").mlflow.uri == "env:GPTQ_TEST_STORE"
