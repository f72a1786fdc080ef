"""The search for a trained layer's lowest rank, and the fit of one rank."""

import logging
import math
from functools import partial

import torch
from omegaconf import DictConfig
from torch import Tensor

from ddlr import CentredInputs, SolverResult, lowest_rank, refit_low_rank
from experiments.benchmarks.layers import Layer, relative_error, trained_layer
from experiments.benchmarks.timing import median_by_pairs, result_columns

log = logging.getLogger(__name__)

_SETTLED = 1e-4  # relative; fits end once a further one lowers the error by less


def rank_search(cfg: DictConfig, device: torch.device) -> list[dict]:
    """The search for a trained layer's lowest rank, and the best weight of one rank.

    Timing begins with the eigenvectors of the inputs, which all solves of a layer share, and
    includes all else, also the projection of the inputs on them. Fits from random weights try
    whether a lower rank was missed.
    """
    settings = cfg.lowest_rank
    of_network = cfg.copy()
    of_network.model, of_network.layer.position = settings.model, settings.position
    layer = trained_layer(of_network, device, settings.samples)
    eigen = CentredInputs(layer.inputs).eigen

    def geometry() -> CentredInputs:
        return CentredInputs.with_eigen(layer.inputs, eigen)

    def search(relative_tolerance: float) -> SolverResult:
        return lowest_rank(
            geometry(),
            layer.targets,
            layer.radius(relative_tolerance),
            activation=layer.activation,
            warm_start=layer.start,
        )

    def fit(rank: int) -> tuple[Tensor, Tensor]:
        # Begins at the truncation in the metric of the inputs, that is, at the closed form.
        return refit_low_rank(
            geometry(),
            layer.targets,
            layer.start.weight,
            layer.start.bias,
            rank=rank,
            activation=layer.activation,
        )

    common = {"norm": "rank", "solver": "ours", **layer.shape}
    rows, ranks = [], {}
    for relative_tolerance in settings.relative_tolerances:
        pair, seconds, result = median_by_pairs(layer, partial(search, relative_tolerance))
        ranks[relative_tolerance] = rank = int(result.objective)
        row = {"case": "search", **common, "rank": rank}
        row |= {"relative_tolerance": relative_tolerance, "pair_seconds": pair}
        error = relative_error(layer, result.weight, result.bias)
        rows.append({**row, **result_columns(result), "seconds": seconds, "relative_error": error})
        log.info(
            "tolerance %g: rank %d in %.2f s, %.1f pairs, %d iterations",
            relative_tolerance,
            rank,
            seconds,
            seconds / pair,
            result.iterations,
        )
    rank = ranks[settings.one_rank_at]
    pair, seconds, (weight, bias) = median_by_pairs(layer, partial(fit, rank))
    error = relative_error(layer, weight, bias)
    row = {"case": "one rank", **common, "rank": rank}
    rows.append({**row, "pair_seconds": pair, "seconds": seconds, "relative_error": error})
    log.info("rank %d: error %.4f in %.2f s, %.1f pairs", rank, error, seconds, seconds / pair)
    lower, inputs = rank - 1, geometry()
    for seed in range(settings.other_starts):
        error = error_from_random_start(layer, inputs, lower, seed)
        rows.append({"case": "other start", **common, "rank": lower, "relative_error": error})
        log.info("rank %d from random weights: error %.5f", lower, error)
    return rows


def error_from_random_start(layer: Layer, inputs: CentredInputs, rank: int, seed: int) -> float:
    """The relative error at which repeated fits of one rank end, begun at a random weight.

    Each fit is held near its own beginning, in directions that the data hardly show, so the next
    one begins where it ended.
    """
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(layer.targets.shape[1], layer.inputs.shape[1], generator=random)
    weight = weight.to(layer.inputs) / layer.inputs.shape[1] ** 0.5
    bias = layer.targets.mean(dim=0)
    error, before = relative_error(layer, weight, bias), math.inf
    while error < (1 - _SETTLED) * before:
        weight, bias = refit_low_rank(
            inputs,
            layer.targets,
            weight,
            bias,
            rank=rank,
            activation=layer.activation,
            tolerance=_SETTLED,
        )
        error, before = relative_error(layer, weight, bias), error
    return error
