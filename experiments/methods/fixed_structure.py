"""The largest entries of a matrix, and fits of what has zeros in given places."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ddlr.constraints import OutputSet
from ddlr.eigen import symmetric_eigen
from ddlr.method import LayerProblem
from ddlr.problem import WarmStart
from ddlr.quadratic import OutputQuadratic
from ddlr.result import SolverResult
from nettrim.budgets import Fitted
from nettrim.support import largest_places

_REFIT_STEPS = 100
_REFIT_TOLERANCE = 1e-3  # of the loss, in ten steps


@dataclass(frozen=True)
class QuadraticFits:
    """What fits of a structure to a layer's outputs have in common.

    Attributes
    ----------
    quadratic : OutputQuadratic
    dtype : torch.dtype
        In which to compute.
    """

    quadratic: OutputQuadratic
    dtype: torch.dtype

    @cached_property
    def gram(self) -> Tensor:
        return self.quadratic.gram.to(self.dtype)

    @cached_property
    def norms(self) -> Tensor:
        """Those of the inputs, ridge included, shape (in_features,)."""
        return self.gram.diagonal().sqrt()

    @cached_property
    def scaled_eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors of the Gram matrix of scaled inputs."""
        norms = self.quadratic.gram.diagonal().sqrt()
        values, vectors = symmetric_eigen(self.quadratic.gram / norms / norms[:, None])
        return values.to(self.dtype), vectors.to(self.dtype)


def largest_entries(matrix: Tensor, number: int) -> Tensor:
    """A matrix with zeros in the place of all entries but the largest in magnitude."""
    return matrix * largest_places(matrix, number)


def minimise_on_support(
    product: Callable[[Tensor], Tensor],
    cross: Tensor,
    start: Tensor,
    diagonal: Tensor,
    *,
    iterations: int = 10,
) -> Tensor:
    """Minimise a quadratic over the matrices that are zero where the start is.

        minimise <W, product(W)> - 2 <W, cross>   over W = 0 where start = 0

    by conjugate gradients with a diagonal preconditioner. It never ends above the start.

    Parameters
    ----------
    product : callable
        A linear map that is symmetric and positive.
    cross, start : Tensor, shape (rows, columns)
    diagonal : Tensor
        That of `product`, in a shape that broadcasts to theirs; positive.
    iterations : int
    """
    support = start != 0
    found = start.clone()
    residual = (cross - product(found)) * support
    step = residual / diagonal
    direction, size = step, (residual * step).sum()
    first = size
    for _ in range(iterations):
        if size <= torch.finfo(size.dtype).eps ** 2 * first or not size > 0:
            break
        curved = product(direction)
        length = size / (direction * curved).sum()
        found = found + length * direction
        residual = residual - length * (curved * support)
        step = residual / diagonal
        following = (residual * step).sum()
        direction, size = step + (following / size) * direction, following
    return found


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
