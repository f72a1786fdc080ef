"""The proof that comes with a solve: how infeasible a weight is, and how far from optimal.

Computed from the returned weight, bias and dual variable alone, by code that shares nothing with
the solver's loop.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ddlr.proximal import Norm

VIOLATION_LIMIT = 1e-3
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Certificate:
    """Numbers that prove how good a weight is.

    Attributes
    ----------
    objective, lower_bound, relative_gap, violation
        As in `SolverResult`.
    constraint_violation : float
        As `violation`, but a deviation off Omega counts in full for `net_trim`, where the radius
        is for Omega alone: sqrt(max(||D on Omega||, radius)^2 + ||D off Omega||^2) / radius - 1.
        Never less than `violation`, and equal to it for `hinge`.
    dual : Tensor, shape (samples, out_features)
        The repaired, feasible dual variable that proves `lower_bound`.
    """

    objective: float
    lower_bound: float
    relative_gap: float
    violation: float
    constraint_violation: float
    dual: Tensor

    def within(self, tolerance: float) -> bool:
        """Whether gap and violation are both within what `tolerance` promises."""
        return abs(self.relative_gap) <= tolerance and self.constraint_violation <= min(
            VIOLATION_LIMIT, tolerance
        )


def certify(
    weight: Tensor,
    bias: Tensor,
    dual: Tensor,
    inputs: Tensor,
    targets: Tensor,
    radius: float,
    *,
    norm: Norm,
    activation: str = "relu",
    constraint: str = "net_trim",
    dtype: torch.dtype = torch.float64,
) -> Certificate:
    """Bound the optimum of a layer problem from below, and measure a weight against it.

        minimise norm(W)   subject to   X Wt + 1 bt in C(targets, radius),   b free

    Any V with V <= 0 off Omega, columns that sum to zero and dual norm of Vt X at most 1 gives
    ``<V, Y> - radius * ||V||_F`` as a lower bound (for `net_trim` with the norm over Omega only).
    `dual` is repaired to such a V in closed form: clamped off Omega, the sum of each column spread
    over its entries in Omega, and its columns scaled until Vt X is in the dual ball. So the bound
    holds for any `dual` whatsoever; a poor one only makes it loose.

    Parameters
    ----------
    weight, bias : Tensor, shapes (out_features, in_features) and (out_features,)
    dual, targets : Tensor, shape (samples, out_features)
    inputs : Tensor, shape (samples, in_features)
    radius : float
        Frobenius bound on the output error, in units of `targets`.
    dtype : torch.dtype
        Precision of the matrix products; float64 for a proof.

    References
    ----------
    Lagrangian duality for the program of Aghasi et al. (2020), arXiv 1806.06457, with the bias
    free and the norm exchanged.
    """
    active = targets > 0 if activation == "relu" else torch.ones_like(targets, dtype=torch.bool)

    dual = dual.to(dtype)
    dual = torch.where(active, dual, dual.clamp(max=0))
    counts = active.sum(dim=0)
    dual = torch.where(active, dual - dual.sum(dim=0) / counts.clamp(min=1), dual)
    # A column without any active entry sums to zero only if it is zero.
    dual = dual * (counts > 0)

    on, off = 0.0, 0.0
    adjoint = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
    # The columns of the dual sum to zero, so that any constant may be taken from the inputs; the
    # mean keeps rounding in the sums from being multiplied by a large offset.
    mean = inputs.mean(dim=0)
    for start in range(0, len(inputs), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        samples, wanted, here = inputs[rows].to(dtype), targets[rows].to(dtype), active[rows]
        outputs = torch.addmm(bias.to(dtype), samples, weight.to(dtype).T)
        on += torch.where(here, outputs - wanted, 0).double().square().sum().item()
        off += torch.where(here, 0, outputs.clamp(min=0)).double().square().sum().item()
        adjoint.addmm_(dual[rows].T, samples - mean.to(dtype))

    dual = dual * _best_scale(dual, adjoint, active, targets, radius, norm, constraint)
    lower_bound = _dual_value(dual, active, targets, radius, constraint)

    objective = norm.value(weight)
    scale = radius or torch.linalg.vector_norm(targets, dtype=torch.float64).item() or 1.0
    violation = max(0.0, (math.sqrt(on + off) - radius) / scale)
    if constraint == "hinge":
        constraint_violation = violation
    else:
        constraint_violation = (math.sqrt(max(on, radius**2) + off) - radius) / scale
    return Certificate(
        objective=objective,
        lower_bound=lower_bound,
        relative_gap=(objective - lower_bound) / objective if objective > 0 else 0.0,
        violation=violation,
        constraint_violation=constraint_violation,
        dual=dual,
    )


def _best_scale(
    dual: Tensor,
    adjoint: Tensor,
    active: Tensor,
    targets: Tensor,
    radius: float,
    norm: Norm,
    constraint: str,
) -> Tensor:
    """Factors of the columns of `dual`, shape (out_features,), that make it feasible.

    Column m may be scaled by at most 1 / size_m. Scaling all alike by s, and less only where the
    limit asks for it, is tried for every s at which some column meets its limit.
    """
    limits = torch.nan_to_num(1 / norm.dual_sizes(adjoint).double(), posinf=0.0)
    gains = (dual * targets).sum(dim=0, dtype=torch.float64)
    costs = _paid(dual, active, constraint).square().sum(dim=0, dtype=torch.float64)
    candidates = torch.minimum(limits.unique()[:, None], limits)
    values = candidates @ gains - radius * (candidates.square() @ costs).sqrt()
    return candidates[values.argmax()].to(dual.dtype)


def _dual_value(
    dual: Tensor, active: Tensor, targets: Tensor, radius: float, constraint: str
) -> float:
    """Value of a feasible dual variable; 0 is a bound too, since a norm is never negative."""
    paid = torch.linalg.vector_norm(_paid(dual, active, constraint), dtype=torch.float64)
    return max(0.0, (dual * targets).sum(dtype=torch.float64).item() - radius * paid.item())


def _paid(dual: Tensor, active: Tensor, constraint: str) -> Tensor:
    """The part of the dual variable whose norm the radius multiplies."""
    return dual if constraint == "hinge" else torch.where(active, dual, 0)
