"""Weights that no output of a network depends on: found and removed, whatever method left them.

A hidden unit is dead in two ways, and in both its weights go without a change to any output:

- nothing reads it: the next layer has only zeros in its column. Its row and its bias go.
- it is constant: its row has only zeros. What it gives is added to the next layer's bias, and the
  next layer's column goes; its own bias stays.

One removal can make another unit dead, so it goes on until none is left.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ddlr.hooks import capture, run_batches
from ddlr.layers import LowRankLinear


@torch.no_grad()
def remove_dead_weights(
    model: nn.Module, pairs: Sequence[tuple[str, str]], batches: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Set to zero, in place, the weights that no output depends on.

    Outputs of the model do not change, but for rounding.

    Parameters
    ----------
    model : nn.Module
    pairs : sequence of (str, str)
        Names of a layer and of the one layer that reads its outputs, which it has for its inputs,
        after an activation perhaps. In the order of the network. Each is an `nn.Linear` or a
        `LowRankLinear`.
    batches : sequence of Tensor
        Network inputs; one of them shows what a constant unit gives after its activation.

    Returns
    -------
    dict of str to Tensor
        For the first layer of each pair which of its outputs had weights, and nobody to read them.
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
    """Whether units of a layer are constant, or not read by the one layer that could."""
    return bool((_unread(layer, reader) | _constant(layer, reader)).any())


def _unread(layer: nn.Module, reader: nn.Module) -> Tensor:
    return (layer.weight != 0).any(dim=1) & ~(reader.weight != 0).any(dim=0)


def _constant(layer: nn.Module, reader: nn.Module) -> Tensor:
    return ~(layer.weight != 0).any(dim=1) & (reader.weight != 0).any(dim=0)


def _drop_unread(layer: nn.Module, reader: nn.Module) -> Tensor:
    unread = _unread(layer, reader)
    rows = layer[1] if isinstance(layer, LowRankLinear) else layer
    rows.weight[unread] = 0
    if rows.bias is not None:
        rows.bias[unread] = 0
    return unread


def _fold_constant(model: nn.Module, name: str, reader: str, batches: Sequence[Tensor]) -> bool:
    following = model.get_submodule(reader)
    constant = _constant(model.get_submodule(name), following)
    if not constant.any():
        return False
    with capture(model, [reader]) as records:
        run_batches(model, [next(batch for batch in batches if len(batch))[:1]])
    given = records[reader].inputs[0].to(following.weight)
    if following.bias is None:  # nowhere to put anything but zeros
        constant &= given == 0
    else:
        following.bias.add_(following.weight @ (given * constant))
    columns = following[0] if isinstance(following, LowRankLinear) else following
    columns.weight[:, constant] = 0
    return bool(constant.any())
