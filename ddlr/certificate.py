"""The proof that comes with a solve: how infeasible a weight is, and how far from optimal.

It is computed from the returned weight, bias and dual variable alone, by code that shares nothing
with the solver's loop. The optimum is bounded from both sides:

- From below by the dual objective. This is a proof, whatever the dual variable.
- From above by the objective itself, where the weight is feasible. With the set `hinge`, and for
  layers without an activation, the returned weight is feasible, so both bounds are proofs.
- From above by the objective plus the `shortfall`, for `nettrim`, whose million sign constraints no
  iterate meets to the last bit. The shortfall is the price of the violations at the multipliers.
  With an optimal dual variable this is a proof (the optimum is convex in the right sides of its
  constraints). With one within a gap of optimal it is an estimate, so it may take up at most half
  of the tolerance.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ddlr.inputs import row_blocks
from ddlr.proximal import Norm

# The share of the tolerance that the price of sign violations may take: it is known to first order
# only.
SHORTFALL_SHARE = 0.5
# So that no copy in another precision is held as a whole.
_BLOCK_ROWS = 2048


def violation_limit(tolerance: float) -> float:
    """The largest violation that is accepted with a tolerance on the gap."""
    return min(1e-3, tolerance)


@dataclass(frozen=True)
class Certificate:
    """The numbers that prove how good a weight is.

    Attributes
    ----------
    objective, lower_bound, relative_gap, violation, shortfall
        As in `SolverResult`.
    sign_violation : float
        ||max(A, 0) off Omega||_F / radius for `nettrim`, where it should be 0; 0 for `hinge`.
    sensitivity : float
        The relative fall of the optimum per relative growth of the radius, at the multipliers:
        radius * ||V||_F / objective.
    dual : Tensor, shape (samples, out_features)
        The repaired, feasible dual variable that proves `lower_bound`.
    """

    objective: float
    lower_bound: float
    relative_gap: float
    violation: float
    sign_violation: float
    shortfall: float
    sensitivity: float
    dual: Tensor

    def within(self, tolerance: float) -> bool:
        """Whether the optimum is within a tolerance on both sides, and no violation too large."""
        return (
            self.relative_gap <= tolerance
            and self.shortfall <= SHORTFALL_SHARE * tolerance
            and is_feasible(self.violation, self.sign_violation, tolerance)
        )


def is_feasible(violation: float, sign_violation: float, tolerance: float) -> bool:
    """Whether both violations are accepted with a tolerance on the gap."""
    return violation <= violation_limit(tolerance) and sign_violation <= tolerance


@torch.no_grad()
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
    constraint: str = "nettrim",
    free_bias: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Certificate:
    """Bound the optimum of a layer problem from below, and measure a weight against it.

        minimise norm(W)   subject to   X Wt + 1 bt in C(targets, radius),   b free

    Any V with V <= 0 off Omega, columns that sum to zero and dual norm of Vt X at most 1 gives
    ``<V, Y> - radius * ||V||_F`` as a lower bound (for `nettrim` with the norm over Omega only).
    `dual` is repaired to such a V in closed form: clamped off Omega, the sum of each column spread
    over its entries in Omega, and its columns scaled until Vt X is in the dual ball. So the bound
    holds for any `dual` whatsoever; a poor one only makes it loose.

    Parameters
    ----------
    weight, bias : Tensor, shapes (out_features, norm.parts * in_features) and (out_features,)
    dual, targets : Tensor, shape (samples, out_features)
    inputs : Tensor, shape (samples, in_features)
    radius : float
        Frobenius bound on the output error, in units of `targets`.
    norm : Norm
        Such as `NUCLEAR` or `L1` of `ddlr.proximal`.
    activation : {"relu", "none"}
    constraint : {"nettrim", "hinge"}
    free_bias : bool
        False for the program without a bias (or with the bias as a column of the weight, against an
        input of ones). Then the columns of V need not sum to zero, and `bias` must be 0.
    dtype : torch.dtype
        Precision of the matrix products; float64 for a proof.

    Returns
    -------
    Certificate
        ``lower_bound`` is proven. The optimum is at most the objective, which is proven, where
        `violation` and `sign_violation` are 0; else at most ``(1 + shortfall) * objective`` to
        first order, see the head of this module.

    Raises
    ------
    ValueError
        If `bias` is not 0 where `free_bias` is False.

    References
    ----------
    Lagrangian duality for the program of Aghasi et al. (2020), arXiv 1806.06457, with the bias
    free and the norm exchanged.
    """
    if not free_bias and bias.any():
        raise ValueError("bias must be 0 where free_bias is False")
    lower_bound, dual = _bound(
        dual, inputs, targets, radius, norm, activation, constraint, free_bias, dtype
    )
    objective = norm.value(weight)
    fitted = norm.weight_of(weight)
    deviation = _measure(fitted, bias, inputs, targets, activation, dtype, dual)
    violation, sign_violation = deviation.violations(targets, radius, constraint)
    size = objective or math.inf
    return Certificate(
        objective=objective,
        lower_bound=lower_bound,
        relative_gap=(objective - lower_bound) / objective if objective > 0 else 0.0,
        violation=violation,
        sign_violation=sign_violation,
        shortfall=deviation.price(radius, constraint) / size,
        sensitivity=radius * deviation.multiplier(constraint) / size,
        dual=dual,
    )


def measure_violations(
    weight: Tensor,
    bias: Tensor,
    inputs: Tensor,
    targets: Tensor,
    radius: float,
    activation: str,
    constraint: str,
    dtype: torch.dtype = torch.float64,
) -> tuple[float, float]:
    """The `violation` and `sign_violation` of `Certificate`, from the weight and bias alone."""
    deviation = _measure(weight, bias, inputs, targets, activation, dtype)
    return deviation.violations(targets, radius, constraint)


@dataclass(frozen=True)
class _Deviation:
    """The norms of the deviation D on Omega and off it, and of the dual variable beside them.

    Attributes
    ----------
    on, off : float
        ||D on Omega||_F and ||D off Omega||_F.
    dual_on, dual_off : float
        The same norms of the dual variable V.
    paired : float
        -<V, D> off Omega, which is not negative.
    """

    on: float
    off: float
    dual_on: float
    dual_off: float
    paired: float

    def violations(self, targets: Tensor, radius: float, constraint: str) -> tuple[float, float]:
        scale = radius or torch.linalg.vector_norm(targets, dtype=torch.float64).item() or 1.0
        violation = max(0.0, (math.hypot(self.on, self.off) - radius) / scale)
        return violation, self.off / scale if constraint == "nettrim" else 0.0

    def price(self, radius: float, constraint: str) -> float:
        """The most by which violations lower the objective, at the multipliers, to first order."""
        if constraint == "hinge":
            return self.multiplier(constraint) * max(0.0, math.hypot(self.on, self.off) - radius)
        return self.multiplier(constraint) * max(0.0, self.on - radius) + self.paired

    def multiplier(self, constraint: str) -> float:
        """The radius's multiplier: the norm of the dual variable where the radius bounds D."""
        return math.hypot(self.dual_on, self.dual_off * (constraint == "hinge"))


def _measure(
    weight: Tensor,
    bias: Tensor,
    inputs: Tensor,
    targets: Tensor,
    activation: str,
    dtype: torch.dtype,
    dual: Tensor | None = None,
) -> _Deviation:
    squares = torch.zeros(5, dtype=torch.float64, device=inputs.device)
    weight, bias = weight.to(dtype), bias.to(dtype)
    for rows in row_blocks(len(inputs), _BLOCK_ROWS):
        target = targets[rows].to(dtype)
        miss = torch.addmm(bias, inputs[rows].to(dtype), weight.T).sub_(target)
        active = target > 0 if activation == "relu" else torch.ones_like(target, dtype=torch.bool)
        off = miss.masked_fill(active, 0).clamp_(min=0).double()
        squares[0] += miss.masked_fill_(~active, 0).double().square_().sum()
        squares[1] += off.square().sum()
        if dual is not None:
            multipliers = dual[rows].double()
            squares[4] -= (multipliers * off).sum()
            multipliers = multipliers.square()
            squares[2] += (multipliers * active).sum()
            squares[3] += (multipliers * ~active).sum()
    paired = squares[4].item()
    return _Deviation(*squares[:4].sqrt().tolist(), paired)


def _bound(
    dual: Tensor,
    inputs: Tensor,
    targets: Tensor,
    radius: float,
    norm: Norm,
    activation: str,
    constraint: str,
    free_bias: bool,
    dtype: torch.dtype,
) -> tuple[float, Tensor]:
    """The lower bound that a repaired dual variable proves, and that variable."""
    features = targets.shape[1]
    relu = activation == "relu"
    counts = (targets > 0).sum(dim=0) if relu else torch.full_like(targets[0], len(targets))
    sums = torch.zeros(features, dtype=torch.float64, device=dual.device)
    if free_bias:
        for rows in row_blocks(len(dual), _BLOCK_ROWS):
            sums += _clamped(dual[rows], targets[rows], relu).sum(dim=0, dtype=torch.float64)
    # A column without any active entry sums to zero only if it is zero: it gets no scale below.
    shift = sums / counts.clamp(min=1)

    adjoint = torch.zeros(features, inputs.shape[1], dtype=dtype, device=dual.device)
    gains, costs = torch.zeros(2, features, dtype=torch.float64, device=dual.device)
    repaired = torch.empty_like(dual)
    # The columns of the dual sum to zero, so that any constant may be taken from the inputs; the
    # mean keeps rounding in the sums from being multiplied by a large offset.
    mean = inputs.mean(dim=0).to(dtype) * free_bias
    for rows in row_blocks(len(dual), _BLOCK_ROWS):
        block = _clamped(dual[rows].to(dtype), targets[rows], relu)
        if relu:
            active = targets[rows] > 0
            block.sub_(active * shift.to(dtype))
        else:
            block.sub_(shift.to(dtype))
        adjoint.addmm_(block.T, inputs[rows].to(dtype) - mean)
        repaired[rows] = block
        gains += (block * targets[rows]).sum(dim=0, dtype=torch.float64)
        if relu and constraint == "nettrim":
            block.mul_(active)
        costs += block.double().square_().sum(dim=0)

    dual_norms = norm.dual_norm_by_row(adjoint).double()
    limits = torch.nan_to_num(1 / dual_norms, posinf=0.0) * (counts > 0)
    # Column m may be scaled by at most limits[m]. Scaling all alike by s, and less only where the
    # limit asks for it, is tried for every s at which some column meets its limit.
    candidates = torch.minimum(limits.unique()[:, None], limits)
    values = candidates @ gains - radius * (candidates.square() @ costs).sqrt()
    best = values.argmax()
    # No norm is below 0, so 0 is a bound too.
    return max(0.0, values[best].item()), repaired.mul_(candidates[best].to(dual.dtype))


def _clamped(dual: Tensor, targets: Tensor, relu: bool) -> Tensor:
    """A copy of the dual variable with positive entries off Omega set to 0."""
    return torch.where(targets > 0, dual, dual.clamp(max=0)) if relu else dual.clone()
