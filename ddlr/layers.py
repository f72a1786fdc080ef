"""The forms in which a compressed layer is stored, and how one takes a layer's place."""

import math

import torch
from torch import Tensor, nn

from ddlr.identity import inherit, replace_everywhere
from ddlr.index_sets import IndexSet, pick
from ddlr.pivoting import choose_pivots
from ddlr.sparse_layers import SparseLinear
from ddlr.stored_form import StoredForm, empty_weights_allowed, store_linear
from ddlr.two_part_forms import TWO_PART_FORMS, SparseFactors, SparsePlusLowRank
from ddlr.untouched import random_state_kept

__all__ = [
    "FORMS",
    "LowRankLinear",
    "PivotedLinear",
    "SelectedLinear",
    "SeparableLinear",
    "SparseFactors",
    "SparseLinear",
    "SparsePlusLowRank",
    "factorise",
    "numerical_rank",
    "replace_layer",
    "store_linear",
]


class LowRankLinear(StoredForm, nn.Sequential):
    """A linear layer of given rank: two `nn.Linear` in sequence, the first without bias.

    Parameters
    ----------
    in_features, out_features, rank : int
        Rank 0 is allowed, and leaves only the bias.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, **factory):
        with empty_weights_allowed():
            super().__init__(
                nn.Linear(in_features, rank, bias=False, **factory),
                nn.Linear(rank, out_features, **factory),
            )
        self.in_features, self.out_features, self.rank = in_features, out_features, rank

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor, rank: int | None = None) -> "LowRankLinear":
        """Factorise a weight of shape (out_features, in_features), truncated to `rank` if given."""
        return cls.from_factors(*factorise(weight, rank), bias)

    @classmethod
    @torch.no_grad()
    def from_factors(cls, left: Tensor, right: Tensor, bias: Tensor) -> "LowRankLinear":
        """The layer of left (out_features, rank) and right (rank, in_features)."""
        with random_state_kept():  # the initial values are overwritten
            layer = cls(
                right.shape[1], len(left), len(right), dtype=right.dtype, device=right.device
            )
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


class PivotedLinear(StoredForm, nn.Module):
    """A linear layer of given rank, with fewer weights than two factors and equal outputs.

    As many rows of its weight as the rank, the pivots, are stored as they are; the others are
    combinations of them. The outputs of the pivots come first, and the others' follow from these:

        y[pivots] = P x,   y[others] = C y[pivots],   and then the bias

    That is rank * (in_features + out_features - rank) weights in place of rank * (in_features +
    out_features), and as many multiplications per sample; it is never more than the dense layer
    has. The state dict also says which rows are pivots, see `ddlr.index_sets.IndexSet`.

    Parameters
    ----------
    in_features, out_features, rank : int
        The rank is at most `out_features`; rank 0 leaves only the bias.
    bias : bool

    Raises
    ------
    ValueError
        If the rank is above `out_features`.

    References
    ----------
    Zhao, Zhang and Cannistraci (2025), Pivoting factorization (ICML), PMLR 267:77926.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = True, **factory
    ):
        if rank > out_features:
            raise ValueError(f"rank is {rank}; it must be at most out_features, {out_features}")
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        with empty_weights_allowed():
            self.pivot_rows = nn.Linear(in_features, rank, bias=False, **factory)
            self.other_rows = nn.Linear(rank, out_features - rank, bias=False, **factory)
        self.pivots = IndexSet(rank, out_features, factory.get("device"))
        like = self.pivot_rows.weight
        self.bias = nn.Parameter(like.new_zeros(out_features)) if bias else None

    @classmethod
    @torch.no_grad()
    def from_factors(cls, left: Tensor, right: Tensor, bias: Tensor | None) -> "PivotedLinear":
        """The layer of weight ``left @ right``, equal to it up to rounding.

        Parameters
        ----------
        left, right : Tensor, shapes (out_features, rank) and (rank, in_features)
        bias : Tensor of shape (out_features,), or None
        """
        chosen, coefficients = choose_pivots(left)
        (out_features, rank), in_features = left.shape, right.shape[1]
        with random_state_kept():  # the initial values are overwritten
            layer = cls(
                in_features,
                out_features,
                rank,
                bias=bias is not None,
                dtype=right.dtype,
                device=right.device,
            )
        layer.pivots = IndexSet.of(chosen)
        layer.pivot_rows.weight.copy_(left[chosen].double() @ right.double())
        layer.other_rows.weight.copy_(coefficients)
        if bias is not None:
            layer.bias.copy_(bias)
        return layer

    def forward(self, inputs: Tensor) -> Tensor:
        pivots = self.pivot_rows(inputs)
        outputs = torch.cat([pivots, self.other_rows(pivots)], dim=-1)
        outputs = pick(outputs, self.pivots.places)
        return outputs if self.bias is None else outputs + self.bias

    @property
    def weight(self) -> Tensor:
        """The weight of a linear layer with the same outputs, (out_features, in_features)."""
        pivots = self.pivot_rows.weight
        return torch.cat([pivots, self.other_rows.weight @ pivots])[self.pivots.places]


class SelectedLinear(StoredForm, nn.Module):
    """A layer that stores weights for some of its inputs and outputs only; other outputs are 0.

    Parameters
    ----------
    layer : nn.Linear, LowRankLinear or PivotedLinear
        The layer on the inputs and outputs that have weights.
    inputs, outputs : Tensor of bool, shapes (in_features,) and (out_features,)
        Which these are. The state dict names them in the fewest bytes, and none where all are kept;
        see `ddlr.index_sets.IndexSet`.
    bias : Tensor of shape (out_features,), optional
        Is added to all outputs, where one without weights has a bias. The layer inside has none
        then.
    """

    def __init__(
        self, layer: nn.Module, inputs: Tensor, outputs: Tensor, bias: Tensor | None = None
    ):
        super().__init__()
        self.layer = layer
        self.in_features, self.out_features = len(inputs), len(outputs)
        self.inputs, self.outputs = IndexSet.of(inputs), IndexSet.of(outputs)
        self.whole_bias = None if bias is None else nn.Parameter(bias)

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.inputs.is_all:
            inputs = pick(inputs, self.inputs.indices)
        outputs = self.outputs.spread(self.layer(inputs))
        return outputs if self.whole_bias is None else outputs + self.whole_bias

    @property
    def rank(self) -> int | None:
        """That of the layer inside, where it is low-rank."""
        return getattr(self.layer, "rank", None)

    @property
    def weight(self) -> Tensor:
        """The weight of a linear layer with the same outputs, (out_features, in_features)."""
        return self.outputs.spread(self.inputs.spread(self.layer.weight), dim=0)

    @property
    def bias(self) -> Tensor | None:
        if self.whole_bias is not None or self.layer.bias is None:
            return self.whole_bias
        return self.outputs.spread(self.layer.bias)


class SeparableLinear(StoredForm, nn.Module):
    """On patches the layer of a kernel that is a sum of products of a column and a row.

        W[o, c, i, j] = sum over s of across[s, o, j] * down[s, c, i]

    As a convolution it is one of height x 1 to `terms` channels and one of 1 x width behind it, see
    `ddlr.convolution_forms.SeparableConvolution`.

    Parameters
    ----------
    down : Tensor, shape (terms, in_channels, height)
    across : Tensor, shape (terms, out_features, width)
    bias : Tensor, shape (out_features,)
    """

    def __init__(self, down: Tensor, across: Tensor, bias: Tensor):
        super().__init__()
        self.down, self.across, self.bias = map(nn.Parameter, (down, across, bias))
        self.terms, self.in_channels, self.height = down.shape
        self.out_features, self.width = across.shape[1:]
        self.in_features = self.in_channels * self.height * self.width

    @classmethod
    @torch.no_grad()
    def from_weight(
        cls, weight: Tensor, bias: Tensor, kernel: tuple[int, int, int]
    ) -> "SeparableLinear":
        """Factorise a weight (out_features, in_features) of a kernel (channels, height, width)."""
        channels, height, width = kernel
        left, right = factorise(columns_by_rows(weight, kernel))
        down = left.T.reshape(-1, channels, height)
        return cls(down.clone(), right.reshape(len(right), -1, width).clone(), bias.clone())

    def forward(self, inputs: Tensor) -> Tensor:
        patches = inputs.unflatten(-1, (self.in_channels * self.height, self.width))
        columns = self.down.flatten(1) @ patches  # (..., terms, width)
        return columns.flatten(-2) @ self.across.transpose(1, 2).flatten(0, 1) + self.bias

    @property
    def weight(self) -> Tensor:
        """The weight of a linear layer with the same outputs, (out_features, in_features)."""
        return torch.einsum("sci,soj->ocij", self.down, self.across).flatten(1)


def columns_by_rows(weight: Tensor, kernel: tuple[int, int, int]) -> Tensor:
    """A kernel as the matrix whose rank is the number of terms of a `SeparableLinear`.

    From (out_features, channels * height * width) to (channels * height, out_features * width).
    """
    channels, height, width = kernel
    by_place = weight.view(len(weight), channels * height, width)
    return by_place.movedim(1, 0).flatten(1)


# What a compressed layer may be; an `nn.Linear` besides.
FORMS = (
    LowRankLinear,
    PivotedLinear,
    SelectedLinear,
    SeparableLinear,
    SparseLinear,
    *TWO_PART_FORMS,
)


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


def numerical_rank_of(layer: nn.Module) -> int:
    """The numerical rank of a layer's weight, by its factors where it has them."""
    if not isinstance(layer, LowRankLinear):
        return numerical_rank(layer.weight)
    # The triangular factors have the singular values of the product, and are small.
    outer, inner = (
        torch.linalg.qr(each.double(), mode="r").R for each in (layer[1].weight, layer[0].weight.T)
    )
    return _rank_of(torch.linalg.svdvals(outer @ inner.T), layer.weight)


def _rank_of(values: Tensor, weight: Tensor) -> int:
    if values.numel() == 0:
        return 0
    noise = torch.finfo(weight.dtype).eps * sum(math.sqrt(side) for side in weight.shape)
    return int((values > noise * values[0]).sum())
