"""The search for the scales of many groups: least Σ importance · (w - w~)² over a coarse and then a fine grid of scales.

Symmetric: the codes reach one step further down than up, so a scale of either sign is tried: the extreme of a group lies on the
longer side. Asymmetric: the range shrinks around its middle, and the zero is tried one step to either side.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from gptq_core.kernels import dispatch

SMALLEST_SCALE = 2.0**-24
"""Smallest positive float16."""
COARSE_STEPS, FINE_STEPS = 16, 4
SMALLEST_SHARE, LARGEST_SHARE = 0.4, 1.1
"""The search looks at scales from this share of the one that covers the extreme to a little beyond it."""


def search(
    weights: Float[Tensor, "groups columns out"],
    importance: Float[Tensor, "groups columns"],
    max_code: int,
    smallest_zero: int | None,
) -> tuple[Float[Tensor, "groups out"], Float[Tensor, "groups out"]]:
    """Scales, exact in float16, and zeros. smallest_zero: None where the zero is fixed in the middle of the codes (symmetric)."""
    if dispatch.takes(weights, importance):
        from gptq_core.kernels import fused  # only here is Triton imported

        return fused.search(weights, importance, max_code, smallest_zero)
    found = [_search(w, h, max_code, smallest_zero) for w, h in zip(weights, importance, strict=True)]
    return torch.stack([scales for scales, _ in found]), torch.stack([zeros for _, zeros in found])


def _search(weights: Tensor, importance: Tensor, max_code: int, smallest_zero: int | None) -> tuple[Tensor, Tensor]:
    """One group: (columns, out) and (columns,) to two of (out,)."""
    sym, half = smallest_zero is None, (max_code + 1) // 2
    weight = importance.unsqueeze(1)
    low, high = weights.amin(0), weights.amax(0)
    if sym:
        base, middle = torch.maximum(-low, high) / half, torch.zeros_like(low)
        signs, shifts = (1.0, -1.0), (0,)
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        base, middle = (high - low) / max_code, (high + low) / 2
        signs, shifts = (1.0,), (-1, 0, 1)
    best = torch.full_like(base, torch.inf)
    chosen, zero_point, share = torch.ones_like(base), torch.zeros_like(base), torch.ones_like(base)

    def consider(shares: Tensor, sign: Tensor | float, shift: int) -> None:
        scale = float16_exact(sign * shares * base)
        if sym:
            zero = torch.full_like(scale, half)
        else:
            # the middle of the range falls on the middle of the codes
            zero = torch.round(max_code / 2 - middle / scale).add_(shift).clamp_(smallest_zero, max_code)
        error = (weights / scale).round_().add_(zero).clamp_(0, max_code).sub_(zero).mul_(scale).sub_(weights).square_().mul_(weight).sum(0)
        better = error < best
        for kept, new in ((best, error), (chosen, scale), (zero_point, zero), (share, sign * shares)):
            kept.copy_(torch.where(better, new, kept))

    for step in range(COARSE_STEPS):
        fraction = SMALLEST_SHARE + (LARGEST_SHARE - SMALLEST_SHARE) * step / (COARSE_STEPS - 1)
        for sign in signs:
            for shift in shifts:
                consider(torch.full_like(base, fraction), sign, shift)
    around, spacing = share.clone(), (LARGEST_SHARE - SMALLEST_SHARE) / (COARSE_STEPS - 1)
    for step in range(1, FINE_STEPS):
        for side in (-1, 1):
            consider(around.abs() + side * spacing * step / FINE_STEPS, around.sign(), 0)
    return chosen, zero_point


def float16_exact(scale: Tensor) -> Tensor:
    """Each scale as float16 will hold it, never 0."""
    magnitude = torch.where(scale != 0, scale.abs().clamp(min=SMALLEST_SCALE), 1.0)
    return torch.copysign(magnitude, scale).to(torch.float16).to(scale.dtype)
