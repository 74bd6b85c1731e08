"""What `serve` reads and refuses, and how a dead run is told from a live one. What it runs: test_schedules.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from typer.testing import CliRunner

from flows.cli.app import app
from flows.serving import dead_runs
from flows.serving.deployments import read, runner_deployment
from gptq_core.config import Allocate, QuantizeConfig
from tasks.config.evaluation import EvaluationRequest
from tasks.config.measures import TasksMeasure
from tasks.config.run import ModelConfig
from tasks.config.sweep import LimitsConfig, SweepConfig


def call(*args):
    return CliRunner().invoke(app, ["serve", *map(str, args)])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "prefect.yaml cannot be read: No such file or directory; run the command in the checkout, or give --file"),
        ("deployments: [", "is not valid YAML"),
        ("deployments: []", "deployments = []: list should have at least 1 item"),
        ("deployments: [{name: a}]", "entrypoint is required"),
        ("deployments: [{name: a, entrypoint: b.c, schedules: [{cron: '0 2 * * *'}]}]", "timezone is required"),
        (
            "deployments: [{name: a, entrypoint: b.c, concurrency_limit: {limit: 1, collision_strategy: WAIT}}]",
            "collision_strategy = 'WAIT'",
        ),
        ("deployments: [{name: b, entrypoint: b.c}]", "--name a: prefect.yaml has no such deployment; known are b"),
    ],
)
def test_a_wrong_file_is_one_line_and_exit_2(tmp_path, monkeypatch, text, said):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "prefect.yaml").write_text(text)
    result = call("--name", "a")
    assert result.exit_code == 2 and said in result.stderr and result.stderr.count("\n") == 1, result.output


def test_without_a_server_it_says_how_to_start_one(request, monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        result = call("--file", request.config.rootpath / "prefect.yaml")
    assert result.exit_code == 2 and "`prefect server start`, then `prefect config set PREFECT_API_URL=" in result.stderr


def test_names_choose(request):
    file = request.config.rootpath / "prefect.yaml"
    assert [row.name for row in read(file)] == ["nightly-quantize", "weekly-sweep"]
    assert [row.name for row in read(file, ["weekly-sweep"])] == ["weekly-sweep"]
    assert read(file)[0].schedules[0].timezone == "UTC" and read(file)[0].concurrency_limit.collision_strategy == "CANCEL_NEW"


def test_every_key_of_a_deployment_reaches_prefect(tmp_path):
    path = tmp_path / "prefect.yaml"
    path.write_text(
        "deployments:\n- {name: mine, entrypoint: flows.evaluate.evaluate, description: words, tags: [a], enforce_parameter_schema: false,"
        " concurrency_limit: {limit: 2, collision_strategy: ENQUEUE}, parameters: {request: {checkpoint: here}},"
        " schedules: [{cron: '1 2 3 4 *', timezone: Europe/Berlin, active: false}]}\n"
    )
    made = runner_deployment(read(path)[0])
    assert (made.name, made.entrypoint, made.description, made.tags) == ("mine", "flows.evaluate.evaluate", "words", ["a"])
    assert (made.enforce_parameter_schema, made.parameters) == (False, {"request": {"checkpoint": "here"}})
    assert made.concurrency_limit == 2 and made.concurrency_options.collision_strategy == "ENQUEUE"
    [when] = made.schedules
    assert (when.schedule.cron, when.schedule.timezone, when.active) == ("1 2 3 4 *", "Europe/Berlin", False)


def test_the_form_in_prefect_s_ui_shows_the_descriptions():
    from prefect.utilities.callables import parameter_schema

    from flows.evaluate import evaluate
    from flows.quantize import quantize
    from flows.sweep import sweep

    shown = {
        (quantize, "ModelConfig", "dtype"): ModelConfig,
        (quantize, "QuantizeConfig", "bits"): QuantizeConfig,
        (quantize, "Allocate", "budget_gb"): Allocate,
        (quantize, "TasksMeasure", "num_fewshot"): TasksMeasure,
        (sweep, "LimitsConfig", "memory_gb"): LimitsConfig,
        (sweep, "SweepConfig", "grid"): SweepConfig,
        (evaluate, "EvaluationRequest", "backend"): EvaluationRequest,
    }
    for (flow, name, key), schema in shown.items():
        found = parameter_schema(flow).model_dump()["definitions"][name]["properties"][key]
        assert found["description"] == schema.model_fields[key].description, (name, key)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="only where there is /proc")
def test_a_process_is_dead_only_where_this_machine_can_know_it():
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    here, theirs = dead_runs.labels(os.getpid()), dead_runs.labels(sleeper.pid)
    assert not dead_runs.is_dead(theirs, here)
    assert dead_runs.is_dead(theirs | {dead_runs.PROCESS: f"{sleeper.pid} 1"}, here), "another process with this number"
    sleeper.kill()
    sleeper.wait()
    assert dead_runs.is_dead(theirs, here)
    assert not dead_runs.is_dead(theirs | {dead_runs.SPACE: "pid:[1]"}, here), "of another container"
    assert not dead_runs.is_dead(theirs | {dead_runs.MACHINE: "another"}, here) and not dead_runs.is_dead({}, here)
    assert dead_runs.is_dead(dead_runs.labels(os.getpid()) | {dead_runs.BOOT: "an earlier one"}, here)
