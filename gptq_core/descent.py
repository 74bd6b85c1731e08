"""Coordinate descent after the sweep: scales and codes to their best values, each given all others.

The sweep decides about a column before it knows what the columns after it will make of the error, and its scales are fitted before
any code is known. Here everything is known. On E = (w - q)(H + λI)(w - q)ᵀ of each row, group by group:

- its scale to the minimum of the parabola E(s), rounded to float16;
- column by column, its code to the one nearest to the minimum of the parabola E(q_i).

Neither step can raise E, so a pass never makes a row worse. `slope` holds (q - w)(H + λI), half the gradient. It comes out of the
sweep by one triangular product, and is kept up to date by the GEMMs of the blocks: a pass costs about as much as the sweep.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from gptq_core import grid
from gptq_core.kernels.descent import descend_columns

BLOCK = 128
PANEL = 256


def slope_after_sweep(upper: Float[Tensor, "columns columns"], errors: Float[Tensor, "columns out"]) -> Float[Tensor, "columns out"]:
    """(q - w)(H + λI) of every output, transposed: -R z for the z = ((w - q)R)ᵀ that the sweep leaves behind."""
    slope = torch.zeros_like(errors)
    for begin in range(0, upper.shape[0], PANEL):
        end = min(begin + PANEL, upper.shape[0])
        slope[:end].addmm_(upper[:end, begin:end], errors[begin:end], alpha=-1)
    return slope


def descend(
    codes: UInt8[Tensor, "columns out"],
    slope: Float[Tensor, "columns out"],
    fitted: grid.Grid,
    damped: Float[Tensor, "columns columns"],
    *,
    scales: bool,
    passes: int,
) -> Float[Tensor, " out"]:
    """Improve `codes` and `fitted` in place by `passes` passes; how much lower the loss of each output is.

    With `scales` a pass moves the scales too, and with 0 passes one is made that moves nothing else. Groups are runs of columns;
    damped is H + λI in the same order.
    """
    gain = slope.new_zeros(slope.shape[1])
    for number in range(max(passes, 1)):
        last = number == max(passes, 1) - 1
        for span in _spans(slope.shape[0], fitted.scales.shape[0]):
            gain += _descend_span(codes, slope, fitted, damped, span, scales, passes > 0, last)
    return gain


def _spans(columns: int, groups: int) -> list[slice]:
    """Runs of whole groups, near BLOCK columns each where groups are short: what changes in one reaches the others by one GEMM."""
    size = columns // groups
    length = size * max(1, BLOCK // size)
    return [slice(begin, min(begin + length, columns)) for begin in range(0, columns, length)]


def _descend_span(
    codes: Tensor, slope: Tensor, fitted: grid.Grid, damped: Tensor, span: slice, scales: bool, moves_codes: bool, last: bool
) -> Tensor:
    """One pass over the groups of a span; the gain. In the last pass nobody looks back, so only columns that follow are told."""
    size = slope.shape[0] // fitted.scales.shape[0]
    gain = slope.new_zeros(slope.shape[1])
    moved = slope.new_zeros(span.stop - span.start, slope.shape[1])
    for start in range(span.start, span.stop, size):
        g, group = start // size, slice(start, start + size)
        told = slice(start if last else span.start, span.stop)
        if scales:
            centred = codes[group].to(slope.dtype).sub_(fitted.zeros[g])
            reached = damped[told, group] @ centred
            own = slice(start - told.start, start - told.start + size)
            tilt, bend = (centred * slope[group]).sum(0), (centred * reached[own]).sum(0)
            step = _scale_step(fitted.scales[g], tilt, bend)
            gain -= step * (2 * tilt + step * bend)
            slope[told] += reached.mul_(step)
            moved[start - span.start : start - span.start + size] += centred.mul_(step)
            fitted.scales[g] += step
        if moves_codes:
            for begin in range(start, start + size, BLOCK):
                block = slice(begin, min(begin + BLOCK, start + size))
                curvature = damped[block, block]
                change = descend_columns(codes[block], slope[block], fitted.scales[g], fitted.zeros[g], fitted.max_code, curvature)
                gain -= (change * (2 * slope[block] + curvature.diagonal().unsqueeze(1) * change)).sum(0)
                moved[begin - span.start : block.stop - span.start] += change
                slope[block.stop : span.stop].addmm_(damped[block.stop : span.stop, block], change)
                if not last:
                    slope[span.start : begin].addmm_(damped[span.start : begin, block], change)
                    slope[block].addmm_(damped[block, block].triu(), change)  # the lower half was told on the way
    slope[span.stop :].addmm_(damped[span.stop :, span], moved)
    if not last:
        slope[: span.start].addmm_(damped[: span.start, span], moved)
    return gain


def _scale_step(scale: Tensor, tilt: Tensor, bend: Tensor) -> Tensor:
    """From each scale to the float16 nearest to the minimum of bend·t² + 2·tilt·t; 0 where there is no other usable one."""
    best = (scale - tilt / bend).half().to(scale.dtype)
    usable = (bend > 0) & torch.isfinite(best) & (best != 0)
    return torch.where(usable, best - scale, 0.0)
