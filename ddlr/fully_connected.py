"""Fully connected layers as linear maps: the kinds of `ddlr.linear_maps` without convolutions."""

import torch
from torch import Tensor, nn

from ddlr.identity import is_plain
from ddlr.layers import FORMS, store_linear

_LINEAR_WITHIN = 100  # roundings of a product's norm


class LinearMap:
    """An `nn.Linear`: the kind that the others are variations of.

    A kind is a set of functions of a module; it has no state.

    Attributes
    ----------
    on_patches : bool
        Whether rows of the inputs are patches that overlap, so that the layer can not leave out
        single inputs.
    """

    on_patches = False

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    def unsupported(self, module: nn.Module) -> str:
        """Why a module of this kind can not be compressed, as the end of a sentence; or ""."""
        return ""

    def features(self, module: nn.Module) -> tuple[int, int]:
        """In and out features of the weight as a matrix."""
        return module.in_features, module.out_features

    def weight(self, module: nn.Module) -> Tensor:
        """Shape (out_features, in_features)."""
        return module.weight

    def bias(self, module: nn.Module) -> Tensor | None:
        return module.bias

    def leading_shape(self, module: nn.Module, outputs: Tensor) -> tuple[int, ...]:
        """The shape of the outputs without their features: of one call, how many rows."""
        return tuple(outputs.shape[:-1])

    def input_rows(self, module: nn.Module, inputs: Tensor, rows: Tensor | None) -> Tensor:
        """What the module is given, as rows of a matrix, or those of some indices; maybe a view."""
        return _taken(inputs.flatten(0, -2), rows)

    def output_rows(self, module: nn.Module, outputs: Tensor, rows: Tensor | None) -> Tensor:
        """What it gives for these, shape (rows, out_features)."""
        return _taken(outputs.flatten(0, -2), rows)

    def as_given(self, rows: Tensor, outputs: Tensor) -> Tensor:
        """A copy of a call's outputs, of which all rows are there; may share memory with these."""
        return rows.reshape(outputs.shape)

    def linear_within(self, outputs: Tensor) -> float:
        """How far outputs may be from the product by rounding, relative to its norm."""
        return _LINEAR_WITHIN * torch.finfo(outputs.dtype).eps

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
