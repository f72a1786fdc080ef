"""The lowest rank with which a layer stays within a radius of its outputs."""

import dataclasses
import math
import time

import torch
from torch import Tensor

from ddlr.constraints import OutputSet
from ddlr.inputs import CentredInputs
from ddlr.problem import WarmStart, check_problem, check_warm_start
from ddlr.reduced_rank import RIDGE, RankFit, WhitenedInputs, check_ridge
from ddlr.result import ConvergenceError, SolverResult, SolverStatus

# The violation that passes for rounding: above the radius, relative to it.
RADIUS_SLACK = 1e-3
_FIRST_GUESS = 0.85  # of the closed form's rank


@torch.no_grad()
def lowest_rank(
    inputs: Tensor | CentredInputs,
    targets: Tensor,
    radius: float,
    *,
    activation: str = "relu",
    ridge: float = RIDGE,
    max_iterations: int = 50,
    warm_start: WarmStart | SolverResult | None = None,
) -> SolverResult:
    """Find the lowest rank of a layer whose outputs stay within the radius of the targets.

        minimise rank(W)   subject to ||D||_F <= radius,   over W and b

    D is the deviation of A = X Wt + 1 bt from the targets as in the hinge set: A - Y where Y > 0,
    max(A, 0) elsewhere, so that ||relu(A) - Y||_F <= radius.

    Without an activation this is reduced-rank regression: one truncated singular value
    decomposition gives the answer, and the rank is proven to be the lowest. With ReLU each rank
    that is tried is fitted as in `refit_low_rank`. The returned rank is within the radius. The fit
    of the next lower rank was not, which is no proof, since the problem is not convex.

    The search begins at the rank of the closed form for the pre-activations (the activation-aware
    SVD), which is within the radius and so bounds the answer. Fits begin at the truncation of the
    best one so far.

    Parameters
    ----------
    inputs : Tensor, shape (samples, in_features), or CentredInputs
        There may be fewer samples than features; dead and dependent inputs are recognised by
        eigenvalues below rounding.
    targets : Tensor, shape (samples, out_features)
        Output of the original layer, after its activation.
    radius : float
        Bound on the Frobenius norm of the deviation, in units of `targets`.
    activation : {"relu", "none"}
    ridge : float
        Ridge of the fits, see `refit_low_rank`. A larger one makes the rank somewhat higher, and
        the error on other samples lower.
    max_iterations : int
        Limit for the fit of one rank.
    warm_start : WarmStart or SolverResult, optional
        Weight and bias of the original layer. With ReLU the fits begin from their outputs, and stay
        near the weight in directions that the data hardly show. Without a start they begin from the
        targets, and nothing holds them there.

    Returns
    -------
    SolverResult
        `objective` is the rank. Without an activation `lower_bound` is the same; with ReLU it and
        `relative_gap` are nan, and the status is "fitted".

    Raises
    ------
    ValueError
        If an argument makes no problem; names the argument and value.
    ConvergenceError
        If not even full rank is within the radius; carries the best fit.

    References
    ----------
    Izenman (1975); see `refit_low_rank`.
    """
    started = time.perf_counter()
    ridge = check_ridge(ridge)
    exact = activation == "none"
    white = WhitenedInputs(inputs, 0.0 if exact or warm_start is None else ridge)
    plain = white.original.inputs
    check_problem(plain, targets, tolerance=1.0, max_iterations=max_iterations)
    outputs = OutputSet(targets, radius, activation, "hinge")
    if warm_start is not None:
        check_warm_start(warm_start, plain, targets)
    search = _RankSearch(white, outputs, warm_start, max_iterations)
    fit = search.closed_form if exact else search.lowest()
    (weight, bias), rank = fit.answer(), fit.rank
    result = SolverResult(
        weight=weight,
        bias=bias,
        status=SolverStatus.CONVERGED if exact else SolverStatus.FITTED,
        iterations=search.iterations,
        objective=float(rank),
        lower_bound=float(rank) if exact else math.nan,
        relative_gap=0.0 if exact else math.nan,
        violation=outputs.violation(torch.addmm(bias, plain, weight.T)),
        dual=weight.new_empty(0),
        seconds=time.perf_counter() - started,
    )
    if result.violation > RADIUS_SLACK:
        raise ConvergenceError(
            f"no rank is within the radius of {radius:g}: at rank {rank} the error is "
            f"{1 + result.violation:.4g} times that",
            dataclasses.replace(result, status=SolverStatus.ITERATION_LIMIT),
        )
    return result


class _RankSearch:
    """The search for the lowest rank, from the regression that the start's outputs lead to.

    It is reduced-rank regression on the outputs nearest to the start's that reproduce the targets:
    one decomposition holds all its ranks. With targets that are the start's own outputs, before
    their activation, it is the activation-aware singular value decomposition.
    """

    def __init__(
        self,
        white: WhitenedInputs,
        outputs: OutputSet,
        start: WarmStart | SolverResult | None,
        max_iterations: int,
    ):
        self.white, self.outputs, self.max_iterations = white, outputs, max_iterations
        self.iterations = 0
        inputs = white.original.inputs
        if start is None:
            self.origin = inputs.new_zeros(outputs.targets.shape[1], len(white.scale))
            produced = torch.zeros_like(outputs.targets)
        else:
            self.origin = white.whiten(start.weight)
            produced = torch.addmm(start.bias, inputs, start.weight.T)
        nearest = outputs.nearest(produced)
        regressed = torch.addmm(self.origin, nearest.sub(produced).T, white.inputs)
        bias = nearest.mean(dim=0)
        left, self._values, right = torch.linalg.svd(regressed, full_matrices=False)
        scores = (white.inputs @ right.T) * self._values
        rank = lowest_truncation(outputs, bias, scores, left.T)
        del scores, produced, nearest
        left, right = left[:, :rank] * self._values[:rank], right[:rank].T
        self.closed_form = RankFit(white, outputs, self.origin, left, right, bias)

    def lowest(self) -> RankFit:
        """The fit of the lowest rank found to be within the radius."""
        best, radius = self.closed_form, self.outputs.radius
        constant = self.outputs.best_constant_output()
        if not self.outputs.violation(constant.expand_as(self.outputs.targets)):
            left, right = best.left[:, :0], best.right[:, :0]
            return RankFit(self.white, self.outputs, self.origin, left, right, constant)
        if best.square > radius**2:  # not even full rank is within it, so far
            best.reach(radius, self.max_iterations)
        missed, rank = 0, int(_FIRST_GUESS * best.rank)
        while missed < best.rank - 1:
            rank = min(max(rank, missed + 1), best.rank - 1)
            fit = best.truncated(rank)
            expected = fit.reach(radius, self.max_iterations)
            self.iterations += fit.iterations
            if fit.square <= radius**2:
                best = fit
            else:
                missed = rank
            rank += self._ranks_to(radius, rank, expected)
        return best

    def _ranks_to(self, radius: float, rank: int, error: float) -> int:
        """How many ranks more, or fewer, would bring an error at a rank to the radius.

        It supposes that each lowers the error by the share by which it lowers the regression's.
        """
        rest = self._values[rank:].double().square().sum()
        share = (self._values[rank].double().square() / rest).item()
        if not (radius and error and share > 0):
            return 0
        return round(2 * math.log(error / radius) / share)


def lowest_truncation(
    outputs: OutputSet, offset: Tensor, scores: Tensor, directions: Tensor
) -> int:
    """Find the lowest r for which ``offset + scores[:, :r] @ directions[:r]`` is within the radius.

    The deviation need not fall with every further term, so all ranks count, from 0 upwards. But its
    norm is the distance to a convex set, which changes by no more than the outputs move; so ranks
    that cannot be within the radius are stepped over unseen.

    Parameters
    ----------
    outputs : OutputSet
        With the hinge constraint.
    offset : Tensor, shape (out_features,)
    scores : Tensor, shape (samples, terms)
    directions : Tensor, shape (terms, out_features)
        With orthonormal rows.

    Returns
    -------
    int
        The number of all terms, where no fewer are within the radius.
    """
    terms = len(directions)
    # With orthonormal directions the squared movements of separate terms add up.
    moved = scores.new_zeros(terms + 1, dtype=torch.float64)
    moved[1:] = scores.square().sum(dim=0, dtype=torch.float64).cumsum(dim=0)
    produced = offset.expand_as(outputs.targets).clone()
    rank = 0
    while rank < terms:
        excess = torch.linalg.vector_norm(outputs.deviation(produced)).item() - outputs.radius
        if excess <= 0:
            break
        reached = int(torch.searchsorted(moved, moved[rank] + excess**2))
        following = min(max(reached, rank + 1), terms)
        produced.addmm_(scores[:, rank:following], directions[rank:following])
        rank = following
    return rank
