"""How much of one text occurs in another: a model must not be evaluated on the text that it was calibrated on."""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor

NGRAM = 16
"""Tokens in a row that two texts of one language seldom share by chance."""
OVERLAPPING = 0.05
"""From this share on, the judged text counts as seen in calibration. Licences, boilerplate and plots repeat: 1.2 per cent of the embedded
held-out text also occurs in the calibration windows, 2.1 per cent of TinyStories'."""
CONTAINED = 0.5
"""From this share of the calibration windows on that occur in the judged text, the two count as one text."""
BASE = 6364136223846793005
"""Odd, so that multiplying by it modulo 2⁶⁴ loses nothing (Knuth's MMIX)."""


def overlap(judged: Int64[Tensor, "windows tokens"], seen: Int64[Tensor, "others length"], ngram: int = NGRAM) -> float:
    """Share of the n-grams inside the windows of `judged` that also occur inside a window of `seen`; 0 if windows are shorter."""
    digests = [_digests(windows, ngram) for windows in (judged, seen)]
    if not all(digest.numel() for digest in digests):
        return 0.0
    return torch.isin(*digests).double().mean().item()


def overlapping(seen: Int64[Tensor, "others length"], judged: Int64[Tensor, "windows tokens"], what: str) -> str | None:
    """Value and rule in one line, if calibration windows `seen` and a judged text have too much in common; else None."""
    return objection(overlap(judged, seen), overlap(seen, judged), what)


def objection(share: float, of_seen: float, what: str) -> str | None:
    """As `overlapping`, for shares that are known already."""
    if share < OVERLAPPING and of_seen < CONTAINED:
        return None
    return (
        f"{what} and calibration overlap: {share:.1%} of the judged text is calibrated on (must be below {OVERLAPPING:.0%}), "
        f"{of_seen:.1%} of the calibration text stands in the judged one (must be below {CONTAINED:.0%}), by {NGRAM} tokens in a row"
    )


def _digests(windows: Tensor, ngram: int) -> Tensor:
    """One number for each n-gram, a polynomial of its tokens modulo 2⁶⁴ (int64 wraps around)."""
    found = windows.new_zeros(windows.shape[0], max(0, windows.shape[1] - ngram + 1))
    for place in range(ngram):
        found = found * BASE + windows[:, place : place + found.shape[1]] + 1
    return found.flatten()
