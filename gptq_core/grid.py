"""Grids: scales and zero points of groups, and the map between weights and codes.

W~ = scale · (code - zero). Scales are rounded to float16 when they are fitted, so that the error feedback of the sweep sees
the very value a kernel will multiply with. Tensors are transposed, (in, out): a column of the weight is one contiguous row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from gptq_core.config import QuantizeConfig
from gptq_core.kernels.scales import float16_exact, search


def fit(
    weights: Float[Tensor, "groups columns out"], importance: Float[Tensor, "groups columns"], config: QuantizeConfig
) -> tuple[Float[Tensor, "groups out"], Float[Tensor, "groups out"]]:
    """Scales and zeros of groups, as `config.scale_search` says. importance: what an error in each column costs."""
    if config.scale_search == "min_max":
        return min_max(weights, config)
    return search(weights, importance, config.max_code, None if config.sym else config.smallest_zero)


@dataclass(frozen=True)
class Grid:
    """Scales and zeros of all groups of one layer, or of stacked layers: each (groups, out), in the sweep's dtype."""

    scales: Float[Tensor, "groups out"]
    zeros: Float[Tensor, "groups out"]
    max_code: int


def min_max(
    weights: Float[Tensor, "*groups columns out"], config: QuantizeConfig
) -> tuple[Float[Tensor, "*groups out"], Float[Tensor, "*groups out"]]:
    """Scale and zero of each group and output, from the extremes of its columns.

    Symmetric: 2·max|w| / (2^bits - 1) around the fixed zero 2^(bits-1). Asymmetric: the range of {w, 0} and the rounded zero.
    A group of zeros gets scale 1. Source: the GPTQ reference quantizer (Frantar et al. 2022, arXiv 2210.17323).
    """
    if config.sym:
        span = 2 * weights.abs().amax(-2)
        scale = float16_exact(span / config.max_code)
        return scale, torch.full_like(scale, 2 ** (config.bits - 1))
    low, high = weights.amin(-2).clamp(max=0), weights.amax(-2).clamp(min=0)
    scale = float16_exact((high - low) / config.max_code)
    return scale, torch.round(-low / scale).clamp(config.smallest_zero, config.max_code)


def quantize(weights: Tensor, scales: Tensor, zeros: Tensor, max_code: int) -> Tensor:
    """Nearest code of each weight, in the weights' dtype; shapes broadcast."""
    return torch.round(weights / scales).add_(zeros).clamp_(0, max_code)


def dequantize(
    codes: UInt8[Tensor, "columns out"],
    scales: Float[Tensor, "groups out"],
    zeros: UInt8[Tensor, "groups out"],
    g_idx: Int[Tensor, " columns"],
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "out columns"]:
    """The weight (out, in) that a consumer computes from a layer's codes, in `dtype`; the arithmetic is float32.

    Negative entries of g_idx count groups from the end, as some writers do.
    """
    group = g_idx.long()
    centred = codes.float() - zeros.float()[group]
    return (centred * scales.float()[group]).T.to(dtype).contiguous()


def refitted(
    pulled: Float[Tensor, "columns out"],
    codes: UInt8[Tensor, "columns out"],
    fitted: Grid,
    g_idx: Int[Tensor, " columns"],
    damped: Float[Tensor, "columns columns"],
) -> tuple[Float[Tensor, "groups out"], Float[Tensor, " out"]]:
    """Scales with the least (w - w~)(H + λI)(w - w~)ᵀ for frozen codes, and how much lower the loss of each output becomes.

    Least squares over the group scales of each row: A s = b with A_gh = q_g H_gh q_hᵀ, b_g = q_g (H w)_g, q = code - zero; `pulled`
    is H w. A row whose loss does not fall once its scales are float16 keeps them as they are.
    """
    groups, out = fitted.scales.shape
    centred = codes.to(pulled.dtype) - fitted.zeros[g_idx]
    if not bool((g_idx[1:] >= g_idx[:-1]).all()):  # groups out of order: put their columns together
        grouped = torch.argsort(g_idx, stable=True)
        centred, damped, pulled = centred[grouped], damped[grouped][:, grouped], pulled[grouped]
    size = centred.shape[0] // groups
    parts = centred.view(groups, size, out)
    right = (pulled * centred).view(groups, size, out).sum(1).T.double()  # b: (out, groups)
    normal = centred.new_empty(out, groups, groups)
    for g in range(groups):
        # A is symmetric: groups from g on are enough
        reached = damped[g * size :, g * size : (g + 1) * size] @ parts[g]
        normal[:, g:, g] = reached.mul_(centred[g * size :]).view(groups - g, size, out).sum(1).T
        normal[:, g, g + 1 :] = normal[:, g + 1 :, g]
    left = normal.double()
    # a group whose codes are all at the zero point has no scale to solve for; a whisper of the identity leaves it where it is
    ridge = left.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30) * 1e-9
    left = left + torch.diag_embed(ridge.unsqueeze(1).expand(-1, groups))
    before = fitted.scales.T.double()

    def times(scales: Tensor) -> Tensor:
        return (left @ scales.unsqueeze(2)).squeeze(2)

    def objective(scales: Tensor) -> Tensor:
        return (scales * (times(scales) - 2 * right)).sum(1)

    step, info = torch.linalg.solve_ex(left, (right - times(before)).unsqueeze(2))
    after = (before + step.squeeze(2)).to(torch.float16).double()
    gain = objective(before) - objective(after)
    kept = (gain > 0) & (info == 0) & torch.isfinite(after).all(1) & (after != 0).all(1)
    scales = torch.where(kept.unsqueeze(1), after, before).T.to(fitted.scales.dtype)
    return scales.contiguous(), torch.where(kept, gain, 0.0).to(pulled.dtype)
