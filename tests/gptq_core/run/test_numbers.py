"""Numbers that are none, or that destroy a layer: named, counted, and never passed on in silence."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import quantize, save_model, windows

from gptq_core import QuantizeConfig, evaluate_pair, load_quantized
from gptq_core.checkpoint.finite import check_finite
from gptq_core.errors import CorruptCheckpointError, EvaluationError, InputError
from gptq_core.inference.evaluation import Comparison, perplexity_of

W4 = QuantizeConfig(bits=4, group_size=32)


def changed(folder, change, architecture="llama"):
    model = save_model(architecture, folder)
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.embed_tokens.weight", (3, 5)),
        ("model.layers.1.input_layernorm.weight", (7,)),
        ("model.layers.0.mlp.down_proj.weight", (2, 1)),
        ("lm_head.weight", (0, 0)),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_source_that_holds_them_is_refused_by_tensor_and_place(name, place, value, tmp_path):
    model = changed(tmp_path / "model", lambda tensors: tensors[name].__setitem__(place, value))
    with pytest.raises(CorruptCheckpointError) as refused:
        quantize(model, tmp_path / "out", W4)
    assert f"{name} holds {value} at {list(place)}" in str(refused.value) and "model.safetensors" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_holds_them_is_refused(tmp_path):
    model = save_model("llama", tmp_path / "model")
    quantize(model, tmp_path / "out", W4)
    [shard] = [path for path in (tmp_path / "out").glob("*.safetensors") if "00001" in path.name]
    tensors = load_file(shard)
    tensors["model.layers.0.mlp.up_proj.scales"][0, 3] = math.nan
    save_file(tensors, shard, {"format": "pt"})
    for use in (
        lambda: load_quantized(tmp_path / "out"),
        lambda: evaluate_pair(str(model), str(tmp_path / "out"), windows(), device="cpu"),
    ):
        with pytest.raises(CorruptCheckpointError, match=r"model.layers.0.mlp.up_proj.scales holds nan at \[0, 3\]"):
            use()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_finite_numbers_of_any_size_pass(dtype):
    edge = torch.tensor([[torch.finfo(dtype).max, torch.finfo(dtype).min, 0.0, torch.finfo(dtype).tiny]], dtype=dtype)
    assert check_finite(edge, "x", "here") is edge
    assert check_finite(torch.empty(0, 3, dtype=dtype), "x", "here").shape == (0, 3)
    assert check_finite(torch.tensor([1, 2]), "x", "here").tolist() == [1, 2]


@pytest.mark.slow
def test_a_bias_beyond_float16_is_refused_by_name(tmp_path):
    name = "model.layers.1.self_attn.q_proj.bias"
    model = changed(tmp_path / "model", lambda tensors: tensors[name].__setitem__(0, 1e5), "qwen2_tied_with_bias")
    with pytest.raises(InputError, match=rf"{name}: reaches 1e\+05, .*float16, up to 65504; leave this linear out by a rule"):
        quantize(model, tmp_path / "out", W4)
    left = QuantizeConfig(bits=4, group_size=32, strict=False, dynamic={r"-:.*1\.self_attn\.(q|k|v)_proj": {}})
    quantize(model, tmp_path / "left", left)
    kept = {name: tensor for path in (tmp_path / "left").glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert float(kept[name][0]) == 1e5


def test_a_layer_of_zeros_has_no_error_and_the_manifest_is_json(tmp_path):
    model = changed(tmp_path / "model", lambda tensors: tensors["model.layers.0.mlp.down_proj.weight"].zero_())
    summary = quantize(model, tmp_path / "out", W4)
    lines = (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=lambda word: pytest.fail(word)) for line in lines]
    [zero] = [layer for record in records for layer in record.get("layers", []) if layer["name"] == "model.layers.0.mlp.down_proj"]
    assert (zero["relative_error"], zero["loss"], zero["fallback"]) == (0.0, 0.0, None)
    assert summary["fallback_layers"] == []


def test_a_destroyed_layer_counts_as_one_that_fell_back(tmp_path):
    """Scales of 1e-9 are zero in float16: what is written is not that layer."""
    name = "model.layers.1.mlp.down_proj"
    model = changed(tmp_path / "model", lambda tensors: tensors[f"{name}.weight"].mul_(1e-8 / tensors[f"{name}.weight"].abs().max()))
    summary = quantize(model, tmp_path / "out", W4)
    assert summary["fallback_layers"] == [name]
    lines = map(json.loads, (tmp_path / "out" / "manifest.jsonl").read_text().splitlines())
    [report] = [layer for line in lines for layer in line.get("layers", []) if layer["name"] == name]
    assert report["fallback"].startswith("destroyed: relative error") and report["relative_error"] > 0.5


@pytest.mark.slow
def test_two_bits_by_the_plainest_recipe_are_rounded_and_not_destroyed(tmp_path):
    plain = QuantizeConfig(bits=2, group_size=-1, recipe="classic")
    assert quantize(save_model("llama", tmp_path / "model"), tmp_path / "out", plain)["fallback_layers"] == []


def test_an_evaluation_without_numbers_fails():
    comparison = Comparison()
    comparison.add(torch.full((2, 3), math.nan), torch.zeros(2, 3), torch.tensor([0, 1]))
    with pytest.raises(EvaluationError, match="KL per token is not finite"):
        comparison.figures()
    with pytest.raises(EvaluationError, match="the mean loss of the checkpoint is nan: its logits are not finite"):
        perplexity_of(math.nan, "the checkpoint")
    with pytest.raises(EvaluationError, match="is 1234.5 nats a token, beyond any perplexity"):
        perplexity_of(1234.5, "the checkpoint")
    assert perplexity_of(2.0, "the checkpoint") == pytest.approx(math.exp(2))
