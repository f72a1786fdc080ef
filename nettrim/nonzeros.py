"""The fewest nonzeros with which a layer stays within a radius of its outputs."""

import math
import time

import torch
from torch import Tensor

from ddlr.arguments import as_number
from ddlr.constraints import OutputSet
from ddlr.input_elimination import regress_on_fewest
from ddlr.inputs import CentredInputs
from ddlr.method import LayerProblem
from ddlr.problem import WarmStart, check_problem, check_warm_start
from ddlr.quadratic import OutputQuadratic
from ddlr.rank_search import RADIUS_SLACK
from ddlr.reduced_rank import RIDGE, check_ridge
from ddlr.result import ConvergenceError, SolverResult, SolverStatus
from nettrim.sparse_fit import SparseFit, SparseProblem, fewest_within, on_inputs

_SUPPORTS_OF_REFIT, _SWINGS_OF_REFIT = 10, 2


@torch.no_grad()
def fewest_nonzeros(
    inputs: Tensor | CentredInputs,
    targets: Tensor,
    radius: float,
    *,
    activation: str = "relu",
    ridge: float = RIDGE,
    selection: float = 0.0,
    warm_start: WarmStart | SolverResult | None = None,
) -> SolverResult:
    """Find the sparsest layer whose outputs stay within the radius of the targets.

        minimise nonzeros(W)   subject to ||D||_F <= radius,   over W and b

    D is the deviation of A = X Wt + 1 bt from the targets as in the hinge set: A - Y where Y > 0,
    max(A, 0) elsewhere, so that ||relu(A) - Y||_F <= radius. This is what the l1 norm of
    `nettrim.solve_sparse` stands in for, as `ddlr.lowest_rank` is to `ddlr.solve_low_rank`.

    Each number of nonzeros that is tried is fitted. Two things take turns: the support is looked
    for, and the weight on it is moved to a smaller ||D||. Both work on the majoriser of ||D||^2 at
    the outputs A, ||X Wt + 1 bt - T||_F^2 with T = A - D, which is a quadratic of the weight: the
    search by `nettrim.support.SupportSearch`, the move by least squares on the support, with
    targets that are extrapolated. So the support follows the ReLU, too. The number itself is found
    by secants of the logarithms. The returned number is within the radius; the fit of one per cent
    fewer was not, which is no proof, since the problem is not convex.

    Parameters
    ----------
    inputs : Tensor, shape (samples, in_features), or CentredInputs
    targets : Tensor, shape (samples, out_features)
        Output of the original layer, after its activation.
    radius : float
        Bound on the Frobenius norm of the deviation, in units of `targets`.
    activation : {"relu", "none"}
    ridge : float
        Of the fits: ridge * ||W - W0||_F^2 is added to ||D||_F^2, relative to the mean eigenvalue
        of the centred inputs' Gram matrix. Must be positive.
    selection : float, from 0 to 0.99
        The share of the squared radius that may go into inputs without any weight: so many inputs
        are left out first, the one that matters least at a time, that a dense weight on the others
        has an error of at most its root times the radius. The layer before has no use for these
        outputs then. 0 leaves out no input but by chance.
    warm_start : WarmStart or SolverResult, optional
        Weight W0 and bias of the original layer. Fits begin from its outputs. Without it they begin
        from the targets, and W0 is 0.

    Returns
    -------
    SolverResult
        `objective` is the number of nonzeros, `iterations` the number of least-squares fits of all
        numbers. `lower_bound` and `relative_gap` are nan, the status is "fitted". The `warm_start`
        itself where nothing sparser is within the radius.

    Raises
    ------
    ValueError
        If an argument makes no problem; names the argument and value.
    ConvergenceError
        If not even a dense weight is within the radius; carries it.

    References
    ----------
    Meng, Behdin, Wang and Mazumder (2024), ALPS, arXiv 2406.07831, for the search of a support;
    Hassibi and Stork (1993), optimal brain surgeon, for the inputs that go.
    """
    began = time.perf_counter()
    ridge = check_ridge(ridge)
    selection = check_selection(selection)
    inputs = CentredInputs.of(inputs)
    check_problem(inputs.inputs, targets, tolerance=1.0, max_iterations=1)
    outputs = OutputSet(targets, radius, activation, "hinge")
    if warm_start is not None:
        check_warm_start(warm_start, inputs.inputs, targets)
    start = warm_start or WarmStart(
        targets.new_zeros(targets.shape[1], inputs.inputs.shape[1]), torch.zeros_like(targets[0])
    )
    bias = outputs.best_constant_output()
    if not outputs.violation(bias.expand_as(targets)):
        answer, iterations = WarmStart(torch.zeros_like(start.weight), bias), 0
    elif not (radius and len(inputs.eigen[0])):  # exactly the targets, or inputs that do not vary
        answer, iterations = start, 0
    else:
        answer, iterations = _sparsest(inputs, outputs, start, ridge, selection)
    violation = outputs.violation(torch.addmm(answer.bias, inputs.inputs, answer.weight.T))
    result = SolverResult(
        weight=answer.weight,
        bias=answer.bias,
        status=SolverStatus.FITTED,
        iterations=iterations,
        objective=float((answer.weight != 0).sum()),
        lower_bound=math.nan,
        relative_gap=math.nan,
        violation=violation,
        dual=targets.new_empty(0),
        seconds=time.perf_counter() - began,
    )
    if violation > RADIUS_SLACK:
        raise ConvergenceError(
            f"no number of nonzeros is within the radius of {radius:g}: a dense weight's error is "
            f"{1 + violation:.4g} times that",
            result,
        )
    return result


@torch.no_grad()
def refit_nonzeros(
    inputs: Tensor | CentredInputs,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    activation: str = "relu",
    ridge: float = RIDGE,
) -> tuple[Tensor, Tensor]:
    """Move a sparse weight to a smaller output error, at the same number of nonzeros.

        minimise ||D||_F^2 + ridge * ||W - W0||_F^2   over W with as many nonzeros as W0, and b

    The support moves, too, unlike in `nettrim.refit_sparse`; but inputs that W0 does not use stay
    unused. It is looked for as in `fewest_nonzeros`; the loss never ends above that at W0.

    Parameters, return value and errors are those of `nettrim.refit_sparse`.
    """
    ridge = check_ridge(ridge)
    inputs = CentredInputs.of(inputs)
    used = (weight != 0).any(dim=0).nonzero()[:, 0]
    if not len(used):
        return weight, bias
    outputs = OutputSet(targets, 0.0, activation, "hinge")
    start = WarmStart(weight[:, used], bias)
    problem = SparseProblem(on_inputs(inputs, used), outputs, start, ridge)
    fit = SparseFit(problem, start.weight != 0, problem.targets_of_start)
    nonzeros = int((weight != 0).sum())
    fit.alternate(nonzeros, _SUPPORTS_OF_REFIT)
    for _ in range(_SWINGS_OF_REFIT):
        fit = fit.after_swing(nonzeros)
    refitted = torch.zeros_like(weight)
    refitted[:, used] = fit.weight.to(weight)
    return refitted, fit.answer().bias


def refit_fewest(
    problem: LayerProblem, solved: SolverResult, *, ridge: float
) -> tuple[Tensor, Tensor]:
    """The best weight with as many nonzeros as a solved one, see `refit_nonzeros`."""
    return refit_nonzeros(
        problem.inputs,
        problem.targets,
        solved.weight,
        solved.bias,
        activation=problem.activation,
        ridge=ridge,
    )


def check_selection(selection: float) -> float:
    """The share as a number; a ValueError if it is not from 0 to below 1."""
    return as_number(selection, "selection", highest=0.99)


def _sparsest(
    inputs: CentredInputs,
    outputs: OutputSet,
    start: WarmStart | SolverResult,
    ridge: float,
    selection: float,
) -> tuple[WarmStart, int]:
    """The answer of `fewest_nonzeros` for an output set that holds no constant; and all fits."""
    # What the start has no weight for was left out before, as by a selection that went before.
    kept = start.weight.any(dim=0).nonzero()[:, 0]
    if not len(kept):
        kept = torch.arange(inputs.inputs.shape[1], device=inputs.inputs.device)
    some, chosen = on_inputs(inputs, kept), WarmStart(start.weight[:, kept], start.bias)
    if selection:
        share = selection**0.5 * outputs.radius
        fewest, chosen = regress_on_fewest(some, outputs, chosen, ridge, share)
        some, kept = on_inputs(some, fewest), kept[fewest]
    problem = SparseProblem(some, outputs, chosen, ridge)
    best, iterations = fewest_within(_first_fit(problem), chosen.weight.numel())
    if best is None:  # nothing sparser than the start
        return start, iterations
    weight = torch.zeros_like(start.weight)
    weight[:, kept] = best.weight
    return WarmStart(weight, best.bias), iterations


def _first_fit(problem: SparseProblem) -> SparseFit:
    """A fit of so few nonzeros that it is not likely to be enough."""
    quadratic = problem.quadratic
    nonzeros = max(_number_of_largest(quadratic, problem.outputs.radius) // 20, 1)
    support = problem.search.support(quadratic.cross, nonzeros)
    return SparseFit(problem, support, problem.targets_of_start)


def _number_of_largest(quadratic: OutputQuadratic, radius: float) -> int:
    """How many of the largest entries of the dense weight alone are within the radius, about."""
    scale = quadratic.gram.diagonal().sqrt()
    dense = quadratic.minimiser
    order = (dense * scale).abs().flatten().argsort(descending=True)
    low, high = 0, dense.numel()
    while high - low > max(1, 0.05 * high):
        middle = (low + high) // 2
        weight = torch.zeros_like(dense).flatten()
        weight[order[:middle]] = dense.flatten()[order[:middle]]
        enough = quadratic.excess(weight.view_as(dense)) <= radius**2
        low, high = (low, middle) if enough else (middle, high)
    return high
