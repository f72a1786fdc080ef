"""Modules that multiply their inputs by a weight, whatever they are called.

For each kind: what it holds, as the weight and bias of `inputs @ weight.T + bias`, what it is given
and gives, as rows of two matrices, and what takes its place.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from ddlr.calls import Batch
from ddlr.convolutions import CompressedConvolution, Convolution
from ddlr.fully_connected import CompressedLayer, LinearMap, TransposedLinear

# Named "fully connected" together: what is compressed unless layers are chosen.
FULLY_CONNECTED: tuple[LinearMap, ...] = (LinearMap(), TransposedLinear(), CompressedLayer())
KINDS: tuple[LinearMap, ...] = (*FULLY_CONNECTED, Convolution(), CompressedConvolution())
_ANY_MODULE = LinearMap()


def kind_of(module: nn.Module, kinds: tuple[LinearMap, ...] = KINDS) -> LinearMap | None:
    """The kind of linear map that a module is, if it is one."""
    return next((kind for kind in kinds if kind.matches(module)), None)


def rows_kind(module: nn.Module) -> LinearMap:
    """By which kind inputs and outputs of a module are noted as rows.

    Of what is no linear map, or none that is supported, leading dimensions are rows, as for an
    `nn.Linear`.
    """
    kind = kind_of(module)
    return _ANY_MODULE if kind is None or kind.unsupported(module) else kind


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
    kind = rows_kind(module)
    return batch.chosen_rows(kind.leading_shape(module, outputs), kind.most_rows(module))


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
        within = kind_of(module).linear_within(outputs)
        norm = torch.linalg.vector_norm(expected.double())
    except (RuntimeError, TypeError):
        return why
    # What is not finite is named with the layer's activations.
    return why if bool(off > within * norm) else ""


def as_layer(module: nn.Module) -> nn.Module:
    """A layer of a compressed network as an `nn.Linear` or a form, whatever takes its place."""
    kind = kind_of(module)
    return module if kind is None else kind.as_layer(module)
