"""The flow from end to end on a model of two blocks, with a Prefect server and an MLflow store of its own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from typer.testing import CliRunner

import tasks.steps.evaluate
from flows.cli.app import app
from gptq_core.kernels.dispatch import implementation
from tasks.outcome import record as records

pytestmark = pytest.mark.usefixtures("prefect_server")


def call(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("flow")


@pytest.fixture(scope="module")
def args(home, tiny_llama, corpus):
    return [
        "quantize",
        "--model",
        tiny_llama,
        "--dataset",
        corpus,
        "--bits",
        4,
        "--group-size",
        32,
        "--samples",
        8,
        "--seqlen",
        64,
        "--device",
        "cpu",
        "--out",
        home / "out",
        "--set",
        f"tracking.uri=sqlite:///{home}/mlflow.db",
        "--set",
        "evaluation.samples=8",
    ]


@pytest.fixture(scope="module")
def done(args):
    result = call(*args)
    assert result.exit_code == 0, result.output
    return result


def mlflow_runs(home):
    client = MlflowClient(tracking_uri=f"sqlite:///{home}/mlflow.db")
    return client.search_runs([client.get_experiment_by_name("gptq").experiment_id])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_checkpoint_record_table_mlflow_and_prefect_agree(done, home):
    from prefect.client.orchestration import get_client

    record = records.read(home / "out")
    numbers = record.evaluation
    assert f"{numbers.quantized_perplexity:.3f}" in done.stdout and f"{numbers.kl:.5f}" in done.stdout
    assert numbers.kl > 0 and numbers.windows == 8
    assert [len(block.layers) for block in record.blocks] == [7, 7]
    [run] = mlflow_runs(home)
    assert run.info.run_id == record.mlflow.run_id and run.data.metrics["kl"] == numbers.kl
    for stage in ("read", "forward", "hessian", "factor", "scales", "sweep", "descent", "pack", "write"):
        assert 0 < record.stage_seconds[stage] == run.data.metrics[f"seconds/{stage}"]
    with get_client(sync_client=True) as client:
        flow_run = client.read_flow_run(record.prefect_flow_run_id)
        names = {task.name for task in client.read_task_runs()}
        [link] = [each for each in client.read_artifacts() if each.key == "quantize-mlflow" and each.flow_run_id == flow_run.id]
    assert run.info.run_id in link.data and run.data.tags["prefect.flow_run_id"] == str(flow_run.id)
    assert run.data.tags["prefect.flow_run_url"].endswith(f"/runs/flow-run/{flow_run.id}")
    assert run.data.metrics["system/system_memory_usage_percentage"] > 0 and run.data.tags["gptq.device"] == "cpu"
    assert run.data.tags["gptq.kernels"] == record.kernels == implementation(torch.device("cpu"), torch.float32)
    assert len(run.data.tags["gptq.model_digest"]) == 64 and run.info.end_time == record.finished_ms
    assert flow_run.state.is_completed() and flow_run.parameters["config"]["quantization"]["bits"] == 4
    assert {"quantize_block-0", "quantize_block-1"} <= names


def test_the_report_lies_beside_the_record_and_its_picture_in_prefect(done, home):
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    record = records.read(home / "out")
    text = (home / "out.report.html").read_text()
    assert f"{record.evaluation.quantized_perplexity:.4g}" in text and 'id="plot-errors"' in text
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["quantize-figures"])))
    [shown] = [one.data for one in found if str(one.flow_run_id) == record.prefect_flow_run_id]
    assert "](data:image/png;base64,iVBOR" in shown and str(home / "out.report.html") in shown
    (home / "out.report.html").unlink()
    result = call("report", home / "out.run.json")
    assert result.exit_code == 0 and (home / "out.report.html").read_text() == text


def test_a_report_that_cannot_be_written_costs_a_note(done, home, args, monkeypatch):
    def fails(*_args):
        raise OSError("the disk is full")

    monkeypatch.setattr("tasks.report.page.write", fails)
    result = call(*args)
    assert result.exit_code == 0 and "no report: OSError: the disk is full" in result.stderr


def test_nothing_that_differs_between_runs_is_in_the_checkpoint(done, home, args):
    again = [home / "again" if arg == home / "out" else arg for arg in args]
    assert call(*again).exit_code == 0
    first, second = files(home / "out"), files(home / "again")
    # the card tells the numbers of the evaluation: both runs have evaluated
    assert records.read(home / "out").evaluation and records.read(home / "again").evaluation
    assert first.keys() == second.keys() and [name for name in first if first[name] != second[name]] == []


def test_without_kl_only_the_perplexity_is_measured(done, home, args):
    plain = [home / "plain" if arg == home / "out" else arg for arg in args]
    assert call(*plain, "--set", "evaluation.kl=false").exit_code == 0
    numbers = records.read(home / "plain").evaluation
    assert numbers.kl is None and numbers.top1_agreement is None
    assert numbers.quantized_perplexity == records.read(home / "out").evaluation.quantized_perplexity


def test_a_checkpoint_of_another_config_is_replaced_only_when_asked_to(done, home, args):
    old = home / "replaced"
    shutil.copytree(home / "out", old)
    before, other = files(old), [3 if arg == 4 else old if arg == home / "out" else arg for arg in args]
    result = call(*other)
    assert result.exit_code == 2 and "--overwrite" in result.stderr and result.stderr.count("\n") == 1
    assert files(old) == before
    result = call(*other, "--overwrite")
    assert result.exit_code == 0, result.output
    assert json.loads(call("inspect", old, "--json").stdout)["bits"] == 3


def test_finished_work_is_not_done_twice(done, home, args):
    before, record, runs = files(home / "out"), records.read(home / "out"), len(mlflow_runs(home))
    result = call(*args)
    assert result.exit_code == 0 and "unchanged" in result.stderr
    assert files(home / "out") == before and len(mlflow_runs(home)) == runs
    assert records.read(home / "out").evaluation == record.evaluation


def test_a_failing_evaluation_keeps_the_checkpoint_and_is_made_up_for(home, args, monkeypatch):
    def fails(*_args, **_kwargs):
        raise OSError("the disk is gone")

    args = [home / "kept" if arg == home / "out" else arg for arg in args]
    with monkeypatch.context() as patch:
        patch.setattr("tasks.steps.evaluate.evaluate_pair", fails)
        result = call(*args)
    assert result.exit_code == 1 and "is complete, but its evaluation failed (OSError: the disk is gone)" in result.stderr
    assert (home / "kept" / "manifest.jsonl").is_file() and records.read(home / "kept").evaluation is None
    result = call(*args)
    assert result.exit_code == 0 and records.read(home / "kept").evaluation.kl > 0
    assert len(records.read(home / "kept").blocks) == 2


def test_the_numbers_of_another_runner_are_not_its_own(home, args, monkeypatch):
    args = [home / "ran" if arg == home / "out" else arg for arg in args]
    assert call(*args).exit_code == 0
    before, ours = files(home / "ran"), records.read(home / "ran").evaluation
    assert ours.backend == "torch"
    asked, right = [], tasks.steps.evaluate.evaluate_pair

    def by_torch(*given, backend, **rest):
        asked.append(backend)
        return right(*given, backend=None, **rest)

    monkeypatch.setattr("gptq_core.inference.backends.choose", lambda *_args: None)
    monkeypatch.setattr("tasks.steps.evaluate.evaluate_pair", by_torch)
    result = call(*args, "--set", "quantization.backend=marlin")
    assert result.exit_code == 0 and "unchanged" in result.stderr, result.output
    assert asked == ["marlin"] and records.read(home / "ran").evaluation.backend == "gptq_marlin"
    assert files(home / "ran") == before  # the same checkpoint, judged anew


def test_a_block_that_fails_once_is_tried_again(home, args, monkeypatch):
    from gptq_core.run.engine import Quantization

    right, calls = Quantization.quantize_block, []

    def once(self, index):
        calls.append(index)
        if calls == [0, 1]:
            raise OSError("a hiccup")
        return right(self, index)

    monkeypatch.setattr(Quantization, "quantize_block", once)
    result = call(*[home / "retried" if arg == home / "out" else arg for arg in args])
    assert result.exit_code == 0 and calls == [0, 1, 1], result.output


def test_what_the_engine_refuses_is_not_tried_again(home, args, monkeypatch):
    from gptq_core.errors import FactorizationError
    from gptq_core.run.engine import Quantization

    calls = []

    def never(self, index):
        calls.append(index)
        raise FactorizationError("block 0 cannot be factored")

    monkeypatch.setattr(Quantization, "quantize_block", never)
    result = call(*[home / "refused" if arg == home / "out" else arg for arg in args])
    assert result.exit_code == 1 and calls == [0] and "error: block 0 cannot be factored" in result.stderr


def test_evaluate_and_inspect(done, home, corpus, tiny_llama):
    result = call("evaluate", home / "out", "--json")
    same = json.loads(result.stdout)
    told = records.read(home / "out").evaluation
    assert same["kl"] == pytest.approx(told.kl) and same["digest"] == told.digest
    other = json.loads(call("evaluate", home / "out", "--dataset", corpus, "--samples", 2, "--seqlen", 32, "--json").stdout)
    assert (other["windows"], other["seqlen"], other["original"]) == (2, 32, str(tiny_llama))
    found = json.loads(call("inspect", home / "out", "--json").stdout)
    assert found["bits"] == 4 and len(found["layers"]) == 14
    table = call("inspect", home / "out").stdout
    assert "model.layers.1.mlp.down_proj" in table


def test_without_a_record_only_perplexity_is_known(done, home, corpus):
    moved = home / "moved"
    moved.symlink_to(home / "out")
    result = call("evaluate", moved)
    assert result.exit_code == 2 and "--dataset" in result.stderr
    alone = json.loads(call("evaluate", moved, "--dataset", corpus, "--samples", 2, "--json").stdout)
    assert alone["quantized_perplexity"] > 1 and alone["kl"] is None and alone["original"] is None


def test_prefect_going_away_costs_only_its_own_record(home, args, monkeypatch):
    import httpx

    import flows.quantize

    right = flows.quantize.quantize

    def lost_at_the_end(config):
        right(config)
        raise httpx.ConnectError("refused")

    def lost_at_the_start(config):
        raise RuntimeError("Failed to reach API at http://127.0.0.1:9/api/")

    args = [home / "lost" if arg == home / "out" else arg for arg in args]
    monkeypatch.setattr(flows.quantize, "quantize", lost_at_the_start)
    result = call(*args)
    assert result.exit_code == 1 and result.stderr.startswith("error: Prefect does not answer") and result.stderr.count("\n") == 1
    monkeypatch.setattr(flows.quantize, "quantize", lost_at_the_end)
    result = call(*args)
    assert result.exit_code == 0 and "computed, not recorded in Prefect" in result.stderr
    assert "KL per token" in result.stdout


def test_a_flow_that_the_command_line_did_not_start_looks_first(args, home, monkeypatch):
    import tasks.request.capacity
    from flows.quantize import quantize
    from gptq_core.errors import InputError
    from tasks.config.run import from_dict

    config = from_dict(
        {
            "model": {"path": str(args[2])},
            "quantization": {"bits": 4, "group_size": 32, "dataset": str(args[4])},
            "output": {"dir": str(home / "never")},
        }
    )
    monkeypatch.setattr(tasks.request.capacity, "available_memory", lambda: 1_000_000)
    with pytest.raises(InputError, match="memory: .* are free"):
        quantize(config)
    assert not (home / "never").exists() and not (home / "never.partial").exists()
