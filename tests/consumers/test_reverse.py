"""The other way round: checkpoints that other writers made, in our loader.

Each is held against an independent dequantization of its files, and against the writer's own reader. Needs gptqmodel 7.7 or
auto-round 0.16, which nothing here installs; the tests of a writer that is missing are left out. In an environment of either:

    HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES= GPTQMODEL_CPU_WORKERS=2 python -m pytest tests/consumers/test_reverse.py
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import logits, save_model, windows

from gptq_core import QuantizedLinear, load_quantized

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with one worker, its choice on two cores, 7.7 cannot load
pytestmark = pytest.mark.consumers

TOKENIZER = Path(__file__).parents[2] / "flows" / "embedded" / "model"


def original(architecture, folder):
    """A model with a tokenizer, without which GPTQModel does not load it."""
    model = save_model(architecture, folder)
    for path in TOKENIZER.glob("tokenizer*"):
        shutil.copy(path, model)
    return model


ONES = {bits: np.int32(sum(1 << shift for shift in range(0, 32, bits))) for bits in (2, 4, 8)}
"""v1 is one less in every field, and of 2, 4 and 8 bits GPTQModel subtracts that from the word: a zero of 0 borrows from its
neighbour, and only adding to the word as a whole gives both back. Of 3 bits it takes each field modulo 8."""


def fields(words, bits):
    """Unsigned fields (n, m) of a little-endian bit stream that runs down the rows of int32 words."""
    stream = np.unpackbits(np.ascontiguousarray(words.T).view(np.uint8), axis=1, bitorder="little")
    return stream.reshape(words.shape[1], -1, bits) @ (1 << np.arange(bits))


def tensors_of(folder):
    return {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}


def dense_by_hand(folder, model):
    """The transformers model of `model` with what numpy reads from the checkpoint in `folder`; and how many linears were packed."""
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    bits = quantization["bits"]
    v1 = (quantization.get("checkpoint_format") or quantization.get("format") or "gptq") == "gptq"
    tensors = tensors_of(folder)
    state, packed = {}, 0
    for name, tensor in tensors.items():
        stem, leaf = name.rsplit(".", 1)
        if leaf == "qweight":
            packed += 1
            codes, qzeros = fields(tensor.numpy(), bits).T, tensors[f"{stem}.qzeros"].numpy()  # codes (in, out)
            scales = tensors[f"{stem}.scales"].float().numpy()
            zeros = fields((qzeros + ONES.get(bits, 0) * v1).T, bits)  # (groups, out)
            if v1 and bits == 3:
                zeros = (zeros + 1) % 8
            group = np.arange(codes.shape[0]) // (codes.shape[0] // scales.shape[0])
            if f"{stem}.g_idx" in tensors:
                group = tensors[f"{stem}.g_idx"].numpy()
            weight = scales[group] * (codes - zeros[group])
            state[f"{stem}.weight"] = torch.from_numpy(weight.T.astype(np.float32))
        elif leaf not in ("qzeros", "scales", "g_idx"):
            state[name] = tensor.float()
    twin = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    report = twin.load_state_dict(state, strict=False)
    assert not report.unexpected_keys
    assert set(report.missing_keys) <= {"lm_head.weight"}  # tied
    return twin, packed


def assert_read(folder, model, by_the_writer):
    """Our loader against numpy, to float32, and against the writer's reader, to float16."""
    quantized = load_quantized(folder)
    twin, packed = dense_by_hand(folder, model)
    assert packed == sum(isinstance(module, QuantizedLinear) for module in quantized.modules()) == 14
    found = logits(quantized, windows().tokens)
    torch.testing.assert_close(found, logits(twin, windows().tokens), rtol=1e-4, atol=1e-5)
    other = logits(by_the_writer, windows().tokens).float()
    assert float((found - other).abs().max()) < 0.02 * float(found.abs().max())
    return quantized


# -- GPTQModel ------------------------------------------------------------------------------------------------------------

BY_GPTQMODEL = [
    {"bits": 4, "group_size": 32},
    {"bits": 4, "group_size": 32, "format": "gptq_v2"},
    {"bits": 4, "group_size": 16, "desc_act": True},
    {"bits": 4, "group_size": -1, "sym": False, "format": "gptq_v2"},
    {"bits": 4, "group_size": 32, "sym": False},
    {"bits": 3, "group_size": 32},
    {"bits": 3, "group_size": 32, "sym": False, "desc_act": True, "format": "gptq_v2"},
    {"bits": 3, "group_size": 16, "sym": False},
    {"bits": 2, "group_size": 16},
    {"bits": 2, "group_size": 32, "sym": False, "format": "gptq_v2"},
    {"bits": 2, "group_size": 16, "sym": False},
    {"bits": 8, "group_size": 32},
    {"bits": 8, "group_size": -1, "desc_act": True, "format": "gptq_v2"},
    {"bits": 8, "group_size": 64, "sym": False, "format": "gptq_v2"},
]


@pytest.mark.parametrize("config", BY_GPTQMODEL, ids=str)
@pytest.mark.parametrize("architecture", ["llama", "qwen2_tied_with_bias"])
def test_a_checkpoint_of_gptqmodel(architecture, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # its quantizer writes logs/ where it stands
    gptqmodel = pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")
    model = original(architecture, tmp_path / "model")
    groups_move = not config.get("desc_act") and config["group_size"] != -1  # 7.7 refuses the rest
    full = {"sym": True, "desc_act": False, "act_group_aware": groups_move} | config
    writer = gptqmodel.GPTQModel.load(
        str(model), gptqmodel.QuantizeConfig(**full, offload_to_disk=False, device="cpu"), dtype=torch.float32
    )
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in windows().tokens]
    writer.quantize(rows, batch_size=2, calibration_sort=None)
    writer.save(str(tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written["checkpoint_format"] == config.get("format", "gptq")
    assert (written["bits"], written["sym"]) == (config["bits"], config.get("sym", True))
    reader = gptqmodel.GPTQModel.load(str(tmp_path / "out"), backend=gptqmodel.BACKEND.TORCH, device="cpu", dtype=torch.float16)
    quantized = assert_read(tmp_path / "out", model, reader.model)
    if config.get("desc_act") and config["group_size"] != -1:
        assert (quantized.model.layers[0].mlp.down_proj.g_idx.diff() < 0).any()


# -- AutoRound ------------------------------------------------------------------------------------------------------------

BY_AUTOROUND = [  # 0.16 writes v1 alone, and refuses 8 bits that are not symmetric
    {"bits": bits, "group_size": size, "sym": sym} for bits in (2, 3, 4, 8) for size in (32, -1) for sym in (True, False) if sym or bits < 8
]


@pytest.mark.parametrize("config", BY_AUTOROUND, ids=str)
def test_a_checkpoint_of_autoround(config, tmp_path):
    auto_round = pytest.importorskip("auto_round", reason="auto-round is not installed")
    model = original("qwen2_tied_with_bias", tmp_path / "model")
    dense = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokens = windows().tokens
    writer = auto_round.AutoRound(
        dense,
        tokenizer,
        **config,
        iters=1,
        dataset=list(tokens.split(2)),
        seqlen=tokens.shape[1],
        nsamples=len(tokens),
        batch_size=2,
        device_map="cpu",
        enable_torch_compile=False,
    )
    writer.quantize()
    writer.save_quantized(str(tmp_path / "out"), format="auto_gptq", inplace=True)
    if config["sym"]:
        own = transformers.AutoRoundConfig(backend="torch")
        reader = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=own, device_map="cpu")
    else:
        reader = with_autorounds_linears(tmp_path / "out", model, config)
    assert_read(tmp_path / "out", model, reader)


def with_autorounds_linears(folder, model, config):
    """0.16 has no loader on the CPU for its asymmetric files, but it has the linear."""
    from auto_round_extension.torch.qlinear_torch_zp import QuantLinear

    reader, _ = dense_by_hand(folder, model)
    tensors = tensors_of(folder)
    for name, module in list(reader.named_modules()):
        if f"{name}.qweight" in tensors:
            has_bias = module.bias is not None
            linear = QuantLinear(config["bits"], config["group_size"], module.in_features, module.out_features, has_bias)
            linear.load_state_dict({leaf: tensors[f"{name}.{leaf}"] for leaf in linear.state_dict()})
            reader.set_submodule(name, linear)
    return reader
