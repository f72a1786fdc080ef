"""Modules that multiply their inputs by a weight, whatever they are called.

For each kind: what it holds, as the weight and bias of `inputs @ weight.T + bias`, what it is given
and gives, as rows of two matrices, and what takes its place.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from ddlr.calls import Batch
from ddlr.identity import is_plain
from ddlr.layers import FORMS, store_linear

_LINEAR_WITHIN = 100  # roundings of a product's norm


class LinearMap:
    """An `nn.Linear`: the kind that the others are variations of.

    A kind is a set of functions of a module; it has no state.
    """

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    def features(self, module: nn.Module) -> tuple[int, int]:
        """In and out features of the weight as a matrix."""
        return module.in_features, module.out_features

    def weight(self, module: nn.Module) -> Tensor:
        """Shape (out_features, in_features)."""
        return module.weight

    def bias(self, module: nn.Module) -> Tensor | None:
        return module.bias

    def leading_shape(self, outputs: Tensor) -> tuple[int, ...]:
        """The shape of the outputs without their features: of one call, how many rows."""
        return tuple(outputs.shape[:-1])

    def input_rows(self, module: nn.Module, inputs: Tensor, rows: Tensor | None) -> Tensor:
        """What the module is given, as rows of a matrix, or those of some indices; maybe a view."""
        return _taken(inputs.flatten(0, -2), rows)

    def output_rows(self, module: nn.Module, outputs: Tensor, rows: Tensor | None) -> Tensor:
        """What it gives for these, shape (rows, out_features)."""
        return _taken(outputs.flatten(0, -2), rows)

    def in_shape(self, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
        """All rows of a call's outputs in the shape that they had."""
        return rows.reshape(shape)

    def about_inputs(self, module: nn.Module) -> tuple:
        """What `input_rows` depends on besides the inputs; layers that agree in it may share."""
        return ()

    def most_rows(self, module: nn.Module) -> int | None:
        """The most rows of its inputs that are kept, unless asked for otherwise; None for all."""
        return None

    def wrapped(self, original: nn.Module, layer: nn.Module) -> nn.Module:
        """A compressed layer, an `nn.Linear` or a form of `ddlr.layers`, as what takes a place."""
        return layer

    def as_layer(self, module: nn.Module) -> nn.Module:
        """What took the place, or the original, as an `nn.Linear` or a form of `ddlr.layers`."""
        return module

    def is_plain(self, module: nn.Module) -> bool:
        """Whether weight and bias are parameters of its own, computed from nothing else."""
        return is_plain(module)


class TransposedLinear(LinearMap):
    """GPT-2's `Conv1D`, a linear layer that holds its weight as (in_features, out_features)."""

    def matches(self, module: nn.Module) -> bool:
        kind = type(module)
        return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")

    def features(self, module: nn.Module) -> tuple[int, int]:
        return tuple(module.weight.shape)

    def weight(self, module: nn.Module) -> Tensor:
        return module.weight.T

    def as_layer(self, module: nn.Module) -> nn.Module:
        if not self.matches(module):
            return module
        return store_linear(module.weight.detach().T.contiguous(), module.bias.detach())


class CompressedLayer(LinearMap):
    """A layer that was compressed before, in one of the forms of `ddlr.layers`."""

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, FORMS)

    def is_plain(self, module: nn.Module) -> bool:
        return False  # its weight is the product of its parts


def _taken(matrix: Tensor, rows: Tensor | None) -> Tensor:
    matrix = matrix.detach()
    return matrix if rows is None else matrix[rows.to(matrix.device)]


# Named "fully connected" together: what is compressed unless layers are chosen.
FULLY_CONNECTED: tuple[LinearMap, ...] = (LinearMap(), TransposedLinear(), CompressedLayer())
KINDS: tuple[LinearMap, ...] = FULLY_CONNECTED


def kind_of(module: nn.Module, kinds: tuple[LinearMap, ...] = KINDS) -> LinearMap | None:
    """The kind of linear map that a module is, if it is one."""
    return next((kind for kind in kinds if kind.matches(module)), None)


def weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor]:
    """A module's weight and bias as those of `inputs @ weight.T + bias`; no bias is zeros."""
    kind = kind_of(module)
    weight, bias = kind.weight(module).detach(), kind.bias(module)
    return weight, weight.new_zeros(len(weight)) if bias is None else bias.detach()


def given_to(arguments: tuple, keywords: Mapping) -> Tensor:
    """The input of a layer, however it was called: its only argument."""
    return arguments[0] if arguments else next(iter(keywords.values()))


def rows_that_count(module: nn.Module, outputs: Tensor, batch: Batch | None) -> Tensor | None:
    """Which rows of one call of a module are kept, see `ddlr.calls.Batch.chosen_rows`."""
    if batch is None:
        return None
    kind = kind_of(module) or LinearMap()
    return batch.chosen_rows(kind.leading_shape(outputs), kind.most_rows(module))


def why_no_linear_map(module: nn.Module, inputs: Tensor, outputs: Tensor) -> str:
    """Why a module is more than ``inputs @ weight.T + bias`` (but for rounding), or "".

    Parameters
    ----------
    inputs, outputs : Tensor, shapes (rows, in_features) and (rows, out_features)
        What it was given and gave.
    """
    why = f"is a {type(module).__name__} whose forward pass is not just inputs @ weight.T + bias"
    weight = kind_of(module).weight(module)
    if "forward" in vars(module) or not (isinstance(weight, Tensor) and weight.is_floating_point()):
        return why
    try:
        expected = functional.linear(inputs, weight, kind_of(module).bias(module))
        off = torch.linalg.vector_norm((outputs - expected).double())
        within = _LINEAR_WITHIN * torch.finfo(outputs.dtype).eps
        norm = torch.linalg.vector_norm(expected.double())
    except (RuntimeError, TypeError):
        return why
    # What is not finite is named with the layer's activations.
    return why if bool(off > within * norm) else ""


def as_layer(module: nn.Module) -> nn.Module:
    """A layer of a compressed network as an `nn.Linear` or a form, whatever takes its place."""
    kind = kind_of(module)
    return module if kind is None else kind.as_layer(module)
