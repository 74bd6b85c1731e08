import pytest
import torch

from gptq_core.config import QuantizeConfig
from gptq_core.errors import FactorizationError
from gptq_core.method.factor import column_order, factorize


def test_factor_is_lower_and_multiplies_back():
    x = torch.randn(200, 64, dtype=torch.float64)
    hessian = x.T @ x / 200
    config = QuantizeConfig(bits=4, desc_act=True, damp_percent=0.03)
    factor = factorize(hessian, config, "layer", 600)
    assert torch.equal(factor.lower, factor.lower.tril())
    damped = hessian + 0.03 * hessian.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    torch.testing.assert_close(factor.lower @ factor.lower.T, damped[factor.backwards][:, factor.backwards])
    assert (factor.damp_percent, factor.failed_attempts) == (0.03, 0)


def test_orders():
    diagonal = torch.tensor([1.0, 5.0, 2.0, 4.0, 9.0, 0.0, 3.0, 3.0])
    decreasing, by_groups = [4, 1, 3, 6, 7, 2, 0, 5], [4, 6, 7, 5, 1, 3, 2, 0]
    for fields, expected in (
        ({"desc_act": True}, decreasing),
        ({"static_groups": False}, by_groups),
        ({"static_groups": True}, decreasing),
        ({"static_groups": False, "act_group_aware": False}, list(range(8))),
        ({"static_groups": True, "act_group_aware": False}, list(range(8))),
        ({"static_groups": False, "group_size": -1}, decreasing),
    ):
        assert column_order(diagonal, QuantizeConfig(**{"bits": 4, "group_size": 4, **fields})).tolist() == expected


def test_auto_damping_is_half_the_columns_over_the_tokens():
    x = torch.randn(64, 16)
    for tokens, expected in ((64, 0.125), (8, 0.9), (100_000, 0.005)):
        factor = factorize(x.T @ x / 64, QuantizeConfig(bits=4, group_size=16, damp_percent="auto"), "layer", tokens)
        assert factor.damp_percent == pytest.approx(expected)


def test_failed_cholesky_raises_damping_and_says_so():
    """Indefinite at 1 % of damping, definite at 10 %."""
    values = torch.full((32,), 1.0)
    values[0] = -0.05
    rotation = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0]
    hessian = rotation @ torch.diag(values) @ rotation.T
    factor = factorize(hessian, QuantizeConfig(bits=4, group_size=-1, damp_percent=0.01), "layer", 600)
    assert factor.damp_percent == pytest.approx(0.1)
    assert factor.failed_attempts == 1


@pytest.mark.parametrize("hessian", [torch.zeros(8, 8), torch.full((8, 8), float("nan")), -torch.eye(8)], ids=["zero", "nan", "negative"])
def test_hopeless_hessian_is_an_error_that_names_the_layer(hessian):
    with pytest.raises(FactorizationError, match="model.layers.3.mlp.down_proj"):
        factorize(hessian, QuantizeConfig(bits=4, group_size=-1), "model.layers.3.mlp.down_proj", 600)


def test_indefinite_through_the_whole_schedule():
    hessian = torch.diag(torch.tensor([100.0] + [1.0] * 6 + [-90.0]))
    with pytest.raises(FactorizationError, match=r"damp_percent 0\.01, 0\.1, 1"):
        factorize(hessian, QuantizeConfig(bits=4, group_size=-1, damp_percent=0.01), "layer", 600)


@pytest.mark.parametrize("damp_percent", [0.03, 1e-9], ids=["at once", "after attempts that fail"])
def test_the_hessian_is_left_as_it_is(damp_percent):
    """The factor is made in place, of a permuted copy."""
    x = torch.randn(40, 300)
    hessian = x.T @ x / 40  # of rank 40: without damping there is no factor
    before = hessian.clone()
    try:
        factor = factorize(hessian, QuantizeConfig(bits=4, group_size=-1, desc_act=True, damp_percent=damp_percent), "layer", 40)
        assert factor.hessian is hessian and factor.lower.untyped_storage().data_ptr() != hessian.untyped_storage().data_ptr()
    except FactorizationError:
        assert damp_percent < 0.03
    assert torch.equal(hessian, before)
