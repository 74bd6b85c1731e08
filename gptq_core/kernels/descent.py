"""Coordinate descent on the codes of one column block: each to the minimum of its own parabola, given all others.

A changed code changes the slopes of the columns that follow in the block; its caller passes the change on to the rest of the layer.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from gptq_core.kernels import dispatch
from gptq_core.kernels.constants import LARGEST_BLOCK

SUB_BLOCK = 16


def descend_columns(
    codes: UInt8[Tensor, "block out"],
    slope: Float[Tensor, "block out"],
    scale: Float[Tensor, " out"],
    zero: Float[Tensor, " out"],
    max_code: int,
    damped: Float[Tensor, "block block"],
) -> Float[Tensor, "block out"]:
    """Move the codes of a block, which lies in one group, in place; the change of its rounded weights.

    slope: half the gradient, (q - w)(H + λI), in place: each row ends as its column found it, before its own code moved.
    damped: H + λI of these columns.
    """
    block = codes.shape[0]
    kernels = dispatch.kernels(slope, codes, scale, zero, damped) if block <= LARGEST_BLOCK else None
    if kernels:
        return kernels.descend_columns(codes, slope, scale, zero, max_code, damped)
    inverse = (1 / damped.diagonal()).tolist()
    before = codes.to(slope.dtype).sub_(zero).mul_(scale)
    centred, change = torch.empty_like(before), torch.empty_like(before)  # centred: code less zero
    lowest, highest = -zero, max_code - zero
    with dispatch.small_operations:
        for start in range(0, block, SUB_BLOCK):
            stop = min(start + SUB_BLOCK, block)
            for i in range(start, stop):
                code = torch.sub(before[i], slope[i], alpha=inverse[i], out=centred[i]).div_(scale).round_()
                torch.clamp(code, lowest, highest, out=code)
                moved = torch.mul(code, scale, out=change[i]).sub_(before[i])
                if i + 1 < stop:
                    slope[i + 1 : stop].addr_(damped[i, i + 1 : stop], moved)
            if stop < block:
                slope[stop:].addmm_(damped[stop:, start:stop], change[start:stop])
    codes.copy_(centred.add_(zero))
    return change
