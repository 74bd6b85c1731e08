"""Slow, plain references that the tests hold the engine against."""

from __future__ import annotations

import torch
from torch import Tensor


def problem(columns: int, rows: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and a correlated Hessian with a wide spectrum."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(600, columns, generator=g) @ torch.randn(columns, columns, generator=g) * torch.rand(columns, generator=g)
    return torch.randn(rows, columns, generator=g), x.T @ x / 600


def textbook_gptq(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    group_size: int,
    sym: bool,
    damp_percent: float,
    order: Tensor,
    groups_follow_order: bool,
    static_groups: bool = False,
    smallest_zero: int = 1,
) -> dict[str, Tensor]:
    """Algorithm 1 of Frantar et al. 2022 in float64, column by column, with the inverse Hessian and its Cholesky factor.

    weight (out, in), hessian (in, in). Group scales are min-max on the weights as updated so far, rounded to float16.
    """
    weight, hessian = weight.double(), hessian.double()
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    max_code = 2**bits - 1
    scales, zeros = torch.zeros(columns // size, rows).double(), torch.zeros(columns // size, rows).double()

    def fit(group: int, part: Tensor) -> None:
        for r in range(rows):
            low, high = min(part[r].min().item(), 0.0), max(part[r].max().item(), 0.0)
            if sym:
                span = 2 * max(-low, high)
                low = -span / 2
            else:
                span = high - low
            scale = torch.tensor(span / max_code if span else 1.0, dtype=torch.float64).half().double()
            scales[group, r] = scale
            zeros[group, r] = 2 ** (bits - 1) if sym else torch.round(-low / scale).clamp(smallest_zero, max_code)

    damped = hessian + torch.eye(columns).double() * damp_percent * hessian.diagonal().mean()
    inverse_factor = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    work = weight[:, order].clone()
    original_group = torch.arange(columns) // size
    group_of = original_group if groups_follow_order else original_group[order]
    if static_groups:
        for g in range(columns // size):
            fit(g, weight[:, g * size : (g + 1) * size])
    codes, loss = torch.zeros(columns, rows, dtype=torch.uint8), torch.zeros(rows).double()
    for i in range(columns):
        g = int(group_of[i])
        if not static_groups and i % size == 0:
            fit(g, work[:, i : i + size])
        code = (torch.round(work[:, i] / scales[g]) + zeros[g]).clamp(0, max_code)
        codes[order[i]] = code.to(torch.uint8)
        error = (work[:, i] - scales[g] * (code - zeros[g])) / inverse_factor[i, i]
        loss += error**2
        work[:, i + 1 :] -= error[:, None] * inverse_factor[i, i + 1 :]
    g_idx = torch.empty(columns, dtype=torch.int32)
    g_idx[order] = group_of.int()
    return {"codes": codes, "scales": scales, "zeros": zeros, "g_idx": g_idx, "loss": loss}


def slow_pack(codes: Tensor, bits: int) -> Tensor:
    """Bit by bit: column by column, one Python integer a column."""
    rows, columns = codes.shape
    words = torch.zeros(rows * bits // 32, columns, dtype=torch.int32)
    for c in range(columns):
        stream = sum(int(codes[r, c]) << (r * bits) for r in range(rows))
        for w in range(words.shape[0]):
            word = (stream >> (32 * w)) & 0xFFFFFFFF
            words[w, c] = word - 2**32 if word >= 2**31 else word
    return words
