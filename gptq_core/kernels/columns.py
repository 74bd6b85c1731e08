"""One column block of the sweep: round a column, push its error on the columns that follow.

The columns of a block depend on each other, outputs do not: see solver.py for the mathematics.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from gptq_core.kernels import dispatch

SUB_BLOCK = 16


def round_columns(
    now: Float[Tensor, "block out"],
    feedback: Float[Tensor, "block block"],
    scales: Float[Tensor, "groups out"],
    zeros: Float[Tensor, "groups out"],
    group: Int[Tensor, " block"],
    max_code: int,
) -> UInt8[Tensor, "block out"]:
    """Codes of a block's columns. `now`, their conditional targets, is overwritten by what rounding leaves: target less rounded weight.

    feedback: upper triangular with a unit diagonal, row i the share of column i's error that each later column takes over.
    group: row of `scales` and `zeros` for each column.
    """
    if dispatch.takes(now, feedback, scales, zeros, group):
        from gptq_core.kernels import fused  # only here is Triton imported

        return fused.round_columns(now, feedback, scales, zeros, group, max_code)
    block = now.shape[0]
    groups = group.tolist()
    codes = torch.empty(now.shape, dtype=torch.uint8, device=now.device)
    for start in range(0, block, SUB_BLOCK):
        stop = min(start + SUB_BLOCK, block)
        for i in range(start, stop):
            scale, zero = scales[groups[i]], zeros[groups[i]]
            code = (now[i] / scale).round_().add_(zero).clamp_(0, max_code)
            codes[i] = code
            now[i] -= code.sub_(zero).mul_(scale)
            if i + 1 < stop:
                now[i + 1 : stop].addr_(feedback[i, i + 1 : stop], now[i], alpha=-1)
        if stop < block:
            now[stop:].addmm_(feedback[start:stop, stop:].T, now[start:stop], alpha=-1)
    return codes
