"""The README's commands exist and parse; those that are quick and need nothing are run."""

import re
import shlex
import subprocess
import sys

import pytest
import typer

from flows.cli import app


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


def test_the_library_it_shows_exists():
    from gptq_core import load_quantized

    assert callable(load_quantized)
