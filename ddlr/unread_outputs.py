"""Outputs that the next layer has no use for: freed before a solve, removed after the last."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ddlr.calls import Batch
from ddlr.captured import CapturedLayer
from ddlr.dead_weights import has_dead_weights, remove_dead_weights
from ddlr.hooks import is_sole_consumer
from ddlr.identity import is_plain, shares_with
from ddlr.layers import LowRankLinear
from ddlr.result import SolverResult
from ddlr.two_part_forms import TWO_PART_FORMS


def used_inputs(layer: CapturedLayer, solved: SolverResult | None) -> Tensor:
    """Which of a layer's inputs its solved weight is not zero for, shape (in_features,)."""
    if solved is None:
        return layer.live_in
    used = torch.zeros_like(layer.live_in)
    used[layer.live_in] = (solved.weight != 0).any(dim=0)
    return used


def adjacent_layers(layers: Sequence[CapturedLayer]) -> list[tuple[str, str]]:
    """Names of layers that follow each other, the one's outputs being the other's inputs."""
    return [
        (layer.name, following.name)
        for layer, following in pairwise(layers)
        if layer.is_input_of(following)
    ]


def remove_unread(
    model: nn.Module,
    compressed: nn.Module,
    adjacent: Sequence[tuple[str, str]],
    batches: Sequence[Batch],
) -> Mapping[str, Tensor]:
    """Remove what is dead in compressed layers, where trying it out shows that nothing reads it.

    Returns by layer which outputs nothing reads any longer, see `ddlr.dead_weights`.
    """
    layers = {name: compressed.get_submodule(name) for pair in adjacent for name in pair}
    pairs = [pair for pair in adjacent if all(_has_own_weights(layers[name]) for name in pair)]
    if not any(has_dead_weights(layers[one], layers[other]) for one, other in pairs):
        return {}
    pairs = [pair for pair in pairs if is_sole_consumer(model, *pair, batches)]
    pairs = [
        pair for pair in pairs if not any(shares_with(compressed, layers[name]) for name in pair)
    ]
    return remove_dead_weights(compressed, pairs, batches)


def _has_own_weights(layer: nn.Module) -> bool:
    if isinstance(layer, TWO_PART_FORMS):
        return all(_has_own_weights(part) for part in layer.parts)
    return isinstance(layer, LowRankLinear) or (isinstance(layer, nn.Linear) and is_plain(layer))
