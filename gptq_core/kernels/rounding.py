"""One column block of the sweep: round a column, push its error on the columns that follow.

The columns of a block depend on each other, outputs do not: see solver.py for the mathematics.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from gptq_core.kernels import dispatch
from gptq_core.kernels.constants import LARGEST_BLOCK

SUB_BLOCK = 16


def round_columns(
    now: Float[Tensor, "block out"],
    feedback: Float[Tensor, "block block"],
    scales: Float[Tensor, "groups out"],
    zeros: Float[Tensor, "groups out"],
    group: Int[Tensor, " block"],
    max_code: int,
) -> UInt8[Tensor, "block out"]:
    """Codes of a block's columns. `now`, their conditional targets, is overwritten by target less rounded weight.

    feedback: upper triangular with a unit diagonal, row i the share of column i's error that each later column takes over.
    group: row of `scales` and `zeros` for each column.
    """
    block = now.shape[0]
    kernels = dispatch.kernels(now, feedback, scales, zeros, group)
    if kernels and block <= LARGEST_BLOCK:
        return kernels.round_columns(now, feedback, scales, zeros, group, max_code)
    if kernels:
        codes = torch.empty(block, now.shape[1], dtype=torch.uint8, device=now.device)
        for start in range(0, block, LARGEST_BLOCK):
            part = slice(start, min(start + LARGEST_BLOCK, block))
            codes[part] = kernels.round_columns(now[part], feedback[part, part], scales, zeros, group[part], max_code)
            if part.stop < block:
                now[part.stop :].addmm_(feedback[part, part.stop :].T, now[part], alpha=-1)
        return codes
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


def write_back(
    found: UInt8[Tensor, "block out"],
    left: Float[Tensor, "block out"],
    target: Float[Tensor, "columns out"],
    here: Int[Tensor, " block"],
    scales: Float[Tensor, "groups out"],
    zeros: Float[Tensor, "groups out"],
    group: Int[Tensor, " block"],
    diagonal: Float[Tensor, " block"],
    codes: UInt8[Tensor, "columns out"],
    delta: Float[Tensor, "block out"],
    errors: Float[Tensor, "block out"] | None,
    loss: Float[Tensor, " out"],
) -> None:
    """Write back what `round_columns` made of a block, whose columns are the rows `here` of target and codes: to `codes`, the codes; to
    `delta`, target less rounded weight; to `errors`, (w - q)L, both with the last column first and in their own dtype; to `loss`,
    Σ errors².

    left: the conditional targets less the rounded weights, which the torch version overwrites. diagonal: R[i,i].
    """
    kernels = dispatch.kernels(left, target, scales, zeros, diagonal, loss)
    if kernels and hasattr(kernels, "write_back"):
        kernels.write_back(found, left, target, here, scales, zeros, group, diagonal, codes, delta, errors, loss)
        return
    codes[here] = found
    rounded = found.to(target.dtype).sub_(zeros[group]).mul_(scales[group])
    delta.copy_((target[here] - rounded).flip(0))
    left.mul_(diagonal.unsqueeze(1))
    loss += left.square().sum(0)
    if errors is not None:
        errors.copy_(left.flip(0))
