"""Outputs that the next layer has no use for: freed before a solve, removed after the last."""

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from ddlr.captured import CapturedLayer, CapturedLayers
from ddlr.dead_weights import has_dead_weights, remove_dead_weights
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


def remove_unread(
    model: nn.Module, compressed: nn.Module, captured: CapturedLayers
) -> Mapping[str, Tensor]:
    """Remove what is dead in compressed layers, where trying it out shows that nothing reads it.

    It is tried out on the captured network, see `CapturedLayers.is_sole_consumer`. Returns by layer
    which outputs nothing reads any longer, see `ddlr.dead_weights`.
    """
    made = {layer.name: compressed.get_submodule(layer.name) for layer in captured.layers}
    pairs = [
        (layer, following)
        for layer, following in pairwise(captured.layers)
        if layer.is_input_of(following)
        and all(_has_own_weights(made[each.name]) for each in (layer, following))
    ]
    if not any(has_dead_weights(made[one.name], made[other.name]) for one, other in pairs):
        return {}
    names = [
        (layer.name, following.name)
        for layer, following in pairs
        if captured.is_sole_consumer(model, following, layer)
    ]
    names = [pair for pair in names if not any(shares_with(compressed, made[one]) for one in pair)]
    return remove_dead_weights(compressed, names, captured.batches)


def _has_own_weights(layer: nn.Module) -> bool:
    if isinstance(layer, TWO_PART_FORMS):
        return all(_has_own_weights(part) for part in layer.parts)
    return isinstance(layer, LowRankLinear) or (isinstance(layer, nn.Linear) and is_plain(layer))
