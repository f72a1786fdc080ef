"""Removal of weights that no output of a network depends on, whatever method left them.

A hidden unit is dead in two ways. In both its weights can go without a change to any output:

- It is unread: the next layer has only zeros in its column. Its row and its bias go.
- It is constant: its row has only zeros. Its value is added to the next layer's bias, and the next
  layer's column goes; its own bias stays.

One removal can make another unit dead, so removal goes on until no dead unit is left.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ddlr.calls import Batch
from ddlr.layers import LowRankLinear
from ddlr.recording import record
from ddlr.two_part_forms import SparseFactors, SparsePlusLowRank


@torch.no_grad()
def remove_dead_weights(
    model: nn.Module, pairs: Sequence[tuple[str, str]], batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """Set to zero, in place, the weights that no output depends on.

    The outputs of the model stay the same up to rounding.

    Parameters
    ----------
    model : nn.Module
    pairs : sequence of (str, str)
        Names of a layer and of the one layer that reads its outputs, in the order of the network.
        The outputs are the reader's inputs, perhaps after an activation. Each layer is an
        `nn.Linear`, a `LowRankLinear`, or of two parts that are such.
    batches : sequence of Batch
        Network inputs; one sample shows the value of a constant unit after its activation.

    Returns
    -------
    dict of str to Tensor
        For the first layer of each pair, which of its outputs had weights but no reader, as a
        mask of shape (out_features,).
    """
    unread = {
        name: torch.zeros(len(model.get_submodule(name).weight), dtype=torch.bool)
        for name, _ in pairs
    }
    changed = True
    while changed:
        changed = False
        for name, reader in pairs:
            changed |= _fold_constant(model, name, reader, batches)
        for name, reader in reversed(pairs):
            dropped = _drop_unread(model.get_submodule(name), model.get_submodule(reader))
            unread[name] |= dropped.cpu()
            changed |= bool(dropped.any())
    return unread


def has_dead_weights(layer: nn.Module, reader: nn.Module) -> bool:
    """Whether a layer has units that are constant, or unread by the one layer that could."""
    return bool((_unread(layer, reader) | _constant(layer, reader)).any())


def _unread(layer: nn.Module, reader: nn.Module) -> Tensor:
    return (layer.weight != 0).any(dim=1) & ~(reader.weight != 0).any(dim=0)


def _constant(layer: nn.Module, reader: nn.Module) -> Tensor:
    return ~(layer.weight != 0).any(dim=1) & (reader.weight != 0).any(dim=0)


def _drop_unread(layer: nn.Module, reader: nn.Module) -> Tensor:
    unread = _unread(layer, reader)
    for rows in _linear_parts(layer, last=True):
        rows.weight[unread] = 0
        if rows.bias is not None:
            rows.bias[unread] = 0
    if isinstance(layer, SparseFactors):
        layer.clear_unused()
    return unread


def _linear_parts(layer: nn.Module, *, last: bool) -> list[nn.Linear]:
    """What gives a layer's outputs, or else what reads its inputs."""
    if isinstance(layer, SparsePlusLowRank):
        return [each for part in layer.parts for each in _linear_parts(part, last=last)]
    if isinstance(layer, SparseFactors):
        return [layer.last if last else layer.first]
    if isinstance(layer, LowRankLinear):
        return [layer[1] if last else layer[0]]
    return [layer]


def _fold_constant(model: nn.Module, name: str, reader: str, batches: Sequence[Batch]) -> bool:
    following = model.get_submodule(reader)
    constant = _constant(model.get_submodule(name), following)
    if not constant.any():
        return False
    try:
        records = record(model, [reader], [batches[0].part(slice(0, 1))], with_outputs=False)
    except Exception:  # the network takes no other number of samples
        records = record(model, [reader], batches[:1], with_outputs=False)
    value = records[reader].inputs[0].to(following.weight)
    if following.bias is None:  # nowhere to put anything but zeros
        constant &= value == 0
    else:
        following.bias.add_(following.weight @ (value * constant))
    for columns in _linear_parts(following, last=False):
        columns.weight[:, constant] = 0
    if isinstance(following, SparseFactors):
        following.clear_unused()
    return bool(constant.any())
