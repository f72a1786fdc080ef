"""The one splitting loop, for any norm and either output set."""

import math
import time
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ddlr.certificate import VIOLATION_LIMIT, Certificate, certify
from ddlr.constraints import OutputSet
from ddlr.proximal import Norm
from ddlr.result import ConvergenceError, SolverResult, SolverStatus

_OVER_RELAXATION = 1.7
_ITERATIONS_A_CHECK = 10
_ITERATIONS_A_REBALANCE = 50
_LAST_REBALANCE = 1000
_BALANCE = 0.4
# Of the mean shrunk term of the starting weight. The loop is not sensitive to it.
_RELATIVE_THRESHOLD = 0.5


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


def minimise_norm(
    norm: Norm,
    outputs: OutputSet,
    inputs: Tensor,
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

    Every `_ITERATIONS_A_CHECK` iterations S is certified with the multiplier V of the ridge step
    as its dual variable. The loop ends when the certificate is within the tolerance, in the
    inputs' precision and again in float64. The penalty of the output block follows V, see
    `_output_penalty`.

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
    check_problem(inputs, outputs.targets, tolerance, max_iterations)
    if warm_start is not None:
        _check_warm_start(warm_start, inputs, outputs.targets)

    def certificate(weight: Tensor, bias: Tensor, dual: Tensor, dtype: torch.dtype) -> Certificate:
        return certify(
            weight,
            bias,
            dual,
            inputs,
            outputs.targets,
            outputs.radius,
            norm=norm,
            activation=outputs.activation,
            constraint=outputs.constraint,
            dtype=dtype,
        )

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
            dual=proof.dual.to(inputs.dtype),
            seconds=time.perf_counter() - started,
        )

    constant = outputs.best_constant_output()
    if outputs.violation(constant.expand_as(outputs.targets)) == 0:
        zero = inputs.new_zeros(outputs.targets.shape[1], inputs.shape[1])
        proof = certificate(zero, constant, torch.zeros_like(outputs.targets), torch.float64)
        return finish(zero, constant, proof, iterations=0)

    loop = _Splitting(norm, outputs, CentredInputs(inputs), warm_start)
    for iteration in range(1, max_iterations + 1):
        step = loop.step()
        last = iteration == max_iterations
        if not last and iteration % _ITERATIONS_A_CHECK:
            continue
        proof = certificate(*step, inputs.dtype)
        if last or proof.within(tolerance):
            proof = certificate(*step, torch.float64)
            if last or proof.within(tolerance):
                break
        loop.rebalance(iteration, proof, tolerance)
    result = finish(step.weight, step.bias, proof, iteration)
    if result.status is not SolverStatus.CONVERGED:
        raise ConvergenceError(
            f"{result.status.message}: after {iteration} iterations the relative gap is "
            f"{result.relative_gap:.1e} and the violation {proof.constraint_violation:.1e}, "
            f"for a tolerance of {tolerance:g}; raise max_iterations or tolerance",
            result,
        )
    return result


class _Step(NamedTuple):
    """What one iteration offers to be certified."""

    weight: Tensor
    bias: Tensor
    dual: Tensor


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
        if warm_start is None:
            warm_start = _least_squares(inputs, outputs.targets)
        weight = warm_start.weight.to(inputs.inputs)
        bias = warm_start.bias.to(weight) + weight @ inputs.mean
        size = norm.value(weight)
        self.weight_penalty = norm.terms(weight) / (_RELATIVE_THRESHOLD * size) if size else 1.0
        self.balance = _BALANCE
        targets_norm = torch.linalg.vector_norm(outputs.targets).item()
        self.output_penalty = self._wanted_penalty(size / targets_norm)
        self.weight_shadow = weight.clone()
        self.output_shadow = torch.addmm(bias, inputs.centred, weight.T)
        if warm_start.dual is not None:
            dual = warm_start.dual.to(weight)
            self.output_penalty = self._wanted_penalty(torch.linalg.vector_norm(dual).item())
            self.output_shadow.sub_(dual, alpha=1 / self.output_penalty)
            self.weight_shadow.add_(dual.T @ inputs.centred, alpha=1 / self.weight_penalty)

    def step(self) -> "_Step":
        """One iteration, updating the shadows."""
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
        dual = reflected.sub_(fitted).mul_(self.output_penalty)
        return _Step(weight, bias - weight @ self.inputs.mean, dual)

    def rebalance(self, iteration: int, proof: Certificate, tolerance: float) -> None:
        """Move the output penalty to where the size of the dual variable wants it.

        Now and then also the aim itself: up if feasibility is what is missing, down if the gap is.
        Changes end at `_LAST_REBALANCE`, since convergence is proven for constant penalties.
        """
        if iteration > _LAST_REBALANCE:
            return
        if iteration % _ITERATIONS_A_REBALANCE == 0:
            # An objective below the bound is bought by a deviation, so it asks for less of that.
            infeasibility = max(
                proof.constraint_violation / min(VIOLATION_LIMIT, tolerance),
                -proof.relative_gap / tolerance,
            )
            suboptimality = proof.relative_gap / tolerance
            if infeasibility > 4 * suboptimality:
                self.balance *= 2
            elif suboptimality > 4 * infeasibility:
                self.balance /= 2
        projected = self.outputs.project(self.output_shadow)
        size = torch.linalg.vector_norm(projected - self.output_shadow).item()
        wanted = self._wanted_penalty(self.output_penalty * size)
        if size and not 2 / 3 < wanted / self.output_penalty < 3 / 2:
            self.output_shadow = projected.lerp_(self.output_shadow, self.output_penalty / wanted)
            self.output_penalty = wanted

    def _wanted_penalty(self, dual_norm: float) -> float:
        """Output penalty for which the shadow lies well outside the set, yet not too far.

        The multiplier is penalty times (Z - shadow), so the penalty fixes how far outside. A
        distance of the geometric mean of radius and ||Y||_F, times a factor of 2.5, was best or
        near it over layers, tolerances 0.03 to 0.3, norms and sets.
        """
        targets_norm = torch.linalg.vector_norm(self.outputs.targets).item()
        radius = max(self.outputs.radius, 1e-3 * targets_norm)
        return self.balance * dual_norm / math.sqrt(radius * targets_norm)


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
