"""The gate of a run: limits on what was measured. No Prefect, no MLflow: a sweep judges its cells by the same function.

The gate is no part of what a checkpoint is made of: finished work is judged anew when the limits change.
"""

from __future__ import annotations

from typing import Any

from gptq_core.errors import GPTQError
from gptq_core.model.selection import NOT_LISTED
from tasks.config.run import LIMITS, GateConfig, RunConfig

Verdict = dict[str, Any]
"""{"passed": bool, "checks": [{"limit", "limit_value", "value", "passed"}], "measure": name, "value": number or None}"""


class GateFailedError(GPTQError):
    """The checkpoint is complete and its numbers are outside the gate's limits."""


def judge(gate: GateConfig, record: dict[str, Any]) -> Verdict:
    """The record of a run against the limits that are set. What was not measured passes no limit."""
    known = measured(record)
    checks = [_check(name, getattr(gate, name), known[name.partition("_")[2]]) for name in LIMITS if getattr(gate, name) is not None]
    return {"passed": all(check["passed"] for check in checks), "checks": checks, "measure": gate.measure, "value": known[gate.measure]}


def measured(record: dict[str, Any]) -> dict[str, float | int | None]:
    """What limits are set on, by the name of the limit without max_ or min_; None: not measured."""
    evaluation, assembly = record.get("evaluation") or {}, record.get("assembly") or {}
    before, after = evaluation.get("original_perplexity"), evaluation.get("quantized_perplexity")
    size = assembly.get("bytes")
    return {
        "perplexity_increase": after / before - 1 if before and after is not None else None,
        "kl": evaluation.get("kl"),
        "recovery": evaluation.get("recovery"),
        "gb": None if size is None else size / 1e9,
        "fallback_layers": _fallbacks(assembly),
    }


def failed(verdict: Verdict | None) -> str | None:
    """Every limit that was not kept, with its value, in one line; None where there is no gate or it passed."""
    if verdict is None or verdict["passed"]:
        return None
    return "; ".join(_told(check) for check in verdict["checks"] if not check["passed"])


def verdict(found: Verdict | None) -> str | None:
    """`passed`, or `failed` and why; None where there is no gate."""
    reasons = failed(found)
    return f"failed: {reasons}" if reasons else found and "passed"


def demand(config: RunConfig, record: dict[str, Any]) -> None:
    """Raise GateFailedError where the record's gate failed."""
    reasons = failed(record.get("gate"))
    if reasons:
        raise GateFailedError(
            f"gate failed ({reasons}): the checkpoint {config.out} is kept and not registered; "
            "ease the gate, or quantize to more bits or with a better recipe"
        )


def _check(limit: str, bound: float, value: float | None) -> dict[str, Any]:
    kept = value is not None and (value >= bound if limit.startswith("min_") else value <= bound)  # false for nan
    return {"limit": limit, "limit_value": bound, "value": value, "passed": bool(kept)}


def _told(check: dict[str, Any]) -> str:
    if check["value"] is None:
        return f"{check['limit']} = {check['limit_value']:.6g}: not measured"
    side = "below" if check["limit"].startswith("min_") else "above"
    return f"{check['limit']}: {check['value']:.6g} is {side} {check['limit_value']:.6g}"


def _fallbacks(assembly: dict[str, Any]) -> int | None:
    """Linears rounded where their Hessian could not be factored, and linears left dense that nobody asked to leave."""
    if "fallback_layers" not in assembly or "skipped" not in assembly:
        return None
    unasked = [row for row in assembly["skipped"] if row["reason"] != NOT_LISTED and not row["reason"].startswith("dynamic: ")]
    return len(assembly["fallback_layers"]) + len(unasked)
