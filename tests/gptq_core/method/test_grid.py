"""Scales: the search against brute force."""

import pytest
import torch
from oracles import problem

from gptq_core.config import QuantizeConfig
from gptq_core.method import grid
from gptq_core.method.factor import factorize
from gptq_core.method.solver import solve


def searched(weights, importance, config):
    """Scale and zero of one group."""
    assert config.scale_search == "weighted"
    scales, zeros = grid.fit(weights[None], importance[None], config)
    return scales[0], zeros[0]


def weighted_error(weights, importance, scale, zero, max_code):
    rounded = ((weights / scale).round().add(zero).clamp(0, max_code) - zero) * scale
    return ((weights - rounded).square() * importance.unsqueeze(1)).sum(0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_search_comes_close_to_brute_force_and_beats_the_extremes(bits, sym):
    g = torch.Generator().manual_seed(bits)
    weights, importance = torch.randn(64, 40, generator=g), torch.rand(64, generator=g) ** 3
    config = QuantizeConfig(bits=bits, sym=sym, group_size=64, format="gptq_v2")
    error = weighted_error(weights, importance, *searched(weights, importance, config), config.max_code)
    plain = weighted_error(weights, importance, *grid.min_max(weights, config), config.max_code)
    best = torch.full_like(plain, torch.inf)
    span = weights.amax(0) - weights.amin(0)
    for share in torch.linspace(0.2, 1.3, 300):
        for sign in (1, -1) if sym else (1,):
            scale = sign * share * span / config.max_code
            middle = (weights.amax(0) + weights.amin(0)) / 2
            centre = torch.round(config.max_code / 2 - middle / scale)
            for shift in (0,) if sym else (-1, 0, 1):
                zero = torch.full_like(scale, 2 ** (bits - 1)) if sym else (centre + shift).clamp(0, config.max_code)
                best = torch.minimum(best, weighted_error(weights, importance, scale, zero, config.max_code))
    # at 8 bits an error is luck among hundreds of nearly equal scales, and brute force tries more of them
    assert error.sum() < (1.1 if bits < 8 else 1.2) * best.sum()
    assert error.sum() < 0.95 * plain.sum()


def test_the_extreme_lies_on_the_longer_side_so_scales_may_be_negative():
    weights = torch.full((32, 2), 0.1)
    weights[0, 0], weights[0, 1] = 8.0, -8.0
    scale, zero = searched(weights, torch.ones(32), QuantizeConfig(bits=4))
    assert scale[0] < 0 < scale[1]
    assert zero.tolist() == [8, 8]
    assert torch.equal(scale, scale.half().float())


def test_importance_decides():
    """A column that never fires may be clipped, one that fires may not."""
    weights = torch.linspace(-1, 1, 33)[:, None].clone()
    weights[0] = 10.0
    importance = torch.ones(33)
    importance[0] = 1e-6
    config = QuantizeConfig(bits=3)
    clipped = searched(weights, importance, config)[0].abs()
    assert clipped < searched(weights, torch.ones(33), config)[0].abs()


def test_tuned_is_better_than_classic_on_the_true_hessian():
    weight, hessian = problem(256)
    losses = {}
    for recipe in ("classic", "tuned"):
        config = QuantizeConfig(bits=3, group_size=64, recipe=recipe)
        error = weight - solve(weight, factorize(hessian, config, "layer", 600), config).weight(torch.float32)
        losses[recipe] = float(((error @ hessian) * error).sum())
    assert losses["tuned"] < 0.9 * losses["classic"]
