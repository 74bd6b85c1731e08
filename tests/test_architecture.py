"""The rooms keep their directions, and importing the engine changes nothing."""

import subprocess
import sys

import pytest

PROBE = """
import logging, random, sys
sys.modules["triton"] = None  # as where it is not installed
import torch

def state():
    return (torch.get_rng_state().sum().item(), torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(), logging.getLogger().level, list(logging.getLogger().handlers),
            random.getstate(), logging.getLogger("gptq_core").handlers)

import transformers  # its own effects are its own
before = state()
import gptq_core
import gptq_core.run.engine, gptq_core.inference.evaluation
after = state()
assert before == after, (before, after)
foreign = {"prefect", "mlflow", "typer", "tasks", "flows"} & set(sys.modules)
assert not foreign, foreign
"""


def run(root, *command):
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def test_imports_go_one_way(request):
    done = run(
        request.config.rootpath,
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))",
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_importing_the_engine_changes_nothing(request):
    done = run(request.config.rootpath, sys.executable, "-c", PROBE)
    assert done.returncode == 0, done.stderr


def test_no_package_under_tests(request):
    # a tests/tasks/__init__.py would shadow `tasks`
    assert not list((request.config.rootpath / "tests").rglob("__init__.py"))
