"""The one splitting loop, for any norm and either output set."""

import math
import time
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from ddlr.certificate import (
    SHORTFALL_SHARE,
    Certificate,
    certify,
    is_feasible,
    measure_violations,
    violation_limit,
)
from ddlr.constraints import OutputSet, row_blocks
from ddlr.proximal import Norm
from ddlr.result import ConvergenceError, SolverResult, SolverStatus

_OVER_RELAXATION = 1.8
_ITERATIONS_A_CHECK = 10
# A gap this many times the tolerance is not closed within one interval between checks.
_FAR = 3
# Samples that stay in the processor's cache from one operation on them to the next.
_ROWS_AT_ONCE = 512
# The penalties: see `_Splitting.rebalance`, `_wanted_penalty` and `_wanted_weight_penalty`. Of a
# dozen settings tried over 28 layer problems of MNIST networks, those near these numbers needed
# the fewest iterations.
_ITERATIONS_A_REBALANCE = 50
_LAST_FOLLOWED = 100
_LAST_REBALANCE = 1000
_LARGEST_STEP = 4
_BALANCE = 0.8
# By how much the loop aims inside the radius at first, and what share of the tolerance that may
# cost: near the radius at which the weight vanishes the optimum depends on it steeply.
_LARGEST_MARGIN = 1e-3
_MARGIN_OF_TOLERANCE = 0.1
_MARGIN_SHARE = 0.25
_RELATIVE_THRESHOLD = 2.0


@dataclass(frozen=True)
class WarmStart:
    """Where a solve begins. A `SolverResult` can stand in its place."""

    weight: Tensor
    bias: Tensor
    dual: Tensor | None = None


@dataclass(frozen=True)
class CentredInputs:
    """The mean-free inputs and the eigenvectors of their Gram matrix.

    Centring takes the free bias out of the linear algebra: at the least-squares solution it is
    the mean of the residual. Each property is computed when first asked for, and kept.
    """

    inputs: Tensor
    free_bias: ClassVar[bool] = True

    @classmethod
    def with_eigen(cls, inputs: Tensor, eigen: tuple[Tensor, Tensor]) -> "CentredInputs":
        """Inputs whose property `eigen` is known from before."""
        made = cls(inputs)
        vars(made)["eigen"] = eigen
        return made

    @cached_property
    def mean(self) -> Tensor:
        return self.inputs.mean(dim=0)

    @cached_property
    def centred(self) -> Tensor:
        return self.inputs - self.mean

    def _exact_mean(self) -> Tensor:
        return self.inputs.mean(dim=0, dtype=torch.float64)

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues above rounding, ascending, and eigenvectors as columns, of Xc^T Xc.

        Decomposed in float64 on the smaller side of Xc.
        """
        samples, features = self.inputs.shape
        tall = samples >= features
        mean = self._exact_mean()
        # In blocks, so that the inputs are never held as a whole in float64.
        if tall:
            gram = mean.new_zeros(features, features)
            for rows in row_blocks(samples, _ROWS_AT_ONCE):
                block = self.inputs[rows].double() - mean
                gram.addmm_(block.T, block)
        else:
            gram = mean.new_zeros(samples, samples)
            for columns in row_blocks(features, _ROWS_AT_ONCE):
                block = self.inputs[:, columns].double() - mean[columns]
                gram.addmm_(block, block.T)
        values, vectors = torch.linalg.eigh(gram)
        kept = values > max(samples, features) * torch.finfo(values.dtype).eps * values[-1]
        values, vectors = values[kept], vectors[:, kept]
        if not tall:
            vectors = vectors / values.sqrt()
            blocks = (
                (self.inputs[:, columns].double() - mean[columns]).T @ vectors
                for columns in row_blocks(features, _ROWS_AT_ONCE)
            )
            vectors = torch.cat([block.to(self.inputs.dtype) for block in blocks])
        return values.to(self.inputs.dtype), vectors.to(self.inputs.dtype)

    @cached_property
    def principal(self) -> "PrincipalInputs":
        return PrincipalInputs(self)

    def to_loop(self, weight: Tensor) -> Tensor:
        """A weight in the coordinates of `centred`."""
        return weight

    from_loop = to_loop

    def solve_ridge(self, weight: Tensor, cross: Tensor, penalty: float) -> Tensor:
        """Minimise ``||W - weight||_F^2 + penalty * ||Xc Wt - R||_F^2``, given cross = Rt Xc.

        Both forms divide by 1 + penalty * eigenvalue rather than subtract what is close to equal,
        which float32 would not survive at large penalties.
        """
        values, vectors = self.eigen
        gain = penalty * values
        if len(values) == vectors.shape[0]:
            right_side = weight + penalty * cross
            return ((right_side @ vectors) / (1 + gain)) @ vectors.T
        residual = cross @ vectors - (weight @ vectors) * values
        return weight + (residual * (penalty / (1 + gain))) @ vectors.T


class UncentredInputs(CentredInputs):
    """Inputs as they are, for problems without a free bias."""

    free_bias: ClassVar[bool] = False

    @cached_property
    def mean(self) -> Tensor:
        return torch.zeros_like(self.inputs[0])

    @cached_property
    def centred(self) -> Tensor:
        return self.inputs

    def _exact_mean(self) -> Tensor:
        return self.mean.double()


class PrincipalInputs:
    """Centred inputs in their principal coordinates, for norms that a rotation leaves alone.

    There the ridge regression is a division, and the dimensions in which the data do not vary are
    gone: no more columns than samples, or than the rank of the data. A weight of least nuclear norm
    has nothing in those.
    """

    def __init__(self, original: CentredInputs):
        self.eigen = self.values, self.vectors = original.eigen
        inputs = original.inputs
        self.mean = original.mean @ self.vectors
        self.centred = inputs.new_empty(len(inputs), len(self.values))
        for rows in row_blocks(len(inputs), _ROWS_AT_ONCE):
            torch.mm(inputs[rows] - original.mean, self.vectors, out=self.centred[rows])

    def to_loop(self, weight: Tensor) -> Tensor:
        """A weight in the coordinates of `centred`."""
        return weight @ self.vectors

    def from_loop(self, weight: Tensor) -> Tensor:
        return weight @ self.vectors.T

    def solve_ridge(self, weight: Tensor, cross: Tensor, penalty: float) -> Tensor:
        """As `CentredInputs.solve_ridge`."""
        return torch.add(weight, cross, alpha=penalty) / (1 + penalty * self.values)


@torch.no_grad()
def minimise_norm(
    norm: Norm,
    outputs: OutputSet,
    inputs: Tensor | CentredInputs,
    *,
    tolerance: float,
    max_iterations: int,
    warm_start: WarmStart | SolverResult | None = None,
) -> SolverResult:
    """Minimise a norm of the weight over an output set.

        minimise norm(W)   subject to   X Wt + 1 bt in `outputs`,   b free

    (b = 0 for `UncentredInputs`) by Douglas-Rachford splitting (the alternating direction method of
    multipliers, over-relaxed):
    W = S, A = Z with S taken by the proximal operator of the norm, Z by projection on the output
    set, and (W, A) by a ridge regression that couples them, X centred. An iteration costs the two
    products X Wt and Rt X, 4 N M P flops, and what the proximal operator needs; the eigenvectors
    of Xt X are computed once.

    Every `_ITERATIONS_A_CHECK` iterations, or twice that while the gap is wide, S is certified with
    the multiplier V of the ridge step as its dual variable. The loop ends when the certificate is
    within the tolerance, in the inputs' precision and again in float64. It aims at a radius smaller
    by a margin for what ADMM misses it by, so that S is within the radius that was asked for.

    Raises
    ------
    ValueError
        If shapes disagree, or a value is not finite.
    ConvergenceError
        If the tolerance is not met within `max_iterations`; carries the result.

    References
    ----------
    Eckstein and Bertsekas (1992) for the splitting and its over-relaxation; Aghasi et al. (2020),
    arXiv 1806.06457, for its use on this program.
    """
    started = time.perf_counter()
    geometry = inputs if isinstance(inputs, CentredInputs) else CentredInputs(inputs)
    inputs = geometry.inputs
    check_problem(inputs, outputs.targets, tolerance, max_iterations)
    if warm_start is not None:
        check_warm_start(warm_start, inputs, outputs.targets)

    problem = (inputs, outputs.targets, outputs.radius)
    options = {"activation": outputs.activation, "constraint": outputs.constraint}
    proof_options = {**options, "free_bias": geometry.free_bias}

    def prove(weight: Tensor, bias: Tensor, dual: Tensor, dtype: torch.dtype) -> Certificate:
        return certify(weight, bias, dual, *problem, norm=norm, **proof_options, dtype=dtype)

    def kept(violation: float) -> bool:
        return violation == 0 or outputs.radius == 0  # no iterate keeps a radius of 0

    def done(proof: Certificate) -> bool:
        return kept(proof.violation) and proof.within(tolerance)

    def finish(weight: Tensor, bias: Tensor, proof: Certificate, iterations: int) -> SolverResult:
        met = done(proof)
        return SolverResult(
            weight=weight,
            bias=bias,
            status=SolverStatus.CONVERGED if met else SolverStatus.ITERATION_LIMIT,
            iterations=iterations,
            objective=proof.objective,
            lower_bound=proof.lower_bound,
            relative_gap=proof.relative_gap,
            violation=proof.violation,
            dual=proof.dual,
            seconds=time.perf_counter() - started,
            shortfall=proof.shortfall,
        )

    constant = outputs.best_constant_output()
    if not geometry.free_bias:
        constant = torch.zeros_like(constant)
    if outputs.violation(constant.expand_as(outputs.targets)) == 0:
        zero = inputs.new_zeros(outputs.targets.shape[1], inputs.shape[1])
        proof = prove(zero, constant, torch.zeros_like(outputs.targets), torch.float64)
        return finish(zero, constant, proof, iterations=0)

    if warm_start is not None and warm_start.dual is not None and warm_start.dual.numel():
        # What is a solution already is proven to be one.
        weight, bias, dual = (
            value.detach().to(inputs)
            for value in (warm_start.weight, warm_start.bias, warm_start.dual)
        )
        proof = prove(weight, bias, dual, torch.float64)
        if done(proof):
            return finish(weight, bias, proof, iterations=0)

    margin = min(_LARGEST_MARGIN, _MARGIN_OF_TOLERANCE * tolerance)
    loop = _Splitting(norm, outputs, geometry, warm_start, margin)
    feasible, next_check = False, _ITERATIONS_A_CHECK
    for iteration in range(1, max_iterations + 1):
        loop.step()
        last = iteration == max_iterations
        if not last and iteration < next_check:
            continue
        next_check += _ITERATIONS_A_CHECK
        weight, bias = loop.answer()
        proof = None
        if not feasible:
            # The cheaper half of the certificate first: it fails for the first half of the way.
            missed = measure_violations(weight, bias, *problem, **options, dtype=inputs.dtype)
            feasible = kept(missed[0]) and is_feasible(*missed, tolerance)
        if last or feasible or iteration % _ITERATIONS_A_REBALANCE == 0:
            proof = prove(weight, bias, loop.dual, inputs.dtype)
            if last or done(proof):
                proof = None  # frees its dual variable
                proof = prove(weight, bias, loop.dual, torch.float64)
                if last or done(proof):
                    break
            if proof.relative_gap > _FAR * tolerance:
                next_check += _ITERATIONS_A_CHECK
        loop.rebalance(iteration, proof, tolerance)
    result = finish(weight, bias, proof, iteration)
    if result.status is not SolverStatus.CONVERGED:
        raise ConvergenceError(
            f"{result.status.message}: after {iteration} iterations the relative gap is "
            f"{result.relative_gap:.1e}, the violation {proof.violation:.1e} (of signs "
            f"{proof.sign_violation:.1e}) and the shortfall {proof.shortfall:.1e}, for a tolerance "
            f"of {tolerance:g}; raise max_iterations or tolerance",
            result,
        )
    return result


class _Splitting:
    """The state of the loop: the shadows of weight and output, and the two penalties.

    The shadow of a variable is what its proximal step is applied to. Shadow minus variable, times
    the penalty, is the multiplier, so a penalty changes by moving the shadow along that difference.
    Whatever has a value a sample and output is worked on in blocks of samples, and of these only
    the shadow and the dual variable are kept.
    """

    def __init__(
        self,
        norm: Norm,
        outputs: OutputSet,
        geometry: CentredInputs,
        warm_start: WarmStart | SolverResult | None,
        margin: float,
    ):
        self.norm, self.free_bias = norm, geometry.free_bias
        self.radius, self.margin = outputs.radius, margin
        self.outputs = replace(outputs, radius=outputs.radius * (1 - margin))
        self.inputs = geometry.principal if norm.rotation_invariant else geometry
        centred, targets = self.inputs.centred, outputs.targets
        # A cache is small; an accelerator is better served by few large operations.
        at_once = _ROWS_AT_ONCE if centred.device.type == "cpu" else len(centred)
        self._blocks = row_blocks(len(centred), at_once)
        # A zero weight says nothing about the scale of the solution.
        if warm_start is None or not warm_start.weight.any():
            weight, bias, dual = *self._least_squares(), None
        else:
            weight = warm_start.weight.to(centred)
            bias = warm_start.bias.to(centred) + weight @ geometry.mean
            weight, dual = self.inputs.to_loop(weight).clone(), warm_start.dual
        size = norm.value(weight)
        self.weight_penalty = self._wanted_weight_penalty(weight)
        self.balance = _BALANCE
        targets_norm = torch.linalg.vector_norm(targets).item()
        self.output_penalty = self._wanted_penalty(size / targets_norm) or self.weight_penalty
        self.weight_shadow = weight
        self.output_shadow = torch.addmm(bias, centred, weight.T)
        if dual is not None and dual.any():
            dual = dual.to(weight)
            self.output_penalty = self._wanted_penalty(torch.linalg.vector_norm(dual).item())
            self.output_shadow.sub_(dual, alpha=1 / self.output_penalty)
            self.weight_shadow.add_(dual.T @ centred, alpha=1 / self.weight_penalty)
        self.dual = torch.empty_like(targets)
        self._keep = self._kept_share()

    def step(self) -> None:
        """One iteration, updating the shadows.

        Leaves the multiplier of its ridge step in `dual`: its columns sum to zero by construction.
        """
        centred, targets = self.inputs.centred, self.outputs.targets
        weight = self.norm.prox(self.weight_shadow, 1 / self.weight_penalty)
        cross, total = torch.zeros_like(weight), torch.zeros_like(targets[0])
        for rows in self._blocks:
            reflected = self._reflected(rows)
            cross.addmm_(reflected.T, centred[rows])
            total += reflected.sum(dim=0)
        bias = total / len(targets) if self.free_bias else torch.zeros_like(total)
        ratio = self.output_penalty / self.weight_penalty
        ridge = self.inputs.solve_ridge(2 * weight - self.weight_shadow, cross, ratio)

        # shadow += relaxation * (fitted - Z), where Z = (reflected + shadow) / 2.
        square = 0.0
        for rows in reversed(self._blocks):
            if rows is not self._blocks[-1]:  # whose reflection is at hand
                reflected = self._reflected(rows)
            fitted = torch.addmm(bias, centred[rows], ridge.T)
            shadow = self.output_shadow[rows]
            shadow.mul_(1 - _OVER_RELAXATION / 2)
            shadow.add_(fitted, alpha=_OVER_RELAXATION)
            shadow.sub_(reflected, alpha=_OVER_RELAXATION / 2)
            torch.mul(reflected.sub_(fitted), self.output_penalty, out=self.dual[rows])
            square += self.outputs.bounded_square(shadow, rows)
        self._keep = self.outputs.kept_share(square)
        self.weight_shadow.add_(ridge.sub_(weight), alpha=_OVER_RELAXATION)
        self._weight, self._bias = weight, bias

    def answer(self) -> tuple[Tensor, Tensor]:
        """The norm-side weight of the latest step, and its bias."""
        weight = self.inputs.from_loop(self._weight)
        return weight, self._bias - self._weight @ self.inputs.mean

    def _kept_share(self) -> Tensor:
        """What the projection of the output shadow leaves of its deviation."""
        squares = [self.outputs.bounded_square(self.output_shadow[r], r) for r in self._blocks]
        return self.outputs.kept_share(sum(squares))

    def _reflected(self, rows: slice) -> Tensor:
        """Twice the projection of the output shadow, minus the shadow."""
        shadow = self.output_shadow[rows]
        return shadow.sub(self.outputs.displacement(shadow, self._keep, rows), alpha=2)

    def _least_squares(self) -> tuple[Tensor, Tensor]:
        """A ridge regression on the targets, light enough to leave all but the smallest directions.

        Its weight, and its bias for centred inputs.
        """
        centred, targets = self.inputs.centred, self.outputs.targets
        values, _ = self.inputs.eigen
        penalty = 1e3 / values[-1].item() if len(values) else 1.0
        zero = targets.new_zeros(targets.shape[1], centred.shape[1])
        weight = self.inputs.solve_ridge(zero, targets.T @ centred, penalty)
        mean = targets.mean(dim=0)
        return weight, mean if self.free_bias else torch.zeros_like(mean)

    def rebalance(self, iteration: int, proof: Certificate | None, tolerance: float) -> None:
        """Move the penalties to where they serve.

        For the first `_LAST_FOLLOWED` iterations the output penalty follows the dual variable, a
        bounded step at a time. At checks that fall on a multiple of `_ITERATIONS_A_REBALANCE` it
        goes up if feasibility is what is missing and down if the gap is, and the weight penalty is
        set anew if the weight has outgrown it. All of it ends at `_LAST_REBALANCE`, since
        convergence is proven for constant penalties.
        """
        if proof is not None:
            self._afford_margin(proof.sensitivity, tolerance)
        if iteration > _LAST_REBALANCE:
            return
        factor = 1.0
        if proof is not None and iteration % _ITERATIONS_A_REBALANCE == 0:
            factor = _balance_factor(
                _infeasibility(proof, tolerance),
                proof.relative_gap / tolerance,
            )
            self.balance *= factor
            self._follow_weight()
        if iteration <= _LAST_FOLLOWED:
            square = 0.0
            for rows in self._blocks:
                displaced = self.outputs.displacement(self.output_shadow[rows], self._keep, rows)
                square += displaced.square_().sum()
            wanted = self._wanted_penalty(self.output_penalty * square.sqrt().item())
            factor = min(max(wanted / self.output_penalty, 1 / _LARGEST_STEP), _LARGEST_STEP)
        if not 2 / 3 < factor < 3 / 2:
            for rows in self._blocks:
                shadow = self.output_shadow[rows]
                displaced = self.outputs.displacement(shadow, self._keep, rows)
                shadow.sub_(displaced, alpha=1 - 1 / factor)
            self._keep = self._kept_share()
            self.output_penalty *= factor

    def _afford_margin(self, sensitivity: float, tolerance: float) -> None:
        """Keep what the margin inside the radius costs below a share of the tolerance."""
        affordable = _MARGIN_SHARE * tolerance / sensitivity if sensitivity else math.inf
        if self.margin > affordable:
            self.margin = affordable
            self.outputs = replace(self.outputs, radius=self.radius * (1 - affordable))
            self._keep = self._kept_share()

    def _follow_weight(self) -> None:
        """Set the weight penalty anew if it is far from what the present weight wants."""
        wanted = self._wanted_weight_penalty(self._weight)
        factor = wanted / self.weight_penalty
        if not 1 / _LARGEST_STEP < factor < _LARGEST_STEP:
            self.weight_shadow = torch.lerp(self._weight, self.weight_shadow, 1 / factor)
            self.weight_penalty = wanted

    def _wanted_weight_penalty(self, weight: Tensor) -> float:
        """The threshold is a fixed multiple of the mean nonzero term of the weight's norm."""
        size = self.norm.value(weight)
        return self.norm.terms(weight) / (_RELATIVE_THRESHOLD * size) if size else 1.0

    def _wanted_penalty(self, dual_norm: float) -> float:
        """Output penalty for which the shadow lies well outside the set, yet not too far.

        The multiplier is penalty times (Z - shadow), so the penalty fixes how far outside: here
        the geometric mean of radius and ||Y||_F, divided by `balance`.
        """
        targets_norm = torch.linalg.vector_norm(self.outputs.targets).item()
        radius = max(self.outputs.radius, 1e-3 * targets_norm)
        return self.balance * dual_norm / math.sqrt(radius * targets_norm)


def _infeasibility(proof: Certificate, tolerance: float) -> float:
    """Violations, and what they may have bought, relative to where the loop ends."""
    exceeded = proof.violation / violation_limit(tolerance) + (proof.violation > 0)
    bought = proof.shortfall / (SHORTFALL_SHARE * tolerance)
    return max(exceeded, proof.sign_violation / tolerance, bought)


def _balance_factor(infeasibility: float, suboptimality: float) -> float:
    """2 if feasibility is what is missing, 1/2 if the gap is, else 1.

    Both are relative to what is asked for.
    """
    if suboptimality > 4 * infeasibility:
        return 0.5
    return 2.0 if infeasibility > 4 * suboptimality else 1.0


def check_problem(inputs: Tensor, targets: Tensor, tolerance: float, max_iterations: int) -> None:
    """Raise a ValueError that names the argument and value which makes no layer problem."""
    for name, value in (("inputs", inputs), ("targets", targets)):
        if value.ndim != 2 or 0 in value.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; it must be (samples, features), not empty"
            )
        if not value.dtype.is_floating_point:
            raise ValueError(f"{name} is of {value.dtype}; it must be of a floating-point dtype")
        if not value.isfinite().all():
            raise ValueError(f"{name} has {(~value.isfinite()).sum()} values that are not finite")
    if len(inputs) != len(targets):
        raise ValueError(f"inputs has {len(inputs)} samples, targets has {len(targets)}")
    if not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance}; it must be positive")
    if max_iterations < 1:
        raise ValueError(f"max_iterations is {max_iterations}; it must be at least 1")


def check_warm_start(start: WarmStart | SolverResult, inputs: Tensor, targets: Tensor) -> None:
    wanted = {
        "weight": (targets.shape[1], inputs.shape[1]),
        "bias": (targets.shape[1],),
        "dual": tuple(targets.shape),
    }
    for name, shape in wanted.items():
        value = getattr(start, name)
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(
                f"warm_start.{name} has shape {tuple(value.shape)}; it must be {shape}"
            )
