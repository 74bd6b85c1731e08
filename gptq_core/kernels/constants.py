"""Numbers that all implementations of the innermost loops share."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

LARGEST_BLOCK = 128
"""Columns that a program of the sweep or of the descent holds at once."""


SMALLEST_SCALE = 2.0**-24
"""Smallest positive float16."""


COARSE_STEPS, FINE_STEPS = 16, 4


SMALLEST_SHARE, LARGEST_SHARE = 0.4, 1.1
"""The search looks at scales from this share of the one that covers the extreme to a little beyond it."""


def coarse_candidates(symmetric: bool) -> Float[Tensor, "candidates 2"]:
    """(share of the scale that covers the extreme, its sign that of the scale; steps by which the zero is moved) of each candidate."""
    signs, shifts = ((1.0, -1.0), (0,)) if symmetric else ((1.0,), (-1, 0, 1))
    spacing = (LARGEST_SHARE - SMALLEST_SHARE) / (COARSE_STEPS - 1)
    return torch.tensor(
        [(sign * (SMALLEST_SHARE + step * spacing), shift) for step in range(COARSE_STEPS) for sign in signs for shift in shifts],
        dtype=torch.float32,
        device="cpu",
    )


def fine_offsets() -> Float[Tensor, " candidates"]:
    """What is added to the best coarse share, the zero where its own scale puts it."""
    spacing = (LARGEST_SHARE - SMALLEST_SHARE) / (COARSE_STEPS - 1)
    offsets = [side * step / FINE_STEPS * spacing for step in range(1, FINE_STEPS) for side in (-1, 1)]
    return torch.tensor(offsets, dtype=torch.float32, device="cpu")
