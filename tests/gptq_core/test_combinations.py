"""Every combination of the options that decide a file: solved, packed and run; and a covering sample end to end."""

import functools
import itertools

import pytest
import torch
import transformers
from oracles import problem
from tiny import dense_twin, logits, quantize, save_model, windows

from gptq_core import QuantizeConfig, QuantizedLinear, load_quantized
from gptq_core.checkpoint.format import packed_tensors
from gptq_core.inference.dequantize import dequantize_checkpoint
from gptq_core.method.factor import factorize
from gptq_core.method.solver import round_to_nearest, solve
from gptq_core.model.architecture import find_decoder

pytestmark = pytest.mark.usefixtures("one_thread")

COLUMNS, OUT = 256, 32
ORDERS = {
    "plain": {"recipe": "classic", "act_group_aware": False},
    "act_group_aware": {"recipe": "classic", "act_group_aware": True},
    "desc_act": {"recipe": "classic", "desc_act": True},
    "static": {"recipe": "classic", "static_groups": True, "act_group_aware": False},
    "static_ordered": {"recipe": "classic", "static_groups": True},
    "tuned": {"recipe": "tuned"},
}
WEIGHT, HESSIAN = problem(COLUMNS, OUT)
DAMPED = HESSIAN.double() + 0.05 * HESSIAN.double().diagonal().mean() * torch.eye(COLUMNS)


def damage(weight):
    """(w - q)(H + λI)(w - q)ᵀ of each row, in float64."""
    error = WEIGHT.double() - weight.double()
    return ((error @ DAMPED) * error).sum(1)


@pytest.mark.grid
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_packed_layer_runs_as_it_was_solved(bits, sym, order):
    generator = torch.Generator().manual_seed(bits)
    x, bias = torch.randn(3, COLUMNS, generator=generator), torch.randn(OUT, generator=generator).half()
    for group_size, format in itertools.product((-1, 16, 32, 64, 128), ("gptq", "gptq_v2")):
        config = QuantizeConfig(bits=bits, sym=sym, group_size=group_size, format=format, damp_percent=0.05, **ORDERS[order])
        factor = factorize(HESSIAN, config, "layer", 600)
        solved = solve(WEIGHT, factor, config)
        size = COLUMNS if group_size == -1 else group_size

        assert int(solved.codes.max()) <= 2**bits - 1
        assert int(solved.zeros.max()) <= 2**bits - 1
        assert int(solved.zeros.min()) >= (1 if format == "gptq" else 0)
        if sym:
            assert torch.all(solved.zeros == 2 ** (bits - 1))
        assert solved.scales.dtype == torch.float16
        assert torch.isfinite(solved.scales).all() and torch.all(solved.scales != 0)
        assert solved.scales.shape == solved.zeros.shape == (COLUMNS // size, OUT)
        if order == "desc_act":
            assert torch.equal(solved.g_idx[factor.order], torch.arange(COLUMNS, dtype=torch.int32) // size)
        else:
            assert torch.equal(solved.g_idx, torch.arange(COLUMNS, dtype=torch.int32) // size)

        group = solved.g_idx.long()
        expected = ((solved.codes.float() - solved.zeros.float()[group]) * solved.scales.float()[group]).T
        assert torch.equal(solved.weight(torch.float32), expected)
        packed = packed_tensors("layer", solved.codes, solved.scales, solved.zeros, solved.g_idx, config)
        tensors = [packed[f"layer.{leaf}"] for leaf in ("qweight", "qzeros", "scales", "g_idx")]
        for with_bias in (None, bias):
            linear = QuantizedLinear(*tensors, with_bias, bits, format)
            assert torch.equal(linear.weight_in(torch.float32), expected)
            product = x @ expected.T if with_bias is None else x @ expected.T + bias.float()
            torch.testing.assert_close(linear(x), product, rtol=1e-5, atol=1e-4)

        loss = damage(expected)
        torch.testing.assert_close(solved.loss.double(), loss, rtol=1e-3, atol=0)
        assert loss.sum() < 0.9 * nearest_damage(bits, sym, group_size, format)


@functools.cache
def nearest_damage(bits, sym, group_size, format):
    """Of rounding to nearest on min-max scales, whatever the order."""
    config = QuantizeConfig(bits=bits, sym=sym, group_size=group_size, format=format)
    return damage(round_to_nearest(WEIGHT, config).weight(torch.float32)).sum()


# pairs of values of different options meet in at least one row
END_TO_END = [
    # bits, sym, group_size, order, format, true_sequential, architecture
    (2, True, 16, "plain", "gptq", True, "llama"),
    (2, True, -1, "desc_act", "gptq_v2", False, "qwen2_tied_with_bias"),
    (2, False, 32, "act_group_aware", "gptq_v2", True, "qwen2_tied_with_bias"),
    (2, False, 64, "static_ordered", "gptq", False, "llama"),
    (2, False, 16, "tuned", "gptq_v2", False, "qwen2_tied_with_bias"),
    (2, True, 32, "static", "gptq", True, "opt"),
    (3, True, 64, "act_group_aware", "gptq", False, "qwen2_tied_with_bias"),
    (3, True, 32, "desc_act", "gptq_v2", True, "llama"),
    (3, False, 16, "static", "gptq_v2", True, "llama"),
    (3, False, -1, "plain", "gptq", False, "qwen2_tied_with_bias"),
    (3, True, -1, "tuned", "gptq", True, "llama"),
    (3, False, 32, "static_ordered", "gptq_v2", False, "opt"),
    (4, True, 32, "tuned", "gptq_v2", False, "llama"),
    (4, True, -1, "act_group_aware", "gptq", True, "llama"),
    (4, False, 64, "desc_act", "gptq", True, "qwen2_tied_with_bias"),
    (4, False, 16, "static_ordered", "gptq_v2", True, "qwen2_tied_with_bias"),
    (4, True, 16, "static", "gptq", False, "qwen2_tied_with_bias"),
    (4, True, 64, "plain", "gptq_v2", True, "opt"),
    (8, True, 16, "desc_act", "gptq", False, "llama"),
    (8, True, -1, "static_ordered", "gptq_v2", True, "qwen2_tied_with_bias"),
    (8, False, 64, "tuned", "gptq", True, "qwen2_tied_with_bias"),
    (8, False, 32, "plain", "gptq_v2", False, "llama"),
    (8, False, -1, "static", "gptq_v2", False, "qwen2_tied_with_bias"),
    (8, True, 32, "act_group_aware", "gptq_v2", False, "opt"),
]


def test_the_sample_covers_every_pair_of_bits_sym_order_and_format():
    columns = list(zip(*[row[:6] for row in END_TO_END], strict=True))
    for one, two in itertools.combinations((0, 1, 3, 4, 5), 2):
        met = set(zip(columns[one], columns[two], strict=True))
        assert met == set(itertools.product(set(columns[one]), set(columns[two]))), (one, two)


@pytest.mark.grid
@pytest.mark.parametrize("row", END_TO_END, ids=lambda row: "-".join(map(str, row)))
def test_a_checkpoint_loads_as_it_was_walked(row, tmp_path):
    bits, sym, group_size, order, format, true_sequential, architecture = row
    fields = {"bits": bits, "sym": sym, "group_size": group_size, "format": format, "true_sequential": true_sequential}
    model = save_model(architecture, tmp_path / "model")
    result = quantize(model, tmp_path / "out", QuantizeConfig(**fields, **ORDERS[order]))
    quantized = load_quantized(tmp_path / "out")
    hidden = []
    blocks = find_decoder(quantized).blocks
    blocks[-1].register_forward_hook(lambda _m, _a, output: hidden.append(output[0] if isinstance(output, tuple) else output))
    found = logits(quantized, windows().tokens)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(hidden[0], result["hidden"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, logits(dense_twin(model, quantized), windows().tokens), rtol=1e-5, atol=1e-5)
    dequantize_checkpoint(tmp_path / "out", tmp_path / "dense")
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    torch.testing.assert_close(found, logits(dense, windows().tokens), rtol=1e-5, atol=1e-5)
    packed = {name: module for name, module in quantized.named_modules() if isinstance(module, QuantizedLinear)}
    assert {module.bits for module in packed.values()} == {bits}
    assert any(module.bias is not None for module in packed.values()) == (architecture != "llama")
