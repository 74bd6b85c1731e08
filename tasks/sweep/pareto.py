"""Choosing among the cells of a sweep: the Pareto front over size and quality, and one cell by a stated rule."""

from __future__ import annotations

import math
from typing import Any

Row = dict[str, Any]
"""One cell: name, bytes, kl, perplexity, original_perplexity, gate (passed, failed or None), judged_on (model and text), ..."""


def front(rows: list[Row], measure: str) -> list[str]:
    """Names of the cells that no other one of the same model and text matches or beats in both size and `measure`, the smallest first."""
    kept, best = [], {}
    for row in sorted(_measured(rows, measure), key=lambda row: (row["bytes"], row[measure])):
        if row[measure] < best.get(row.get("judged_on"), math.inf):
            best[row.get("judged_on")] = row[measure]
            kept.append(row["name"])
    return kept


def recommend(rows: list[Row], *, rule: str, measure: str, max_gb: float | None, gated: bool, max_increase: float) -> dict[str, Any]:
    """{"name": of the cell or None, "rule": what was asked for, "reason": why it is this one or none}."""
    if rule == "best_within_size":
        text = f"the best {measure} within {max_gb:g} GB" + (" that passes the gate" if gated else "")
        fit = [row for row in _measured(rows, measure) if row["bytes"] <= max_gb * 1e9 and (not gated or row.get("gate") == "passed")]
        best = min(fit, key=lambda row: (row[measure], row["bytes"]), default=None)
    elif gated:
        text = "the smallest that passes the gate"
        fit = [row for row in rows if row.get("gate") == "passed"]
        best = min(fit, key=lambda row: (row["bytes"], _or_last(row[measure])), default=None)
    else:
        text = f"the smallest whose perplexity is at most {max_increase:.0%} above the original's (no gate is set)"
        fit = [row for row in _measured(rows, "perplexity") if row["perplexity"] <= (1 + max_increase) * row["original_perplexity"]]
        best = min(fit, key=lambda row: (row["bytes"], _or_last(row[measure])), default=None)
    if best is None:
        return {"name": None, "rule": text, "reason": f"none of {len(rows)} cells"}
    reason = f"{best['bits_per_weight']:.3f} bits per weight, {_told(best)}; {len(fit)} of {len(rows)} cells fit"
    if len({row.get("judged_on") for row in fit}) > 1:
        reason += f"; they are of several models or texts, between which {measure} cannot be compared"
    return {"name": best["name"], "rule": text, "reason": reason}


def _measured(rows: list[Row], measure: str) -> list[Row]:
    return [row for row in rows if row.get("bytes") is not None and row.get(measure) is not None and math.isfinite(row[measure])]


def _or_last(value: float | None) -> float:
    return float("inf") if value is None else value


def _told(row: Row) -> str:
    kl = f", KL {row['kl']:.4g}" if row.get("kl") is not None else ""
    return f"perplexity {row['perplexity']:.4g} (original {row['original_perplexity']:.4g}){kl}"
