"""The smallest budget of a method, such as a number of nonzeros, that keeps a layer's promise."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddlr.constraints import OutputSet
from ddlr.inputs import CentredInputs
from ddlr.problem import WarmStart
from ddlr.quadratic import OutputQuadratic
from ddlr.reduced_rank import check_ridge
from ddlr.result import SolverResult, SolverStatus
from nettrim.secants import RESOLUTION, extrapolated, log_ratio, next_size

_FIRST = 1 / 20  # of the largest budget: no search begins below
_HALVE_EVERY = 3  # steps, so that errors that go down in steps do not stop a search


@dataclass(frozen=True)
class Fitted(WarmStart):
    """A weight and bias with what the weight is made of, see `ddlr.SolverResult`."""

    parts: Mapping[str, Tensor] | None = None


def smallest_within(
    fit: Callable[[int], WarmStart],
    largest: int,
    inputs: CentredInputs,
    outputs: OutputSet,
    start: WarmStart | SolverResult,
) -> SolverResult:
    """The layer of the smallest budget, up to one per cent, whose outputs are within the radius.

    Found by secants of the logarithms of budget and error, and by bisection in every third step, as
    if a larger budget never did worse. The start itself where no budget below the largest will do;
    a bias alone where that will do.

    Parameters
    ----------
    fit : callable
        A budget, from 1 to `largest`, to a weight and bias for all inputs, maybe with parts.
    largest : int
        The budget of the start.
    inputs : CentredInputs
    outputs : OutputSet
        Has the radius.
    start : WarmStart
        Weight and bias of the original layer, or of one that is known to be within the radius.

    Returns
    -------
    SolverResult
        `objective` is the budget; the status is "fitted", `iterations` the number of fits.
    """
    began = time.perf_counter()
    constant = WarmStart(torch.zeros_like(start.weight), outputs.best_constant_output())
    if _log_error(constant, inputs, outputs) <= 0:
        best, kept, missed = constant, 0, 0
    else:
        best, kept, missed = start, largest, 0
    budget = _first_budget(largest, _log_error(start, inputs, outputs))
    errors: dict[int, float] = {}
    while kept > max(missed + 1, RESOLUTION * missed):
        tried = fit(budget)
        errors[budget] = _log_error(tried, inputs, outputs)
        if errors[budget] <= 0:
            best, kept = tried, budget
        else:
            missed = budget
        budget = _next_budget(errors, missed, kept)
    return SolverResult(
        weight=best.weight,
        bias=best.bias,
        status=SolverStatus.FITTED,
        iterations=len(errors),
        objective=float(kept),
        lower_bound=float("nan"),
        relative_gap=float("nan"),
        violation=outputs.violation(torch.addmm(best.bias, inputs.inputs, best.weight.T)),
        dual=best.weight.new_empty(0),
        seconds=time.perf_counter() - began,
        parts=getattr(best, "parts", None),
    )


def _log_error(fit: WarmStart | SolverResult, inputs: CentredInputs, outputs: OutputSet) -> float:
    """The logarithm of ||D||_F relative to the radius."""
    produced = torch.addmm(fit.bias, inputs.inputs, fit.weight.T)
    return log_ratio(torch.linalg.vector_norm(outputs.deviation(produced)).item(), outputs.radius)


def _first_budget(largest: int, error: float) -> int:
    """Where the error of the largest budget says that the answer may be, but not too far below."""
    return max(round(largest * min(max(extrapolated(error), _FIRST), 1 / RESOLUTION)), 1)


def _next_budget(errors: Mapping[int, float], missed: int, kept: int) -> int:
    if missed and len(errors) % _HALVE_EVERY == 0:
        return min(max(round((missed * kept) ** 0.5), missed + 1), kept - 1)
    return next_size(errors, missed, kept)


def smallest_of_several(
    fits: Sequence[Callable[[int], WarmStart]],
    largest: int,
    inputs: CentredInputs,
    outputs: OutputSet,
    start: WarmStart | SolverResult,
) -> SolverResult:
    """The smallest that `smallest_within` finds by several ways to spend a budget.

    A way is searched only if it is within the radius at a budget one per cent below the smallest
    of the ways before it.

    Parameters are those of `smallest_within`, with `fits` in the place of `fit`.
    """
    best = smallest_within(fits[0], largest, inputs, outputs, start)
    for fit in fits[1:]:
        below = int(best.objective / RESOLUTION)
        if below < 1:
            return best
        tried = fit(below)
        found, fitted = best, 1
        if _log_error(tried, inputs, outputs) <= 0:
            found = smallest_within(fit, below, inputs, outputs, tried)
            fitted += found.iterations
        best = replace(
            found,
            iterations=best.iterations + fitted,
            seconds=best.seconds + (found.seconds if found is not best else 0.0),
        )
    return best


@torch.no_grad()
def fewest_nonzeros(
    pruning_of: Callable[[OutputQuadratic], Callable[[int], Tensor]],
    inputs: CentredInputs,
    targets: Tensor,
    radius: float,
    *,
    activation: str,
    ridge: float,
    warm_start: WarmStart,
) -> SolverResult:
    """The sparse layer of the fewest nonzeros, up to one per cent, within the radius.

    Parameters
    ----------
    pruning_of : callable
        A quadratic to a function of a number of nonzeros, that gives a weight of so many for which
        the quadratic is small, shape (out_features, in_features).
    ridge : float
        That of the quadratic, towards the start.

    Other parameters and the return value are those of `smallest_within` and of
    `ddlr.lowest_rank`.
    """
    began = time.perf_counter()
    outputs = OutputSet(targets, radius, activation, "hinge")
    quadratic = OutputQuadratic.of(inputs, outputs, warm_start, check_ridge(ridge))
    varying = quadratic.penalty > 0  # else a weight says no more than the bias
    prune = pruning_of(quadratic) if varying else lambda _: torch.zeros_like(quadratic.cross)

    def fit(nonzeros: int) -> WarmStart:
        weight = prune(nonzeros).to(warm_start.weight)
        return WarmStart(weight, quadratic.bias_of(weight))

    found = smallest_within(fit, warm_start.weight.numel(), inputs, outputs, warm_start)
    return replace(found, seconds=time.perf_counter() - began)
