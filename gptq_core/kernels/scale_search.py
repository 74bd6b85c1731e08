"""The search for the scales of many groups: least Σ importance · (w - w~)² over a coarse and then a fine grid of scales.

Symmetric: the codes reach one step further down than up, so a scale of either sign is tried: the extreme of a group lies on the
longer side. Asymmetric: the range shrinks around its middle, and the zero is tried one step to either side.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from gptq_core.kernels import dispatch
from gptq_core.kernels.constants import SMALLEST_SCALE, coarse_candidates, fine_offsets


def search(
    weights: Float[Tensor, "groups columns out"], importance: Float[Tensor, "groups columns"], max_code: int, smallest_zero: int | None
) -> tuple[Float[Tensor, "groups out"], Float[Tensor, "groups out"]]:
    """Scales, exact in float16, and zeros. smallest_zero: None where the zero is fixed in the middle of the codes (symmetric)."""
    kernels = dispatch.kernels(weights, importance)
    if kernels:
        return kernels.search(weights, importance, max_code, smallest_zero)
    found = [_search(w, h, max_code, smallest_zero) for w, h in zip(weights, importance, strict=True)]
    return torch.stack([scales for scales, _ in found]), torch.stack([zeros for _, zeros in found])


def _search(weights: Tensor, importance: Tensor, max_code: int, smallest_zero: int | None) -> tuple[Tensor, Tensor]:
    """One group: (columns, out) and (columns,) to two of (out,)."""
    low, high = weights.amin(0), weights.amax(0)
    if smallest_zero is None:
        base = torch.maximum(-low, high) / ((max_code + 1) // 2)
        middle = torch.zeros_like(base)
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        base = (high - low) / max_code
        middle = (high + low) / 2
    buffer = torch.empty_like(weights)

    def least(shares: Tensor, shift: Tensor, *rivals: Tensor) -> tuple[Tensor, ...]:
        """(error, scale, zero, share) of the best candidate of each output, `rivals` among them; shares (candidates, out)."""
        scale = float16_exact(shares * base)  # (candidates, out)
        if smallest_zero is None:
            zero = torch.full_like(scale, (max_code + 1) // 2)
        else:  # the middle of the range falls on the middle of the codes
            zero = torch.round(max_code / 2 - middle / scale).add_(shift).clamp_(smallest_zero, max_code)
        lowest, highest, error = -zero, max_code - zero, torch.empty_like(scale)
        for each in range(scale.shape[0]):
            code = torch.div(weights, scale[each], out=buffer).round_()
            torch.clamp(code, lowest[each], highest[each], out=code)
            torch.mv(torch.addcmul(weights, code, scale[each], value=-1, out=code).square_().T, importance, out=error[each])
        every = [error, scale, zero, shares]
        if rivals:
            every = [torch.cat([one.unsqueeze(0), others]) for one, others in zip(rivals, every, strict=True)]
        best = every[0].nan_to_num(nan=torch.inf).argmin(0, keepdim=True)  # the first of equals
        return tuple(values.gather(0, best).squeeze(0) for values in every)

    shares, shift = coarse_candidates(smallest_zero is None).to(base).unsqueeze(2).unbind(1)  # (candidates, 1)
    found = least(shares.expand(-1, base.numel()), shift)
    fine = fine_offsets().to(base).unsqueeze(1)
    share = found[3]
    error, scale, zero, _ = least(share.sign() * (share.abs() + fine), torch.zeros_like(fine), *found)
    return scale.masked_fill(~(error < torch.inf), torch.nan), zero  # where no error is a number, no scale is


def float16_exact(scale: Tensor) -> Tensor:
    """Each scale as float16 will hold it, never 0."""
    magnitude = torch.where(scale != 0, scale.abs().clamp(min=SMALLEST_SCALE), 1.0)
    return torch.copysign(magnitude, scale).to(torch.float16).to(scale.dtype)
