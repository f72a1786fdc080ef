"""What takes the place of a layer that was solved."""

import dataclasses

import torch
from torch import Tensor, nn

from ddlr.captured import CapturedLayer
from ddlr.latency import Latency
from ddlr.layers import FORMS, store_linear
from ddlr.linear_maps import as_layer, kind_of
from ddlr.method import Method
from ddlr.result import SolverResult
from ddlr.sizes import layer_size


def stored(
    original: nn.Module,
    captured: CapturedLayer,
    solved: SolverResult | None,
    method: Method,
    break_even: Latency | None,
) -> nn.Module | None:
    """The layer that takes the original's place, or None where that does not pay.

    Of the original, what is not live is set to zero once the layer is to be compressed.
    """
    if solved is None and not captured.dropped:
        return None
    live_in, live_out = captured.live_in, captured.live_out
    like = next(original.parameters())
    layer = None
    if solved is not None:
        method = captured.method_of(method)
        full = on_all_features(solved, method, live_out, live_in)
        layer = method.store(full.weight, full.bias, **(full.parts or {}))
    whole = as_it_is(original, captured)
    if layer is not None and not _is_larger(layer, original):
        layer = layer.to(like)
        if break_even is None or break_even.keeps(layer, whole, captured.inputs):
            return layer
    if _was_compressed(original):
        return None
    weight = whole.weight.detach() * (live_out[:, None] & live_in)
    bias = None if whole.bias is None else whole.bias.detach() * live_out
    return store_linear(weight, bias).to(like)


def _is_larger(layer: nn.Module, original: nn.Module) -> bool:
    """Whether a layer stores more than one that was compressed before."""
    return _was_compressed(original) and (
        layer_size(layer).parameters > layer_size(as_layer(original)).parameters
    )


def _was_compressed(layer: nn.Module) -> bool:
    return isinstance(as_layer(layer), FORMS)


def as_it_is(original: nn.Module, captured: CapturedLayer) -> nn.Module:
    """The original layer with a weight of its own, where it computes it from others."""
    kind = kind_of(original)
    plain = kind.is_plain(original) or _was_compressed(original)
    return kind.as_layer(original) if plain else _whole(original, captured)


def _whole(original: nn.Module, captured: CapturedLayer) -> nn.Linear:
    bias = None if kind_of(original).bias(original) is None else captured.bias
    return store_linear(captured.weight, bias).to(next(original.parameters()))


def on_all_features(
    solved: SolverResult, method: Method, live_out: Tensor, live_in: Tensor
) -> SolverResult:
    """A solution with the outputs and inputs that were removed, for which its weights are zero."""
    parts = solved.parts and {
        name: embedded(part, *_sides(part, method.parts[name], live_out, live_in))
        for name, part in solved.parts.items()
    }
    return dataclasses.replace(
        solved,
        weight=embedded(solved.weight, live_out, live_in),
        bias=embedded(solved.bias[:, None], live_out)[:, 0],
        parts=parts,
    )


def on_live_features(
    full: SolverResult, method: Method, live_out: Tensor, live_in: Tensor
) -> SolverResult:
    """A solution without some outputs and inputs: the inverse of `on_all_features`."""
    parts = full.parts
    if parts is not None:
        sides = {
            name: _sides(part, method.parts[name], live_out, live_in)
            for name, part in parts.items()
        }
        parts = {name: parts[name][rows][:, columns] for name, (rows, columns) in sides.items()}
    return dataclasses.replace(
        full, weight=full.weight[live_out][:, live_in], bias=full.bias[live_out], parts=parts
    )


def _sides(
    part: Tensor, is_side: tuple[bool, bool], live_out: Tensor, live_in: Tensor
) -> tuple[Tensor, Tensor]:
    """Which rows and columns of a part are there, of all that a layer has."""
    rows, columns = (torch.ones(side, dtype=torch.bool, device=part.device) for side in part.shape)
    return live_out if is_side[0] else rows, live_in if is_side[1] else columns


def embedded(block: Tensor, rows: Tensor, columns: Tensor | None = None) -> Tensor:
    """Put a block back among the rows and columns that were removed, which become zero."""
    full = block.new_zeros(len(rows), block.shape[1] if columns is None else len(columns))
    if columns is None:
        full[rows] = block
    else:
        full[rows.nonzero(), columns.nonzero()[:, 0]] = block
    return full
