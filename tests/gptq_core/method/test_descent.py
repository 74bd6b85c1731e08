"""Coordinate descent: against what it promises, on the exact quadratic."""

import pytest
import torch
from oracles import problem

from gptq_core.config import QuantizeConfig
from gptq_core.method.descent import slope_after_sweep
from gptq_core.method.factor import factorize
from gptq_core.method.solver import solve

WAYS = {
    "static": {"static_groups": True},
    "dynamic": {"static_groups": False},
    "desc_act": {"desc_act": True},
    "row": {"group_size": -1},
    "short groups": {"group_size": 16},
    "asymmetric": {"sym": False},
}


def solved(weight, hessian, **fields):
    config = QuantizeConfig(**{"bits": 3, "group_size": 64} | fields)
    return solve(weight.double(), factorize(hessian.double(), config, "layer", 600), config)


def test_the_slope_comes_out_of_the_sweep():
    """(q - w)(H + λI) from L and z = (w - q)L, without q, w or H."""
    weight, hessian = problem(300)
    hessian = (hessian + hessian.T).double() / 2
    factor = factorize(hessian, QuantizeConfig(bits=4, group_size=-1), "layer", 600)
    error = torch.randn(300, 7, dtype=torch.float64)
    slope = slope_after_sweep(factor.lower, factor.lower.T @ error[factor.backwards], factor.backwards)
    damped = hessian + factor.damp * torch.eye(300, dtype=torch.float64)
    torch.testing.assert_close(slope, -damped @ error)


@pytest.mark.grid
@pytest.mark.parametrize("way", WAYS)
def test_no_row_gets_worse_and_more_passes_are_better(way):
    weight, hessian = problem(256)
    none, *losses = (solved(weight, hessian, descent=passes, refit=passes > 0, **WAYS[way]).loss for passes in (0, 1, 2, 6))
    for before, after in zip([none, *losses], losses, strict=False):
        assert (after <= before * (1 + 1e-9)).all()
        assert after.sum() < 0.997 * before.sum()
    assert (solved(weight, hessian, descent=0, refit=True, **WAYS[way]).loss <= none).all()


@pytest.mark.grid
@pytest.mark.parametrize("way", WAYS)
def test_many_passes_end_where_no_single_code_and_no_scale_can_be_bettered(way):
    weight, hessian = problem(128, rows=6)
    found = solved(weight, hessian, descent=60, **WAYS[way])
    damped = hessian.double() + 0.1 * hessian.double().diagonal().mean() * torch.eye(128)
    group = found.g_idx.long()

    def loss(codes, scales):
        error = weight.double() - ((codes - found.zeros.double()[group]) * scales[group]).T
        return ((error @ damped) * error).sum(1)

    codes, scales = found.codes.double(), found.scales.double()
    least = loss(codes, scales)
    torch.testing.assert_close(found.loss, least)
    for i in range(128):
        for step in (-1, 1):
            moved = codes.clone()
            moved[i] = (moved[i] + step).clamp(0, 7)
            assert (loss(moved, scales) >= least * (1 - 1e-9)).all()
    for g in range(scales.shape[0]):
        for neighbour in (torch.inf, -torch.inf):
            moved = scales.clone()
            moved[g] = torch.nextafter(scales[g].half(), torch.tensor(neighbour).half()).double()
            assert (loss(codes, moved) >= least * (1 - 1e-6)).all()


def test_refit_alone_keeps_the_codes():
    weight, hessian = problem(256)
    without, refitted = (solved(weight, hessian, descent=0, refit=refit) for refit in (False, True))
    assert torch.equal(without.codes, refitted.codes)
    assert not torch.equal(without.scales, refitted.scales)
    assert refitted.loss.sum() < 0.995 * without.loss.sum()


def test_descent_alone_keeps_the_scales():
    weight, hessian = problem(256)
    without, descended = (solved(weight, hessian, descent=passes, refit=False) for passes in (0, 2))
    assert torch.equal(without.scales, descended.scales)
    assert not torch.equal(without.codes, descended.codes)
