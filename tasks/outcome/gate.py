"""The gate of a run: limits on its numbers. No Prefect, no MLflow: a sweep judges its cells by the same function.

The gate is no part of what a checkpoint is made of: when its limits change, finished work is judged again.
"""

from __future__ import annotations

from gptq_core.errors import GPTQError
from gptq_core.model.selection import NOT_LISTED
from tasks.config.run import LIMITS, GateConfig, RunConfig
from tasks.outcome.parts import GateResult, LimitCheck, Quality, Sizes
from tasks.outcome.record import RunRecord


class GateFailedError(GPTQError):
    """The checkpoint is complete and its numbers are outside the gate's limits."""


def judge(gate: GateConfig, quality: Quality | None, sizes: Sizes) -> GateResult:
    """Compare the numbers with the limits that are set. What was not measured passes no limit."""
    known = limited(quality, sizes)
    checks = [_check(name, getattr(gate, name), known[name.partition("_")[2]]) for name in LIMITS if getattr(gate, name) is not None]
    return GateResult(passed=all(check.passed for check in checks), checks=checks, measure=gate.measure, value=known[gate.measure])


def limited(quality: Quality | None, sizes: Sizes) -> dict[str, float | int | None]:
    """The numbers on which limits are set, by the name of the limit without max_ or min_; None: not measured."""
    return {
        "perplexity_increase": quality.perplexity_increase if quality else None,
        "kl": quality.kl if quality else None,
        "recovery": quality.recovery if quality else None,
        "gb": sizes.bytes / 1e9,
        "fallback_layers": fallbacks(sizes),
    }


def fallbacks(sizes: Sizes) -> int:
    """Linears rounded where their Hessian could not be factored, and linears left dense though no rule of the config leaves them."""
    unwanted = [row for row in sizes.skipped if row.reason != NOT_LISTED and not row.reason.startswith("dynamic: ")]
    return len(sizes.fallback_layers) + len(unwanted)


def demand(config: RunConfig, record: RunRecord) -> None:
    """Raise GateFailedError if the record's gate failed."""
    if record.gate and not record.gate.passed:
        raise GateFailedError(
            f"gate failed ({record.gate.failures}): the checkpoint {config.out} is kept and not registered; "
            "ease the gate, or quantize to more bits or with a better recipe"
        )


def _check(limit: str, bound: float, value: float | None) -> LimitCheck:
    kept = value is not None and (value >= bound if limit.startswith("min_") else value <= bound)  # false for nan
    return LimitCheck(limit=limit, limit_value=bound, value=value, passed=bool(kept))
