"""Measures by the command line: in the record, told, made up for where they failed, and shared by the cells of a sweep."""

import json

import pytest
from typer.testing import CliRunner

import tasks.evaluation.scores
from flows.cli.app import app
from tasks.outcome import record as records

pytestmark = pytest.mark.usefixtures("prefect_server", "one_thread")
CHOICE = "evaluation.measures=[{kind: tasks, tasks: [embedded_choice], include: flows/embedded/tasks, limit: 6}]"


def call(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("measured")


@pytest.fixture(scope="module")
def quantize(home, tiny_llama, corpus):
    def run(name, *settings):
        args = [
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
            home / name,
        ]
        for setting in (f"tracking.uri=sqlite:///{home}/mlflow.db", "evaluation.samples=4", *settings):
            args += ["--set", setting]
        return call(*args)

    return run


def test_measures_are_in_the_record_and_a_gate_on_recovery_judges_them(quantize, home):
    result = quantize("out", CHOICE, "gate.min_recovery=0.01")
    assert result.exit_code == 0, result.output
    record = records.read(home / "out")
    rows = record.evaluation.measures
    assert {(row.name, row.metric) for row in rows} == {("embedded_choice", "acc"), ("embedded_choice", "acc_norm")}
    assert all(row.sentence in result.stderr for row in rows)
    assert record.evaluation.recovery == min(row.recovery for row in rows) and record.gate.passed
    assert record.stage_seconds["measure"] > 0 and record.evaluation.overlap.share < 0.05
    assert "embedded_choice" in (home / "out" / "README.md").read_text()
    again = quantize("out", CHOICE, "gate.min_recovery=100")
    assert again.exit_code == 1 and "min_recovery" in again.stderr and "unchanged" in again.stderr


def test_a_measure_that_fails_costs_no_number_and_is_made_up_for(quantize, home, monkeypatch):
    def broken(*_args):
        raise RuntimeError("the device is gone")

    evaluated = []
    right = tasks.run.Steps.evaluate.fn
    monkeypatch.setattr(tasks.run.Steps.evaluate, "fn", lambda *args: evaluated.append(1) or right(*args))
    with monkeypatch.context() as patch:
        patch.setattr(tasks.evaluation.scores._Judge, "results", broken)
        result = quantize("again", CHOICE, "gate.max_kl=100", "gate.register_as=tiny")
    assert "registry" not in result.stdout
    assert result.exit_code == 1 and "RuntimeError: the device is gone" in result.stderr
    first = records.read(home / "again")
    assert first.evaluation.kl > 0 and first.evaluation.measures == [] and evaluated == [1]
    result = quantize("again", CHOICE)
    assert result.exit_code == 0, result.output
    record = records.read(home / "again")
    assert record.evaluation.kl == first.evaluation.kl and len(record.evaluation.measures) == 2
    assert evaluated == [1] and record.evaluation_error is None, "the held-out text was judged once"
    assert record.seconds > first.seconds
    # measures that fail on finished work leave none of the former ones behind, nor a recovery for the gate
    with monkeypatch.context() as patch:
        patch.setattr(tasks.evaluation.scores._Judge, "results", broken)
        result = quantize("again", CHOICE.replace("6", "5"), "gate.min_recovery=0.01", "gate.register_as=tiny")
    record = records.read(home / "again")
    assert result.exit_code == 1 and record.evaluation.measures == [] and not record.gate.passed and record.registry is None


def test_another_measure_is_added_to_finished_work(quantize, home, corpus):
    quantize("out", CHOICE)
    before = records.read(home / "out")
    result = quantize("out", f"evaluation.measures=[{corpus}]")
    assert result.exit_code == 0, result.output
    record = records.read(home / "out")
    assert [row.kind for row in record.evaluation.measures] == ["perplexity"] and record.evaluation.recovery is None
    assert record.evaluation.kl == before.evaluation.kl and record.blocks == before.blocks


def test_a_task_that_is_not_known_costs_no_work(quantize, home):
    result = quantize("never", "evaluation.measures=[{kind: tasks, tasks: [embedded_chioce], include: flows/embedded/tasks}]")
    assert result.exit_code == 2 and "'embedded_chioce' is not known" in result.stderr and not (home / "never").exists()


def test_judging_on_the_calibration_text_is_a_note_and_strict_refuses_it(quantize, home, corpus):
    result = quantize("seen", f"evaluation.dataset={corpus}")
    assert result.exit_code == 0 and "100.0% of the calibration text stands in the judged one" in result.stderr
    assert records.read(home / "seen").evaluation.overlap.calibration_share == 1
    strict = quantize("strict", f"evaluation.dataset={corpus}", "evaluation.strict=true")
    assert strict.exit_code == 2 and "evaluation and calibration overlap" in strict.stderr and not (home / "strict").exists()


def test_the_cells_of_a_sweep_share_the_originals_scores(home, tiny_llama, corpus):
    config = home / "run.yaml"
    config.write_text(
        json.dumps(
            {
                "model": {"path": str(tiny_llama), "device": "cpu"},
                "quantization": {"dataset": str(corpus), "group_size": 32},
                "calibration": {"samples": 8, "seqlen": 64},
                "evaluation": {"samples": 4, "seqlen": 64},
                "tracking": {"uri": f"sqlite:///{home}/mlflow.db"},
            }
        )
    )
    result = call(
        "sweep", config, "--grid", "bits=3,4", "--out", home / "s", "--set", CHOICE, "--set", "choose.max_perplexity_increase=9", "--json"
    )
    assert result.exit_code == 0, result.output
    cells = [records.read(row["out"]).evaluation.measures for row in json.loads(result.stdout)["cells"]]
    assert len(cells) == 2 and cells[0][0].original == cells[1][0].original
    [kept] = (home / "s" / ".originals").glob("*.json")
    assert kept.stat().st_mtime_ns < (home / "s" / "bits=3" / "README.md").stat().st_mtime_ns, "scored before the cells"
