"""The refit that rivals of two parts have in common, at the structure that they have."""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ddlr.constraints import OutputSet
from ddlr.method import LayerProblem
from ddlr.problem import WarmStart
from ddlr.quadratic import OutputQuadratic
from ddlr.result import SolverResult
from nettrim.budgets import Fitted

_REFIT_STEPS = 100
_REFIT_TOLERANCE = 1e-3  # of the loss, in ten steps


def refit_parts(
    problem: LayerProblem,
    solved: SolverResult,
    improve: Callable[[OutputQuadratic, Fitted], Fitted],
    *,
    ridge: float,
) -> tuple[Tensor, Tensor, object]:
    """Move the parts of a weight to a smaller output error, at their structure.

        minimise ||D||_F^2 + ridge * ||W - W0||_F^2   over the parts of W, and b

    The loss is majorised at the current outputs A by the squared distance to the outputs nearest to
    them that reproduce the targets, A - D, which is a quadratic of W. It never rises.

    Parameters
    ----------
    solved : SolverResult
        W0, with its parts.
    improve : callable
        A quadratic and a fit to a fit of the same structure at which the quadratic is no larger.
    ridge : float
        Relative to the mean eigenvalue of the centred inputs' Gram matrix.

    Returns
    -------
    weight, bias, parts
    """
    outputs = OutputSet(problem.targets, 0.0, problem.activation, "hinge")
    inputs, best = problem.inputs, Fitted(solved.weight, solved.bias, parts=solved.parts)

    def loss(fit: WarmStart, penalty: float) -> float:
        deviation = outputs.deviation(torch.addmm(fit.bias, inputs.inputs, fit.weight.T))
        held = (fit.weight - solved.weight).double().square().sum()
        return (deviation.double().square().sum() + penalty * held).item()

    reached = math.inf
    for step in range(_REFIT_STEPS):
        quadratic = OutputQuadratic.of(inputs, outputs, best, ridge)
        penalty = quadratic.penalty
        towards = penalty * (solved.weight - best.weight).double()
        tried = improve(dataclasses.replace(quadratic, cross=quadratic.cross + towards), best)
        if loss(tried, penalty) >= loss(best, penalty):
            break
        best = tried
        if step % 10 == 9:
            previous, reached = reached, loss(best, penalty)
            if previous - reached <= _REFIT_TOLERANCE * reached:
                break
    return best.weight, best.bias, best.parts
