"""The layer that stores least within a radius of its outputs, whatever its form."""

import dataclasses
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ddlr.arguments import one_of
from ddlr.compacting import compact
from ddlr.compression import refit_rank, store_selected
from ddlr.input_selection import fewest_weights
from ddlr.inputs import CentredInputs
from ddlr.latency import fastest_times, rows_of
from ddlr.layers import store_linear
from ddlr.method import LayerProblem, SolveCache
from ddlr.problem import WarmStart
from ddlr.reduced_rank import RIDGE
from ddlr.result import ConvergenceError, SolverResult
from ddlr.sizes import layer_size
from nettrim.nonzeros import fewest_nonzeros, refit_fewest

_BATCH, _ROUNDS = 256, 15  # of a timing


@torch.no_grad()
def smallest_layer(
    inputs: Tensor | CentredInputs,
    targets: Tensor,
    radius: float,
    *,
    activation: str = "relu",
    ridge: float = RIDGE,
    selection: float = 0.0,
    minimise: str = "parameters",
    warm_start: WarmStart | SolverResult | None = None,
    cache: SolveCache | None = None,
) -> SolverResult:
    """Find the layer of the smallest form whose outputs stay within the radius of the targets.

        minimise size(W)   subject to ||D||_F <= radius,   over W and b

    with D as in `ddlr.lowest_rank`, and over two forms: of low rank on some of the inputs, by
    `ddlr.fewest_weights`, which is dense on these where the rank is full; and sparse, by
    `nettrim.fewest_nonzeros`. Each keeps the promise by itself; the smaller one is the answer.

    Parameters, return value and errors are those of `nettrim.fewest_nonzeros`. Beside them:

    Parameters
    ----------
    minimise : {"parameters", "bytes", "latency"}
        What size is: the weights stored; their bytes with all indices; or the measured seconds of
        the layer as it is deployed, for 256 samples at once, with the threads that torch has, so
        that the answer depends on the machine. See `ddlr.layer_size`, `ddlr.compact`.
    cache : callable, optional
        Called as ``cache(function, *arguments, **keywords)`` for each of the two searches; it may
        answer with what it knows of an equal call.

    Returns
    -------
    SolverResult
        `objective` is the size. `iterations` and `seconds` are of both searches.
    """
    size_of = MEASURES[one_of(minimise, "minimise", tuple(MEASURES))]
    began = time.perf_counter()
    inputs = CentredInputs.of(inputs)
    shared = {"activation": activation, "ridge": ridge, "warm_start": warm_start}
    searches = {fewest_weights: shared, fewest_nonzeros: shared | {"selection": selection}}
    tried = [
        _within_radius(cache, search, inputs, targets, radius, **options)
        for search, options in searches.items()
    ]
    found = [each for each in tried if isinstance(each, SolverResult)]
    if not found:
        raise tried[-1]
    sizes = [size_of(store_smallest(each.weight, each.bias), inputs.inputs) for each in found]
    smallest = min(sizes)
    return dataclasses.replace(
        found[sizes.index(smallest)],
        objective=float(smallest),
        iterations=sum(each.iterations for each in found),
        seconds=time.perf_counter() - began,
    )


def refit_smallest(
    problem: LayerProblem, solved: SolverResult, *, ridge: float
) -> tuple[Tensor, Tensor]:
    """Move a weight to a smaller output error in the form it has: at its rank, or its nonzeros."""
    if is_low_rank(solved.weight):
        return refit_rank(problem, solved, ridge=ridge)
    return refit_fewest(problem, solved, ridge=ridge)


def store_smallest(weight: Tensor, bias: Tensor) -> nn.Module:
    """A weight as two factors where that stores fewer weights than its nonzeros are, else whole."""
    if is_low_rank(weight):
        return store_selected(weight, bias)
    return store_linear(weight, bias)


def is_low_rank(weight: Tensor) -> bool:
    """Whether a weight is stored with fewer numbers by its rank than by its nonzeros."""
    bias = weight.new_zeros(len(weight))
    return layer_size(store_selected(weight, bias)).parameters < int((weight != 0).sum())


def _within_radius(
    cache: SolveCache | None, search: Callable[..., SolverResult], *arguments, **options
) -> SolverResult | ConvergenceError:
    try:
        if cache is None:
            return search(*arguments, **options)
        return cache(search, *arguments, **options)
    except ConvergenceError as error:
        return error


def _seconds(layer: nn.Module, inputs: Tensor) -> float:
    batch = rows_of(inputs, _BATCH).to(next(layer.parameters()))
    [seconds] = fastest_times([compact(layer)], batch, rounds=_ROUNDS)
    return seconds


# What is to be small, of a layer as it is stored and its inputs.
MEASURES: dict[str, Callable[[nn.Module, Tensor], float]] = {
    "parameters": lambda layer, _: layer_size(layer).parameters,
    "bytes": lambda layer, _: layer_size(layer).bytes,
    "latency": _seconds,
}
