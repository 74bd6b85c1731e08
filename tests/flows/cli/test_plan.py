"""`plan` on the command line: everything at once, without Prefect and without weights."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from flows.cli.app import app

KEYS = {
    "loads",
    "quantized_layers",
    "left",
    "bits_per_weight",
    "bytes",
    "original_bytes",
    "blocks",
    "device",
    "dtype",
    "host_bytes",
    "mapped_bytes",
    "device_bytes",
    "stage_bytes",
    "read_bytes",
    "write_bytes",
    "seconds",
    "total_seconds",
    "fits",
    "shortages",
    "notes",
}


def request_of(tmp_path, model, corpus):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {{path: {model}, device: cpu}}\nquantization: {{bits: 4, group_size: 32, dataset: {corpus}}}\n"
        f"output: {{dir: {tmp_path / 'out'}}}\n"
    )
    return str(path)


def test_the_plan_tells_memory_bytes_and_seconds(tiny_llama, corpus, tmp_path):
    request = request_of(tmp_path, tiny_llama, corpus)
    found = json.loads(CliRunner().invoke(app, ["plan", request, "--json", "--set", "quantization.dynamic={'-:.*0.mlp': {}}"]).stdout)
    assert set(found) == KEYS and found["blocks"] == 2 and found["fits"] is True
    assert set(found["left"].values()) == {"dynamic: -:.*0.mlp"} and len(found["left"]) == 3
    assert found["total_seconds"] == sum(found["seconds"].values()) > 0
    assert found["original_bytes"] > found["mapped_bytes"] > 0 and found["host_bytes"] > found["mapped_bytes"]
    assert found["device_bytes"] == 0
    assert found["write_bytes"] > found["bytes"]
    table = CliRunner().invoke(app, ["plan", request, "--set", "quantization.dynamic={'-:.*0.mlp': {}}"]).stdout
    for said in ("peak memory", "reads", "writes", "about", "gate_proj and 2 more: dynamic: -:.*0.mlp", "vLLM"):
        assert said in table


def test_a_plan_that_does_not_fit_says_so(tiny_llama, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.request.capacity.available_memory", lambda: 1000)
    request = request_of(tmp_path, tiny_llama, corpus)
    assert json.loads(CliRunner().invoke(app, ["plan", request, "--json"]).stdout)["fits"] is False
    shown = CliRunner().invoke(app, ["plan", request])
    assert shown.exit_code == 0 and "does not fit: memory" in shown.stdout
    refused = CliRunner().invoke(app, ["quantize", request])
    assert refused.exit_code == 2 and refused.stderr.count("\n") == 1 and "must fit" in refused.stderr


def test_a_config_alone_is_planned_and_not_run(tiny_llama, corpus, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text((tiny_llama / "config.json").read_text())
    request = request_of(tmp_path, tmp_path / "model", corpus)
    shown = CliRunner().invoke(app, ["plan", request])
    assert shown.exit_code == 0 and "config.json only" in shown.stdout
    refused = CliRunner().invoke(app, ["quantize", request])
    assert refused.exit_code == 2 and "no *.safetensors" in refused.stderr


@pytest.mark.slow
def test_the_plan_starts_no_prefect_and_writes_nothing(tiny_llama, corpus, tmp_path):
    request = request_of(tmp_path, tiny_llama, corpus)
    before = sorted(tmp_path.rglob("*"))
    code = (
        "import sys; from flows.cli.app import app\n"
        f"app(['plan', {request!r}], standalone_mode=False)\n"
        "print(sorted({'prefect', 'mlflow'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]" and sorted(tmp_path.rglob("*")) == before
