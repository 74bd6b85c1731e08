"""Coordinate descent after the sweep: scales and codes to their best values, each given all others.

The sweep decides about a column before it knows what the columns after it will make of the error, and its scales are fitted before
any code is known. Here everything is known. On E = (w - q)(H + λI)(w - q)ᵀ of each row, group by group:

- its scale to the minimum of the parabola E(s), rounded to float16;
- column by column, its code to the one nearest to the minimum of the parabola E(q_i).

Neither step can raise E, so a pass never makes a row worse. `slope` holds (q - w)(H + λI), half the gradient. It comes out of the
sweep by one triangular product, and what a span of columns has moved reaches the next ones by one tall product each: a pass costs
about as much as the sweep. These products may have bfloat16 operands: with a slope that is off by 0.3 % only those codes change for
which both values cost about the same.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from gptq_core.kernels.descent import descend_columns
from gptq_core.method import grid

BLOCK = 128


def slope_after_sweep(
    lower: Float[Tensor, "columns columns"], errors: Float[Tensor, "columns out"], place: Int[Tensor, " columns"]
) -> Float[Tensor, "columns out"]:
    """(q - w)(H + λI) of every output, transposed, in float32 at least: -L z for the z = ((w - q)L)ᵀ that the sweep leaves behind.

    Both in the order of L's rows; `place` says which row of the result each one becomes.
    """
    columns, out = errors.shape
    slope = torch.empty(columns, out, dtype=torch.promote_types(errors.dtype, torch.float32), device=errors.device)
    for begin in range(0, columns, BLOCK):
        end = min(begin + BLOCK, columns)
        slope[place[begin:end]] = -(lower[begin:end, :end] @ errors[:end]).to(slope.dtype)
    return slope


def descend(
    codes: UInt8[Tensor, "columns out"],
    slope: Float[Tensor, "columns out"],
    fitted: grid.Grid,
    hessian: Float[Tensor, "columns columns"],
    damp: Float[Tensor, ""],
    coarse: Float[Tensor, "columns columns"],
    *,
    scales: bool,
    passes: int,
) -> Float[Tensor, " out"]:
    """Improve `codes` and `fitted` in place by `passes` passes; how much lower the loss of each output is.

    With `scales` a pass moves the scales too, and with 0 passes one is made that moves nothing else. Groups are runs of columns;
    hessian is H in the same order, coarse the same in the dtype of the tall products, and damp is λ.
    """
    gain = slope.new_zeros(slope.shape[1])
    moved = torch.zeros_like(slope, dtype=coarse.dtype)  # what each span has changed and the others do not know yet
    columns, groups = slope.shape[0], fitted.scales.shape[0]
    for number in range(max(passes, 1)):
        for span in _spans(columns, groups):
            others = slice(0, None if number else span.start)  # in the first pass nothing after the span has moved
            moved[span] = 0
            if number or span.start:
                slope[span] += coarse[span, others] @ moved[others]
            own = hessian[span, span].clone()
            own.diagonal().add_(damp)
            within = slice(span.start * groups // columns, span.stop * groups // columns)
            part = grid.Grid(fitted.scales[within], fitted.zeros[within], fitted.max_code)
            last = number == max(passes, 1) - 1
            change, less = _descend_span(codes[span], slope[span], part, own, scales, passes > 0, last)
            moved[span] = change
            gain += less
    return gain


def _spans(columns: int, groups: int) -> list[slice]:
    """Runs of whole groups, near BLOCK columns each where groups are short: what changes in one reaches the others by one GEMM."""
    size = columns // groups
    length = size * max(1, BLOCK // size)
    return [slice(begin, min(begin + length, columns)) for begin in range(0, columns, length)]


def _descend_span(
    codes: Tensor, slope: Tensor, fitted: grid.Grid, own: Tensor, scales: bool, moves_codes: bool, last: bool
) -> tuple[Tensor, Tensor]:
    """One pass over the groups of a span, in place; the change of its rounded weights, and the gain.

    All tensors are the span's; own is H + λI. slope knows of all that has moved in the span, in the last pass of what later columns see.
    """
    size = codes.shape[0] // fitted.scales.shape[0]
    gain = slope.new_zeros(slope.shape[1])
    moved = torch.zeros_like(slope)
    for g, start in enumerate(range(0, codes.shape[0], size)):
        group, reach = slice(start, start + size), slice(start if last else 0, None)
        if scales:
            centred = codes[group].to(slope.dtype).sub_(fitted.zeros[g])
            reached = own[reach, group] @ centred
            tilt = (centred * slope[group]).sum(0)
            bend = (centred * reached[start - (reach.start or 0) :][:size]).sum(0)
            step = _scale_step(fitted.scales[g], tilt, bend)
            gain -= step * (2 * tilt + step * bend)
            slope[reach] += reached.mul_(step)
            moved[group] = centred.mul_(step)
            fitted.scales[g] += step
        if moves_codes:
            for begin in range(start, start + size, BLOCK):
                block = slice(begin, min(begin + BLOCK, start + size))
                curvature = own[block, block]
                change = descend_columns(codes[block], slope[block], fitted.scales[g], fitted.zeros[g], fitted.max_code, curvature)
                gain -= torch.addcmul(slope[block], curvature.diagonal().unsqueeze(1), change, value=0.5).mul_(change).sum(0).mul_(2)
                moved[block] += change
                slope[block.stop :].addmm_(own[block.stop :, block], change)
                if not last:
                    slope[:begin].addmm_(own[:begin, block], change)
                    slope[block].addmm_(curvature.triu(), change)  # the lower half was added on the way
    return moved, gain


def _scale_step(scale: Tensor, tilt: Tensor, bend: Tensor) -> Tensor:
    """From each scale to the float16 nearest to the minimum of bend·t² + 2·tilt·t; 0 where there is no other usable one."""
    best = (scale - tilt / bend).half().to(scale.dtype)
    usable = (bend > 0) & torch.isfinite(best) & (best != 0)
    return torch.where(usable, best - scale, 0.0)
