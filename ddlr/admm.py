"""The splitting iteration behind both convex solvers, for any norm and either output set."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from ddlr.certificate import SHORTFALL_SHARE, Certificate, violation_limit
from ddlr.constraints import OutputSet
from ddlr.inputs import BLOCK_ROWS, CentredInputs, row_blocks
from ddlr.proximal import Norm

REBALANCE_INTERVAL = 50
_OVER_RELAXATION = 1.8
# The penalties, see `Splitting.rebalance`, `_output_penalty_for` and `_weight_penalty_for`. Of a
# dozen settings tried over 28 layer problems of MNIST networks, those near these numbers needed
# the fewest iterations.
_LAST_DUAL_FOLLOWED = 100
_LAST_REBALANCE = 1000
_LARGEST_FACTOR = 4
_INITIAL_BALANCE = 0.8
_RELATIVE_THRESHOLD = 2.0
# By how much the loop aims inside the radius at first, and what share of the tolerance that may
# cost: near the radius at which the weight vanishes the optimum depends on it steeply.
_LARGEST_MARGIN = 1e-3
_MARGIN_PER_TOLERANCE = 0.1
_AFFORDABLE_SHARE = 0.25


class Splitting:
    """The state of the Douglas-Rachford splitting of a layer problem, and its steps.

        minimise norm(W)   subject to   X Wt + 1 bt in `outputs`,   b free

    (For a norm of several parts the weight is their sum, and the variable has them side by side.)
    A step takes the weight W from its governing variable by the proximal operator of the norm, the
    outputs Z from theirs by projection on the output set, and then couples both by a ridge
    regression. Governing variable minus variable, times the penalty, is the multiplier, so a
    penalty changes by moving the governing variable along that difference.

    The loop aims at a radius smaller by a margin for what it misses it by, so that the weight is
    within the radius that was asked for. Whatever has one value per sample and output is worked on
    in blocks of samples; of these only the governing variable and the dual variable are kept.

    Parameters
    ----------
    norm : Norm
    outputs : OutputSet
    inputs : CentredInputs
    start : tuple of Tensor, optional
        Weight, bias, and dual variable or None. Without it, or with a weight of zeros, the start
        is a light ridge regression on the targets.
    tolerance : float
        On the relative gap: fixes the margin, and what the penalties are balanced for.

    Attributes
    ----------
    weight_governing : Tensor, shape (out_features, norm.parts * in_features)
        In the coordinates of the inputs that the norm allows, principal ones for the nuclear norm.
    output_governing : Tensor, shape (samples, out_features)
    dual : Tensor, shape (samples, out_features)
        The multiplier of the latest ridge step. Its columns sum to zero by construction.
    weight_penalty, output_penalty : float

    References
    ----------
    Eckstein and Bertsekas (1992) for the splitting and its over-relaxation; Aghasi et al. (2020),
    arXiv 1806.06457, for its use on this program.
    """

    def __init__(
        self,
        norm: Norm,
        outputs: OutputSet,
        inputs: CentredInputs,
        start: tuple[Tensor, Tensor, Tensor | None] | None,
        tolerance: float,
    ):
        self.norm, self.free_bias, self.tolerance = norm, inputs.free_bias, tolerance
        self._radius = outputs.radius
        self._margin = min(_LARGEST_MARGIN, _MARGIN_PER_TOLERANCE * tolerance)
        self.outputs = replace(outputs, radius=outputs.radius * (1 - self._margin))
        self.inputs = inputs.principal if norm.rotation_invariant else inputs
        centred, targets = self.inputs.centred, outputs.targets
        # A cache is small; an accelerator is better served by few large operations.
        block_rows = BLOCK_ROWS if centred.device.type == "cpu" else len(centred)
        self._blocks = row_blocks(len(centred), block_rows)
        # A zero weight says nothing about the scale of the solution.
        if start is None or not start[0].any():
            weight, bias, dual = *self._least_squares(), None
        else:
            weight, bias, dual = start
            weight = weight.to(centred)
            bias = bias.to(centred) + norm.weight_of(weight) @ inputs.mean
            weight = self.inputs.to_coordinates(weight).clone()
        size = norm.value(weight)
        self.weight_penalty = self._weight_penalty_for(weight)
        self._balance = _INITIAL_BALANCE
        targets_norm = torch.linalg.vector_norm(targets).item()
        self.output_penalty = self._output_penalty_for(size / targets_norm) or self.weight_penalty
        self.weight_governing = weight
        self.output_governing = torch.addmm(bias, centred, norm.weight_of(weight).T)
        if dual is not None and dual.any():
            dual = dual.to(weight)
            self.output_penalty = self._output_penalty_for(torch.linalg.vector_norm(dual).item())
            self.output_governing.sub_(dual, alpha=1 / self.output_penalty)
            adjoint = (dual.T @ centred).repeat(1, norm.parts)
            self.weight_governing.add_(adjoint, alpha=1 / self.weight_penalty)
        self.dual = torch.empty_like(targets)
        self._shrink_factor = self._measure_shrink_factor()

    def step(self) -> None:
        """Make one iteration: update the governing variables and the dual variable.

        It costs the two products X Wt and Rt X, 4 samples * in_features * out_features flops, and
        what the proximal operator needs.
        """
        centred, targets = self.inputs.centred, self.outputs.targets
        weight = self.norm.prox(self.weight_governing, 1 / self.weight_penalty)
        cross = torch.zeros_like(self.norm.weight_of(weight))
        total = torch.zeros_like(targets[0])
        for rows in self._blocks:
            reflected = self._reflected(rows)
            cross.addmm_(reflected.T, centred[rows])
            total += reflected.sum(dim=0)
        bias = total / len(targets) if self.free_bias else torch.zeros_like(total)
        ratio = self.output_penalty / self.weight_penalty
        ridge = self._solve_ridge(2 * weight - self.weight_governing, cross, ratio)
        slopes = self.norm.weight_of(ridge).T

        # governing += relaxation * (fitted - Z), where Z = (reflected + governing) / 2.
        square = 0.0
        for rows in reversed(self._blocks):
            if rows is not self._blocks[-1]:  # whose reflection is at hand
                reflected = self._reflected(rows)
            fitted = torch.addmm(bias, centred[rows], slopes)
            governing = self.output_governing[rows]
            governing.mul_(1 - _OVER_RELAXATION / 2)
            governing.add_(fitted, alpha=_OVER_RELAXATION)
            governing.sub_(reflected, alpha=_OVER_RELAXATION / 2)
            torch.mul(reflected.sub_(fitted), self.output_penalty, out=self.dual[rows])
            square += self.outputs.bounded_square(governing, rows)
        self._shrink_factor = self.outputs.shrink_factor(square)
        self.weight_governing.add_(ridge.sub_(weight), alpha=_OVER_RELAXATION)
        self._weight, self._bias = weight, bias

    def answer(self) -> tuple[Tensor, Tensor]:
        """The weight that the latest step took by the proximal operator, and its bias."""
        weight = self.inputs.from_coordinates(self._weight)
        return weight, self._bias - self.norm.weight_of(self._weight) @ self.inputs.mean

    def rebalance(self, iteration: int, certificate: Certificate | None) -> None:
        """Move the penalties to where they serve, after a check of the latest step.

        For the first `_LAST_DUAL_FOLLOWED` iterations the output penalty follows the dual variable,
        by a bounded factor at a time. At checks that fall on a multiple of `REBALANCE_INTERVAL` it
        goes up if feasibility is what is missing and down if the gap is, and the weight penalty is
        set anew if the weight has outgrown it. All of it ends at `_LAST_REBALANCE`, since
        convergence is proven for constant penalties.
        """
        if certificate is not None:
            self._afford_margin(certificate.sensitivity)
        if iteration > _LAST_REBALANCE:
            return
        factor = 1.0
        if certificate is not None and iteration % REBALANCE_INTERVAL == 0:
            factor = _balance_factor(
                _infeasibility(certificate, self.tolerance),
                certificate.relative_gap / self.tolerance,
            )
            self._balance *= factor
            self._follow_weight()
        if iteration <= _LAST_DUAL_FOLLOWED:
            square = 0.0
            for rows in self._blocks:
                square += self._displaced(rows).square_().sum()
            penalty = self._output_penalty_for(self.output_penalty * square.sqrt().item())
            factor = min(max(penalty / self.output_penalty, 1 / _LARGEST_FACTOR), _LARGEST_FACTOR)
        if not 2 / 3 < factor < 3 / 2:
            for rows in self._blocks:
                self.output_governing[rows].sub_(self._displaced(rows), alpha=1 - 1 / factor)
            self._shrink_factor = self._measure_shrink_factor()
            self.output_penalty *= factor

    def _measure_shrink_factor(self) -> Tensor:
        """What the projection of the output's governing variable leaves of its deviation."""
        squares = [self.outputs.bounded_square(self.output_governing[r], r) for r in self._blocks]
        return self.outputs.shrink_factor(sum(squares))

    def _displaced(self, rows: slice) -> Tensor:
        """The output's governing variable minus its projection."""
        return self.outputs.displacement(self.output_governing[rows], self._shrink_factor, rows)

    def _reflected(self, rows: slice) -> Tensor:
        """Twice the projection of the output's governing variable, minus that variable."""
        return self.output_governing[rows].sub(self._displaced(rows), alpha=2)

    def _solve_ridge(self, weight: Tensor, cross: Tensor, penalty: float) -> Tensor:
        """The ridge regression on the sum of the parts, which take equal shares of its change."""
        parts = self.norm.parts
        if parts == 1:
            return self.inputs.solve_ridge(weight, cross, penalty)
        total = self.norm.weight_of(weight)
        change = self.inputs.solve_ridge(total, cross, parts * penalty).sub_(total)
        return weight + change.div_(parts).repeat(1, parts)

    def _least_squares(self) -> tuple[Tensor, Tensor]:
        """A ridge regression on the targets, light enough to leave all but the smallest directions.

        Its weight, and its bias for centred inputs.
        """
        centred, targets = self.inputs.centred, self.outputs.targets
        values, _ = self.inputs.eigen
        penalty = 1e3 / values[-1].item() if len(values) else 1.0
        zero = targets.new_zeros(targets.shape[1], self.norm.parts * centred.shape[1])
        weight = self._solve_ridge(zero, targets.T @ centred, penalty)
        mean = targets.mean(dim=0)
        return weight, mean if self.free_bias else torch.zeros_like(mean)

    def _afford_margin(self, sensitivity: float) -> None:
        """Keep what the margin inside the radius costs below a share of the tolerance."""
        affordable = _AFFORDABLE_SHARE * self.tolerance / sensitivity if sensitivity else math.inf
        if self._margin > affordable:
            self._margin = affordable
            self.outputs = replace(self.outputs, radius=self._radius * (1 - affordable))
            self._shrink_factor = self._measure_shrink_factor()

    def _follow_weight(self) -> None:
        """Set the weight penalty anew if it is far from that for the present weight."""
        penalty = self._weight_penalty_for(self._weight)
        factor = penalty / self.weight_penalty
        if not 1 / _LARGEST_FACTOR < factor < _LARGEST_FACTOR:
            self.weight_governing = torch.lerp(self._weight, self.weight_governing, 1 / factor)
            self.weight_penalty = penalty

    def _weight_penalty_for(self, weight: Tensor) -> float:
        """The penalty whose threshold is a fixed multiple of the mean nonzero term of the norm."""
        size = self.norm.value(weight)
        return self.norm.terms(weight) / (_RELATIVE_THRESHOLD * size) if size else 1.0

    def _output_penalty_for(self, dual_norm: float) -> float:
        """The penalty for which the governing variable lies well outside the set, yet not too far.

        The multiplier is penalty times (Z - governing), so the penalty fixes how far outside: here
        the geometric mean of radius and ||Y||_F, divided by the balance.
        """
        targets_norm = torch.linalg.vector_norm(self.outputs.targets).item()
        radius = max(self.outputs.radius, 1e-3 * targets_norm)
        return self._balance * dual_norm / math.sqrt(radius * targets_norm)


def _infeasibility(certificate: Certificate, tolerance: float) -> float:
    """Violations, and what they may have bought, relative to where the loop ends."""
    violation = certificate.violation
    exceeded = violation / violation_limit(tolerance) + (violation > 0)
    bought = certificate.shortfall / (SHORTFALL_SHARE * tolerance)
    return max(exceeded, certificate.sign_violation / tolerance, bought)


def _balance_factor(infeasibility: float, suboptimality: float) -> float:
    """2 if feasibility is what is missing, 1/2 if the gap is, else 1.

    Both are relative to what is asked for.
    """
    if suboptimality > 4 * infeasibility:
        return 0.5
    return 2.0 if infeasibility > 4 * suboptimality else 1.0
