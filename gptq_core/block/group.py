"""Solve an input group: from the Hessian that its members share, the solution and the report of each member."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from gptq_core.config import QuantizeConfig
from gptq_core.errors import FactorizationError
from gptq_core.method import solver
from gptq_core.method.factor import Factor, damping, factorize
from gptq_core.method.hessian import Hessian, Shift
from gptq_core.runtime.timing import Stages

Factorize = Callable[[Tensor, QuantizeConfig, str, int], Factor]
"""`factor.factorize`, or a version that keeps its results for others that solve on the same Hessian."""


@dataclass(frozen=True)
class Member:
    """A linear of the group."""

    name: str
    """Full name."""
    weight: Tensor
    """(out, in)."""
    config: QuantizeConfig
    writes_residual: bool = False
    """Its output is added to the residual stream, whose error it can make up for."""


class LayerReport(TypedDict):
    """How solving a linear went, for the manifest and the run record."""

    name: str
    """Full name."""
    bits: int
    group_size: int
    in_features: int
    out_features: int
    loss: float
    """Sum of `Solution.loss` over the outputs."""
    relative_error: float | None
    """`solver.relative_error`; None where the linear was rounded to nearest."""
    tokens: int
    """That went into its Hessian."""
    damp_percent: float | None
    """The damping that worked; None where none did."""
    failed_attempts: int | None
    fallback: str | None
    """Why the linear was rounded to nearest; None where it was not."""


def solve_group(
    members: list[Member], hessian: Hessian, shift: Shift | None, timed: Stages, factorize: Factorize = factorize
) -> Iterator[tuple[str, solver.Solution, LayerReport]]:
    """(name, solution, report) of every member. `timed` measures the stages factor, shift and the solver's.

    Members of equal config are factored once and solved as the stacked rows of one matrix. Raises FactorizationError, which names
    the linears, unless their config allows rounding instead.
    """
    mean = hessian.mean()
    alike: list[list[Member]] = []
    for member in members:
        same = next((part for part in alike if part[0].config == member.config), None)
        same.append(member) if same else alike.append([member])
    for part in alike:
        yield from _solve_alike(part, mean, shift, hessian.tokens, timed, factorize)


def _solve_alike(
    members: list[Member], hessian: Tensor, shift: Shift | None, tokens: int, timed: Stages, factorize: Factorize
) -> Iterator[tuple[str, solver.Solution, LayerReport]]:
    config = members[0].config
    weights = torch.cat([member.weight for member in members]) if len(members) > 1 else members[0].weight  # (out of all members, in)
    prepared = damp_percent = failed_attempts = fallback = None
    try:
        with timed("factor"):
            factor = factorize(hessian, config, " + ".join(member.name for member in members), tokens)
        target = weights
        if shift is not None:
            with timed("shift"):
                target = shifted(members, weights, hessian, shift, tokens)
        with timed("sweep"):
            prepared = solver.prepare(factor, config, solver.products_dtype(weights.dtype, weights.device))
        damp_percent, failed_attempts = factor.damp_percent, factor.failed_attempts
        del factor  # what the rows need of it is in `prepared`, often in half the bytes
        solved = solver.solve_prepared(target, prepared, config, timed)
    except FactorizationError as error:
        if config.on_failure != "round":
            raise
        fallback = str(error)
        solved = solver.round_to_nearest(weights, config)
    parts = [(weight, solved.rows(*span)) for weight, span in zip(weights.split(_rows(members)), _spans(members), strict=True)]
    figures = _figures(parts, prepared)
    del prepared  # whoever receives a solution makes weights of it
    for member, (weight, solution), (loss, relative_error, finite) in zip(members, parts, figures, strict=True):
        if not finite:
            raise FactorizationError(f"{member.name}: scales are not finite; its weights are not finite or exceed float16")
        report: LayerReport = {
            "name": member.name,
            "bits": config.bits,
            "group_size": config.group_size,
            "in_features": weight.shape[1],
            "out_features": weight.shape[0],
            "loss": loss,
            "relative_error": None if fallback else relative_error if loss else 0.0,  # a layer of zeros: 0 / 0
            "tokens": tokens,
            "damp_percent": damp_percent,
            "failed_attempts": failed_attempts,
            "fallback": fallback,
        }
        yield member.name, solution, report


def _rows(members: list[Member]) -> list[int]:
    return [member.weight.shape[0] for member in members]


def _spans(members: list[Member]) -> list[tuple[int, int]]:
    """First row of each member in the stacked ones, and the one after its last."""
    stops = list(itertools.accumulate(_rows(members)))
    return list(zip([0, *stops[:-1]], stops, strict=True))


def _figures(parts: list[tuple[Tensor, solver.Solution]], prepared: solver.Prepared | None) -> list[list[float]]:
    """[loss, relative error, whether all scales are finite] of each part, fetched from a GPU together."""
    found = []
    for weight, solution in parts:
        loss = solution.loss.double().sum()
        error = solver.relative_error(weight, solution.loss, prepared.hessian, prepared.damp) if prepared else torch.zeros_like(loss)
        found.append(torch.stack([loss, error, solution.scales.isfinite().all().double()]))
    return torch.stack(found).tolist()


def shifted(members: list[Member], weights: Tensor, hessian: Tensor, shift: Shift, tokens: int) -> Tensor:
    """From the stacked `weights` of the members, the targets W* = W + α (W ΔC + β ΔR)(H + λI)⁻¹: what on the inputs as they are
    now gives what W gave on the original ones and, for members that write to the residual stream, a share β of what that stream has
    lost. α is target_shift.

    The minimum of ‖W x + β (r - r̃) - W* x̃‖² over the tokens, damped (QEP, arXiv 2504.09629, for β = 0). Raises FactorizationError.
    """
    config, weights = members[0].config, weights.float()
    pulled = shift.inputs().T @ weights.T  # (in, out of all members)
    for member, (start, stop) in zip(members, _spans(members), strict=True):
        if member.writes_residual and config.residual_shift:
            pulled[:, start:stop] += config.residual_shift * shift.residual().T
    damped = hessian.clone()
    damp = damping(config.shift_damp_percent, 1.0, hessian.shape[0], tokens)
    damped.diagonal().add_(damp * hessian.diagonal().mean())
    lower, info = torch.linalg.cholesky_ex(damped)
    if int(info) != 0:
        raise FactorizationError(
            f"{members[0].name}: the Hessian is not positive definite with shift_damp_percent {damp:g}; "
            "raise it, or calibrate on more tokens"
        )
    return weights + config.target_shift * torch.cholesky_solve(pulled, lower).T
