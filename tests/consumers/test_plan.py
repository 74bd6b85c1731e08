"""The verdicts of `plan` on GPTQModel and transformers, held against loading the files there. Run as test_gptqmodel.py."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from tiny import logits, quantize, save_model, windows

from gptq_core import QuantizeConfig, load_quantized

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with one worker, its choice on two cores, 7.7 cannot load
gptqmodel = pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")
transformers = pytest.importorskip("transformers")
pytest.importorskip("optimum.gptq", reason="optimum is not installed")
pytestmark = pytest.mark.consumers

EMBEDDED = Path(__file__).parents[2] / "flows" / "embedded" / "model"
W4 = {"bits": 4, "group_size": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_model("llama", tmp_path_factory.mktemp("model") / "llama")
    for path in EMBEDDED.glob("tokenizer*"):  # without one GPTQModel does not load
        shutil.copy(path, folder)
    return folder


def by_gptqmodel(folder):
    return gptqmodel.GPTQModel.load(str(folder), backend=gptqmodel.BACKEND.TORCH, device="cpu", dtype=torch.float16).model


def by_transformers(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)


def works(load, folder):
    """True if it loads and computes what the files say, else what happened."""
    try:
        found = logits(load(folder), windows().tokens).float()
    except (ValueError, RuntimeError, IndexError) as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    expected = logits(load_quantized(folder), windows().tokens)
    off = float((found - expected).abs().max()) / float(expected.abs().max())
    return True if off < 0.02 else f"logits are off by {off:.3f}"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"dynamic": {".*down": {"bits": 8}}},
        {"dynamic": {r".*\.1\.self_attn": {"bits": 3, "group_size": 16}}},
        {"dynamic": {".*down": {"group_size": 64}}},
        {"bits": 3, "dynamic": {".*": {"bits": 4}}},
        {"dynamic": {r"-:.*mlp\.(gate|up)_proj": {}}},
        {"dynamic": {r"-:model\.layers\.0\.mlp\.": {}}},
        {"modules_in_block_to_quantize": [["mlp.down_proj"]]},
        {"modules_in_block_to_quantize": [["mlp.down_proj"]], "dynamic": {".*0.mlp": {"bits": 8}}},
        {"lm_head": True},
        {"lm_head": True, "dynamic": {"lm_head": {"bits": 8}, r"-:.*mlp\.(gate|up)_proj": {}}},
        {"sym": False},
        {"sym": False, "format": "gptq_v2", "dynamic": {r"-:.*o_proj": {}}},
        {"group_size": 8},
    ],
    ids=str,
)
def test_the_verdict_is_what_happens(fields, model, tmp_path):
    made = quantize(model, tmp_path / "out", QuantizeConfig(**W4 | fields))
    verdicts = {record["consumer"]: record for record in made["loads"]}
    for name, load in {"GPTQModel": by_gptqmodel, "transformers": by_transformers}.items():
        happened = works(load, tmp_path / "out")
        assert (happened is True) == verdicts[name]["loads"], (name, happened, verdicts[name]["reasons"])


@pytest.mark.parametrize("changes", [{"sym": False}, {"desc_act": True}], ids=str)
def test_rules_for_zeros_and_order_are_kept_by_gptqmodel(changes, model, tmp_path):
    """transformers' torch kernel would read these two from the tensors; its verdict is for all backends."""
    made = quantize(model, tmp_path / "out", QuantizeConfig(**W4, dynamic={".*down": changes}))
    assert {record["consumer"]: record["loads"] for record in made["loads"]}["GPTQModel"]
    assert works(by_gptqmodel, tmp_path / "out") is True
