"""The three innermost loops as Triton kernels, one launch each where the twins of the same names make hundreds. See dispatch.py.

Layout. Tensors are transposed: a column of the layer is a contiguous row of outputs. Outputs do not depend on each other, so a
program owns a tile of TILE outputs and all of its columns, loads and stores run along the outputs, and programs do not communicate.

Sweep and descent hold a block of up to LARGEST_BLOCK columns x TILE outputs in registers, 32 float32 a thread, and walk the columns
in order. Registers cannot be indexed by what is known only at run time, so a column is taken out by a sum under a mask, and its error
goes to the columns that follow as an outer product; also to those already done, which are not read again. That is twice the
arithmetic of a triangle and none of its memory traffic. The rest is loaded where it is needed; rows of scales and of the feedback
are shared by many programs and come from the cache. Longer blocks, those of dynamic groups of more than LARGEST_BLOCK columns, are
cut by rounding.round_columns, with a GEMM between the parts; in descent they are left to the twin, and its caller makes none.

The search holds one candidate at a time, its error, and the best so far; the weights of its tile are read again for each candidate,
from the cache as long as a group of columns x TILE floats fits there. Groups of any length go through in chunks.

Arithmetic. As the twins: true division (`/` is approximate in Triton), rounding of halves to even, scales through float16, and no
contraction of products and sums (`enable_fp_fusion=False`). What differs is the order of sums: the twins carry errors on by GEMMs,
and sum the error of a candidate otherwise. So where all sums are exact the results are equal to the bit; else a code may differ
where its target is within about 1e-4 of a step of a tie, with what follows from it in the same output, and a scale where two
candidates are as good up to rounding. The kernels also run in Triton's interpreter, on the CPU, where TRITON_INTERPRET=1 was set
before Triton was imported. No function here waits for the device.

This module imports Triton, so dispatch imports it only when a tensor is to go there.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from gptq_core.kernels import constants
from gptq_core.kernels.constants import LARGEST_BLOCK

NAME = "triton"
"""As `dispatch.implementation` and run records call it."""
TILE = 32
"""Outputs of a program: a row of float32 is one line of the cache, and 4096 outputs still make 128 programs."""
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}

TO_WHOLE = tl.constexpr(1.5 * 2**23)
"""Added, it leaves a float32 below 2^22 no bits behind the point."""


def round_columns(
    now: Float[Tensor, "block out"],
    feedback: Float[Tensor, "block block"],
    scales: Float[Tensor, "groups out"],
    zeros: Float[Tensor, "groups out"],
    group: Int[Tensor, " block"],
    max_code: int,
) -> UInt8[Tensor, "block out"]:
    """rounding.round_columns, of at most LARGEST_BLOCK columns."""
    assert _is_along_rows(now), now.stride()  # it is written to
    feedback, scales, zeros = map(_along_rows, (feedback, scales, zeros))  # a triangular solve leaves its result transposed
    block, out = now.shape
    codes = torch.empty(block, out, dtype=torch.uint8, device=now.device)
    with torch.cuda.device_of(now):
        _round_columns[(triton.cdiv(out, TILE),)](
            now,
            feedback,
            scales,
            zeros,
            group,
            codes,
            block,
            out,
            now.stride(0),
            feedback.stride(0),
            scales.stride(0),
            zeros.stride(0),
            MAX_CODE=max_code,
            BLOCK=_rows(block),
            TILE=TILE,
            **LAUNCH,
        )
    return codes


def descend_columns(
    codes: UInt8[Tensor, "block out"],
    slope: Float[Tensor, "block out"],
    scale: Float[Tensor, " out"],
    zero: Float[Tensor, " out"],
    max_code: int,
    damped: Float[Tensor, "block block"],
) -> Float[Tensor, "block out"]:
    """descent.descend_columns, of at most LARGEST_BLOCK columns."""
    assert _is_along_rows(codes) and _is_along_rows(slope), (codes.stride(), slope.stride())  # they are written to
    damped = _along_rows(damped)
    block, out = codes.shape
    change = torch.empty_like(slope, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(slope):
        _descend_columns[(triton.cdiv(out, TILE),)](
            codes,
            slope,
            scale,
            zero,
            damped,
            change,
            block,
            out,
            codes.stride(0),
            slope.stride(0),
            damped.stride(0),
            MAX_CODE=max_code,
            BLOCK=_rows(block),
            TILE=TILE,
            **LAUNCH,
        )
    return change


def search(
    weights: Float[Tensor, "groups columns out"], importance: Float[Tensor, "groups columns"], max_code: int, smallest_zero: int | None
) -> tuple[Float[Tensor, "groups out"], Float[Tensor, "groups out"]]:
    """scale_search.search."""
    weights, importance = map(_along_rows, (weights, importance))
    groups, columns, out = weights.shape
    scales, zeros = weights.new_empty(2, groups, out)
    with torch.cuda.device_of(weights):
        _search[(triton.cdiv(out, TILE), groups)](
            weights,
            importance,
            scales,
            zeros,
            columns,
            out,
            weights.stride(0),
            weights.stride(1),
            importance.stride(0),
            MAX_CODE=max_code,
            SYM=smallest_zero is None,
            SMALLEST_ZERO=smallest_zero or 0,
            COARSE=constants.COARSE_STEPS,
            FINE=constants.FINE_STEPS,
            LEAST=constants.SMALLEST_SHARE,
            MOST=constants.LARGEST_SHARE,
            SMALLEST_SCALE=constants.SMALLEST_SCALE,
            CHUNK=min(_rows(columns), LARGEST_BLOCK),
            TILE=TILE,
            **LAUNCH,
        )
    return scales, zeros


def _along_rows(tensor: Tensor) -> Tensor:
    return tensor if _is_along_rows(tensor) else tensor.contiguous()


def _is_along_rows(tensor: Tensor) -> bool:
    """Whether a row is contiguous; the stride of a row of one means nothing, and may be anything."""
    return tensor.shape[-1] == 1 or tensor.stride(-1) == 1


def _rows(columns: int) -> int:
    """A power of two, as Triton wants the sides of a tile; short blocks share one."""
    power: int = triton.next_power_of_2(columns)
    return max(16, power)


# no_type_check: the tests decorate all functions that are to be checked at run time, and Triton compiles only undecorated ones


@triton.jit
@no_type_check
def _whole(x):
    """Nearest whole number, halves to even, of |x| < 2^22; of more than that a number as far beyond every code. No compiler may fold the
    two additions: IEEE sums are not associative, and Triton asks for no fast-math. CUDA's rint is unknown to the interpreter."""
    return (x + TO_WHOLE) - TO_WHOLE


@triton.jit
@no_type_check
def _code(weight, scale, zero, MAX_CODE: tl.constexpr):
    return tl.minimum(tl.maximum(_whole(tl.div_rn(weight, scale)) + zero, 0.0), MAX_CODE * 1.0)


@triton.jit
@no_type_check
def _round_columns(
    now,
    feedback,
    scales,
    zeros,
    group,
    codes,
    block,
    out,
    now_stride,
    feedback_stride,
    scales_stride,
    zeros_stride,
    MAX_CODE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    rows, outs = tl.arange(0, BLOCK), tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = outs < out
    held = (rows < block)[:, None] & inside[None, :]
    tile = tl.load(now + rows[:, None] * now_stride + outs[None, :], mask=held, other=0.0)
    for i in range(block):
        g = tl.load(group + i)
        scale = tl.load(scales + g * scales_stride + outs, mask=inside, other=1.0)
        zero = tl.load(zeros + g * zeros_stride + outs, mask=inside, other=0.0)
        share = tl.load(feedback + i * feedback_stride + rows, mask=rows < block, other=0.0)
        target = tl.sum(tl.where(rows[:, None] == i, tile, 0.0), 0)
        code = _code(target, scale, zero, MAX_CODE)
        left = target - (code - zero) * scale
        tile -= share[:, None] * left[None, :]
        tl.store(codes + i * out + outs, code.to(tl.uint8), mask=inside)
        tl.store(now + i * now_stride + outs, left, mask=inside)


@triton.jit
@no_type_check
def _descend_columns(
    codes,
    slope,
    scales,
    zeros,
    damped,
    change,
    block,
    out,
    codes_stride,
    slope_stride,
    damped_stride,
    MAX_CODE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    rows, outs = tl.arange(0, BLOCK), tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = outs < out
    scale = tl.load(scales + outs, mask=inside, other=1.0)
    zero = tl.load(zeros + outs, mask=inside, other=0.0)
    held = (rows < block)[:, None] & inside[None, :]
    tile = tl.load(slope + rows[:, None] * slope_stride + outs[None, :], mask=held, other=0.0)
    for i in range(block):
        before = (tl.load(codes + i * codes_stride + outs, mask=inside, other=0).to(tl.float32) - zero) * scale
        bend = tl.load(damped + i * damped_stride + i)
        share = tl.load(damped + i * damped_stride + rows, mask=rows < block, other=0.0)
        found = tl.sum(tl.where(rows[:, None] == i, tile, 0.0), 0)
        code = _code(before - found * tl.div_rn(1.0, bend), scale, zero, MAX_CODE)
        moved = (code - zero) * scale - before
        tile += share[:, None] * moved[None, :]
        tl.store(codes + i * codes_stride + outs, code.to(tl.uint8), mask=inside)
        tl.store(slope + i * slope_stride + outs, found, mask=inside)
        tl.store(change + i * out + outs, moved, mask=inside)


@triton.jit
@no_type_check
def _search(
    weights,
    importance,
    scales,
    zeros,
    columns,
    out,
    group_stride,
    column_stride,
    importance_stride,
    MAX_CODE: tl.constexpr,
    SYM: tl.constexpr,
    SMALLEST_ZERO: tl.constexpr,
    COARSE: tl.constexpr,
    FINE: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    SMALLEST_SCALE: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    outs = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = outs < out
    rows, g = tl.arange(0, CHUNK).to(tl.int64), tl.program_id(1).to(tl.int64)  # offsets in a whole weight may pass 2^31
    weights += g * group_stride
    importance += g * importance_stride

    low, high = tl.full([TILE], float("inf"), tl.float32), tl.full([TILE], float("-inf"), tl.float32)
    for start in range(0, columns, CHUNK):
        held = (start + rows < columns)[:, None] & inside[None, :]
        at = (start + rows)[:, None] * column_stride + outs[None, :]
        low = tl.minimum(low, tl.min(tl.load(weights + at, mask=held, other=float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.load(weights + at, mask=held, other=float("-inf")), 0))
    if SYM:
        base = tl.where(inside, tl.maximum(-low, high) * (2 / (MAX_CODE + 1)), 0.0)  # a power of two: exact
        middle = tl.zeros([TILE], tl.float32)
    else:
        low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
        base = tl.div_rn(high - low, tl.full([TILE], MAX_CODE, tl.float32))
        middle = (high + low) * 0.5

    # coarse: every share with either sign, or with the zero a step down, in place and a step up; fine: around the best of those
    WAYS: tl.constexpr = 2 if SYM else 3
    SPACING: tl.constexpr = (MOST - LEAST) / (COARSE - 1)
    best = tl.full([TILE], float("inf"), tl.float32)
    chosen, zero_point = tl.full([TILE], float("nan"), tl.float32), tl.zeros([TILE], tl.float32)  # stays so where no error is a number
    share, around = tl.full([TILE], 1.0, tl.float32), tl.full([TILE], 1.0, tl.float32)
    for candidate in range(COARSE * WAYS + 2 * (FINE - 1)):
        way, fine = candidate % WAYS, candidate - COARSE * WAYS
        around = tl.where(fine <= 0, share, around)
        # float64 and then rounded, as the twin's shares are Python's
        fraction = (LEAST + (MOST - LEAST) * tl.cast(candidate // WAYS, tl.float64) / (COARSE - 1)).to(tl.float32)
        offset = ((2 * (fine % 2) - 1) * SPACING * tl.cast(fine // 2 + 1, tl.float64) / FINE).to(tl.float32)
        tried = tl.where(fine < 0, fraction, tl.abs(around) + offset)
        if SYM:
            tried = tl.where((fine < 0) & (way == 1) | (fine >= 0) & (around < 0), -tried, tried)
        scale = _float16_exact(tried * base, SMALLEST_SCALE)
        if SYM:
            zero = tl.full([TILE], (MAX_CODE + 1) // 2, tl.float32)
        else:
            zero = _whole(MAX_CODE / 2 - tl.div_rn(middle, scale)) + tl.where(fine < 0, way - 1, 0)
            zero = tl.minimum(tl.maximum(zero, SMALLEST_ZERO * 1.0), MAX_CODE * 1.0)
        error = tl.zeros([TILE], tl.float32)
        for start in range(0, columns, CHUNK):
            held = (start + rows < columns)[:, None] & inside[None, :]
            weight = tl.load(weights + (start + rows)[:, None] * column_stride + outs[None, :], mask=held, other=0.0)
            cost = tl.load(importance + start + rows, mask=start + rows < columns, other=0.0)
            off = (_code(weight, scale[None, :], zero[None, :], MAX_CODE) - zero[None, :]) * scale[None, :] - weight
            error += tl.sum(off * off * cost[:, None], 0)
        better = error < best
        best, share = tl.where(better, error, best), tl.where(better, tried, share)
        chosen, zero_point = tl.where(better, scale, chosen), tl.where(better, zero, zero_point)
    tl.store(scales + g * out + outs, chosen, mask=inside)
    tl.store(zeros + g * out + outs, zero_point, mask=inside)


@triton.jit
@no_type_check
def _float16_exact(scale, SMALLEST_SCALE: tl.constexpr):
    magnitude = tl.where(scale != 0, tl.maximum(tl.abs(scale), SMALLEST_SCALE), 1.0)
    return tl.where(scale < 0, -magnitude, magnitude).to(tl.float16).to(tl.float32)
