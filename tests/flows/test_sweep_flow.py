"""A sweep from end to end on a model of two blocks: what is shared, what is done again, what a bad cell costs."""

import json
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

from flows.cli.app import app
from tasks.outcome import record as records

# one thread here as in the cells: sums of another number of threads differ in their last digits
pytestmark = pytest.mark.usefixtures("prefect_server", "one_thread")


def call(*args):
    return CliRunner().invoke(app, ["sweep", *(str(arg) for arg in args)])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def run_yaml(home, tiny_llama, corpus):
    path = home / "run.yaml"
    path.write_text(
        json.dumps(
            {
                "model": {"path": str(tiny_llama), "device": "cpu"},
                "quantization": {"dataset": str(corpus)},
                "calibration": {"samples": 8, "seqlen": 64},
                "evaluation": {"samples": 8, "seqlen": 64},
                "tracking": {"uri": f"sqlite:///{home}/mlflow.db"},
            }
        )
    )
    return path


@pytest.fixture(scope="module")
def first(home, run_yaml):
    """Two widths by two groups, one of which fits nothing, and a cell that is no valid config."""
    (home / "sweep.yaml").write_text(
        json.dumps(
            {
                "base": str(run_yaml),
                "grid": {"bits": [3, 4], "group_size": [32, 100]},
                "exclude": [{"bits": 4, "group_size": 100}],
                "cells": [{"bits": 7}],
                "dir": str(home / "s"),
                "max_parallel": 2,
                "threads": 1,
                "choose": {"rule": "best_within_size", "max_gb": 1},
            }
        )
    )
    result = call(home / "sweep.yaml")
    return result, json.loads((home / "s" / "sweep.json").read_text())


def rows(found):
    return {row["name"]: row for row in found["cells"]}


def mlflow_runs(home):
    client = MlflowClient(tracking_uri=f"sqlite:///{home}/mlflow.db")
    return client.search_runs([client.get_experiment_by_name("gptq").experiment_id])


def test_bad_cells_are_told_with_their_reasons_and_the_others_complete(first):
    result, found = first
    assert result.exit_code == 1 and "2 of 4 cells failed" in result.stderr
    assert {name: row["status"] for name, row in rows(found).items()} == {
        "bits=3_group_size=32": "done",
        "bits=4_group_size=32": "done",
        "bits=3_group_size=100": "invalid",
        "bits=7": "invalid",
    }
    assert "does not divide" in rows(found)["bits=3_group_size=100"]["error"] and "bits = 7" in result.stdout
    assert found["front"] == ["bits=3_group_size=32", "bits=4_group_size=32"]
    assert found["recommended"]["name"] == "bits=4_group_size=32" and "recommended: bits=4_group_size=32" in result.stdout


def test_the_report_lies_in_its_folder(first, home):
    text = (home / "s" / "report.html").read_text()
    assert 'id="plot-front-kl"' in text and "does not divide" in text
    assert all(row["original_bytes"] > row["bytes"] for row in first[1]["cells"] if row["status"] == "done")
    cell = CliRunner().invoke(app, ["report", str(home / "s" / "bits=4_group_size=32")])
    assert cell.exit_code == 0 and (home / "s" / "bits=4_group_size=32.report.html").is_file()


def test_a_cell_is_what_a_single_run_writes(first, home, run_yaml):
    out = home / "single"
    result = CliRunner().invoke(app, ["quantize", str(run_yaml), "--bits", "4", "--group-size", "32", "--out", str(out)])
    assert result.exit_code == 0, result.output
    cell = home / "s" / "bits=4_group_size=32"
    assert {path.name for path in out.iterdir()} == {path.name for path in cell.iterdir()}
    assert [path.name for path in out.iterdir() if path.read_bytes() != (cell / path.name).read_bytes()] == []
    assert records.read(out).evaluation.kl == records.read(cell).evaluation.kl


def test_mlflow_has_a_parent_and_a_child_for_each_cell(first, home):
    _, found = first
    runs = {run.info.run_name: run for run in mlflow_runs(home)}
    parent = runs["tiny-llama sweep s"]
    assert parent.info.run_id == found["mlflow"]["run_id"] and parent.data.tags["gptq.recommended"] == "bits=4_group_size=32"
    assert parent.data.metrics["cells/failed"] == 2 and parent.info.status == "FAILED"
    for name in found["front"]:
        assert runs[f"tiny-llama {name}"].data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert runs[f"tiny-llama {name}"].data.metrics["kl"] == rows(found)[name]["kl"]
    artifacts = {item.path for item in MlflowClient(tracking_uri=f"sqlite:///{home}/mlflow.db").list_artifacts(parent.info.run_id)}
    assert {"sweep.json", "front.png"} <= artifacts


def test_the_same_sweep_again_computes_and_logs_nothing(first, home, monkeypatch):
    import flows.sweep

    before, stamps = len(mlflow_runs(home)), {path: path.stat().st_mtime_ns for path in (home / "s").rglob("*.safetensors")}
    monkeypatch.setattr(flows.sweep, "sweep", lambda config: pytest.fail("the flow was started"))
    result = call(home / "sweep.yaml")
    assert result.exit_code == 1 and "unchanged" in result.stderr and "recommended: bits=4_group_size=32" in result.stdout
    assert len(mlflow_runs(home)) == before and all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def test_a_width_more_computes_only_the_new_cells_in_the_same_parent(first, home, run_yaml):
    stamps = {path: path.stat().st_mtime_ns for path in (home / "s").rglob("model-*.safetensors")}
    parent = first[1]["mlflow"]["run_id"]
    result = call(
        run_yaml,
        "--grid",
        "bits=2,3,4",
        "--grid",
        "group_size=32",
        "--out",
        home / "s",
        "--set",
        "choose={rule: best_within_size, max_gb: 1}",
        "--json",
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["computed"] == ["bits=2_group_size=32"] and len(found["cells"]) == 3 and found["mlflow"]["run_id"] == parent
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def test_a_cell_that_was_lost_is_done_again_and_no_other(first, home, run_yaml):
    shutil.rmtree(home / "s" / "bits=3_group_size=32")
    result = call(
        run_yaml,
        "--grid",
        "bits=3,4",
        "--grid",
        "group_size=32",
        "--out",
        home / "s",
        "--set",
        "choose={rule: best_within_size, max_gb: 1}",
        "--json",
    )
    assert result.exit_code == 0 and json.loads(result.stdout)["computed"] == ["bits=3_group_size=32"]


def test_cells_without_memory_or_time_are_reported_beside_one_that_has_both(home, run_yaml, monkeypatch):
    import tasks.sweep.jobs

    real = tasks.sweep.jobs.jobs

    def jobs(*args):
        found = real(*args)
        for bits, change in ((2, {"memory_gb": 1e-6}), (3, {"kind": "nothing"})):  # the second: a bug in the worker
            found[f"bits={bits}_group_size=32"] = found[f"bits={bits}_group_size=32"].model_copy(update=change)
        return found

    monkeypatch.setattr(tasks.sweep.jobs, "jobs", jobs)
    result = call(
        run_yaml,
        "--grid",
        "bits=2,3,4",
        "--grid",
        "group_size=32",
        "--out",
        home / "bad",
        "--set",
        "limits.retries=0",
        "--set",
        "max_parallel=1",
        "--set",
        "choose.max_perplexity_increase=100",
        "--json",
    )
    found = rows(json.loads(result.stdout))
    assert result.exit_code == 1
    assert [found[f"bits={bits}_group_size=32"]["status"] for bits in (2, 3, 4)] == ["memory", "failed", "done"]
    assert "tag 'nothing' found using 'kind'" in found["bits=3_group_size=32"]["error"]
    monkeypatch.undo()
    result = call(
        run_yaml,
        "--grid",
        "bits=2,3,4",
        "--grid",
        "group_size=32",
        "--out",
        home / "bad",
        "--set",
        "choose.max_perplexity_increase=100",
        "--json",
    )
    assert result.exit_code == 0 and len(json.loads(result.stdout)["computed"]) == 2


def test_a_cell_that_takes_too_long_is_ended(home, run_yaml, monkeypatch):
    args = [run_yaml, "--grid", "bits=3,4", "--set", "quantization.group_size=32", "--out", home / "late", "--json"]
    result = call(*args, "--set", "limits.minutes=0.001", "--set", "max_parallel=1")
    found = rows(json.loads(result.stdout))
    assert result.exit_code == 1 and {row["status"] for row in found.values()} == {"time"}
    assert "limits.minutes = 0.001" in found["bits=3"]["error"] and "2 of 2 cells failed" in result.stderr


def test_hooks_are_told_once_and_again_when_something_has_changed(home, run_yaml):
    args = [
        run_yaml,
        "--set",
        "quantization.group_size=32",
        "--out",
        home / "told",
        "--json",
        "--set",
        "choose.max_perplexity_increase=100",
        "--set",
        f"notify.command=cat >> {home}/told.txt; echo >> {home}/told.txt",
    ]

    def told(*grid):
        assert call(*args, "--grid", *grid).exit_code == 0
        return len((home / "told.txt").read_text().splitlines())

    assert told("bits=4") == 1
    # sweep.json is written again for another reason: MLflow had not taken the parent
    path = home / "told" / "sweep.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | {"mlflow": found["mlflow"] | {"error": "was away"}}))
    assert told("bits=4") == 1
    assert told("bits=3,4") == 2


def test_a_text_that_has_changed_asks_for_overwrite(home, run_yaml, tmp_path, corpus):
    text = tmp_path / "text.txt"
    text.write_text(Path(corpus).read_text())
    args = [
        run_yaml,
        "--grid",
        "bits=4",
        "--set",
        "quantization.group_size=32",
        "--set",
        f"quantization.dataset={text}",
        "--out",
        tmp_path / "s",
        "--json",
        "--set",
        "choose.max_perplexity_increase=100",
    ]
    assert call(*args).exit_code == 0
    text.write_text(Path(corpus).read_text()[1000:])
    result = call(*args)
    assert result.exit_code == 1 and "--overwrite" in result.stderr
    assert call(*args, "--overwrite").exit_code == 0


def test_the_text_is_read_once_and_the_original_run_once(home, run_yaml, monkeypatch):
    import tasks.request.texts
    import tasks.sweep.jobs

    read, stored = [], []
    split, jobs = tasks.request.texts.split_windows, tasks.sweep.jobs.jobs
    monkeypatch.setattr(tasks.request.texts, "split_windows", lambda *args: read.append(args) or split(*args))
    monkeypatch.setattr(tasks.sweep.jobs, "jobs", lambda *args: stored.append(args[-1]) or jobs(*args))
    result = call(run_yaml, "--grid", "bits=3,4,8", "--set", "quantization.group_size=64", "--out", home / "shared")
    assert result.exit_code == 0, result.output
    [file] = (home / "shared" / "shared").glob("original-*.npy")
    assert len(read) == 1 and list(stored[0].values()) == [str(file)]


def test_screening_ranks_without_checkpoints_and_says_so(home, run_yaml):
    args = [
        run_yaml,
        "--grid",
        "bits=2,4,8",
        "--grid",
        "group_size=32",
        "--mode",
        "screening",
        "--out",
        home / "screen",
        "--set",
        "choose.max_perplexity_increase=0.2",
    ]
    result = call(*args)
    assert result.exit_code == 0, result.output
    found = json.loads((home / "screen" / "sweep.json").read_text())
    assert found["mode"] == "screening" and "screening" in result.stdout and "mode: exact" in result.stdout
    kl = [rows(found)[f"bits={bits}_group_size=32"]["kl"] for bits in (2, 4, 8)]
    assert kl == sorted(kl, reverse=True)
    assert not list((home / "screen").rglob("model-*.safetensors")) and not list((home / "screen").rglob("manifest.jsonl"))
    # what screening does not look at makes no other work: both cells have its figures
    both = call(*args[:2], "bits=4", "--grid", "backend=auto,torch", *args[3:], "--json")
    assert [row["status"] for row in json.loads(both.stdout)["cells"]] == ["done", "done"], both.output
    again = call(*args[:2], "bits=2,3,4,8", *args[3:], "--json")
    assert json.loads(again.stdout)["computed"] == ["bits=3_group_size=32"]
    assert [run.data.tags["gptq.mode"] for run in mlflow_runs(home) if run.info.run_name == "tiny-llama sweep screen"] == ["screening"]


def test_two_grids_that_differ_in_nothing_but_the_choice_share_their_cells(home, run_yaml):
    out = ["--grid", "bits=3,4,8", "--set", "quantization.group_size=64", "--out", home / "shared", "--json"]
    small = call(run_yaml, *out, "--set", "choose={rule: best_within_size, max_gb: 0.001}")
    large = call(run_yaml, *out, "--set", "choose={rule: best_within_size, max_gb: 1}")
    assert json.loads(large.stdout)["recommended"]["name"] == "bits=8" and json.loads(large.stdout)["computed"] == []
    assert small.exit_code == 0 or json.loads(small.stdout)["recommended"]["name"] is None


def test_a_held_cell_is_reported(home, run_yaml):
    import fcntl

    folder = home / "held"
    folder.mkdir()
    with Path(folder / "bits=4.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = call(
            run_yaml,
            "--grid",
            "bits=3,4",
            "--set",
            "quantization.group_size=32",
            "--out",
            folder,
            "--json",
            "--set",
            "choose.max_perplexity_increase=100",
        )
    found = rows(json.loads(result.stdout))
    assert result.exit_code == 1 and (found["bits=3"]["status"], found["bits=4"]["status"]) == ("done", "held")
