"""The forms in which a compressed layer is stored, and how one takes a layer's place."""

import math
import warnings

import torch
from torch import Tensor, nn

from ddlr.identity import copied, inherit, is_plain, replace_everywhere
from ddlr.untouched import random_state_kept

_INDEX_DTYPES = ((8, torch.uint8), (16, torch.uint16), (63, torch.int64))


class LowRankLinear(nn.Sequential):
    """A linear layer of given rank: two `nn.Linear` in sequence, the first without bias.

    Parameters
    ----------
    in_features, out_features, rank : int
        Rank 0 is allowed, and leaves only the bias.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, **factory):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            super().__init__(
                nn.Linear(in_features, rank, bias=False, **factory),
                nn.Linear(rank, out_features, **factory),
            )
        self.in_features, self.out_features, self.rank = in_features, out_features, rank

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor, rank: int | None = None) -> "LowRankLinear":
        """Factorise a weight of shape (out_features, in_features), truncated to `rank` if given."""
        left, right = factorise(weight, rank)
        out_features, in_features = weight.shape
        with random_state_kept():  # the initial values are overwritten
            layer = cls(
                in_features, out_features, right.shape[0], dtype=weight.dtype, device=weight.device
            )
        with torch.no_grad():
            layer[0].weight.copy_(right)
            layer[1].weight.copy_(left)
            layer[1].bias.copy_(bias)
        return layer

    @property
    def weight(self) -> Tensor:
        """The product of the factors, shape (out_features, in_features)."""
        return self[1].weight @ self[0].weight

    @property
    def bias(self) -> Tensor:
        return self[1].bias


class SelectedLinear(nn.Module):
    """A layer that stores weights for some of its inputs and outputs only; other outputs are 0.

    Parameters
    ----------
    layer : nn.Linear or LowRankLinear
        The layer on the inputs and outputs that have weights.
    inputs, outputs : Tensor, shapes (inputs kept,) and (outputs kept,)
        Their indices among `in_features` and `out_features`, stored in the smallest integers that
        fit.
    in_features, out_features : int
    """

    def __init__(
        self,
        layer: nn.Module,
        inputs: Tensor,
        outputs: Tensor,
        in_features: int,
        out_features: int,
    ):
        super().__init__()
        self.layer, self.in_features, self.out_features = layer, in_features, out_features
        self.register_buffer("inputs", inputs.to(_index_dtype(in_features - 1)))
        self.register_buffer("outputs", outputs.to(_index_dtype(out_features - 1)))

    def forward(self, inputs: Tensor) -> Tensor:
        produced = self.layer(inputs.index_select(-1, self.inputs.long()))
        outputs = produced.new_zeros(*produced.shape[:-1], self.out_features)
        return outputs.index_copy(-1, self.outputs.long(), produced)

    @property
    def weight(self) -> Tensor:
        """The weight of a linear layer with the same outputs, (out_features, in_features)."""
        small = self.layer.weight
        weight = small.new_zeros(self.out_features, self.in_features)
        wide = small.new_zeros(len(small), self.in_features)
        rows = wide.index_copy(1, self.inputs.long(), small)
        return weight.index_copy(0, self.outputs.long(), rows)

    @property
    def bias(self) -> Tensor | None:
        if self.layer.bias is None:
            return None
        bias = self.layer.bias.new_zeros(self.out_features)
        return bias.index_copy(0, self.outputs.long(), self.layer.bias)


# What a compressed layer may be; an `nn.Linear` besides.
FORMS = (LowRankLinear, SelectedLinear)


@torch.no_grad()
def compact(model: nn.Module) -> nn.Module:
    """A copy of a compressed network that stores no weights of inputs and outputs left out.

    Compression sets these to zero in layers of the shape that they had, which any tool understands.
    Here each such `nn.Linear` and `LowRankLinear` becomes a `SelectedLinear`, smaller in memory and
    on disk and with fewer operations. The outputs are the same up to rounding. A layer stays as it
    is where another module has its weight too, or where the weight is computed from others.
    """
    model = copied(model)
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | LowRankLinear)
    }
    for name, layer in layers.items():
        if isinstance(layers.get(name.rpartition(".")[0]), LowRankLinear):
            continue  # a factor, which goes with its layer
        if isinstance(layer, nn.Linear) and not _owns_weight(model, layer):
            continue
        inputs, outputs = (layer.weight != 0).any(dim=0), _gives_outputs(layer)
        if not (inputs.all() and outputs.all()):
            model = replace_layer(model, name, _selected(layer, inputs, outputs))
    return model


def _owns_weight(model: nn.Module, layer: nn.Linear) -> bool:
    """Whether a layer is a linear map, with a weight that no other module has."""
    holders = sum(
        any(parameter is layer.weight for parameter in module.parameters(recurse=False))
        for module in model.modules()
    )
    return is_plain(layer) and type(layer).forward is nn.Linear.forward and holders == 1


def _selected(layer: nn.Module, inputs: Tensor, outputs: Tensor) -> SelectedLinear:
    bias = None if layer.bias is None else layer.bias[outputs]
    if isinstance(layer, LowRankLinear):
        with random_state_kept():
            small = LowRankLinear(
                int(inputs.sum()),
                int(outputs.sum()),
                layer.rank,
                dtype=bias.dtype,
                device=bias.device,
            )
        small[0].weight.copy_(layer[0].weight[:, inputs])
        small[1].weight.copy_(layer[1].weight[outputs])
        small[1].bias.copy_(bias)
    else:
        small = store_linear(layer.weight[outputs][:, inputs], bias)
    inputs, outputs = (mask.nonzero()[:, 0] for mask in (inputs, outputs))
    return SelectedLinear(small, inputs, outputs, layer.in_features, layer.out_features)


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    """Put a layer into a model in the place of the one with a name, and return the model.

    The name "" is the model itself. The layer also takes the place that the old one has under other
    names, or in lists and dicts, and inherits its mode, hooks and `requires_grad`. A transformer
    layer of torch around it loses its fast path, which would bypass the new layer with the product
    of its factors.
    """
    old = model.get_submodule(name)
    model = replace_everywhere(model, old, inherit(old, layer))
    if layer is not old:
        _leave_fast_path(model, layer)
    return model


def _leave_fast_path(model: nn.Module, layer: nn.Module) -> None:
    for encoder_layer in model.modules():
        if isinstance(encoder_layer, nn.TransformerEncoderLayer) and (
            layer in (encoder_layer.linear1, encoder_layer.linear2)
        ):
            encoder_layer.activation_relu_or_gelu = 0  # read by nothing but the fast path
            for encoder in model.modules():
                if isinstance(encoder, nn.TransformerEncoder) and encoder_layer in encoder.layers:
                    encoder.use_nested_tensor = False  # which takes the fast path


def factorise(weight: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Split a weight into left (out_features, rank) and right (rank, in_features) of equal norm.

    Rows and columns that are zero in the weight are exactly zero in the factors too. The rank is
    the numerical rank unless given.
    """
    rows, columns = (weight != 0).any(dim=1), (weight != 0).any(dim=0)
    block = weight[rows][:, columns]
    u, values, vh = torch.linalg.svd(block.double(), full_matrices=False)
    if rank is None:
        rank = _rank_of(values, block)
    root = values[:rank].sqrt()
    left = weight.new_zeros(weight.shape[0], len(root))
    right = weight.new_zeros(len(root), weight.shape[1])
    left[rows] = (u[:, :rank] * root).to(weight.dtype)
    right[:, columns] = (root[:, None] * vh[:rank]).to(weight.dtype)
    return left, right


def numerical_rank(weight: Tensor) -> int:
    """The number of singular values above the rounding of the weight's dtype.

    Rounding the entries of a matrix is like adding noise to them, which moves singular values by
    about eps * (sqrt(rows) + sqrt(columns)) times the largest entry.
    """
    return _rank_of(torch.linalg.svdvals(weight.double()), weight)


def _rank_of(values: Tensor, weight: Tensor) -> int:
    if values.numel() == 0:
        return 0
    noise = torch.finfo(weight.dtype).eps * sum(math.sqrt(side) for side in weight.shape)
    return int((values > noise * values[0]).sum())


@torch.no_grad()
def store_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with the given weight and bias."""
    layer = nn.utils.skip_init(
        nn.Linear,
        weight.shape[1],
        weight.shape[0],
        bias=bias is not None,
        dtype=weight.dtype,
        device=weight.device,
    )
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    return layer


def _gives_outputs(layer: nn.Module) -> Tensor:
    """The mask of the outputs of a layer that have weights or a bias, shape (out_features,)."""
    weighted = (layer.weight != 0).any(dim=1)
    return weighted if layer.bias is None else weighted | (layer.bias != 0)


def _index_dtype(largest: int) -> torch.dtype:
    return next(dtype for bits, dtype in _INDEX_DTYPES if largest < 2**bits)
