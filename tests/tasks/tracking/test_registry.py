"""The registry, in a database and over a real tracking server: one version a work, and an alias that only the better one takes."""

import hashlib
import re
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient
from servers import TrackingServer

from tasks.config.run import from_dict
from tasks.outcome import record as records
from tasks.outcome.gate import judge
from tasks.outcome.parts import Assembly, MlflowLink, Registration, Text
from tasks.tracking.mlflow_runs import log_to_mlflow
from tasks.tracking.registry import alias_refusal, promote, promote_in_mlflow


@pytest.fixture
def made(tmp_path, migrated):
    """made(name, kl, ...): a config and a logged record that passed its gate, with a folder of its own."""

    shutil.copy(migrated, tmp_path / "mlflow.db")

    def make(name, kl, increase=0.1, digest="e" * 64, uri=None, **gate):
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        (out / "manifest.jsonl").write_text(f'{{"kind": "{name}"}}\n')
        config = from_dict(
            {
                "model": {"path": "m"},
                "quantization": {"bits": 4, "dataset": "t.txt"},
                "output": {"dir": str(out)},
                "tracking": {"uri": uri or f"sqlite:///{tmp_path}/mlflow.db", "experiment": "e", "outbox": str(tmp_path / "outbox")},
                "gate": {"max_gb": 1, "register_as": "m", **gate},
            }
        )
        data = {"file": "f", "digest": digest, "source": "t.txt", "windows": 2, "seqlen": 8, "total_windows": 9}
        assembly = Assembly(bytes=10, original_bytes=40, bits_per_weight=4.2, quantized_layers=4)
        record = records.new(config, name * 8, "2023-11-14T22:13:10Z", Text(**data), Text(**data), assembly)
        record.finished_ms, record.seconds = 1_700_000_000_000, 3.0
        record.evaluation = {
            "original_perplexity": 10.0,
            "quantized_perplexity": 10 * (1 + increase),
            "kl": kl,
            "top1_agreement": None,
            "digest": digest,
        }
        record.gate = judge(config.gate, record.evaluation, record.assembly)
        record.mlflow = log_to_mlflow(config, record)
        assert record.mlflow.error is None
        return config, record

    return make


def versions(config):
    client = MlflowClient(tracking_uri=config.tracking.uri)
    return {str(found.version): found for found in client.search_model_versions("name='m'")}


def holder(config, alias="champion"):
    return str(MlflowClient(tracking_uri=config.tracking.uri).get_model_version_by_alias("m", alias).version)


def test_the_first_version_takes_the_alias_and_tells_all(made):
    config, record = made("one", 0.25)
    outcome = promote.fn(config, record)
    assert outcome == Registration(name="m", version="1", alias="champion", champion=True)
    assert records.read(config.out).registry == outcome and holder(config) == "1"
    version = versions(config)["1"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", version.tags.pop("gptq.alias.champion"))
    assert version.tags == {
        "gptq.key": record.key,
        "gptq.run": record.id,
        "gptq.measure": "kl",
        "gptq.kl": "0.25",
        "gptq.perplexity_increase": repr(10 * 1.1 / 10 - 1),
        "gptq.evaluation": "e" * 64,
        "gptq.checkpoint": str(config.out),
        "gptq.manifest_sha256": hashlib.sha256((config.out / "manifest.jsonl").read_bytes()).hexdigest(),
    }
    assert version.source == config.out.as_uri() and version.run_id == record.mlflow.run_id, "nothing is copied"


def test_the_alias_moves_only_to_a_better_one(made):
    first, worse, better, equal = made("one", 0.25), made("two", 0.5), made("tri", 0.125), made("for", 0.125)
    assert promote_in_mlflow(*first).champion
    lost = promote_in_mlflow(*worse)
    assert (lost.version, lost.champion) == ("2", False)
    assert lost.note == "version 1 keeps the alias: its kl is 0.25, that of this one 0.5"
    won = promote_in_mlflow(*better)
    assert (won.version, won.champion, won.beaten) == ("3", True, "1") and holder(first[0]) == "3"
    assert not promote_in_mlflow(*equal).champion and holder(first[0]) == "3", "as good is not better"


def test_registering_twice_is_registering_once(made):
    config, record = made("one", 0.25)
    assert promote_in_mlflow(config, record) == promote_in_mlflow(config, record) and list(versions(config)) == ["1"]
    # judged anew: other numbers, the same version
    config, again = made("one", 0.125)
    assert again.id != record.id and promote_in_mlflow(config, again).champion
    assert list(versions(config)) == ["1"]
    assert (versions(config)["1"].tags["gptq.kl"], versions(config)["1"].tags["gptq.run"]) == ("0.125", again.id)


def test_the_same_work_elsewhere_is_a_version_of_its_own(made, tmp_path):
    config, record = made("one", 0.25)
    promote_in_mlflow(config, record)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.jsonl").write_text("x")
    moved = config.model_copy(update={"output": config.output.model_copy(update={"dir": str(tmp_path / "other")})})
    assert promote_in_mlflow(moved, record).version == "2" and holder(config) == "1"


def test_a_cut_between_version_and_alias_is_made_up_for(made, monkeypatch):
    config, record = made("one", 0.25)

    def cut(*_args):
        raise OSError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", cut)
        outcome = promote_in_mlflow(config, record)
    assert outcome.error == "OSError: gone" and not outcome.champion
    outcome = promote_in_mlflow(config, record)
    assert (outcome.version, outcome.champion, outcome.error) == ("1", True, None) and holder(config) == "1"


def test_on_another_text_nobody_is_better(made):
    first, other = made("one", 0.25), made("two", 0.125, digest="f" * 64)
    promote_in_mlflow(*first)
    outcome = promote_in_mlflow(*other)
    assert not outcome.champion and "version 1 keeps the alias: not judged by kl on the same windows" in outcome.note
    # the remedy that it names: the holder judged on the new text
    promote_in_mlflow(*made("one", 0.25, digest="f" * 64))
    assert promote_in_mlflow(*other).champion and holder(first[0]) == "2"


def test_a_holder_whose_files_were_replaced_loses_the_alias_even_to_a_worse_one(made):
    config, record = made("one", 0.25)
    promote_in_mlflow(config, record)
    outcome = promote_in_mlflow(
        config, record.model_copy(update={"key": "another", "evaluation": record.evaluation.model_copy(update={"kl": 0.5})})
    )
    assert (outcome.version, outcome.champion, outcome.beaten) == ("2", True, "1") and holder(config) == "2"
    assert outcome.note == "the files of version 1 were replaced by this run, so it loses the alias"


def test_the_measure_decides(made):
    promote_in_mlflow(*made("one", 0.25, increase=0.1))
    loses = made("two", 0.5, increase=0.05)
    assert not promote_in_mlflow(*loses).champion
    wins = made("two", 0.5, increase=0.05, measure="perplexity_increase")
    assert promote_in_mlflow(*wins).beaten == "1"


def test_aliases_and_names_are_those_of_the_gate(made):
    config, record = made("one", 0.25, alias="staging")
    assert promote_in_mlflow(config, record).alias == "staging" and holder(config, "staging") == "1"
    config, record = made("two", 0.5, register_as="another")
    assert promote_in_mlflow(config, record).champion, "an alias belongs to a name"


@pytest.mark.parametrize(
    "own, held, said",
    [
        ({"gptq.kl": "nan"}, None, "its kl is nan"),
        ({}, None, "its kl is nan"),
        ({"gptq.kl": "inf"}, None, "its kl is inf"),
        ({"gptq.kl": "1"}, {}, "not judged by kl"),
        ({"gptq.kl": "1"}, {"gptq.kl": "inf"}, None),
        ({"gptq.kl": "1"}, None, None),
    ],
)
def test_broken_and_missing_numbers(own, held, said):
    text = {"gptq.evaluation": "e"}
    found = alias_refusal({**own, **text, "gptq.checkpoint": "a"}, None if held is None else {**held, **text, "gptq.checkpoint": "b"}, "kl")
    assert found is None if said is None else said in found


def test_a_store_that_is_away_costs_only_the_version(made, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config, record = made("one", 0.25)
    away = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": "http://127.0.0.1:9"})})
    outcome = promote.fn(away, record)
    assert outcome.error and "\n" not in outcome.error and outcome.version is None and not outcome.champion
    assert records.read(config.out).registry == outcome
    assert promote_in_mlflow(config, record.model_copy(update={"mlflow": MlflowLink()})).error == "the run is not in MLflow"
    assert promote_in_mlflow(config, record.model_copy(update={"evaluation": None})).error == "the checkpoint is not evaluated"


@pytest.fixture
def server(tmp_path, migrated):
    shutil.copy(migrated, tmp_path / "server.db")
    found = TrackingServer(tmp_path)
    found.start()
    yield found.address
    found.end()


@pytest.mark.slow
def test_over_a_server_the_tags_tell_the_folder(made, server):
    config, record = made("one", 0.25, uri=server)
    first = promote_in_mlflow(config, record)
    assert first == promote_in_mlflow(config, record), first
    assert (first.error, first.version, first.champion) == (None, "1", True)
    version = versions(config)["1"]
    assert version.source == f"runs:/{record.mlflow.run_id}" and Path(version.tags["gptq.checkpoint"]) == config.out
    assert not promote_in_mlflow(*made("two", 0.5, uri=server)).champion
    assert promote_in_mlflow(*made("tri", 0.125, uri=server)).beaten == "1" and holder(config) == "3"
