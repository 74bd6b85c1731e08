"""Choosing among the cells of a sweep: the Pareto front over size and quality, and one cell by a stated rule."""

from __future__ import annotations

import math

from tasks.outcome.parts import Recommendation, SweptCell


def pareto_front(cells: list[SweptCell], measure: str) -> list[str]:
    """Names of the cells that no other one of the same model and text matches or beats in both size and `measure`, the smallest first."""
    kept: list[str] = []
    best: dict[str | None, float] = {}
    for _, quality, cell in sorted(_comparable(cells, measure), key=lambda each: each[:2]):
        if quality < best.get(cell.judged_on, math.inf):
            best[cell.judged_on] = quality
            kept.append(cell.name)
    return kept


def recommend(cells: list[SweptCell], *, rule: str, measure: str, max_gb: float | None, gated: bool, max_increase: float) -> Recommendation:
    """Choose a cell by `rule`, or none if none fits."""
    if rule == "best_within_size":
        assert max_gb is not None  # ChoiceConfig demands it
        text = f"the best {measure} within {max_gb:g} GB" + (" that passes the gate" if gated else "")
        sized = [each for each in _comparable(cells, measure) if each[0] <= max_gb * 1e9 and (not gated or each[2].gate == "passed")]
        fit = [cell for _, _, cell in sorted(sized, key=lambda each: (each[1], each[0]))]
    elif gated:
        text = "the smallest that passes the gate"
        fit = [cell for cell in cells if cell.gate == "passed"]
        fit.sort(key=lambda cell: (cell.bytes or 0, _or_last(cell.quality(measure))))
    else:
        text = f"the smallest whose perplexity is at most {max_increase:.0%} above the original's (no gate is set)"
        near = [each for each in _comparable(cells, "perplexity") if each[1] <= (1 + max_increase) * (each[2].original_perplexity or 0)]
        fit = [cell for _, _, cell in near]
        fit.sort(key=lambda cell: (cell.bytes or 0, _or_last(cell.quality(measure))))
    best = fit[0] if fit else None
    if best is None:
        return Recommendation(name=None, rule=text, reason=f"none of {len(cells)} cells")
    reason = f"{best.bits_per_weight:.3f} bits per weight, {_numbers(best)}; {len(fit)} of {len(cells)} cells fit"
    if len({cell.judged_on for cell in fit}) > 1:
        reason += f"; they are of several models or texts, between which {measure} cannot be compared"
    return Recommendation(name=best.name, rule=text, reason=reason)


def _comparable(cells: list[SweptCell], measure: str) -> list[tuple[int, float, SweptCell]]:
    """Size, quality and cell, of the cells that have both."""
    found = [(cell.bytes, cell.quality(measure), cell) for cell in cells]
    return [(size, quality, cell) for size, quality, cell in found if size is not None and quality is not None and math.isfinite(quality)]


def _or_last(value: float | None) -> float:
    return math.inf if value is None else value


def _numbers(cell: SweptCell) -> str:
    kl = f", KL {cell.kl:.4g}" if cell.kl is not None else ""
    return f"perplexity {cell.perplexity:.4g} (original {cell.original_perplexity:.4g}){kl}"
