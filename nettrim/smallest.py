"""The layer that stores least within a radius of its outputs, whatever its form."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial

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
from nettrim import factors, sums
from nettrim.factors import refit_product, smallest_product, store_product
from nettrim.nonzeros import fewest_nonzeros, refit_fewest
from nettrim.sums import refit_sum, smallest_sum, store_sum

PARTS = {**sums.PARTS, **factors.PARTS}
"""The names of all parts: those of a sum, and those of a product; see `ddlr.Method`."""

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

    with D as in `ddlr.lowest_rank`, and over four forms: of low rank on some of the inputs, by
    `ddlr.fewest_weights`, which is dense on these where the rank is full; sparse, by
    `nettrim.fewest_nonzeros`; the sum of both, by `nettrim.sums.smallest_sum`; and the product of
    two sparse matrices, by `nettrim.factors.smallest_product`. Each keeps the promise by itself;
    the smallest one is the answer. A sum is sought with fewer weights than the product alone.

    Parameters, return value and errors are those of `nettrim.fewest_nonzeros`. Beside them:

    Parameters
    ----------
    minimise : {"parameters", "bytes", "latency"}
        What size is: the weights stored; their bytes with all indices; or the measured seconds of
        the layer as it is deployed, for 256 samples at once, with the threads that torch has, so
        that the answer depends on the machine. See `ddlr.layer_size`, `ddlr.compact`.
    cache : callable, optional
        Called as ``cache(function, *arguments, **keywords)`` for each of the searches; it may
        answer with what it knows of an equal call.

    Returns
    -------
    SolverResult
        `objective` is the size, `parts` are those of a sum or a product. `iterations` and `seconds`
        are of all searches.
    """
    size_of = MEASURES[one_of(minimise, "minimise", tuple(MEASURES))]
    began = time.perf_counter()
    inputs = CentredInputs.of(inputs)
    search = partial(_within_radius, cache, inputs, targets, radius)
    shared = {"activation": activation, "ridge": ridge, "warm_start": warm_start}
    tried = [
        search(fewest_weights, **shared),
        search(fewest_nonzeros, **shared, selection=selection),
    ]
    found = [each for each in tried if isinstance(each, SolverResult)]
    if not found:
        raise tried[-1]
    if warm_start is not None and len(found) == len(tried):
        low_rank, sparse = found
        product = search(smallest_product, **shared, sparse=sparse)
        below = {"low_rank": low_rank, "below": product.objective}
        found += [product, search(smallest_sum, **shared, sparse=sparse, **below)]
    stored = [store_smallest(each.weight, each.bias, **each.parts or {}) for each in found]
    sizes = [size_of(layer, inputs.inputs) for layer in stored]
    smallest = min(sizes)
    return dataclasses.replace(
        found[sizes.index(smallest)],
        objective=float(smallest),
        iterations=sum(each.iterations for each in found),
        seconds=time.perf_counter() - began,
    )


def refit_smallest(
    problem: LayerProblem, solved: SolverResult, *, ridge: float
) -> tuple[Tensor, Tensor, Mapping[str, Tensor] | None]:
    """Move a weight to a smaller output error in the form it has: at its rank, or its nonzeros."""
    if solved.parts is not None:
        refit_of_parts = refit_product if is_product(solved.parts) else refit_sum
        return refit_of_parts(problem, solved, ridge=ridge)
    refit = refit_rank if is_low_rank(solved.weight) else refit_fewest
    return *refit(problem, solved, ridge=ridge), None


def store_smallest(weight: Tensor, bias: Tensor, **parts: Tensor) -> nn.Module:
    """Two layers of parts; without these, two factors where they are fewer than the nonzeros."""
    if parts:
        return (store_product if is_product(parts) else store_sum)(weight, bias, **parts)
    if is_low_rank(weight):
        return store_selected(weight, bias)
    return store_linear(weight, bias)


def is_product(parts: Mapping[str, Tensor]) -> bool:
    """Whether parts are multiplied, and not added up."""
    return set(parts) == set(factors.PARTS)


def is_low_rank(weight: Tensor) -> bool:
    """Whether a weight is stored with fewer numbers by its rank than by its nonzeros."""
    bias = weight.new_zeros(len(weight))
    return layer_size(store_selected(weight, bias)).parameters < int((weight != 0).sum())


def _within_radius(
    cache: SolveCache | None,
    inputs: CentredInputs,
    targets: Tensor,
    radius: float,
    search: Callable[..., SolverResult],
    **options,
) -> SolverResult | ConvergenceError:
    try:
        if cache is None:
            return search(inputs, targets, radius, **options)
        return cache(search, inputs, targets, radius, **options)
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
