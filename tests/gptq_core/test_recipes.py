"""What the recipes are for: nearer to the original at equal bits, on a trained model, and the same files after a restart."""

import json
from pathlib import Path

import pytest
import torch
from tiny import bytes_of, dense_twin, logits, quantize, save_model, windows

from gptq_core import Quantization, QuantizeConfig, calibration_windows, evaluate_pair, evaluation_windows, load_quantized
from gptq_core.block import tuning
from gptq_core.block.walk import residual_writers
from gptq_core.data.tokenizer import load_tokenizer
from gptq_core.errors import InputError
from gptq_core.model.architecture import empty_model, find_decoder, linears_of, load_config
from gptq_core.model.capture import Call
from gptq_core.run import block_work

EMBEDDED = Path(__file__).parents[2] / "flows" / "embedded"
RECIPES = ("classic", "tuned", "best", "max")


@pytest.mark.slow
def test_each_recipe_is_nearer_to_the_original_than_the_one_before(tmp_path):
    """The embedded model at 2 bits, where the steps are large; KL on held-out text, on the checkpoint as written."""
    model = EMBEDDED / "model"
    tokenizer = load_tokenizer(str(model))
    calibration = calibration_windows(str(EMBEDDED / "train.parquet"), tokenizer, 64, 256, 0)
    heldout = evaluation_windows(str(EMBEDDED / "heldout.parquet"), tokenizer, 256, 24)
    kl = {}
    for recipe in RECIPES:
        quantize(model, tmp_path / recipe, QuantizeConfig(bits=2, recipe=recipe), calibration)
        kl[recipe] = evaluate_pair(str(model), str(tmp_path / recipe), heldout, device="cpu")["kl"]
    assert kl["tuned"] < 0.6 * kl["classic"]
    assert kl["best"] < 0.8 * kl["tuned"]
    assert kl["max"] < kl["best"]


@pytest.mark.grid
@pytest.mark.parametrize("recipe", ["best", "max"])
@pytest.mark.parametrize("architecture", ["llama", "opt", "gemma3", "bloom"])
def test_a_checkpoint_loads_as_it_was_walked(architecture, recipe, tmp_path):
    model = save_model(architecture, tmp_path / "model")
    result = quantize(model, tmp_path / "out", QuantizeConfig(bits=2, group_size=32, recipe=recipe), windows(16))
    quantized = load_quantized(tmp_path / "out")
    hidden = []
    find_decoder(quantized).blocks[-1].register_forward_hook(lambda _m, _a, out: hidden.append(out[0] if isinstance(out, tuple) else out))
    found = logits(quantized, windows(16).tokens)
    torch.testing.assert_close(hidden[0], result["hidden"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, logits(dense_twin(model, quantized), windows(16).tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["best", "max"])
def test_a_restart_gives_the_same_bytes(recipe, tmp_path):
    """What is replayed from disk restores both streams of activations."""
    model = save_model("llama", tmp_path / "model", num_hidden_layers=3)
    config = QuantizeConfig(bits=3, group_size=32, recipe=recipe)
    quantize(model, tmp_path / "whole" / "out", config)
    with Quantization.open(str(model), config, windows(), tmp_path / "out", device="cpu") as run:
        run.quantize_block(0)
    with Quantization.open(str(model), config, windows(), tmp_path / "out", device="cpu") as run:
        assert [run.quantize_block(index)["resumed"] for index in range(3)] == [True, False, False]
        run.assemble()
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole" / "out")


@pytest.mark.parametrize(
    ("architecture", "writers"),
    [
        ("llama", {"self_attn.o_proj", "mlp.down_proj"}),
        ("opt", {"self_attn.out_proj", "fc2"}),
        ("bloom", {"self_attention.dense", "mlp.dense_4h_to_h"}),
        ("gemma3", set()),  # normalizes before it adds
    ],
)
def test_the_linears_that_write_to_the_residual_stream_are_found(architecture, writers, tmp_path):
    folder = save_model(architecture, tmp_path / "model")
    seen = []

    class Spy(Exception):
        pass

    def spy(block, linears, hidden, call):
        seen.append(residual_writers(block, linears, hidden, call))
        raise Spy

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Spy):
        patch.setattr(block_work.walk, "residual_writers", spy)
        quantize(folder, tmp_path / "out", QuantizeConfig(bits=4, group_size=32, recipe="best"))
    assert seen == [writers]


def test_tuning_that_gains_nothing_is_not_kept_and_told(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "SCALE_RATE", 5.0)
    model = save_model("llama", tmp_path / "model")
    found = quantize(model, tmp_path / "max", QuantizeConfig(bits=4, group_size=32, recipe="max", tuning_steps=3))
    quantize(model, tmp_path / "untuned", QuantizeConfig(bits=4, group_size=32, recipe="max", tuning_steps=0))
    assert found["untuned_blocks"] == [0, 1]
    torch.testing.assert_close(*(logits(load_quantized(tmp_path / name), windows().tokens) for name in ("max", "untuned")))
    records = [json.loads(line) for line in (tmp_path / "max" / "manifest.jsonl").read_text().splitlines()]
    assert all(r["tuning"]["error_after"] >= r["tuning"]["error_before"] for r in records if r["kind"] == "block")


def test_one_window_cannot_be_tuned_on(tmp_path):
    model = save_model("llama", tmp_path / "model")
    with pytest.raises(InputError, match="tuning_steps = 50: one calibration window.*samples of 2"):
        quantize(model, tmp_path / "out", QuantizeConfig(bits=4, group_size=32, recipe="max"), windows(1))


def test_a_call_is_cut_to_fewer_windows():
    call = Call((torch.arange(12).view(4, 3), torch.zeros(8, 1, 1)), {"mask": (torch.ones(4, 1), torch.ones(1, 3)), "flag": True}, 4)
    cut = call.cut(2)
    assert cut.size == 2
    assert [tuple(value.shape) for value in cut.args] == [(2, 3), (4, 1, 1)]
    assert [tuple(value.shape) for value in cut.kwargs["mask"]] == [(2, 1), (1, 3)]
    assert cut.kwargs["flag"] is True


def test_the_first_forward_of_the_tuning_is_the_closed_form(tmp_path):
    folder = save_model("llama", tmp_path / "model")
    tuned = []
    original = tuning.tune

    def seen(block, solutions, max_codes, *rest):
        tuned.extend((tuning._Layer(s, max_codes[name]).weight(), s.weight(torch.float32)) for name, s in solutions.items())
        return original(block, solutions, max_codes, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_work, "tune", seen)
        quantize(folder, tmp_path / "out", QuantizeConfig(bits=3, group_size=32, recipe="max", tuning_steps=1))
    assert len(tuned) == 2 * len(linears_of(find_decoder(empty_model(load_config(folder), torch.float32)).blocks[0]))
    for latent, closed in tuned:
        torch.testing.assert_close(latent, closed, rtol=1e-5, atol=1e-6)
