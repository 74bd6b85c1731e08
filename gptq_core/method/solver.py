"""The column sweep: GPTQ on the transposed weight, blocked.

W (in, out) is the target weight, one column of the layer a contiguous row, and R the factor of factor.py, both in processing order here;
in the code W keeps its original order and R is read off L, whose rows run from the last column to the first. For a column block b..e:

1. T = W[b:e] + R_bb⁻ᵀ · R[:b, b:e]ᵀ · δ[:b] with δ = W - Q of the columns done: a tall GEMM, shared by a few blocks, one with what was
   done since, and a small one with the inverse of the small triangle, which step 2 wants as well. T is the conditional optimum of the
   block, given everything rounded so far.
2. Inside, right-looking with U = R_bb⁻¹, rows scaled to a unit diagonal: round a column, push its error on the columns that
   follow. Sub-blocks of at most 16 columns go column by column, a GEMM carries their errors to the rest of the block.
3. δ[b:e] = W[b:e] - Q[b:e].

The tall products of step 1 may have bfloat16 operands and results: where a code falls otherwise, the target lay near a tie,
and the loss is that of the codes that were chosen.

Dynamic groups are fitted on T at the moment their first column is reached, when T is the conditional optimum of the whole
group; therefore sub-blocks never straddle a group. The loss is free: Σ_i (target_i - q_i)² R[i,i]², the quadratic form
(w - q)(H + λI)(w - q)ᵀ of each row.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Int32, UInt8
from torch import Tensor

from gptq_core.config import QuantizeConfig
from gptq_core.kernels.rounding import round_columns, write_back
from gptq_core.method import grid
from gptq_core.method.descent import descend, slope_after_sweep
from gptq_core.method.factor import Factor
from gptq_core.runtime.timing import Stages

COLUMN_BLOCK = 128
TALL_COLUMNS = 256
"""Columns whose conditional optimum, given all columns before them, comes from one tall product: a wide one is a faster one."""
ROWS_AT_ONCE = {"cpu": 1024, "cuda": 32768}
"""Outputs that are solved together: on the CPU their targets and errors stay in the cache, and memory does not grow with the layer."""
FEWEST_ROWS = 1024
"""Fewest outputs for a thread on the CPU: with fewer, the tall products of each are too small, and the operations too many."""
LATENT_REACH = 0.49
"""Less than half a step, so that a latent rounds to its code."""
POWER_ROWS = 64
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


def solve(
    weight: Float[Tensor, "out columns"],
    factor: Factor,
    config: QuantizeConfig,
    timed: Stages | None = None,
    products: torch.dtype | None = None,
) -> Solution:
    """Quantize a weight (out, in) against a factored Hessian (in, in). The input is not changed. `timed`: stages scales, sweep, descent.

    Computes in the factor's dtype; `products` is the one of the operands of the tall products, where it is another. in must be
    divisible by group_size (the engine checks this before any work).
    """
    timed = timed or Stages(weight.device)
    with timed("sweep"):
        prepared = prepare(factor, config, products)
    return solve_prepared(weight, prepared, config, timed)


def solve_prepared(weight: Float[Tensor, "out columns"], prepared: Prepared, config: QuantizeConfig, timed: Stages) -> Solution:
    """`solve` with what `prepare` made of the factor for this config."""
    parts = _in_threads(weight, lambda part, own: _solve_rows(part, prepared, config, own), timed)
    if len(parts) == 1:
        return parts[0]
    codes, scales, zeros = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("codes", "scales", "zeros"))
    latents = [part.latents for part in parts if part.latents is not None]
    loss = torch.cat([part.loss for part in parts])
    return Solution(codes, scales, zeros, parts[0].g_idx, loss, torch.cat(latents, 1) if latents else None)


def products_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the operands of the tall products, for a model whose forward is in `dtype`: a processor that forwards in bfloat16
    multiplies twice as fast in it; a GPU is fast enough in float32."""
    return dtype if dtype == torch.bfloat16 and device.type == "cpu" else torch.float32


def threads_for(rows: int, device: torch.device) -> int:
    """Python threads that share the rows of a weight."""
    return max(1, min(torch.get_num_threads(), rows // FEWEST_ROWS)) if device.type == "cpu" else 1


def _in_threads(weight: Tensor, solve_rows: Callable[[Tensor, Stages], Solution], timed: Stages) -> list[Solution]:
    """Solutions of the parts of a weight. On the CPU each thread solves parts of its own, with one thread of torch: rows do not depend
    on each other, and of what is done to a part only the tall products are large enough to be shared by threads."""
    at_once, threads = ROWS_AT_ONCE.get(weight.device.type, ROWS_AT_ONCE["cuda"]), threads_for(weight.shape[0], weight.device)
    if threads == 1:
        return [solve_rows(part, timed) for part in weight.split(at_once)]
    parts = weight.split(min(at_once, -(-weight.shape[0] // threads)))
    clocks = [Stages(weight.device) for _ in parts]

    def work(part: Tensor, own: Stages) -> Solution:
        torch.set_num_threads(1)  # of this thread
        return solve_rows(part, own)

    before = torch.get_num_threads()
    try:
        with timed.shared(clocks), ThreadPoolExecutor(threads) as pool:
            return list(pool.map(work, parts, clocks))
    finally:
        torch.set_num_threads(before)  # MKL keeps one number for all threads


@dataclass(frozen=True)
class Block:
    """A column block of the sweep, as all rows of a weight see it."""

    here: Int[Tensor, " block"]
    """Its columns in the original order."""
    rows: slice
    """Its rows of L, which run from the last column to the first."""
    diagonal: Float[Tensor, " block"]
    """R[i,i]."""
    feedback: Float[Tensor, "block block"]
    """U = R_bb⁻¹, rows scaled to a unit diagonal."""
    carry: Float[Tensor, "block block"]
    """R_bb⁻ᵀ for what the tall product leaves in the order of L; in the dtype of the tall products."""


@dataclass(frozen=True)
class Prepared:
    """What all rows of a weight share while they are solved. Of L it holds only the blocks and the operand of the tall products: if that
    has another dtype, the factor itself can be released."""

    order: Int[Tensor, " n"]
    """Factor.order."""
    blocks: list[Block]
    lower: Float[Tensor, "n n"]
    """L, in the dtype of the tall products."""
    importance: Float[Tensor, " n"]
    """Weight of each column's error in a search for scales."""
    damp: Float[Tensor, ""]
    """λ."""
    hessian: Float[Tensor, "n n"]
    """H, columns in their original order."""
    descended: Float[Tensor, "n n"] | None
    """H in the order of the descent; None where there is none."""
    coarse: Float[Tensor, "n n"] | None
    """The same, in the dtype of the tall products."""


def prepare(factor: Factor, config: QuantizeConfig, products: torch.dtype | None = None) -> Prepared:
    """products: the dtype of the operands of the tall products, where it is not the factor's."""
    columns, products = factor.order.numel(), products or factor.lower.dtype
    descended = factor.hessian if config.refit or config.descent else None
    if descended is not None and config.desc_act:
        descended = descended[factor.order][:, factor.order]
    run = columns // config.groups_of(columns) if _fits_during_sweep(config, columns) else COLUMN_BLOCK
    blocks = _blocks(factor, _block_size(columns, run), products)
    lower, coarse = factor.lower.to(products), None if descended is None else descended.to(products)
    return Prepared(factor.order, blocks, lower, _importance(factor), factor.damp, factor.hessian, descended, coarse)


def _blocks(factor: Factor, size: int, dtype: torch.dtype) -> list[Block]:
    columns, found = factor.order.numel(), []
    for begin in range(0, columns, size):
        end = min(begin + size, columns)
        rows = slice(columns - end, columns - begin)
        triangle = factor.lower[rows, rows].flip(0, 1)  # R_bb
        inverse = torch.linalg.solve_triangular(triangle, torch.eye(end - begin, dtype=triangle.dtype, device=triangle.device), upper=True)
        feedback = inverse / inverse.diagonal().unsqueeze(1)
        found.append(Block(factor.order[begin:end], rows, triangle.diagonal().clone(), feedback, inverse.flip(0).T.to(dtype)))
    return found


def _fits_during_sweep(config: QuantizeConfig, columns: int) -> bool:
    # a single group is fitted on the target either way, so it needs no block as long as the row
    return not config.static_groups and config.groups_of(columns) > 1


def _solve_rows(weight: Tensor, prepared: Prepared, config: QuantizeConfig, timed: Stages) -> Solution:
    """`solve` for some rows of a weight."""
    columns, groups = weight.shape[1], config.groups_of(weight.shape[1])
    size = columns // groups
    importance = prepared.importance
    fit = config if _fits_during_sweep(config, columns) else None
    with timed("scales"):
        target = torch.empty_like(weight.T, dtype=importance.dtype, memory_format=torch.contiguous_format).copy_(weight.T)
        fitted = grid.Grid(target.new_empty(groups, weight.shape[0]), target.new_empty(groups, weight.shape[0]), config.max_code)
        if fit is None:
            fitted = grid.Grid(*grid.fit(target.view(groups, size, -1), importance.view(groups, size), config), config.max_code)
    # groups follow the processing order under desc_act; in every other order a column keeps its own group
    original_group = torch.arange(columns, device=weight.device) // size
    g_idx = torch.empty_like(original_group)
    g_idx[prepared.order] = original_group if config.desc_act else original_group[prepared.order]
    with timed("sweep"):
        codes, errors, loss = sweep(target, prepared, g_idx, fitted, fit, timed)
    del target  # as large as what comes now
    if prepared.descended is not None:
        assert prepared.coarse is not None and errors is not None  # all three are there, or none
        with timed("descent"):
            # the descent wants groups as runs of columns: under desc_act that is the processing order, else the original one
            place = torch.arange(columns, device=weight.device).flip(0) if config.desc_act else prepared.order.flip(0)
            slope = slope_after_sweep(prepared.lower, errors, place)
            del errors
            found = codes[prepared.order] if config.desc_act else codes
            exact, coarse = prepared.descended, prepared.coarse
            loss -= descend(found, slope, fitted, exact, prepared.damp, coarse, scales=config.refit, passes=config.descent)
            if config.desc_act:
                codes[prepared.order] = found
    latents = _latents(weight, codes, g_idx, fitted, prepared) if config.tuning_steps else None
    return Solution(codes, fitted.scales.half(), fitted.zeros.to(torch.uint8), g_idx.to(torch.int32), loss, latents)


def _latents(weight: Tensor, codes: Tensor, g_idx: Tensor, fitted: grid.Grid, prepared: Prepared) -> Tensor:
    """Each code moved towards the minimum of its own parabola, given all other codes, by at most LATENT_REACH."""
    scales = fitted.scales[g_idx]
    error = weight.T.to(scales.dtype) - (codes.to(scales.dtype) - fitted.zeros[g_idx]) * scales
    curvature = prepared.hessian.diagonal() + prepared.damp
    reach = (prepared.hessian @ error).add_(prepared.damp * error).div_(curvature.unsqueeze(1)).div_(scales)
    return codes.to(scales.dtype) + reach.clamp_(-LATENT_REACH, LATENT_REACH)


def _importance(factor: Factor) -> Float[Tensor, " columns"]:
    """Weight of each column's squared error when scales are searched: the geometric mean of diag(H), its cost when no other column
    answers to it, and of R[i,i]², its cost when all columns after it do. Columns in their original order."""
    conditional = torch.empty_like(factor.curvature)
    conditional[factor.backwards] = factor.lower.diagonal().square()
    return (conditional * factor.curvature).sqrt()


def round_to_nearest(weight: Float[Tensor, "out columns"], config: QuantizeConfig) -> Solution:
    """Every weight to its nearest code on min-max scales: what a failed factorization falls back to where that is allowed."""
    columns = weight.shape[1]
    eye, order = torch.eye(columns, dtype=torch.float32, device=weight.device), torch.arange(columns, device=weight.device)
    identity = Factor(eye, order, 0.0, 0, eye, eye.new_zeros(()))
    plain = config.model_copy(update={"desc_act": False, "scale_search": "min_max", "refit": False, "descent": 0})
    return solve(weight.float(), identity, plain)


def sweep(
    target: Float[Tensor, "columns out"],
    prepared: Prepared,
    group_of: Int[Tensor, " columns"],
    fitted: grid.Grid,
    fit: QuantizeConfig | None,
    timed: Stages,
) -> tuple[UInt8[Tensor, "columns out"], Float[Tensor, "columns out"] | None, Float[Tensor, " out"]]:
    """Codes of a target, the errors (w - q)L by the rows of L if a descent wants them, and the sum of their squares, which is the loss.

    Columns of target, codes and `group_of` stand in their original order; errors are in the dtype of the tall products. With `fit`, each
    group is a run of the processing order and its row of `fitted` is filled when the sweep reaches it; without, `fitted` is complete
    and groups may be interleaved.
    """
    (columns, out), blocks, lower = target.shape, prepared.blocks, prepared.lower
    codes = torch.empty(columns, out, dtype=torch.uint8, device=target.device)
    delta = torch.empty(columns, out, dtype=lower.dtype, device=target.device)
    errors = None if prepared.descended is None else torch.empty_like(delta)
    loss = target.new_zeros(out)
    # the order in which groups are fitted, read once: on a GPU that waits for the device
    fitted_next = iter(group_of[prepared.order[:: columns // fitted.scales.shape[0]]].tolist() if fit else [])
    tall = max(1, TALL_COLUMNS // blocks[0].here.numel())
    for number, block in enumerate(blocks):
        here, rows = block.here, block.rows
        length, group, now = here.numel(), group_of[here], target[here]
        if number % tall == 0:
            together = slice(blocks[min(number + tall, len(blocks)) - 1].rows.start, rows.stop)
            far = lower[together.stop :, together].T @ delta[together.stop :]
        if number:
            near = slice(rows.stop, together.stop)  # what was done since the tall product
            carried = far[rows.start - together.start :][:length].addmm_(lower[near, rows].T, delta[near])
            now += block.carry @ carried
        run = columns // fitted.scales.shape[0] if fit else length
        found = torch.empty(length, out, dtype=torch.uint8, device=target.device)
        for start in range(0, length, run):
            part = slice(start, min(start + run, length))
            if fit:
                g, importance = next(fitted_next), prepared.importance[here[part]]
                with timed("scales"):
                    fitted.scales[g], fitted.zeros[g] = (t[0] for t in grid.fit(now[None, part], importance[None], fit))
            found[part] = round_columns(now[part], block.feedback[part, part], fitted.scales, fitted.zeros, group[part], fitted.max_code)
            if part.stop < length:
                now[part.stop :].addmm_(block.feedback[part, part.stop :].T, now[part], alpha=-1)
        error = None if errors is None else errors[rows]
        write_back(found, now, target, here, fitted.scales, fitted.zeros, group, block.diagonal, codes, delta[rows], error, loss)
    return codes, errors, loss


def relative_error(
    weight: Float[Tensor, "out columns"], loss: Float[Tensor, " out"], hessian: Float[Tensor, "columns columns"], damp: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Loss over output power, w(H + λI)wᵀ, on evenly spaced rows; float64. hessian: H; damp: λ."""
    rows = torch.arange(0, weight.shape[0], max(1, weight.shape[0] // POWER_ROWS), device=weight.device)
    some = weight[rows].to(hessian.dtype)
    power = ((some @ hessian).add_(damp * some) * some).sum()
    return loss[rows].double().sum() / power.double()


def _block_size(columns: int, run: int) -> int:
    """A multiple of the group length near COLUMN_BLOCK, so that a block never cuts a group; a long group is its own block."""
    return min(columns, run * max(1, COLUMN_BLOCK // run))
