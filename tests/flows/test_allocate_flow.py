"""Widths chosen by the flow: once, kept beside the work, in the record, and again the same in every later run."""

import json

import pytest
from typer.testing import CliRunner

from flows.cli.app import app
from gptq_core.errors import FactorizationError
from gptq_core.run.engine import Quantization
from gptq_core.search import allocation
from tasks.outcome import record as records

BUDGET = "quantization.allocate={bits: [2, 3, 4, 8], budget_bpw: 3.5}"


def call(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture
def args(tmp_path, tiny_llama, corpus):
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
        tmp_path / "out",
        "--set",
        f"tracking.uri=sqlite:///{tmp_path}/mlflow.db",
        "--set",
        "evaluation.samples=4",
        "--set",
        BUDGET,
    ]


@pytest.fixture
def chosen(monkeypatch):
    """How often widths were chosen."""
    right, calls = allocation.allocate, []

    def counted(*args, **kwargs):
        calls.append(args)
        return right(*args, **kwargs)

    monkeypatch.setattr(allocation, "allocate", counted)
    return calls


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_widths_are_chosen_once_and_recorded(args, chosen, tmp_path, monkeypatch):
    right = Quantization.quantize_block

    def fails(self, index):
        if index == 1:
            raise FactorizationError("block 1 cannot be factored")
        return right(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(Quantization, "quantize_block", fails)
        assert call(*args).exit_code == 1
    file = tmp_path / "out.work" / "allocation.json"
    before = file.read_text()
    result = call(*args)
    assert result.exit_code == 0, result.output
    assert "from disk" in result.stderr, "block 0 was quantized at the same widths"
    record = records.read(tmp_path / "out")
    found = record.allocation
    assert found.model_dump() == json.loads(before) and 3.2 < found.bits_per_weight <= 3.5
    assert record.evaluation.kl > 0 and record.stage_seconds["allocate"] == found.seconds
    assert record.config["quantization"]["allocate"] == {"bits": [2, 3, 4, 8], "budget_bpw": 3.5, "budget_gb": None}
    told = str(found)
    assert told.startswith(f"{found.bits_per_weight:.2f} bits (") and told.endswith(f"predicted KL {found.predicted_kl:.4g}")
    assert told in result.stdout
    layers = {layer["name"]: layer["bits"] for layer in json.loads(call("inspect", tmp_path / "out", "--json").stdout)["layers"]}
    assert layers == {name: unit["bits"] for unit in found.units for name in unit["members"]}
    result = call(*args)
    assert result.exit_code == 0 and "unchanged" in result.stderr and told in result.stdout
    assert len(chosen) == 1 and file.read_text() == before
    # another budget is other work
    other = [BUDGET.replace("3.5", "3.0") if arg == BUDGET else arg for arg in args]
    assert "already holds something else" in call(*other).stderr and len(chosen) == 1
    assert call(*other, "--overwrite").exit_code == 0 and len(chosen) == 2
    assert records.read(tmp_path / "out").allocation.bits_per_weight <= 3.0


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("quantization.allocate={bits: [2, 4], budget_gb: 5}", "quantization.allocate.budget_gb = 5: the quantized linears take"),
        (
            "quantization.allocate={bits: [2, 4], budget_bpw: 5}",
            "quantization.allocate: budget_bpw = 5: must be 2 to 4, the range of the widths [2, 4]",
        ),
        ("output.profile=portable", "output.profile = 'portable' excludes quantization.allocate"),
        ("quantization.dynamic={a: {bits: 8}}", "allocate writes the rules of dynamic itself"),
    ],
)
def test_refused_before_any_work(args, chosen, tmp_path, setting, said):
    result = call(*args, "--set", setting)
    assert result.exit_code == 2 and said in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert chosen == [] and not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()


def test_the_plan_presumes_widths_within_the_budget(tiny_llama, corpus, tmp_path, chosen):
    (tmp_path / "run.yaml").write_text(
        f"model: {{path: {tiny_llama}}}\n"
        f"quantization: {{bits: 4, group_size: 32, dataset: {corpus}, allocate: {{bits: [4, 8], budget_bpw: 5}}}}\n"
    )
    found = json.loads(call("plan", tmp_path / "run.yaml", "--json").stdout)
    assert 4.9 < found["bits_per_weight"] < 5 + 1.7 and chosen == []
    assert {row["consumer"] for row in found["loads"] if not row["loads"]} == {"transformers"}
