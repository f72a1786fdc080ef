"""Weights that are the sum of a sparse and a low-rank matrix: the smallest one within a radius."""

import dataclasses
import math
from collections.abc import Mapping
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from ddlr.compression import store_low_rank
from ddlr.constraints import OutputSet
from ddlr.eigen import symmetric_eigen
from ddlr.inputs import CentredInputs
from ddlr.layers import LowRankLinear, SparsePlusLowRank, numerical_rank, store_linear
from ddlr.method import LayerProblem
from ddlr.problem import WarmStart
from ddlr.reduced_rank import RIDGE
from ddlr.result import SolverResult
from ddlr.sizes import fewest_stored
from ddlr.storing import embedded
from nettrim.budgets import Fitted, smaller_by
from nettrim.sparse_fit import SparseFit, SparseProblem

PARTS = {"sparse": (True, True), "low_rank": (True, True)}
"""The names of the parts, and that both have the layer's outputs and inputs, see `ddlr.Method`."""

_TURNS = 2  # of both parts, for the same targets
_SUPPORTS, _SUPPORTS_OF_REFIT, _SWINGS_OF_REFIT = 4, 10, 2
_RANK_SHARES = (0.5, 0.25, 0.125, 0.75)  # of the rank that is enough by itself


@torch.no_grad()
def smallest_sum(
    inputs: Tensor | CentredInputs,
    targets: Tensor,
    radius: float,
    *,
    sparse: SolverResult,
    low_rank: SolverResult,
    warm_start: WarmStart | SolverResult,
    below: float = math.inf,
    activation: str = "relu",
    ridge: float = RIDGE,
) -> SolverResult:
    """Find a sum of a sparse and a low-rank matrix that stores less than a sparse one alone.

        minimise nonzeros(S) + rank(L) (in_features + out_features - rank(L))
        subject to ||D||_F <= radius,   over W = S + L and b

    with D as in `nettrim.fewest_nonzeros`, on the inputs that the sparse weight uses. Some ranks
    below that of the low-rank weight are tried, each with one per cent fewer weights than the best
    so far; where that is within the radius, the fewest nonzeros beside that rank are sought. Of
    each budget the sum is fitted as in `fewest_nonzeros`: for the targets of the majoriser both
    parts take turns, S by least squares on its support and L as the best of its rank for what S
    leaves. Nothing proves that fewer weights would not do.

    Parameters are those of `nettrim.fewest_nonzeros`. Beside them:

    Parameters
    ----------
    sparse, low_rank : SolverResult
        What `nettrim.fewest_nonzeros` and `ddlr.fewest_weights` found for the same problem.
    warm_start : WarmStart or SolverResult
        As there, but needed.
    below : float
        The number of weights of another form, which a sum has to be smaller than, too.

    Returns
    -------
    SolverResult
        `objective` is the number of weights, `parts` are "sparse" and "low_rank". `sparse` itself,
        which has no parts, where no sum is smaller. `iterations` and `seconds` are those of
        the fits of sums.

    References
    ----------
    Makni, Meng and Mazumder (2025), 3BASiL, NeurIPS, arXiv 2603.01376, for the form and for fits of
    both parts in turn. The bound, the ReLU and the search for both sizes are ours.
    """
    used = sparse.weight.any(dim=0)
    if not (radius and used.any()):
        return sparse
    outputs = OutputSet(targets, radius, activation, "hinge")
    problem = SumProblem.on_used(used, CentredInputs.of(inputs), outputs, warm_start, ridge)
    best = dataclasses.replace(
        sparse,
        weight=sparse.weight[:, used],
        objective=min(sparse.objective, below),
        iterations=0,
        seconds=0.0,
    )
    rank = numerical_rank(low_rank.weight)
    for share in _RANK_SHARES:
        if problem.stored(round(share * rank)) < best.objective:
            fit = partial(_fit, problem, round(share * rank))
            best = smaller_by(fit, best, problem.inputs, outputs)
    if best.parts is None:
        return dataclasses.replace(sparse, iterations=best.iterations, seconds=best.seconds)
    weight, parts = _on_all_inputs(best, used)
    return dataclasses.replace(best, weight=weight, parts=parts)


def refit_sum(
    problem: LayerProblem, solved: SolverResult, *, ridge: float
) -> tuple[Tensor, Tensor, Mapping[str, Tensor] | None]:
    """Move a sum to a smaller output error, with as many nonzeros and at the rank that it has.

        minimise ||D||_F^2 + ridge * ||W - W0||_F^2   over W of the form, and b

    The support moves, too, as in `nettrim.refit_nonzeros`; inputs that are not used stay unused.
    The loss never ends above that at the solved weight W0.
    """
    used = solved.weight.any(dim=0)
    if not used.any():
        return solved.weight, solved.bias, solved.parts
    outputs = OutputSet(problem.targets, 0.0, problem.activation, "hinge")
    sums = SumProblem.on_used(used, problem.inputs, outputs, solved, ridge)
    sparse, low_rank = (solved.parts[name][:, used] for name in PARTS)
    fit = SumFit(sums, sparse != 0, sums.targets_of_start, numerical_rank(low_rank), low_rank)
    nonzeros = int((sparse != 0).sum())
    fit.alternate(nonzeros, _SUPPORTS_OF_REFIT)
    for _ in range(_SWINGS_OF_REFIT):
        fit = fit.after_swing(nonzeros)
    refitted = fit.answer()
    weight, parts = _on_all_inputs(refitted, used)
    return weight, refitted.bias, parts


def store_sum(
    weight: Tensor, bias: Tensor, sparse: Tensor | None = None, low_rank: Tensor | None = None
) -> nn.Module | None:
    """A layer of both parts, or of one where the other is zero; None without parts."""
    if sparse is None or low_rank is None:
        return None if weight.any() else store_low_rank(weight, bias)
    if not low_rank.any():
        return store_linear(sparse, bias)
    if not sparse.any():
        return store_low_rank(low_rank, bias)
    return SparsePlusLowRank(store_linear(sparse, None), LowRankLinear.from_weight(low_rank, bias))


class SumProblem(SparseProblem):
    """What all sums that are fitted to one layer share."""

    def stored(self, rank: int) -> int:
        """The weights that a matrix of a rank is stored with."""
        out_features, in_features = self.start.weight.shape
        return fewest_stored(rank, in_features, out_features)

    def dense(self, cross: Tensor) -> Tensor:
        """The weight without a limit that is the best one for some targets, by their product."""
        return torch.cholesky_solve(cross.T, self._factor).T

    def of_rank(self, weight: Tensor, rank: int) -> Tensor:
        """The weight of a rank whose outputs are nearest to those of a weight, ridge included."""
        metric = weight @ self._factor
        if len(weight) <= weight.shape[1]:  # the smaller side is decomposed
            left = _leading(metric @ metric.T, rank)
            return left @ (left.T @ weight)
        right = _leading(metric.T @ metric, rank)
        back = torch.linalg.solve_triangular(self._factor, right.T, upper=False, left=False)
        return (metric @ right) @ back

    @cached_property
    def _factor(self) -> Tensor:
        return torch.linalg.cholesky(self.quadratic.gram)


class SumFit(SparseFit):
    """A sum of a matrix on a support and one of a rank, on its way to a smaller loss.

    Parameters
    ----------
    problem, support, targets
        As of `SparseFit`.
    rank : int
    low_rank : Tensor, shape (out_features, in_features)
        Where the matrix of that rank begins.
    """

    problem: SumProblem

    def __init__(
        self, problem: SumProblem, support: Tensor, targets: Tensor, rank: int, low_rank: Tensor
    ):
        self.rank, self.parts = rank, {"low_rank": low_rank.double()}
        super().__init__(problem, support, targets)

    def with_support(self, nonzeros: int) -> "SumFit":
        """As of `SparseFit`."""
        support = self._support_from_here(nonzeros)
        return SumFit(self.problem, support, self.nearest, self.rank, self.parts["low_rank"])

    def answer(self) -> Fitted:
        parts = {name: self.parts[name].to(self.problem.start.weight) for name in PARTS}
        weight = parts["sparse"] + parts["low_rank"]
        return Fitted(weight, self.shift - weight @ self.problem.inputs.mean, parts=parts)

    def _least_squares(self, targets: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        problem, low_rank = self.problem, self.parts["low_rank"]
        cross = problem.cross(targets)
        dense = problem.dense(cross)
        for _ in range(_TURNS):
            sparse = self._regression(cross - low_rank @ problem.quadratic.gram)
            low_rank = problem.of_rank(dense - sparse, self.rank)
        return sparse + low_rank, {"sparse": sparse, "low_rank": low_rank}

    def _support_from_here(self, nonzeros: int) -> Tensor:
        problem = self.problem
        cross = problem.cross(self.nearest) - self.parts["low_rank"] @ problem.quadratic.gram
        start = self.parts["sparse"].to(problem.start.weight)
        return problem.search.support(cross, nonzeros, start)


def _fit(problem: SumProblem, rank: int, budget: int) -> Fitted:
    """The sum that stores so many weights; of a lower rank where the budget is too small for it."""
    while problem.stored(rank) >= budget:
        rank -= 1
    nonzeros = budget - problem.stored(rank)
    quadratic = problem.quadratic
    low_rank = problem.of_rank(quadratic.minimiser, rank)
    support = problem.search.support(quadratic.cross - low_rank @ quadratic.gram, nonzeros)
    fit = SumFit(problem, support, problem.targets_of_start, rank, low_rank)
    fit.alternate(nonzeros, _SUPPORTS)
    return fit.answer()


def _on_all_inputs(fit: Fitted | SolverResult, used: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
    """A weight and its parts with zeros for the inputs that are not used."""
    every = used.new_ones(len(fit.weight))
    parts = {name: embedded(part, every, used) for name, part in fit.parts.items()}
    return embedded(fit.weight, every, used), parts


def _leading(gram: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the largest eigenvalues, as columns."""
    return symmetric_eigen(gram)[1][:, len(gram) - rank :]
