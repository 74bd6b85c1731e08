"""How much of one text stands in another: what a model was calibrated on must not judge it."""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor

NGRAM = 16
"""Tokens in a row that two texts of one language seldom share by chance."""
OVERLAPPING = 0.05
"""Share of the judged text from which on it counts as seen. Licences, boilerplate and plots repeat: of the embedded held-out text 1.2 per
cent stands in the calibration windows too, of TinyStories' 2.1."""
CONTAINED = 0.5
"""Share of the calibration windows that stand in the judged text, from which on the two are one text of which little was drawn."""
BASE = 6364136223846793005
"""Odd, so that multiplying by it modulo 2⁶⁴ loses nothing (Knuth's MMIX)."""


def overlap(judged: Int64[Tensor, "windows tokens"], seen: Int64[Tensor, "others length"], ngram: int = NGRAM) -> float:
    """Share of the n-grams inside the windows of `judged` that also stand inside a window of `seen`; 0 where windows are shorter."""
    digests = [_digests(windows, ngram) for windows in (judged, seen)]
    if not all(digest.numel() for digest in digests):
        return 0.0
    return torch.isin(*digests).double().mean().item()


def overlapping(seen: Int64[Tensor, "others length"], judged: Int64[Tensor, "windows tokens"], what: str) -> str | None:
    """Value and rule in one line, where calibration windows `seen` and a judged text have too much in common; else None."""
    return objection(overlap(judged, seen), overlap(seen, judged), what)


def objection(share: float, of_seen: float, what: str) -> str | None:
    """As overlapping, of shares that are known."""
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
