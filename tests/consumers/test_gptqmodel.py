"""Our files in the consumers' own code: GPTQModel's torch kernel, and transformers (through optimum), on the CPU.

Needs gptqmodel 7.7 and optimum 2.3, which nothing here installs; without them these tests are left out, with the reason. In an
environment that has them, with pytest and this project's dependencies:

    HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES= GPTQMODEL_CPU_WORKERS=2 python -m pytest tests/consumers -m consumers
"""

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
COMBINATIONS = [
    {"bits": 4, "group_size": 32},
    {"bits": 4, "group_size": 32, "format": "gptq_v2", "sym": False},
    {"bits": 4, "group_size": 16, "desc_act": True},
    {"bits": 4, "group_size": -1, "static_groups": True},
    {"bits": 4, "group_size": 64, "act_group_aware": False, "format": "gptq_v2"},
    {"bits": 3, "group_size": 32},
    {"bits": 3, "group_size": 64, "desc_act": True, "sym": False, "format": "gptq_v2"},
    {"bits": 3, "group_size": -1, "format": "gptq_v2"},
    {"bits": 2, "group_size": 16},
    {"bits": 2, "group_size": 32, "sym": False, "format": "gptq_v2", "static_groups": True},
    {"bits": 2, "group_size": -1, "desc_act": True, "format": "gptq_v2"},
    {"bits": 8, "group_size": 32},
    {"bits": 8, "group_size": -1, "desc_act": True},
    {"bits": 8, "group_size": 64, "sym": False, "format": "gptq_v2", "true_sequential": False},
]


def quantized(architecture, folder, fields):
    """A quantized checkpoint with a tokenizer, without which GPTQModel does not load it."""
    model = save_model(architecture, folder / "model")
    for path in EMBEDDED.glob("tokenizer*"):
        shutil.copy(path, model)
    quantize(model, folder / "out", QuantizeConfig(**fields))
    return folder / "out"


def by_gptqmodel(folder):
    return gptqmodel.GPTQModel.load(str(folder), backend=gptqmodel.BACKEND.TORCH, device="cpu", dtype=torch.float16).model


def by_transformers(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)


@pytest.mark.parametrize("fields", COMBINATIONS, ids=str)
@pytest.mark.parametrize("architecture", ["llama", "qwen2_tied_with_bias"])
@pytest.mark.parametrize("load", [by_gptqmodel, by_transformers])
def test_the_consumer_gives_our_dequantized_logits(load, architecture, fields, tmp_path):
    out = quantized(architecture, tmp_path, fields)
    expected = logits(load_quantized(out), windows().tokens)
    found = logits(load(out), windows().tokens).float()
    # float16 has 11 bits; two blocks of sums lose a few of them. A wrong zero or scale is off by the size of the logits
    assert float((found - expected).abs().max()) < 0.02 * float(expected.abs().max())


def test_asymmetric_v1_loads_in_transformers_only(tmp_path):
    """GPTQModel itself refuses this pair unless it wrote the file: gptq_v2 is the layout for asymmetric checkpoints."""
    out = quantized("llama", tmp_path, {"bits": 4, "group_size": 32, "sym": False})
    expected = logits(load_quantized(out), windows().tokens)
    found = logits(by_transformers(out), windows().tokens).float()
    assert float((found - expected).abs().max()) < 0.02 * float(expected.abs().max())
    with pytest.raises(ValueError, match="sym=False"):
        by_gptqmodel(out)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("load", [by_gptqmodel, by_transformers])
def test_negative_scales(load, bits, tmp_path):
    """The searched scales of `recipe: tuned` take the sign of the side that needs the extra code; nothing in the format forbids it."""
    out = quantized("llama", tmp_path, {"bits": bits, "group_size": 32, "recipe": "tuned"})
    quantized_model = load_quantized(out)
    scales = torch.cat([tensor.flatten() for name, tensor in quantized_model.state_dict().items() if name.endswith(".scales")])
    assert 0.1 < float((scales < 0).float().mean()) < 0.9
    expected = logits(quantized_model, windows().tokens)
    found = logits(load(out), windows().tokens).float()
    assert float((found - expected).abs().max()) < 0.02 * float(expected.abs().max())
