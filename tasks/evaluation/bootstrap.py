"""Two models on the same questions: recovery, its interval, and a plain sentence on whether the difference is more than noise.

Questions are drawn again with replacement, the same ones for both models (paired bootstrap, Efron and Tibshirani 1993), so that what
is hard for both does not widen the interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

DRAWS, COVERED, SEED = 2000, 0.95, 0
FEWEST = 20
"""Questions for an interval."""
AT_ONCE = 2**22
"""Drawn questions that are held at a time."""


def compare(
    original: float, quantized: float, samples: tuple[list[Any], list[Any]] | None, higher_is_better: bool, curve: Callable[[Any], Any]
) -> dict[str, Any]:
    """{"recovery", "interval", "inside_noise", "lost", "gained", "count"} of two values.

    samples: scores by question of both, numbers or (value, weight) pairs, whose (weighted) mean `curve` turns into the value; None where
    they are not known or do not make up the value, then there is no interval. Nor is there one for fewer than FEWEST questions: drawing
    a few again and again shows less noise than there is. lost and gained count questions that only one of the two answers rightly;
    None where scores are not right or wrong.
    """
    found: dict[str, Any] = {
        "recovery": _recovery(original, quantized, higher_is_better),
        "interval": None,
        "inside_noise": None,
        "lost": None,
        "gained": None,
        "count": None,
    }
    if samples is None or len(samples[0]) != len(samples[1]):
        return found
    before, after = (np.asarray(scores, dtype=float) for scores in samples)
    found["count"] = len(before)
    if before.ndim == 1 and np.isin(before, (0, 1)).all() and np.isin(after, (0, 1)).all():
        found |= {"lost": int((before > after).sum()), "gained": int((after > before).sum())}
    if len(before) < FEWEST:
        return found
    drawn = _drawn(before, after, curve)
    ratios = [ratio for ratio in (_recovery(*pair, higher_is_better) for pair in drawn) if ratio is not None]
    if len(ratios) > DRAWS // 2:  # a score of nothing has no recovery
        low, high = np.quantile(ratios, [(1 - COVERED) / 2, (1 + COVERED) / 2]).tolist()
        found |= {"interval": [low, high], "inside_noise": low <= 1 <= high}
    return found


def _drawn(before: np.ndarray, after: np.ndarray, curve: Callable[[Any], Any]) -> list[tuple[float, float]]:
    chance, count = np.random.default_rng(SEED), len(before)
    weights = np.ones((count, 1)) if before.ndim == 1 else np.stack([before[:, 1], after[:, 1]], 1)
    values = np.stack([before, after], 1) if before.ndim == 1 else np.stack([before[:, 0], after[:, 0]], 1)
    found, step = [], max(1, AT_ONCE // count)
    for start in range(0, DRAWS, step):
        chosen = chance.integers(0, count, (min(step, DRAWS - start), count))
        means = values[chosen].sum(1) / weights[chosen].sum(1)  # (draws, 2)
        found += [(float(curve(a)), float(curve(b))) for a, b in means]
    return found


def _recovery(original: float, quantized: float, higher_is_better: bool) -> float | None:
    """1 is as good as the original; None where the two have no ratio that says so: scores of zero or below."""
    if not (math.isfinite(original) and original > 0):
        return None
    if not math.isfinite(quantized):
        return 0.0
    if quantized <= 0:
        return 0.0 if higher_is_better and quantized == 0 else None
    return quantized / original if higher_is_better else original / quantized


def sentence(row: dict[str, Any]) -> str:
    """What a row of `evaluation.measures` says, for someone who reads one line."""
    text = f"{row['name']}, {row['metric']}: {row['quantized']:.4g}, the original {row['original']:.4g}"
    if row["recovery"] is None:
        return text + "; no recovery: its scores have no ratio."
    text += f"; recovery {row['recovery']:.1%}"
    if row["count"] is not None and row["count"] < FEWEST:
        return f"{text} (no interval: {row['count']} {row['unit']} are too few)."
    if row["interval"] is None:
        return f"{text} (no interval: it is not made up of scores of single {row['unit']})."
    low, high = row["interval"]
    said = (
        "the difference is inside the noise"
        if row["inside_noise"]
        else "worse than the original"
        if high < 1
        else "better than the original"
    )
    return f"{text} ({COVERED:.0%} interval {low:.1%} to {high:.1%}, {row['count']} {row['unit']}): {said}."
