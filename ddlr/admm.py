"""The one splitting loop, for any norm and either output set."""

import math
import time
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ddlr.certificate import Certificate, certify, measure_violations, violation_limit
from ddlr.constraints import OutputSet
from ddlr.proximal import Norm
from ddlr.result import ConvergenceError, SolverResult, SolverStatus

_OVER_RELAXATION = 1.8
_ITERATIONS_A_CHECK = 10
# A gap this many times the tolerance is not closed within one interval between checks.
_FAR = 3
# The penalties: see `_Splitting.rebalance`, `_wanted_penalty` and `_wanted_weight_penalty`. Of a
# dozen settings tried over 28 layer problems of MNIST networks, those near these numbers needed
# the fewest iterations.
_ITERATIONS_A_REBALANCE = 50
_LAST_FOLLOWED = 100
_LAST_REBALANCE = 1000
_LARGEST_STEP = 4
_BALANCE = 0.8
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
    the mean of the residual.
    """

    inputs: Tensor

    @cached_property
    def mean(self) -> Tensor:
        return self.inputs.mean(dim=0)

    @cached_property
    def centred(self) -> Tensor:
        return self.inputs - self.mean

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues above rounding, ascending, and eigenvectors as columns, of Xc^T Xc.

        Decomposed in float64 on the smaller side of Xc.
        """
        samples, features = self.centred.shape
        tall = samples >= features
        centred = self.centred.double()
        gram = centred.T @ centred if tall else centred @ centred.T
        values, vectors = torch.linalg.eigh(gram)
        kept = values > max(samples, features) * torch.finfo(values.dtype).eps * values[-1]
        values, vectors = values[kept], vectors[:, kept]
        if not tall:
            vectors = (centred.T @ vectors) / values.sqrt()
        return values.to(self.inputs.dtype), vectors.to(self.inputs.dtype)

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

    by Douglas-Rachford splitting (the alternating direction method of multipliers, over-relaxed):
    W = S, A = Z with S taken by the proximal operator of the norm, Z by projection on the output
    set, and (W, A) by a ridge regression that couples them, X centred. An iteration costs the two
    products X Wt and Rt X, 4 N M P flops, and what the proximal operator needs; the eigenvectors
    of Xt X are computed once.

    Every `_ITERATIONS_A_CHECK` iterations, or twice that while the gap is wide, S is certified with
    the multiplier V of the ridge step as its dual variable. The loop ends when the certificate is
    within the tolerance, in the inputs' precision and again in float64.

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
        _check_warm_start(warm_start, inputs, outputs.targets)

    problem = (inputs, outputs.targets, outputs.radius)
    options = {"activation": outputs.activation, "constraint": outputs.constraint}

    def prove(weight: Tensor, bias: Tensor, dual: Tensor, dtype: torch.dtype) -> Certificate:
        return certify(weight, bias, dual, *problem, norm=norm, **options, dtype=dtype)

    def finish(weight: Tensor, bias: Tensor, proof: Certificate, iterations: int) -> SolverResult:
        met = proof.within(tolerance)
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
        )

    constant = outputs.best_constant_output()
    if outputs.violation(constant.expand_as(outputs.targets)) == 0:
        zero = inputs.new_zeros(outputs.targets.shape[1], inputs.shape[1])
        proof = prove(zero, constant, torch.zeros_like(outputs.targets), torch.float64)
        return finish(zero, constant, proof, iterations=0)

    loop = _Splitting(norm, outputs, geometry, warm_start)
    feasible, next_check = False, _ITERATIONS_A_CHECK
    for iteration in range(1, max_iterations + 1):
        weight, bias = loop.step()
        last = iteration == max_iterations
        if not last and iteration < next_check:
            continue
        next_check += _ITERATIONS_A_CHECK
        if not feasible:
            # The cheaper half of the certificate first: it fails for the first half of the way.
            _, missed = measure_violations(weight, bias, *problem, **options, dtype=inputs.dtype)
            feasible = missed <= violation_limit(tolerance)
        proof = None
        if last or feasible or iteration % _ITERATIONS_A_REBALANCE == 0:
            proof = prove(weight, bias, loop.dual(), inputs.dtype)
            if last or proof.within(tolerance):
                proof = prove(weight, bias, loop.dual(), torch.float64)
                if last or proof.within(tolerance):
                    break
            if abs(proof.relative_gap) > _FAR * tolerance:
                next_check += _ITERATIONS_A_CHECK
        loop.rebalance(iteration, proof, tolerance)
    result = finish(weight, bias, proof, iteration)
    if result.status is not SolverStatus.CONVERGED:
        raise ConvergenceError(
            f"{result.status.message}: after {iteration} iterations the relative gap is "
            f"{result.relative_gap:.1e} and the violation {proof.constraint_violation:.1e}, "
            f"for a tolerance of {tolerance:g}; raise max_iterations or tolerance",
            result,
        )
    return result


class _Splitting:
    """The state of the loop: the shadows of weight and output, and the two penalties.

    The shadow of a variable is what its proximal step is applied to. Shadow minus variable, times
    the penalty, is the multiplier, so a penalty changes by moving the shadow along that difference.
    """

    def __init__(
        self,
        norm: Norm,
        outputs: OutputSet,
        inputs: CentredInputs,
        warm_start: WarmStart | SolverResult | None,
    ):
        self.norm, self.outputs, self.inputs = norm, outputs, inputs
        # A zero weight says nothing about the scale of the solution.
        if warm_start is None or not warm_start.weight.any():
            warm_start = _least_squares(inputs, outputs.targets)
        weight = warm_start.weight.to(inputs.inputs)
        bias = warm_start.bias.to(weight) + weight @ inputs.mean
        size = norm.value(weight)
        self.weight_penalty = self._wanted_weight_penalty(weight)
        self.balance = _BALANCE
        targets_norm = torch.linalg.vector_norm(outputs.targets).item()
        self.output_penalty = self._wanted_penalty(size / targets_norm) or self.weight_penalty
        self.weight_shadow = weight.clone()
        self.output_shadow = torch.addmm(bias, inputs.centred, weight.T)
        if warm_start.dual is not None and warm_start.dual.any():
            dual = warm_start.dual.to(weight)
            self.output_penalty = self._wanted_penalty(torch.linalg.vector_norm(dual).item())
            self.output_shadow.sub_(dual, alpha=1 / self.output_penalty)
            self.weight_shadow.add_(dual.T @ inputs.centred, alpha=1 / self.weight_penalty)

    def step(self) -> tuple[Tensor, Tensor]:
        """One iteration, updating the shadows; returns the norm-side weight and its bias."""
        self._residual = None  # frees the largest temporary before others are made
        weight = self.norm.prox(self.weight_shadow, 1 / self.weight_penalty)
        reflected = self.outputs.project(self.output_shadow).mul_(2).sub_(self.output_shadow)
        centred, ratio = self.inputs.centred, self.output_penalty / self.weight_penalty
        bias = reflected.mean(dim=0)
        cross = reflected.T @ centred
        ridge = self.inputs.solve_ridge(2 * weight - self.weight_shadow, cross, ratio)
        fitted = torch.addmm(bias, centred, ridge.T)

        # shadow += relaxation * (fitted - Z), where Z = (reflected + shadow) / 2.
        self.output_shadow.mul_(1 - _OVER_RELAXATION / 2)
        self.output_shadow.add_(fitted, alpha=_OVER_RELAXATION)
        self.output_shadow.sub_(reflected, alpha=_OVER_RELAXATION / 2)
        self.weight_shadow.add_(ridge - weight, alpha=_OVER_RELAXATION)
        self._residual = reflected.sub_(fitted)
        self._weight = weight
        return weight, bias - weight @ self.inputs.mean

    def dual(self) -> Tensor:
        """The multiplier of the latest ridge step: its columns sum to zero by construction."""
        return self.output_penalty * self._residual

    def rebalance(self, iteration: int, proof: Certificate | None, tolerance: float) -> None:
        """Move the penalties to where they serve.

        For the first `_LAST_FOLLOWED` iterations the output penalty follows the dual variable, a
        bounded step at a time. At checks that fall on a multiple of `_ITERATIONS_A_REBALANCE` it
        goes up if feasibility is what is missing and down if the gap is, and the weight penalty is
        set anew if the weight has outgrown it. All of it ends at `_LAST_REBALANCE`, since
        convergence is proven for constant penalties.
        """
        if iteration > _LAST_REBALANCE:
            return
        factor = 1.0
        if proof is not None and iteration % _ITERATIONS_A_REBALANCE == 0:
            factor = _balance_factor(
                proof.constraint_violation / violation_limit(tolerance),
                proof.relative_gap / tolerance,
            )
            self.balance *= factor
            self._follow_weight()
        projected = self.outputs.project(self.output_shadow)
        if iteration <= _LAST_FOLLOWED:
            size = torch.linalg.vector_norm(projected - self.output_shadow).item()
            wanted = self._wanted_penalty(self.output_penalty * size)
            factor = min(max(wanted / self.output_penalty, 1 / _LARGEST_STEP), _LARGEST_STEP)
        if not 2 / 3 < factor < 3 / 2:
            self.output_shadow = projected.lerp_(self.output_shadow, 1 / factor)
            self.output_penalty *= factor

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


def _balance_factor(infeasibility: float, suboptimality: float) -> float:
    """2 if feasibility is what is missing, 1/2 if the gap is, else 1.

    Both are relative to what is asked for. An objective below the bound is bought by a deviation,
    so it asks for less of that.
    """
    infeasibility = max(infeasibility, -suboptimality)
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


def _check_warm_start(start: WarmStart | SolverResult, inputs: Tensor, targets: Tensor) -> None:
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


def _least_squares(inputs: CentredInputs, targets: Tensor) -> WarmStart:
    """A ridge regression on the targets, light enough to leave all but the smallest directions."""
    values, _ = inputs.eigen
    penalty = 1e3 / values[-1].item() if len(values) else 1.0
    zero = targets.new_zeros(targets.shape[1], inputs.centred.shape[1])
    weight = inputs.solve_ridge(zero, targets.T @ inputs.centred, penalty)
    return WarmStart(weight, targets.mean(dim=0) - weight @ inputs.mean)
