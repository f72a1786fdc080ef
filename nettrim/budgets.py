"""The smallest budget, such as a number of nonzeros, with which a layer is within a radius."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddlr.constraints import OutputSet
from ddlr.inputs import CentredInputs
from ddlr.problem import WarmStart
from ddlr.result import SolverResult, SolverStatus

RESOLUTION = 1.01
"""The answer is within the radius; one so many times smaller was not."""

_TINY = 1e-9
# The error goes about so with the number of nonzeros, in logarithms.
_SLOPE = -0.6
_GROWTH = 2.0
# Of the smallest size that is enough: the next one, while none has missed.
_LEAST, _MOST = 0.1, 0.8
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
        best = smaller_by(fit, best, inputs, outputs)
    return best


def smaller_by(
    fit: Callable[[int], WarmStart],
    best: SolverResult,
    inputs: CentredInputs,
    outputs: OutputSet,
) -> SolverResult:
    """A layer of a budget at least one per cent smaller than the best one's, or that one.

    It is searched only if that budget is within the radius. `iterations` and `seconds` of both add
    up.
    """
    began = time.perf_counter()
    below = int(best.objective / RESOLUTION)
    if below < 1:
        return best
    tried = fit(below)
    found, fitted = best, 1
    if _log_error(tried, inputs, outputs) <= 0:
        found = smallest_within(fit, below, inputs, outputs, tried)
        fitted += found.iterations
    return replace(
        found,
        iterations=best.iterations + fitted,
        seconds=best.seconds + time.perf_counter() - began,
    )


def log_ratio(error: float, radius: float) -> float:
    """The logarithm of an error relative to a radius, finite also where one of them is 0."""
    ratio = error / radius if radius else math.inf if error else 0.0
    return math.log(min(max(ratio, _TINY), 1 / _TINY))


def extrapolated(error: float) -> float:
    """By what factor a size has to change for its error to meet the radius, by experience."""
    return math.exp(error / -_SLOPE)


def next_size(errors: Mapping[int, float], missed: int, kept: int) -> int:
    """Where the logarithm of the error is expected to meet that of the radius, from below.

    By interpolation between a size that is not enough and one that is; before there is one that
    is, where it seems to be, and at most twice as much; before one is too small, from 0.1 to 0.8 of
    the smallest that is enough. It lies between both sizes,
    and by a factor of `RESOLUTION` away from them where there is room for that.

    Parameters
    ----------
    errors : mapping of int to float
        `log_ratio` of the sizes that were tried.
    missed, kept : int
        The largest size that was not enough, or 0, and the smallest that is, or the whole.
    """
    if missed in errors and kept in errors:
        share = errors[missed] / (errors[missed] - min(errors[kept], -_TINY))
        guess = missed * (kept / missed) ** min(max(share, 0.1), 0.9)
    elif missed in errors:
        guess = missed * min(extrapolated(errors[missed]), _GROWTH)
    elif kept in errors:
        guess = kept * min(max(extrapolated(errors[kept]), _LEAST), _MOST)
    else:
        guess = kept / _GROWTH
    # Rounded so that either end of the range ends a search.
    lowest, highest = math.floor(RESOLUTION * missed), math.ceil(kept / RESOLUTION)
    guess = min(max(round(guess), lowest), highest)
    return min(max(guess, missed + 1), kept - 1)
