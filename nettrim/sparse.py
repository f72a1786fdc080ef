"""Net-Trim's layer problem: the lowest l1 norm that reproduces a layer within a bound."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from ddlr.constraints import OutputSet
from ddlr.inputs import CentredInputs, UncentredInputs
from ddlr.problem import WarmStart, minimise_norm
from ddlr.proximal import L1
from ddlr.reduced_rank import RIDGE, check_ridge
from ddlr.result import ConvergenceError, SolverResult

_CHECK_INTERVAL = 10
_NEWTON_STEPS = 3
_TINY = 1e-30


def solve_sparse(
    inputs: Tensor | CentredInputs,
    targets: Tensor,
    radius: float,
    *,
    activation: str = "relu",
    constraint: str = "nettrim",
    tolerance: float = 1e-2,
    max_iterations: int = 5000,
    warm_start: WarmStart | SolverResult | None = None,
    penalise_bias: bool = False,
) -> SolverResult:
    """Find the sparsest-in-l1 weight that reproduces a layer within a bound.

        minimise sum |W|   subject to   X Wt + 1 bt in C(targets, radius),   b free

    The sum of magnitudes stands in for the number of nonzeros. An iteration costs
    4 samples * in_features * out_features flops.

    Parameters, return value and errors are those of `ddlr.solve_low_rank`. Beside them:

    Parameters
    ----------
    penalise_bias : bool
        Whether the bias is a column of W for an input of ones, as in Net-Trim's own code, and its
        magnitudes count in the objective.

    References
    ----------
    Aghasi, Abdi, Nguyen and Romberg (2017), Net-Trim, NIPS; Aghasi, Abdi and Romberg (2020),
    arXiv 1806.06457. Their bias is penalised with the weights; here it is free by default.
    """
    outputs = OutputSet(targets, radius, activation, constraint)
    limits = {"tolerance": tolerance, "max_iterations": max_iterations}
    if not penalise_bias:
        return minimise_norm(L1, outputs, inputs, warm_start=warm_start, **limits)
    inputs = CentredInputs.of(inputs).inputs
    with_ones = UncentredInputs(torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1))
    if warm_start is not None:
        joined = torch.cat([warm_start.weight, warm_start.bias[:, None]], dim=1)
        zero = torch.zeros_like(warm_start.bias)
        warm_start = WarmStart(joined, zero, warm_start.dual)
    try:
        return _split_bias(minimise_norm(L1, outputs, with_ones, warm_start=warm_start, **limits))
    except ConvergenceError as error:
        raise ConvergenceError(str(error), _split_bias(error.result)) from error


def _split_bias(solved: SolverResult) -> SolverResult:
    """The result with the weight's last column, that of the input of ones, as its bias."""
    return replace(solved, weight=solved.weight[:, :-1], bias=solved.weight[:, -1])


@torch.no_grad()
def refit_sparse(
    inputs: Tensor | CentredInputs,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    activation: str = "relu",
    ridge: float = RIDGE,
    tolerance: float = 3e-3,
    max_iterations: int = 200,
) -> tuple[Tensor, Tensor]:
    """Move a sparse weight to a smaller output error, on the same support.

        minimise ||D||_F^2 + ridge * ||W - W0||_F^2   over W = 0 where W0 = 0, and b

    This is the counterpart of `ddlr.refit_low_rank`, with the same loss and the same ridge. Each
    row is a separate convex problem; all are solved at once by preconditioned conjugate gradients
    (Polak-Ribiere) with an exact line search per row. An iteration costs the two products X Wt and
    Dt X. No row's loss ever rises.

    Parameters, return value and errors are those of `ddlr.refit_low_rank`, without a rank. The
    support is that of `weight`.
    """
    ridge = check_ridge(ridge)
    inputs = CentredInputs.of(inputs)
    centred, outputs = inputs.centred, OutputSet(targets, 0.0, activation, "hinge")
    support = weight != 0
    variances = centred.square().sum(dim=0)
    penalty = ridge * variances.mean()
    curvature = variances + penalty
    fit, shift = weight.clone(), bias + weight @ inputs.mean
    outcome = torch.addmm(shift, centred, fit.T)

    direction = shift_direction = previous_slopes = None
    previous_loss = math.inf
    for iteration in range(max_iterations):
        deviation = outputs.deviation(outcome)
        if iteration % _CHECK_INTERVAL == 0:
            loss = deviation.square().sum() + penalty * (fit - weight).square().sum()
            if previous_loss - loss <= tolerance * loss:
                break
            previous_loss = loss
        slope = (deviation.T @ centred).add_(fit - weight, alpha=penalty.item()).mul_(support)
        shift_slope = deviation.sum(dim=0)
        step, shift_step = slope / curvature, shift_slope / len(targets)
        size = (slope * step).sum(dim=1) + shift_slope * shift_step
        if direction is None:
            direction, shift_direction = -step, -shift_step
        else:
            old_slope, old_shift_slope, old_size = previous_slopes
            gained = size - (old_slope * step).sum(dim=1) - old_shift_slope * shift_step
            beta = (gained / old_size.clamp_min(_TINY)).clamp_min_(0)
            direction = direction.mul_(beta[:, None]).sub_(step)
            shift_direction = shift_direction.mul_(beta).sub_(shift_step)
        previous_slopes = slope, shift_slope, size
        change = torch.addmm(shift_direction, centred, direction.T)
        length = _line_search(
            outputs,
            outcome,
            change,
            penalty * ((fit - weight) * direction).sum(dim=1),
            penalty * direction.square().sum(dim=1),
        )
        fit.addcmul_(direction, length[:, None])
        shift = torch.addcmul(shift, shift_direction, length)
        outcome.addcmul_(change, length)
    return fit, shift - fit @ inputs.mean


def _line_search(
    outputs: OutputSet, outcome: Tensor, change: Tensor, slope: Tensor, curvature: Tensor
) -> Tensor:
    """How far to go along `change`, for each output by itself, shape (out_features,).

    Newton's method on the piecewise quadratic loss along the line, to which `slope` and
    `curvature` add the ridge's part; steps that do not lower the loss are not taken.
    """

    def loss(length: Tensor) -> Tensor:
        deviation = outputs.deviation(torch.addcmul(outcome, change, length))
        return deviation.square_().sum(dim=0) + 2 * slope * length + curvature * length.square()

    length = torch.zeros_like(slope)
    for _ in range(_NEWTON_STEPS):
        deviation = outputs.deviation(torch.addcmul(outcome, change, length))
        first = (deviation * change).sum(dim=0) + slope + curvature * length
        second = change.square().mul_(_counted(outputs, deviation)).sum(dim=0) + curvature
        length = length - first / second.clamp_min(_TINY)
    return torch.where(loss(length) < loss(torch.zeros_like(length)), length, 0)


def _counted(outputs: OutputSet, deviation: Tensor) -> Tensor:
    """1 where the deviation follows the output (on Omega, and off it where positive), else 0."""
    if outputs.activation == "none":
        return torch.ones_like(deviation)
    return ((outputs.targets > 0) | (deviation > 0)).to(deviation.dtype)
