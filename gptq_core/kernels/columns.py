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
    rows, scale = now.unbind(), scales.unbind()
    lowest, highest = (-zeros).unbind(), (max_code - zeros).unbind()
    centred = torch.empty_like(now)  # code less zero
    with dispatch.small_operations:
        for start in range(0, block, SUB_BLOCK):
            stop = min(start + SUB_BLOCK, block)
            for i, g in enumerate(groups[start:stop], start):
                code = torch.div(rows[i], scale[g], out=centred[i]).round_()
                torch.clamp(code, lowest[g], highest[g], out=code)
                rows[i].addcmul_(code, scale[g], value=-1)
                if i + 1 < stop:
                    now[i + 1 : stop].addr_(feedback[i, i + 1 : stop], rows[i], alpha=-1)
            if stop < block:
                now[stop:].addmm_(feedback[start:stop, stop:].T, now[start:stop], alpha=-1)
    return centred.add_(zeros[group]).to(torch.uint8)
