import pytest
import torch

from gptq_core import QuantizeConfig
from gptq_core.kernels import dispatch
from gptq_core.method.factor import factorize
from gptq_core.method.hessian import Hessian, Shift
from gptq_core.method.solver import solve


@pytest.mark.parametrize("columns", [64, 300, 1100])
def test_mean_of_outer_products_over_uneven_batches(columns):
    inputs = [torch.randn(3, 7, columns), torch.randn(1, 7, columns), torch.randn(5, columns)]
    hessian = Hessian(columns, "cpu")
    for x in inputs:
        hessian.add(x)
    flat = torch.cat([x.reshape(-1, columns) for x in inputs]).double()
    assert hessian.tokens == flat.shape[0] == 33
    mean = hessian.mean()
    torch.testing.assert_close(mean.double(), flat.T @ flat / 33, rtol=1e-4, atol=1e-4)
    assert torch.equal(mean, mean.T)


@pytest.fixture(params=["c", "float32"])
def way(request, monkeypatch):
    """How bfloat16 inputs are multiplied."""
    if request.param == "float32":
        monkeypatch.setattr(dispatch, "compiles_products", lambda: False)
    elif not dispatch.compiles_products():
        pytest.skip("no avx512_bf16 here, or no C compiler that knows it")
    return request.param


TOKENS = 4096


def bfloat16_inputs(columns, tokens=TOKENS):
    """Two channels are 100 times as large as the others and move together."""
    chance = torch.Generator().manual_seed(columns)
    x = torch.randn(tokens, columns, generator=chance)
    x[:, 5] = 100 * torch.randn(tokens, generator=chance)
    x[:, columns // 2] = x[:, 5] + torch.randn(tokens, generator=chance)
    return x.to(torch.bfloat16)


def hessian_of(*batches):
    hessian = Hessian(batches[0].shape[-1], "cpu")
    for x in batches:
        hessian.add(x)
    return hessian.mean()


def off(found, left, right):
    """The largest error of the mean of left rightᵀ, of √(mean left_i² · mean right_j²)."""
    left, right = left.double(), right.double()
    sizes = left.square().mean(0).sqrt().unsqueeze(1) * right.square().mean(0).sqrt()
    return float(((found.double() - left.T @ right / len(left)) / sizes).abs().max())


OFF = {"c": 2**-20, "float32": 2**-18}
"""Products of bfloat16 inputs may be off by this. MKL's float32 comes to 2^-21, the loop in C to less; others may add up worse."""


@pytest.mark.grid
@pytest.mark.parametrize("columns", [32, 300, 1100])
def test_products_of_bfloat16_inputs_are_not_rounded_to_it(columns, way):
    x = bfloat16_inputs(columns)
    mean = hessian_of(x[:2500].view(5, 500, columns), x[2500:])
    assert torch.equal(mean, mean.T)
    assert off(mean, x, x) < OFF[way] and off((x.T @ x).float() / len(x), x, x) > 2**-10


def test_shifts_of_bfloat16_inputs_are_not_rounded_to_it(way):
    x = bfloat16_inputs(300)
    original = x + x.roll(1, 1) / 64
    residual = torch.randn(TOKENS, 40).to(torch.bfloat16)
    shift = Shift()
    shift.add(x, original, residual)
    assert off(shift.inputs(), original - x, x) < OFF[way] and off(shift.residual(), residual, x) < OFF[way]


@pytest.mark.parametrize("tokens", [0, 1, 77])
def test_short_batches(tokens, way):
    x = bfloat16_inputs(96, tokens)
    torch.testing.assert_close(hessian_of(x), hessian_of(x.float()), rtol=1e-5, atol=1e-5 if tokens else 0)


@pytest.mark.parametrize(
    "batch",
    [
        lambda x: x.T.contiguous().T,
        lambda x: x.repeat_interleave(2, 1)[:, ::2],
        lambda x: x.repeat_interleave(2, 0)[::2],
        lambda x: torch.cat([x, x], 1)[:, x.shape[1] :],
    ],
    ids=["columns together", "gaps in a row", "gaps between rows", "part of a row"],
)
def test_inputs_that_do_not_lie_together(batch, way):
    x = bfloat16_inputs(150, 100)
    strided = batch(x)
    assert torch.equal(strided, x) and strided.stride() != x.stride()
    torch.testing.assert_close(hessian_of(strided), hessian_of(x), rtol=1e-5, atol=1e-5)


def test_a_shift_of_inputs_in_bfloat16_and_a_residual_in_float32(way):
    x, residual = bfloat16_inputs(60, 100), torch.randn(100, 20)
    shift = Shift()
    shift.add(x, x + 1, residual)
    assert off(shift.residual(), residual, x) < OFF[way]


@pytest.mark.parametrize("bits", [2, 4])
def test_what_is_solved_from_bfloat16_inputs_is_the_same(bits, way):
    """Along the difference of the two large channels H is about as small as its damping; a rounded product is of no use there."""
    x, config = bfloat16_inputs(256), QuantizeConfig(bits=bits, group_size=128, damp_percent=0.001)
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    exact = x.double().T @ x.double() / len(x)

    def solved(hessian):
        found = solve(weight, factorize(hessian, config, "layer", len(x)), config)
        error = (weight - found.weight(torch.float32)).double()
        return found.codes, float(((error @ exact) * error).sum())

    codes, loss = solved(exact.float())
    alike, same = solved(hessian_of(x))
    _, rounded = solved((x.T @ x).float() / len(x))
    assert (alike == codes).float().mean() > 0.99 and same == pytest.approx(loss, rel=2e-3) and rounded > 1.1 * loss


def test_the_mean_takes_the_place_of_the_sum():
    hessian = Hessian(300, "cpu")
    hessian.add(torch.randn(50, 300))
    mean = hessian.mean()
    before = mean.clone()
    assert hessian.mean() is mean and torch.equal(mean, before), "asked for twice it is divided once"
    with pytest.raises(AssertionError, match="the mean was taken"):
        hessian.add(torch.randn(50, 300))
    assert torch.equal(mean, before) and hessian.tokens == 50
