"""A compressed network in the forms that take the least storage."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ddlr.convolution_forms import LowRankConvolution, PivotedConvolution
from ddlr.identity import copied, is_plain, shares_with
from ddlr.layers import (
    LowRankLinear,
    PivotedLinear,
    SelectedLinear,
    replace_layer,
)
from ddlr.sizes import (
    csr_bytes,
    dense_storage,
    low_rank_of,
    low_rank_storage,
    saves_weights,
)
from ddlr.sparse_layers import SparseLinear
from ddlr.stored_form import StoredForm, store_linear
from ddlr.two_part_forms import TWO_PART_FORMS

# A sparse layer runs in CSR where it keeps less than this share of its weights. How many times as
# fast as `nn.Linear` that is on one thread, the median (least) of layers from 300 x 100 to 1024 x
# 4096 at batch 1, 32 and 256; made by `python -m experiments.benchmark parts=[sparse] threads=1`:
#
#     kept   batch 1        batch 32       batch 256
#      2 %   1.2 (0.2)      3.6 (0.6)      2.9 (1.2)
#      5 %   1.1 (0.2)      2.3 (0.6)      1.7 (1.3)
#     10 %   0.9 (0.2)      1.7 (0.6)      1.1 (0.8)
#     15 %   0.6 (0.2)      1.3 (0.5)      0.7 (0.6)
#     20 %   0.6 (0.3)      1.1 (0.4)      0.6 (0.5)
#     30 %   0.5 (0.2)      0.8 (0.4)      0.4 (0.4)
SPARSE_BELOW = 0.1


@torch.no_grad()
def compact(model: nn.Module, *, run_sparse: bool = True) -> nn.Module:
    """A copy of a compressed network in the forms of its layers that take the least storage.

    Compression keeps the layers of its result in forms that any tool understands: two factors, or a
    weight with zeros. In the copy, which is smaller in memory and on disk and takes fewer
    operations,

    - a layer of low rank is a `PivotedLinear`, of fewer weights than its factors, and a convolution
      a `PivotedConvolution`;
    - a layer that keeps less than 10 % of its weights is a `SparseLinear`, where that is smaller
      than an array. Its product may be slower than the dense one, most of all for single samples
      and above 5 % (`run_sparse=False` leaves it out);
    - weights of inputs and outputs that are left out are not stored: `SelectedLinear`;
    - the two parts of a `SparsePlusLowRank` or `SparseFactors` are treated so each by itself.

    Outputs are the same up to rounding. A layer stays as it is where none of that makes it smaller,
    where another module has its weight too, or where the weight is computed from others.

    Parameters
    ----------
    model : nn.Module
    run_sparse : bool
        Whether a layer may become a `SparseLinear`.
    """
    model = copied(model)
    convolutions = {
        name: layer for name, layer in model.named_modules() if type(layer) is LowRankConvolution
    }
    for name, layer in convolutions.items():
        if layer.rank and not shares_with(model, layer) and all(map(is_plain, layer)):
            model = replace_layer(model, name, PivotedConvolution.of(layer))
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | StoredForm)
    }
    for name, layer in layers.items():
        holder = name.rpartition(".")[0]
        around = layers.get(holder) if name else None
        if name and isinstance(model.get_submodule(holder), PivotedConvolution):
            continue
        if around is not None and not isinstance(around, (SelectedLinear, *TWO_PART_FORMS)):
            continue  # a part, which goes with its layer
        if _can_change(model, layer):
            model = replace_layer(model, name, _smallest(layer, run_sparse))
    return model


@torch.no_grad()
def without_larger_factors(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """The model with its smallest form in the place of each layer whose factors are no smaller.

    Two factors of a rank that is below break-even may have more weights than the dense layer, which
    a `PivotedLinear` never has. Changes the model.
    """
    for name in names:
        layer = model.get_submodule(name)
        if isinstance(layer, LowRankLinear | LowRankConvolution):
            factors = sum(each.numel() for each in layer.parameters() if each.ndim > 1)
            if factors >= layer.weight.numel() > 0:
                model = replace_layer(model, name, compact(layer))
    return model


def without_sparse_layers(model: nn.Module) -> nn.Module:
    """The model with an `nn.Linear` in the place of each `SparseLinear`, for what has no such."""
    for name in sparse_layers(model):
        model = replace_layer(model, name, model.get_submodule(name).dense())
    return model


def sparse_layers(model: nn.Module) -> list[str]:
    """The names of its layers that are a `SparseLinear`."""
    return [name for name, module in model.named_modules() if isinstance(module, SparseLinear)]


def _can_change(model: nn.Module, layer: nn.Module) -> bool:
    """Whether it is a linear map, with weights of its own that no other module has."""
    if isinstance(layer, LowRankLinear):
        return all(_can_change(model, factor) for factor in layer)
    if type(layer).forward is not nn.Linear.forward or "forward" in vars(layer):
        return False
    holders = sum(
        any(parameter is layer.weight for parameter in module.parameters(recurse=False))
        for module in model.modules()
    )
    return is_plain(layer) and holders == 1 and not layer.weight.is_meta


def _smallest(layer: nn.Linear | LowRankLinear, run_sparse: bool) -> nn.Module:
    """The layer in its smallest form, or the layer itself."""
    rank = low_rank_of(layer)
    rows, columns = ((layer.weight != 0).any(dim=side) for side in (1, 0))
    if rank is None and run_sparse and _runs_sparse(layer, rows, columns):
        return SparseLinear.from_weight(layer.weight, layer.bias)
    storage = (
        dense_storage(rows, columns) if rank is None else low_rank_storage(rank, rows, columns)
    )
    if rank == 0 or (rank is None and not storage.selected):
        return layer
    if not storage.selected:
        every = torch.ones_like(rows), torch.ones_like(columns)
        return _block(layer, *every, layer.bias)
    bias, whole_bias = layer.bias, None
    if bias is not None and bias[~rows].any():
        bias, whole_bias = None, bias
    elif bias is not None:
        bias = bias[rows]
    return SelectedLinear(_block(layer, rows, columns, bias), columns, rows, whole_bias)


def _block(
    layer: nn.Linear | LowRankLinear, rows: Tensor, columns: Tensor, bias: Tensor | None
) -> nn.Module:
    """The layer on some of its rows and columns: pivoted, or dense where that is as small."""
    rank = low_rank_of(layer)
    if rank is None or not saves_weights(rank, int(columns.sum()), int(rows.sum())):
        return store_linear(layer.weight[rows][:, columns], bias)
    right, left = (factor.weight for factor in layer)
    return PivotedLinear.from_factors(left[rows], right[:, columns], bias)


def _runs_sparse(layer: nn.Linear, rows: Tensor, columns: Tensor) -> bool:
    nonzeros, block = int((layer.weight != 0).sum()), int(rows.sum()) * int(columns.sum())
    smaller = csr_bytes(nonzeros, *layer.weight.shape) < dense_storage(rows, columns).bytes
    return smaller and nonzeros < SPARSE_BELOW * block
