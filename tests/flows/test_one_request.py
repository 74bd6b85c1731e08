"""A run looks at its model once, whoever starts it: counted on the functions that look."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from flows.cli.app import app
from gptq_core.checkpoint.reader import Checkpoint
from gptq_core.checkpoint.writer import OutputFolder
from gptq_core.model.selection import Selection
from gptq_core.planning.estimate import Estimate
from tasks.config.run import from_dict
from tasks.outcome import record as records
from tasks.request import request as requests

pytestmark = pytest.mark.usefixtures("prefect_server", "one_thread")
ONCE = {"folder": 1, "config": 1, "selection": 1, "estimate": 1, "texts": 1, "lock": 1}


@pytest.fixture
def looked(tiny_llama, monkeypatch):
    """How often each thing was done; folders and configs are the original model's, empty models are anybody's."""
    counts = Counter()

    def count(owner, name, label, counted=lambda *args: True, method=True):
        right = getattr(owner, name)

        def spy(*args, **kwargs):
            counts[label] += counted(*args)
            return right(*args, **kwargs)

        monkeypatch.setattr(owner, name, spy if method else staticmethod(spy))

    count(Checkpoint, "__init__", "folder", lambda self, folder: folder == tiny_llama)
    count(AutoConfig, "from_pretrained", "config", lambda folder: Path(folder) == tiny_llama, method=False)
    count(AutoModelForCausalLM, "from_config", "empty model", method=False)
    count(Selection, "__init__", "selection")
    count(Estimate, "__init__", "estimate")
    count(OutputFolder, "__init__", "lock")
    count(requests, "read_texts", "texts")
    return counts


@pytest.fixture
def data(tiny_llama, corpus, tmp_path, migrated):
    shutil.copy(migrated, tmp_path / "mlflow.db")
    return {
        "model": {"path": str(tiny_llama), "device": "cpu"},
        "quantization": {"bits": 4, "group_size": 32, "dataset": str(corpus)},
        "calibration": {"samples": 4, "seqlen": 32},
        "evaluation": {"samples": 4, "seqlen": 32},
        "output": {"dir": str(tmp_path / "out")},
        "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db", "outbox": str(tmp_path / "outbox")},
    }


def from_the_command_line(config):
    args = ["quantize"]
    for key, value in config.flat().items():
        if value is not None and key.partition(".")[0] in ("model", "calibration", "evaluation", "output", "tracking"):
            args += ["--set", f"{key}={value}"]
    for key in ("bits", "group_size", "dataset"):
        args += ["--set", f"quantization.{key}={getattr(config.quantization, key)}"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output


def from_a_deployment(config):
    from flows.quantize import quantize

    quantize(config)


@pytest.mark.parametrize(
    ("start", "folder"), [(from_the_command_line, "out"), (from_the_command_line, "{key}"), (from_a_deployment, "out")]
)
def test_a_run_looks_once(start, folder, data, looked, tmp_path):
    start(from_dict(data, {"output.dir": str(tmp_path / folder)}))
    [written] = tmp_path.glob("*.run.json")
    assert records.read(written.with_name(written.name.removesuffix(".run.json"))).evaluation.kl > 0
    empty_models = looked.pop("empty model")
    assert looked == ONCE and empty_models <= 2, "one of the original, and one of the checkpoint that is evaluated"
