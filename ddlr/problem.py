"""The convex problem of a layer: its start, its checks, and the solver around the splitting."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ddlr.admm import REBALANCE_INTERVAL, Splitting
from ddlr.certificate import Certificate, certify, is_feasible, measure_violations
from ddlr.constraints import OutputSet
from ddlr.inputs import CentredInputs
from ddlr.proximal import Norm
from ddlr.result import ConvergenceError, SolverResult, SolverStatus

_CHECK_INTERVAL = 10
# A gap this many times the tolerance is not closed within one interval between checks.
_WIDE_GAP = 3


@dataclass(frozen=True)
class WarmStart:
    """Where a solve begins. A `SolverResult` can stand in its place.

    Attributes
    ----------
    weight : Tensor, shape (out_features, in_features)
        For a norm of several parts, these side by side.
    bias : Tensor, shape (out_features,)
    dual : Tensor, shape (samples, out_features), optional
        The dual variable of the output constraint.
    """

    weight: Tensor
    bias: Tensor
    dual: Tensor | None = None


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
    multipliers, over-relaxed), see `ddlr.admm.Splitting`. The weight of every tenth iteration, or
    every twentieth while the gap is wide, is certified with the multiplier of the ridge step as
    its dual variable. The loop ends when the certificate is within the tolerance, in the inputs'
    precision and again in float64. The eigenvectors of Xt X are computed once.

    Parameters
    ----------
    norm : Norm
    outputs : OutputSet
        With targets of shape (samples, out_features).
    inputs : Tensor, shape (samples, in_features), or CentredInputs
    tolerance : float
        Bound on |relative_gap|. The violation is held to min(1e-3, tolerance).
    max_iterations : int
    warm_start : WarmStart or SolverResult, optional
        One that is a solution already is proven to be one, without an iteration.

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
    inputs = CentredInputs.of(inputs)
    check_problem(inputs.inputs, outputs.targets, tolerance, max_iterations)
    if warm_start is not None:
        check_warm_start(warm_start, inputs.inputs, outputs.targets, norm.parts)
    program = _Program(norm, outputs, inputs, tolerance)
    trivial = _zero_weight(program) or _proven_start(program, warm_start)
    if trivial is not None:
        return _result(program, trivial, started)
    start = None
    if warm_start is not None:
        start = warm_start.weight, warm_start.bias, warm_start.dual
    splitting = Splitting(norm, outputs, inputs, start, tolerance)
    dtype = inputs.inputs.dtype
    feasible, next_check = False, _CHECK_INTERVAL
    for iteration in range(1, max_iterations + 1):
        splitting.step()
        last = iteration == max_iterations
        if not last and iteration < next_check:
            continue
        next_check += _CHECK_INTERVAL
        weight, bias = splitting.answer()
        certificate = None
        # The cheaper half of the certificate first: it fails for the first half of the way.
        feasible = feasible or program.is_feasible(weight, bias)
        if last or feasible or iteration % REBALANCE_INTERVAL == 0:
            certificate = program.certify(weight, bias, splitting.dual, dtype)
            if last or program.is_solved(certificate):
                certificate = None  # frees its dual variable
                certificate = program.certify(weight, bias, splitting.dual)
                if last or program.is_solved(certificate):
                    break
            if certificate.relative_gap > _WIDE_GAP * tolerance:
                next_check += _CHECK_INTERVAL
        splitting.rebalance(iteration, certificate)
    return _result(program, _Answer(weight, bias, certificate, iteration), started)


@dataclass(frozen=True)
class _Program:
    """A layer problem with its tolerance, and what tells whether a weight solves it."""

    norm: Norm
    outputs: OutputSet
    inputs: CentredInputs
    tolerance: float

    def certify(
        self, weight: Tensor, bias: Tensor, dual: Tensor, dtype: torch.dtype = torch.float64
    ) -> Certificate:
        return certify(
            weight,
            bias,
            dual,
            self.inputs.inputs,
            self.outputs.targets,
            self.outputs.radius,
            norm=self.norm,
            activation=self.outputs.activation,
            constraint=self.outputs.constraint,
            free_bias=self.inputs.free_bias,
            dtype=dtype,
        )

    def is_feasible(self, weight: Tensor, bias: Tensor) -> bool:
        """Whether violations do not stand against the weight: the cheaper half of `certify`."""
        violation, sign_violation = measure_violations(
            self.norm.weight_of(weight),
            bias,
            self.inputs.inputs,
            self.outputs.targets,
            self.outputs.radius,
            self.outputs.activation,
            self.outputs.constraint,
            dtype=self.inputs.inputs.dtype,
        )
        return self._keeps_radius(violation) and is_feasible(
            violation, sign_violation, self.tolerance
        )

    def is_solved(self, certificate: Certificate) -> bool:
        return self._keeps_radius(certificate.violation) and certificate.within(self.tolerance)

    def _keeps_radius(self, violation: float) -> bool:
        return violation == 0 or self.outputs.radius == 0  # no iterate keeps a radius of 0


@dataclass(frozen=True)
class _Answer:
    """A weight and bias with their certificate in float64, and the iterations that led to them."""

    weight: Tensor
    bias: Tensor
    certificate: Certificate
    iterations: int


def _zero_weight(program: _Program) -> _Answer | None:
    """The weight of zeros, if a bias alone is in the output set."""
    outputs, inputs = program.outputs, program.inputs
    bias = outputs.best_constant_output()
    if not inputs.free_bias:
        bias = torch.zeros_like(bias)
    if outputs.violation(bias.expand_as(outputs.targets)) != 0:
        return None
    columns = program.norm.parts * inputs.inputs.shape[1]
    weight = inputs.inputs.new_zeros(outputs.targets.shape[1], columns)
    certificate = program.certify(weight, bias, torch.zeros_like(outputs.targets))
    return _Answer(weight, bias, certificate, iterations=0)


def _proven_start(program: _Program, warm_start: WarmStart | SolverResult | None) -> _Answer | None:
    """The start itself, if its dual variable proves that it is a solution."""
    if warm_start is None or warm_start.dual is None or not warm_start.dual.numel():
        return None
    weight, bias, dual = (
        value.detach().to(program.inputs.inputs)
        for value in (warm_start.weight, warm_start.bias, warm_start.dual)
    )
    certificate = program.certify(weight, bias, dual)
    if not program.is_solved(certificate):
        return None
    return _Answer(weight, bias, certificate, iterations=0)


def _result(program: _Program, answer: _Answer, started: float) -> SolverResult:
    """The answer as a result; an error where iterations ended before it solves the program."""
    certificate = answer.certificate
    solved = program.is_solved(certificate)
    result = SolverResult(
        weight=answer.weight,
        bias=answer.bias,
        status=SolverStatus.CONVERGED if solved else SolverStatus.ITERATION_LIMIT,
        iterations=answer.iterations,
        objective=certificate.objective,
        lower_bound=certificate.lower_bound,
        relative_gap=certificate.relative_gap,
        violation=certificate.violation,
        dual=certificate.dual,
        seconds=time.perf_counter() - started,
        shortfall=certificate.shortfall,
    )
    if result.iterations and not solved:
        raise ConvergenceError(
            f"{result.status.message}: after {result.iterations} iterations the relative gap is "
            f"{result.relative_gap:.1e}, the violation {result.violation:.1e} (of signs "
            f"{certificate.sign_violation:.1e}) and the shortfall {result.shortfall:.1e}, for a "
            f"tolerance of {program.tolerance:g}; raise max_iterations or tolerance",
            result,
        )
    return result


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


def check_warm_start(
    start: WarmStart | SolverResult, inputs: Tensor, targets: Tensor, parts: int = 1
) -> None:
    """Raise a ValueError that names the part of a start whose shape does not fit the problem."""
    shapes = {
        "weight": (targets.shape[1], parts * inputs.shape[1]),
        "bias": (targets.shape[1],),
        "dual": tuple(targets.shape),
    }
    for name, shape in shapes.items():
        value = getattr(start, name)
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(
                f"warm_start.{name} has shape {tuple(value.shape)}; it must be {shape}"
            )
