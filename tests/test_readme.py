"""The README's commands exist, parse, and do on a model of two blocks what they say, as they are written there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from flows.cli.app import app


@pytest.fixture
def commands(request):
    text = (request.config.rootpath / "README.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if shlex.split(line, comments=True)]


def test_make_targets_exist(commands, request):
    makefile = (request.config.rootpath / "Makefile").read_text()
    targets = [words[1] for words in commands if words[0] == "make"]
    assert targets and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_commands_of_the_pipeline_parse(commands):
    group = typer.main.get_command(app)
    found = [words[3:] for words in commands if words[:3] == ["python", "-m", "flows"]]
    assert {words[0] for words in found} >= {"quantize", "evaluate", "inspect"}
    for name, *args in (words for words in found if not words[0].startswith("-")):
        group.commands[name].make_context(name, args)


def test_quick_commands_run(request):
    done = subprocess.run([sys.executable, "-m", "flows", "--help"], cwd=request.config.rootpath, capture_output=True, text=True)
    assert done.returncode == 0 and "quantize" in done.stdout


@pytest.mark.slow
def test_the_pipeline_runs_as_it_is_written(commands, request, prefect_server, tiny_llama, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # what stands for a person's own files, and what configs/quantize.yaml expects to find
    (tmp_path / "configs").symlink_to(request.config.rootpath / "configs")
    text = tmp_path / "short.txt"
    text.write_text(corpus.read_text()[:12_000])
    for link, target in {"DIR": tiny_llama, "FILE.txt": text, "models/my-model": tiny_llama, "data/calibration.txt": text}.items():
        (tmp_path / link).parent.mkdir(exist_ok=True)
        (tmp_path / link).symlink_to(target)
    ran = []
    for name, *args in (words[3:] for words in commands if words[:3] == ["python", "-m", "flows"]):
        if name in ("serve", "ui"):
            continue  # run until they are interrupted: tests/flows/test_schedules.py, tests/flows/test_ui.py
        if name == "quantize" and "quantize" in ran:
            # a second run of the same OUT is refused, as it should be
            args = [arg.replace("output.dir=OUT", "output.dir=OUT3") for arg in args]
        result = CliRunner().invoke(app, [name, *args])
        assert result.exit_code == 0, (name, args, result.output)
        ran.append(name)
    assert ran == ["--help", "quantize", "plan", "quantize", "evaluate", "inspect", "report", "dequantize", "track-pending", "sweep"]
    for made in ("OUT", "OUT3", "DENSE"):
        assert (tmp_path / made / "config.json").is_file()
    assert (tmp_path / "mlflow.db").is_file()
    assert (tmp_path / "OUT.report.html").is_file() and (tmp_path / "SWEEP" / "report.html").is_file()


def test_the_servers_it_names_are_installed(commands):
    tools = {words[0] for words in commands} - {"make", "python"}
    assert tools == {"prefect"}
    beside = Path(sys.executable).parent
    assert [tool for tool in tools if not any((beside / (tool + end)).is_file() for end in ("", ".exe"))] == []


def test_the_library_it_shows_exists():
    from gptq_core import load_quantized

    assert callable(load_quantized)
