"""The column sweep: GPTQ on the transposed weight, blocked.

Input: the target weight W (in, out), one column of the layer a contiguous row, and the factor R of factor.py, both in
processing order. For a column block b..e:

1. T = W[b:e] + solve(R_bbᵀ, R[:b, b:e]ᵀ · δ[:b]) with δ = W - Q of the columns done: one tall GEMM and one small triangular
   solve. T is the conditional optimum of the block, given everything rounded so far.
2. Inside, right-looking with U = R_bb⁻¹, rows scaled to a unit diagonal: round a column, push its error on the columns that
   follow. Sub-blocks of at most 16 columns go column by column, a GEMM carries their errors to the rest of the block.
3. δ[b:e] = W[b:e] - Q[b:e].

Dynamic groups are fitted on T at the moment their first column is reached, when T is the conditional optimum of the whole
group; therefore sub-blocks never straddle a group. The loss is free: Σ_i (target_i - q_i)² R[i,i]², the quadratic form
(w - q)(H + λI)(w - q)ᵀ of each row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Int32, UInt8
from torch import Tensor

from gptq_core import grid
from gptq_core.config import QuantizeConfig
from gptq_core.descent import descend, slope_after_sweep
from gptq_core.factor import Factor
from gptq_core.kernels.columns import round_columns
from gptq_core.stages import Timed, untimed

COLUMN_BLOCK = 128
LATENT_REACH = 0.49
"""Less than half a step, so that a latent rounds to its code."""
POWER_ROWS = 256
"""Rows of a layer on which its output power is measured for the relative error; all of them would cost another sweep."""


@dataclass(frozen=True)
class Solution:
    """One solved weight, columns in their original order. `out` may be the stacked rows of several layers."""

    codes: UInt8[Tensor, "columns out"]
    scales: Float[Tensor, "groups out"]
    """float16, as on disk."""
    zeros: UInt8[Tensor, "groups out"]
    g_idx: Int32[Tensor, " columns"]
    loss: Float[Tensor, " out"]
    """(w - q)(H + λI)(w - q)ᵀ of each output row: mean squared output error a token, damping included."""
    latents: Float[Tensor, "columns out"] | None = None
    """Where on its grid each code was rounded from, at most LATENT_REACH away; only for block tuning."""

    def rows(self, start: int, stop: int) -> Solution:
        """The part that belongs to the output rows start..stop."""
        codes, scales, zeros = (t[:, start:stop].contiguous() for t in (self.codes, self.scales, self.zeros))
        latents = None if self.latents is None else self.latents[:, start:stop].contiguous()
        return Solution(codes, scales, zeros, self.g_idx.clone(), self.loss[start:stop], latents)

    def weight(self, dtype: torch.dtype) -> Float[Tensor, "out columns"]:
        """The dequantized weight (out, in)."""
        return grid.dequantize(self.codes, self.scales, self.zeros, self.g_idx, dtype)


def solve(weight: Float[Tensor, "out columns"], factor: Factor, config: QuantizeConfig, timed: Timed = untimed) -> Solution:
    """Quantize a weight (out, in) against a factored Hessian (in, in). The input is not changed. `timed`: stages scales, sweep, descent.

    Computes in the factor's dtype. in must be divisible by group_size (the engine checks this before any work).
    """
    columns = weight.shape[1]
    size = columns if config.group_size == -1 else config.group_size
    target = weight.to(factor.upper.dtype).T.contiguous()
    original_group = torch.arange(columns, device=weight.device) // size
    groups = config.groups_of(columns)
    shape = (groups, weight.shape[0])
    fitted = grid.Grid(target.new_empty(shape), target.new_empty(shape), config.max_code)
    importance = _importance(factor)
    # a single group is fitted on the target either way, so it needs no block as long as the row
    fit_during_sweep = not config.static_groups and groups > 1
    if not fit_during_sweep:
        with timed("scales"):
            fitted = grid.Grid(*grid.fit(target.view(groups, size, -1), importance.view(groups, size), config), config.max_code)
    # groups follow the processing order under desc_act; in every other order a column keeps its own group
    g_idx = torch.empty_like(original_group)
    g_idx[factor.order] = original_group if config.desc_act else original_group[factor.order]

    order, back = factor.order, torch.argsort(factor.order)
    with timed("sweep"):
        fit = config if fit_during_sweep else None
        codes, errors = sweep(target[order], factor.upper, g_idx[order], fitted, fit, importance[order], timed)
        loss = errors.square().sum(0)
    if config.refit or config.descent:
        with timed("descent"):
            slope, damped = slope_after_sweep(factor.upper, errors), factor.damped
            # the descent wants groups as runs of columns: under desc_act that is the processing order, else the original one
            if config.desc_act:
                damped = damped[order][:, order]
            else:
                codes, slope, back = codes[back], slope[back], slice(None)
            loss -= descend(codes, slope, fitted, damped, scales=config.refit, passes=config.descent)
    codes = codes[back]
    latents = _latents(target, codes, g_idx, fitted, factor.damped) if config.tuning_steps else None
    return Solution(codes, fitted.scales.half(), fitted.zeros.to(torch.uint8), g_idx.to(torch.int32), loss, latents)


def _latents(target: Tensor, codes: Tensor, g_idx: Tensor, fitted: grid.Grid, damped: Tensor) -> Tensor:
    """Each code moved towards the minimum of its own parabola, given all other codes, by at most LATENT_REACH."""
    scales = fitted.scales[g_idx]
    error = target - (codes.to(target.dtype) - fitted.zeros[g_idx]) * scales
    reach = (damped @ error) / damped.diagonal().unsqueeze(1) / scales
    return codes.to(target.dtype) + reach.clamp_(-LATENT_REACH, LATENT_REACH)


def _importance(factor: Factor) -> Float[Tensor, " columns"]:
    """Weight of each column's squared error when scales are searched: the geometric mean of diag(H), its cost when no other column
    answers to it, and of R[i,i]², its cost when all columns after it do. Columns in their original order."""
    conditional = torch.empty_like(factor.upper.diagonal())
    conditional[factor.order] = factor.upper.diagonal().square()
    return (conditional * factor.damped.diagonal()).sqrt()


def round_to_nearest(weight: Float[Tensor, "out columns"], config: QuantizeConfig) -> Solution:
    """Every weight to its nearest code on min-max scales: what a failed factorization falls back to where that is allowed."""
    columns = weight.shape[1]
    eye = torch.eye(columns, device=weight.device)
    identity = Factor(eye, torch.arange(columns, device=weight.device), 0.0, 0, eye)
    plain = config.model_copy(update={"desc_act": False, "scale_search": "min_max", "refit": False, "descent": 0})
    return solve(weight.float(), identity, plain)


def sweep(
    target: Float[Tensor, "columns out"],
    upper: Float[Tensor, "columns columns"],
    group_of: Int[Tensor, " columns"],
    fitted: grid.Grid,
    fit: QuantizeConfig | None,
    importance: Float[Tensor, " columns"],
    timed: Timed = untimed,
) -> tuple[UInt8[Tensor, "columns out"], Float[Tensor, "columns out"]]:
    """Codes (in, out) of a target in processing order, and (w - q)R, whose squares sum up to the loss.

    `group_of` gives the group of each position. With `fit`, each group is a run of positions and its row of `fitted` is filled
    when the sweep reaches it, `importance` (diag(H) by position) weighing its columns; without, `fitted` is complete and groups
    may be interleaved.
    """
    columns, out = target.shape
    run = columns // fitted.scales.shape[0] if fit else COLUMN_BLOCK
    codes = torch.empty(columns, out, dtype=torch.uint8, device=target.device)
    delta = torch.empty_like(target)
    errors = torch.empty_like(target)
    block = _block_size(columns, run)
    for begin in range(0, columns, block):
        end = min(begin + block, columns)
        triangle = upper[begin:end, begin:end]
        now = target[begin:end].clone()
        if begin:
            carried = upper[:begin, begin:end].T @ delta[:begin]
            now += torch.linalg.solve_triangular(triangle.T, carried, upper=False)
        feedback = torch.linalg.solve_triangular(triangle, torch.eye(end - begin, dtype=now.dtype, device=now.device), upper=True)
        feedback = feedback / feedback.diagonal().unsqueeze(1)
        for start in range(0, end - begin, run):
            stop = min(start + run, end - begin)
            part = slice(begin + start, begin + stop)
            if fit:
                g = group_of[begin + start]
                with timed("scales"):
                    fitted.scales[g], fitted.zeros[g] = (t[0] for t in grid.fit(now[None, start:stop], importance[None, part], fit))
            own = feedback[start:stop, start:stop]
            codes[part] = round_columns(now[start:stop], own, fitted.scales, fitted.zeros, group_of[part], fitted.max_code)
            if stop < end - begin:
                now[stop:].addmm_(feedback[start:stop, stop:].T, now[start:stop], alpha=-1)
        group = group_of[begin:end]
        rounded = codes[begin:end].to(now.dtype).sub_(fitted.zeros[group]).mul_(fitted.scales[group])
        torch.sub(target[begin:end], rounded, out=delta[begin:end])
        torch.mul(now, triangle.diagonal().unsqueeze(1), out=errors[begin:end])
    return codes, errors


def relative_error(weight: Tensor, loss: Tensor, factor: Factor | None) -> float | None:
    """Loss over output power, w(H + λI)wᵀ, on evenly spaced rows."""
    if factor is None:
        return None
    rows = torch.arange(0, weight.shape[0], max(1, weight.shape[0] // POWER_ROWS), device=weight.device)
    power = (weight[rows][:, factor.order] @ factor.upper).square().sum()
    return float(loss[rows].double().sum() / power.double())


def _block_size(columns: int, run: int) -> int:
    """A multiple of the group length near COLUMN_BLOCK, so that a block never cuts a group; a long group is its own block."""
    return min(columns, run * max(1, COLUMN_BLOCK // run))
