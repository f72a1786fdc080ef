"""Time in pairs: the median of some runs, beside the products that no iteration can avoid.

A *pair* is the time of the two matrix products X Wt and Rt X at the layer's shapes, dtype, device
and threads.
"""

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import TypeVar

import torch

from ddlr import ConvergenceError, SolverResult, solve_low_rank
from experiments.benchmarks.layers import Layer
from nettrim import solve_low_rank_plus_sparse, solve_sparse

SOLVERS = {"nuclear": solve_low_rank, "l1": solve_sparse}
SUM = "nuclear and l1"
_PAIR_REPETITIONS = 15
_ALL_SOLVERS = {**SOLVERS, SUM: solve_low_rank_plus_sparse}
_Result = TypeVar("_Result")


def timed_solve(
    layer: Layer, norm: str, relative_tolerance: float, gap: float, repetitions: int = 3
) -> dict:
    """The row of the median of some solves, by their time in pairs."""
    solve = partial(solve_layer, layer, norm, relative_tolerance, gap)
    pair, _, result = median_by_pairs(layer, solve, repetitions)
    return {
        "norm": norm,
        "solver": "ours",
        **layer.shape,
        "relative_tolerance": relative_tolerance,
        "gap_asked": gap,
        "pair_seconds": pair,
        **result_columns(result),
    }


def solve_layer(
    layer: Layer, norm: str, relative_tolerance: float, gap: float, limit: int = 20_000
) -> SolverResult:
    """Our solve of a layer; also the result of one that ends at its limit of iterations."""
    try:
        return _ALL_SOLVERS[norm](
            layer.inputs,
            layer.targets,
            layer.radius(relative_tolerance),
            activation=layer.activation,
            tolerance=gap,
            max_iterations=limit,
            warm_start=layer.start,
        )
    except ConvergenceError as error:
        return error.result


def result_columns(result: SolverResult) -> dict:
    """The columns of a row that say how a solve went."""
    columns = ("iterations", "seconds", "relative_gap", "violation")
    values = {column: getattr(result, column) for column in columns}
    return {**values, "status": result.status.value}


def median_by_pairs(
    layer: Layer, solve: Callable[[], _Result], repetitions: int = 3
) -> tuple[float, float, _Result]:
    """The median of some runs, by their time in pairs, which are measured anew before each run.

    Returns the time of a pair, that of the run, and its result.
    """
    timed = []
    for _ in range(repetitions):
        pair = pair_seconds(layer)
        started = time.perf_counter()
        result = solve()
        synchronise(layer.inputs.device)
        timed.append((pair, time.perf_counter() - started, result))
    return sorted(timed, key=lambda each: each[1] / each[0])[repetitions // 2]


def pair_seconds(layer: Layer) -> float:
    """Median time of X Wt and Rt X."""
    weight = layer.targets.new_ones(layer.targets.shape[1], layer.inputs.shape[1])
    times = []
    for _ in range(_PAIR_REPETITIONS):
        synchronise(layer.inputs.device)
        started = time.perf_counter()
        fitted = layer.inputs @ weight.T
        fitted.T @ layer.inputs
        synchronise(layer.inputs.device)
        times.append(time.perf_counter() - started)
    return median(times)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
