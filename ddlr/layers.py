"""Low-rank layers: factorisation, the break-even rule, and how much a layer stores."""

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddlr.identity import copied, inherit, is_plain, replace_everywhere
from ddlr.untouched import random_state_kept

BYTES_A_VALUE = 4
_INDEX_BYTES = ((8, 1), (16, 2), (32, 4), (64, 8))


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
        with random_state_kept():  # what is drawn to begin with is overwritten
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
    """A layer without the inputs and outputs that have no weights: only the others are stored.

    Parameters
    ----------
    layer : nn.Linear or LowRankLinear
        On the inputs and outputs that are left.
    inputs, outputs : Tensor
        Their indices among `in_features` and `out_features`, kept in the smallest integers that
        fit; all other outputs are 0.
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
        """As a linear layer would have it, shape (out_features, in_features)."""
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


@torch.no_grad()
def compact(model: nn.Module) -> nn.Module:
    """A copy of a compressed network that stores no weights of inputs and outputs left out.

    Compression sets these to zero in layers of the shape that they had, which any tool understands.
    Here each such `nn.Linear` and `LowRankLinear` becomes a `SelectedLinear`, smaller in memory and
    on disk and with fewer operations; the outputs are the same but for rounding. A layer stays as
    it is where another module has its weight too, or where the weight is computed from others.
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
        if isinstance(layer, nn.Linear) and not _is_its_own(model, layer):
            continue
        inputs, outputs = (layer.weight != 0).any(dim=0), gives_outputs(layer)
        if not (inputs.all() and outputs.all()):
            model = replace_layer(model, name, _selected(layer, inputs, outputs))
    return model


def _is_its_own(model: nn.Module, layer: nn.Linear) -> bool:
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
                *(int(inputs.sum()), int(outputs.sum()), layer.rank),
                dtype=bias.dtype,
                device=bias.device,
            )
        small[0].weight.copy_(layer[0].weight[:, inputs])
        small[1].weight.copy_(layer[1].weight[outputs])
        small[1].bias.copy_(bias)
    else:
        small = store_linear(layer.weight[outputs][:, inputs], bias)
    kept = (mask.nonzero()[:, 0] for mask in (inputs, outputs))
    return SelectedLinear(small, *kept, layer.in_features, layer.out_features)


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    """Put a layer into a model in the place of the one with a name; "" is the model itself.

    Also where the model holds that one under other names, or in lists and dicts. The layer inherits
    its mode, hooks and `requires_grad`. A transformer layer of torch around it loses its fast path,
    which would go around the new layer with the product of its factors.
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

    Rows and columns that are zero in the weight are exactly zero in the factors too. Without a
    rank the numerical rank is taken.
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
    """Number of singular values above the rounding of the weight's dtype.

    Rounding the entries of a matrix is like adding noise to them, which moves singular values by
    about eps * (sqrt(rows) + sqrt(columns)) times the largest entry.
    """
    return _rank_of(torch.linalg.svdvals(weight.double()), weight)


def _rank_of(values: Tensor, weight: Tensor) -> int:
    if values.numel() == 0:
        return 0
    noise = torch.finfo(weight.dtype).eps * sum(math.sqrt(side) for side in weight.shape)
    return int((values > noise * values[0]).sum())


def saves_weights(rank: int, in_features: int, out_features: int) -> bool:
    """The break-even rule: whether two factors hold fewer weights than the dense layer."""
    return rank * (in_features + out_features) < in_features * out_features


def fewest_stored(rank: int, in_features: int, out_features: int) -> int:
    """The weights of a layer in the smaller of its two forms, factors and dense."""
    return min(rank * (in_features + out_features), in_features * out_features)


@torch.no_grad()
def store_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with the given weight and bias."""
    about = {"bias": bias is not None, "dtype": weight.dtype, "device": weight.device}
    layer = nn.utils.skip_init(nn.Linear, *weight.T.shape, **about)
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    return layer


def gives_outputs(layer: nn.Module) -> Tensor:
    """Which outputs of a layer have weights or a bias, shape (out_features,)."""
    given = (layer.weight != 0).any(dim=1)
    return given if layer.bias is None else given | (layer.bias != 0)


@dataclass(frozen=True)
class LayerSize:
    """What a layer stores, without its bias.

    Attributes
    ----------
    form : {"low_rank", "sparse", "dense"}
    parameters : int
        Factor entries, or nonzero entries. Zero rows and columns are removed, not counted.
    bytes : int
        4 bytes a value, and what says where the values belong, in the smallest of these formats.
        Low rank and dense: on the rows and columns that are not zero, which are named, or on all.
        Sparse, on either: values and a bitmap of one bit a position; values, column indices and row
        pointers (CSR); or a dense array. Rows and columns are named by a list of indices or a
        bitmap; an index takes the smallest of 1, 2, 4 and 8 bytes that fits.
    """

    form: str
    parameters: int
    bytes: int


def layer_size(layer: nn.Module) -> LayerSize:
    """Read the size off an `nn.Linear` or a `LowRankLinear`.

    A linear layer is sparse if it has zeros other than whole rows and columns.
    """
    if isinstance(layer, LowRankLinear):
        rows, columns = (layer[1].weight != 0).any(dim=1), (layer[0].weight != 0).any(dim=0)
        parameters = layer.rank * int(rows.sum() + columns.sum())
        on_all = BYTES_A_VALUE * layer.rank * (len(rows) + len(columns))
        selected = BYTES_A_VALUE * parameters + _selection_bytes(rows) + _selection_bytes(columns)
        return LayerSize("low_rank", parameters, min(on_all, selected))
    stored = layer.weight != 0
    nonzeros = int(stored.sum())
    rows, columns = stored.any(dim=1), stored.any(dim=0)
    block = (int(rows.sum()), int(columns.sum()))
    names = _selection_bytes(rows) + _selection_bytes(columns)
    form = "dense" if nonzeros == block[0] * block[1] else "sparse"
    return LayerSize(
        form,
        nonzeros,
        min(_block_bytes(nonzeros, *block) + names, _block_bytes(nonzeros, *stored.shape)),
    )


def _block_bytes(nonzeros: int, rows: int, columns: int) -> int:
    """Of a matrix as a dense array, as values with a bitmap, or in CSR, whichever is smallest."""
    bitmap = BYTES_A_VALUE * nonzeros + math.ceil(rows * columns / 8)
    return min(BYTES_A_VALUE * rows * columns, bitmap, csr_bytes(nonzeros, rows, columns))


def csr_bytes(nonzeros: int, rows: int, columns: int) -> int:
    """Of a matrix in CSR: values, column indices and row pointers of the smallest types."""
    pointers = (rows + 1) * _index_bytes(nonzeros)
    return nonzeros * (BYTES_A_VALUE + _index_bytes(columns - 1)) + pointers


def _selection_bytes(kept: Tensor) -> int:
    """What it takes to say which rows or columns are kept: nothing, if all or none are."""
    count = int(kept.sum())
    if count in (0, len(kept)):
        return 0
    return min(count * _index_bytes(len(kept) - 1), math.ceil(len(kept) / 8))


def _index_bytes(largest: int) -> int:
    return next(size for bits, size in _INDEX_BYTES if largest < 2**bits)


def _index_dtype(largest: int) -> torch.dtype:
    return {1: torch.uint8, 2: torch.uint16, 4: torch.int64, 8: torch.int64}[_index_bytes(largest)]
