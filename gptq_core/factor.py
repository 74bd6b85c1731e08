"""Column order, damping and the one Cholesky factor.

With H + λI = R Rᵀ and R *upper* triangular, GPTQ processed column by column is

    q_i = Q( w_i + Σ_{k<i} (w_k - q_k) R[k,i] / R[i,i] )

(LDLQ, equivalently Babai's nearest plane; Chen et al. 2025, arXiv 2507.18553), so no inverse is ever formed. R comes from a
lower Cholesky with both axes flipped before and after. λ = damp_percent · mean(diag H). A factorization that fails is tried
again with more damping by a stated schedule; every attempt is recorded and the last failure is an error that names the layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gptq_core.config import QuantizeConfig
from gptq_core.errors import FactorizationError

DAMPING_SCHEDULE = (1.0, 10.0, 100.0)
"""Factors on damp_percent tried in turn when the Cholesky fails."""


@dataclass(frozen=True)
class Factor:
    """The factor of one input group, in processing order."""

    upper: Float[Tensor, "n n"]
    """R, upper triangular, of the permuted and damped Hessian."""
    order: Int[Tensor, " n"]
    """Original column at each processing position."""
    damp_percent: float
    """The damping that worked."""
    failed_attempts: int
    """Cholesky attempts that failed before it."""
    damped: Float[Tensor, "n n"]
    """H + λI, columns in their original order."""


def column_order(diagonal: Float[Tensor, " n"], config: QuantizeConfig) -> Int[Tensor, " n"]:
    """Original column index at each processing position, by the order that the config asks for.

    desc_act and activation_order: decreasing diag(H). act_group_aware: groups by their largest diagonal entry, and columns
    inside a group likewise, so that every group stays together. Otherwise the columns as they stand.
    """
    n = diagonal.numel()
    if config.desc_act or config.activation_order:
        return torch.argsort(diagonal, descending=True, stable=True)
    if config.act_group_aware:
        groups = diagonal.view(config.groups_of(n), -1)  # (groups, columns of a group)
        inside = torch.argsort(groups, dim=1, descending=True, stable=True)
        across = torch.argsort(groups.amax(1), descending=True, stable=True)
        first = torch.arange(groups.shape[0], device=diagonal.device).unsqueeze(1) * groups.shape[1]
        return (first + inside)[across].flatten()
    return torch.arange(n, device=diagonal.device)


def factorize(hessian: Float[Tensor, "n n"], config: QuantizeConfig, layer: str) -> Factor:
    """Order, damp and factor the Hessian of one input group. `layer` names it in the error.

    Raises FactorizationError when H is not finite, is zero, or stays indefinite through the damping schedule.
    """
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    if not mean > 0 or not torch.isfinite(diagonal).all():
        raise FactorizationError(
            f"{layer}: mean of diag(H) is {mean}, a positive finite number is needed; its calibration inputs are zero or not "
            "finite: check the model's weights and the calibration text, or load the model in float32 (model.dtype)"
        )
    order = column_order(diagonal, config)
    for attempt, factor in enumerate(DAMPING_SCHEDULE):
        damp = config.damp_percent * factor
        damped = hessian.clone()
        damped.diagonal().add_(damp * mean)
        backwards = order.flip(0)
        lower, info = torch.linalg.cholesky_ex(damped[backwards][:, backwards])
        if int(info) == 0:
            return Factor(lower.flip(0, 1), order, damp, attempt, damped)
    tried = ", ".join(f"{config.damp_percent * f:g}" for f in DAMPING_SCHEDULE)
    raise FactorizationError(
        f"{layer}: the Hessian is not positive definite with damp_percent {tried}; calibrate on more tokens or raise damp_percent, "
        "or allow on_failure: round"
    )
