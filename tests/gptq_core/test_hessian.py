import pytest
import torch

from gptq_core.hessian import Hessian


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


def test_half_precision_inputs_are_summed_in_float32():
    x = torch.randn(4096, 32).to(torch.bfloat16)
    hessian = Hessian(32, "cpu")
    hessian.add(x)
    expected = x.double().T @ x.double() / 4096
    torch.testing.assert_close(hessian.mean().double(), expected, rtol=1e-5, atol=1e-5)


def test_the_mean_takes_the_place_of_the_sum():
    hessian = Hessian(300, "cpu")
    hessian.add(torch.randn(50, 300))
    mean = hessian.mean()
    before = mean.clone()
    assert hessian.mean() is mean and torch.equal(mean, before), "asked for twice it is divided once"
    with pytest.raises(AssertionError, match="the mean was taken"):
        hessian.add(torch.randn(50, 300))
    assert torch.equal(mean, before) and hessian.tokens == 50
