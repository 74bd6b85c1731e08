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

SMALLEST_SCALE = 2.0**-24
"""Smallest positive float16."""


@dataclass(frozen=True)
class Grid:
    """Scales and zeros of all groups of one layer, or of stacked layers: each (groups, out), in the sweep's dtype."""

    scales: Float[Tensor, "groups out"]
    zeros: Float[Tensor, "groups out"]
    max_code: int


def min_max(weights: Float[Tensor, "columns out"], config: QuantizeConfig) -> tuple[Float[Tensor, " out"], Float[Tensor, " out"]]:
    """Scale and zero of one group for each output, from the extremes of its columns.

    Symmetric: 2·max|w| / (2^bits - 1) around the fixed zero 2^(bits-1). Asymmetric: the range of {w, 0} and the rounded zero.
    A group of zeros gets scale 1. Source: the GPTQ reference quantizer (Frantar et al. 2022, arXiv 2210.17323).
    """
    if config.sym:
        span = 2 * weights.abs().amax(0)
        scale = _float16_exact(span / config.max_code)
        return scale, torch.full_like(scale, 2 ** (config.bits - 1))
    low, high = weights.amin(0).clamp(max=0), weights.amax(0).clamp(min=0)
    scale = _float16_exact((high - low) / config.max_code)
    return scale, torch.round(-low / scale).clamp(config.smallest_zero, config.max_code)


def _float16_exact(scale: Tensor) -> Tensor:
    scale = torch.where(scale > 0, scale.clamp(min=SMALLEST_SCALE), 1.0)
    return scale.to(torch.float16).to(scale.dtype)


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
    """The weight (out, in) that a consumer computes from a layer's codes, in `dtype`; the arithmetic is float32."""
    group = g_idx.long()
    centred = codes.float() - zeros.float()[group]
    return (centred * scales.float()[group]).T.to(dtype).contiguous()
