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
from gptq_core.kernels.scale_search import float16_exact, search


def fit(
    weights: Float[Tensor, "groups columns out"], importance: Float[Tensor, "groups columns"], config: QuantizeConfig
) -> tuple[Float[Tensor, "groups out"], Float[Tensor, "groups out"]]:
    """Scales and zeros of groups, as `config.scale_search` says. importance: what an error in each column costs."""
    if config.scale_search == "min_max":
        return min_max(weights, config)
    return search(weights, importance, config.max_code, None if config.sym else config.smallest_zero)


TILE = {"cpu": 64, "cuda": 512}
"""Outputs that are dequantized together, so that the tensors between codes and weights stay small, on the CPU in the cache."""


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
    columns, out = codes.shape
    group = g_idx.long()
    weight = torch.empty(out, columns, dtype=dtype, device=codes.device)
    tile = TILE.get(codes.device.type, TILE["cuda"])
    for outputs in (slice(start, start + tile) for start in range(0, out, tile)):
        centred = codes[:, outputs].float() - zeros[:, outputs].float()[group]
        weight[outputs] = centred.mul_(scales[:, outputs].float()[group]).T
    return weight
