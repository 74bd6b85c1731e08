"""The sweep against a textbook GPTQ in float64, and against closed forms."""

import itertools

import pytest
import torch
from oracles import problem, textbook_gptq

from gptq_core.config import QuantizeConfig
from gptq_core.method.factor import factorize
from gptq_core.method.solver import TALL_COLUMNS, round_to_nearest, solve

CLASSIC = {"recipe": "classic"}
ORDERS = {
    "plain": CLASSIC | {"act_group_aware": False},
    "group_aware": CLASSIC | {"act_group_aware": True},
    "desc_act": CLASSIC | {"desc_act": True},
    "static": CLASSIC | {"static_groups": True, "act_group_aware": False},
    "static_ordered": CLASSIC | {"static_groups": True},
}


@pytest.mark.grid
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("bits", "sym", "group_size"), itertools.product((2, 3, 4, 8), (True, False), (-1, 32, 48, 128)))
def test_codes_equal_the_textbook(bits, sym, group_size, order):
    equals_the_textbook(192 if group_size == 48 else 256, bits, sym, group_size, order)


@pytest.mark.grid
@pytest.mark.parametrize("order", ["group_aware", "desc_act", "static_ordered"])
@pytest.mark.parametrize(("columns", "group_size"), [(640, 128), (672, 48)])
def test_codes_equal_the_textbook_beyond_a_tall_product(columns, group_size, order):
    """Several spans of TALL_COLUMNS, the last one cut short: each takes in the errors of all before it."""
    assert columns > 2 * TALL_COLUMNS and columns % TALL_COLUMNS
    equals_the_textbook(columns, 3, False, group_size, order)


def equals_the_textbook(columns, bits, sym, group_size, order):
    weight, hessian = problem(columns)
    config = QuantizeConfig(bits=bits, sym=sym, group_size=group_size, damp_percent=0.05, **ORDERS[order])
    factor = factorize(hessian.double(), config, "layer", 600)
    solved = solve(weight.double(), factor, config)
    expected = textbook_gptq(
        weight,
        hessian,
        bits=bits,
        group_size=group_size,
        sym=sym,
        damp_percent=0.05,
        order=factor.order,
        groups_follow_order=config.desc_act,
        static_groups=config.static_groups,
    )
    assert torch.equal(solved.codes, expected["codes"])
    assert torch.equal(solved.g_idx, expected["g_idx"])
    assert torch.equal(solved.scales.double(), expected["scales"])
    assert torch.equal(solved.zeros.double(), expected["zeros"])
    torch.testing.assert_close(solved.loss, expected["loss"])
    # float32 differs only where a weight, or a scale on its way to float16, sits on a rounding tie
    single = solve(weight, factorize(hessian, config, "layer", 600), config)
    assert (single.codes != expected["codes"]).double().mean() < 0.02
    torch.testing.assert_close(single.loss.double().sum(), expected["loss"].sum(), rtol=1e-2, atol=0)


REFITTED = {
    "tuned": {},
    "tuned_asym": {"sym": False},
    "tuned_row": {"group_size": -1},
    "tuned_short_groups": {"group_size": 16, "descent": 2},
    "tuned_desc_act": {"desc_act": True, "descent": 3},
    "refit_alone": CLASSIC | {"refit": True},
    "descent_alone": CLASSIC | {"descent": 2},
    "desc_act_refit": CLASSIC | {"desc_act": True, "refit": True, "scale_search": "weighted"},
    "group_aware_search": CLASSIC | {"scale_search": "weighted"},
}


@pytest.mark.parametrize("fields", [*ORDERS.values(), *REFITTED.values()], ids=[*ORDERS, *REFITTED])
def test_loss_is_the_quadratic_form_of_the_written_weight(fields):
    weight, hessian = problem(256)
    config = QuantizeConfig(**{"bits": 3, "group_size": 64, "damp_percent": 0.02, **fields})
    solved = solve(weight.double(), factorize(hessian.double(), config, "layer", 600), config)
    error = weight.double() - solved.weight(torch.float64)
    damped = hessian.double() + 0.02 * hessian.double().diagonal().mean() * torch.eye(256)
    torch.testing.assert_close(solved.loss, ((error @ damped) * error).sum(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("order", ORDERS)
def test_beats_rounding_to_nearest(order):
    weight, hessian = problem(256)
    config = QuantizeConfig(bits=3, group_size=64, **ORDERS[order])
    solved = solve(weight, factorize(hessian, config, "layer", 600), config)
    nearest = round_to_nearest(weight, config)

    def damage(s):
        error = weight - s.weight(torch.float32)
        return float(((error @ hessian) * error).sum())

    assert damage(solved) < 0.7 * damage(nearest)


def test_diagonal_hessian_rounds_to_nearest():
    """Without correlations there is nothing to feed back: GPTQ is rounding, whatever the order."""
    weight, _ = problem(128)
    hessian = torch.diag(torch.rand(128, generator=torch.Generator().manual_seed(1)) + 0.5)
    config = QuantizeConfig(**CLASSIC, bits=4, group_size=32)
    assert torch.equal(solve(weight, factorize(hessian, config, "layer", 600), config).codes, round_to_nearest(weight, config).codes)


def test_a_column_that_never_fires_is_rounded_and_harms_nobody():
    weight, hessian = problem(128)
    hessian[5], hessian[:, 5] = 0, 0
    config = QuantizeConfig(**CLASSIC, bits=4, group_size=-1)
    solved = solve(weight, factorize(hessian, config, "layer", 600), config)
    assert torch.equal(solved.codes[5], round_to_nearest(weight, config).codes[5])


def test_group_of_zeros_stays_zero():
    weight, hessian = problem(128)
    weight[:, :32] = 0
    config = QuantizeConfig(**CLASSIC, bits=4, group_size=32, static_groups=True)
    solved = solve(weight, factorize(hessian, config, "layer", 600), config)
    assert torch.isfinite(solved.weight(torch.float32)).all()
    assert torch.equal(solved.scales[0], torch.ones_like(solved.scales[0]))


def test_v1_never_gets_a_zero_point_of_zero_and_v2_may():
    weight, hessian = problem(128)
    weight = weight.abs() + 0.1  # all positive: the best zero point is 0
    zeros = {}
    for format in ("gptq", "gptq_v2"):
        config = QuantizeConfig(**CLASSIC, bits=4, group_size=32, sym=False, format=format)
        zeros[format] = solve(weight, factorize(hessian, config, "layer", 600), config).zeros
    assert zeros["gptq"].min() == 1
    assert zeros["gptq_v2"].min() == 0


def test_input_is_left_untouched():
    weight, hessian = problem(128)
    kept = weight.clone(), hessian.clone()
    config = QuantizeConfig(**CLASSIC, bits=4, group_size=32)
    solve(weight, factorize(hessian, config, "layer", 600), config)
    assert torch.equal(weight, kept[0])
    assert torch.equal(hessian, kept[1])


# -- rows at once, and products in another dtype ---------------------------------------------------------------------------


CHUNKED = [ORDERS["plain"], ORDERS["desc_act"], {}, {"sym": False}, {"group_size": -1}, {"recipe": "max"}]


@pytest.mark.parametrize("fields", CHUNKED, ids=str)
def test_rows_solved_in_chunks_are_those_solved_together(fields, monkeypatch):
    weight, hessian = problem(256, rows=50)
    config = QuantizeConfig(**{"bits": 3, "group_size": 64, "damp_percent": 0.05} | fields)
    factor = factorize(hessian.double(), config, "layer", 600)  # float64: a product's rounding depends on its shape
    together = solve(weight.double(), factor, config)
    monkeypatch.setattr("gptq_core.method.solver.ROWS_AT_ONCE", {"cpu": 16, "cuda": 16})
    chunked = solve(weight.double(), factor, config)
    for name in ("codes", "scales", "zeros", "g_idx"):
        assert torch.equal(getattr(chunked, name), getattr(together, name)), name
    torch.testing.assert_close(chunked.loss, together.loss)
    assert (chunked.latents is None) == (together.latents is None) == ("recipe" not in fields or fields["recipe"] != "max")
    if together.latents is not None:
        torch.testing.assert_close(chunked.latents, together.latents)


@pytest.mark.parametrize("recipe", ["classic", "tuned"])
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("columns", [256, 512])
def test_tall_products_in_bfloat16_cost_next_to_nothing(columns, bits, recipe):
    """Codes may differ, their loss hardly: by the quadratic form in float64. And the loss that is reported is that of the codes."""
    weight, hessian = problem(columns, rows=64)
    config = QuantizeConfig(bits=bits, group_size=64, recipe=recipe, damp_percent=0.05)
    factor = factorize(hessian, config, "layer", 600)
    damped = hessian.double() + factor.damp.double() * torch.eye(columns)

    def measured(products):
        solved = solve(weight, factor, config, products=products)
        error = (weight - solved.weight(torch.float32)).double()
        loss = float(((error @ damped) * error).sum())
        assert float(solved.loss.double().sum()) == pytest.approx(loss, rel=2e-3)
        return loss

    # without a descent a code that fell to the other side stays there
    assert measured(torch.bfloat16) == pytest.approx(measured(None), rel=0.005 if recipe == "tuned" else 0.01)
