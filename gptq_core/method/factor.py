"""Column order, damping and the one Cholesky factor.

With H + λI = R Rᵀ and R *upper* triangular, GPTQ processed column by column is

    q_i = Q( w_i + Σ_{k<i} (w_k - q_k) R[k,i] / R[i,i] )

(LDLQ, equivalently Babai's nearest plane; Chen et al. 2025, arXiv 2507.18553), so no inverse is ever formed. Read from its last row
and column to the first, R is the lower Cholesky factor L of the matrix whose columns stand in reverse order: that L is what is kept,
and nothing is flipped. λ = damp_percent · mean(diag H). A factorization that fails is tried again with more damping by a stated
schedule; every attempt is recorded and the last failure is an error that names the layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gptq_core.config import QuantizeConfig
from gptq_core.errors import FactorizationError

AUTO_RANGE = (0.005, 0.9)
"""The range of `auto` damping."""
PANEL = 256
"""Rows of H that are gathered together: few enough to stay in the cache."""
DAMPING_SCHEDULE = (1.0, 10.0, 100.0)
"""Factors on damp_percent tried in turn when the Cholesky fails."""


@dataclass(frozen=True)
class Factor:
    """The factor of one input group."""

    lower: Float[Tensor, "n n"]
    """L, lower triangular, with L Lᵀ the damped Hessian of the columns in reverse processing order: row 0 is the last column's."""
    order: Int[Tensor, " n"]
    """Original column at each processing position."""
    damp_percent: float
    """The damping that worked."""
    failed_attempts: int
    """Cholesky attempts that failed before it."""
    hessian: Float[Tensor, "n n"]
    """H, columns in their original order."""
    damp: Float[Tensor, ""]
    """λ."""

    @property
    def backwards(self) -> Int[Tensor, " n"]:
        """Original column of each row of `lower`."""
        return self.order.flip(0)

    @property
    def curvature(self) -> Float[Tensor, " n"]:
        """diag(H + λI), columns in their original order."""
        return self.hessian.diagonal() + self.damp


def column_order(diagonal: Float[Tensor, " n"], config: QuantizeConfig) -> Int[Tensor, " n"]:
    """Original column index at each processing position, in the order that the config selects.

    desc_act, and act_group_aware with static groups: decreasing diag(H). act_group_aware otherwise: groups by their largest diagonal
    inside a group likewise, so that every group stays together. Otherwise the columns as they stand.
    """
    n = diagonal.numel()
    if config.desc_act or (config.act_group_aware and config.static_groups):
        return torch.argsort(diagonal, descending=True, stable=True)
    if config.act_group_aware:
        groups = diagonal.view(config.groups_of(n), -1)  # (groups, columns of a group)
        inside = torch.argsort(groups, dim=1, descending=True, stable=True)
        across = torch.argsort(groups.amax(1), descending=True, stable=True)
        first = torch.arange(groups.shape[0], device=diagonal.device).unsqueeze(1) * groups.shape[1]
        return (first + inside)[across].flatten()
    return torch.arange(n, device=diagonal.device)


def damping(setting: float | str, share: float, columns: int, tokens: int) -> float:
    """The share of mean(diag H) that a `damp_percent` setting asks for; auto is `share` · columns / tokens, within AUTO_RANGE.

    A mean over T tokens leaves each entry of H uncertain by about 1/√T, and a regression on n columns fits the noise of n/T of its
    degrees of freedom; damping in proportion to n/T keeps both in place.
    """
    low, high = AUTO_RANGE
    return min(max(share * columns / tokens, low), high) if setting == "auto" else float(setting)


def _permuted(hessian: Tensor, order: Tensor) -> Tensor:
    """The lower triangle of a symmetric matrix with rows and columns in another order, stored column by column as LAPACK wants it."""
    n = order.numel()
    columns = torch.empty_like(hessian)  # row i of it is column i of the result
    for begin in range(0, n, PANEL):
        rows = hessian.index_select(0, order[begin : begin + PANEL])
        torch.index_select(rows, 1, order[begin:], out=columns[begin : begin + PANEL, begin:])
    return columns.T


def factorize(hessian: Float[Tensor, "n n"], config: QuantizeConfig, layer: str, tokens: int) -> Factor:
    """Order, damp and factor the Hessian of one input group. `layer` names it in the error; tokens: that went into H.

    Raises FactorizationError when H is not finite, is zero, or stays indefinite through the damping schedule.
    """
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    order = column_order(diagonal, config)
    backwards = order.flip(0)
    info = torch.empty((), dtype=torch.int32, device=hessian.device)
    wanted = damping(config.damp_percent, 0.5, hessian.shape[0], tokens)
    for attempt, factor in enumerate(DAMPING_SCHEDULE):
        damp = wanted * factor
        lower = _permuted(hessian, backwards)
        lower.diagonal().add_(damp * mean)
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        level, failed = torch.stack([mean, info.to(mean.dtype)]).tolist()  # on a GPU the one moment that waits for it
        if not 0 < level < math.inf:
            raise FactorizationError(
                f"{layer}: mean of diag(H) is {level}, a positive finite number is needed; its calibration inputs are zero or not "
                "finite: check the model's weights and the calibration text, or load the model in float32 (model.dtype)"
            )
        if not failed:
            return Factor(lower, order, damp, attempt, hessian, damp * mean)
    tried = ", ".join(f"{wanted * f:g}" for f in DAMPING_SCHEDULE)
    raise FactorizationError(
        f"{layer}: the Hessian is not positive definite with damp_percent {tried}; calibrate on more tokens or raise damp_percent, "
        "or allow on_failure: round"
    )
