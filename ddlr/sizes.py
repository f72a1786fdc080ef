"""Storage counts of layers: the break-even rule, the weights, and the bytes of each form."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from ddlr.index_sets import index_bytes, set_bytes
from ddlr.layers import SeparableLinear
from ddlr.two_part_forms import TWO_PART_FORMS, SparseFactors

BYTES_PER_VALUE = 4


def saves_weights(rank: int, in_features: int, out_features: int) -> bool:
    """Whether a layer of a rank is stored with fewer weights than the dense layer: break-even."""
    return rank < min(in_features, out_features)


def fewest_stored(rank: int, in_features: int, out_features: int) -> int:
    """The fewest weights that a layer of a rank is stored with.

    It has rank * (in_features + out_features - rank) degrees of freedom, and as many weights as a
    `ddlr.layers.PivotedLinear`; at full rank that is the dense layer.
    """
    rank = min(rank, in_features, out_features)
    return rank * (in_features + out_features - rank)


@dataclass(frozen=True)
class LayerSize:
    """The storage that a layer takes, without its bias.

    Attributes
    ----------
    form : {"low_rank", "separable", "sparse", "sparse_low_rank", "sparse_factors", "dense"}
    parameters : int
        Rows and columns that are zero are removed, not counted. Of the others:

        - low rank: rank * (rows + columns - rank), the entries of pivot rows and coefficients, or
          of the dense layer where the rank is full on them;
        - separable: terms * (in_channels * height + rows * width), see `separable_stored`;
        - sparse: nonzero entries;
        - sparse_low_rank and sparse_factors: those of both parts, each as it is stored by itself;
        - dense: all entries.
    bytes : int
        4 bytes per value, and the positions of the values, in the smallest of these formats:

        - low rank: pivot rows and coefficients (`ddlr.layers.PivotedLinear`), with the names of the
          pivots. Two factors are never smaller: they have rank^2 more values;
        - separable: the arrays of both convolutions;
        - sparse: values and a bitmap of one bit per position; values, column indices and row
          pointers (CSR); or a dense array;
        - sparse_low_rank and sparse_factors: those of both parts;
        - dense: an array.

        Each is on the rows and columns that are not zero, which are named, or on all of them. Rows
        and columns are named by a list of indices or a bitmap. An index takes the smallest of 1, 2,
        4 and 8 bytes that fits.
    """

    form: str
    parameters: int
    bytes: int


def layer_size(layer: nn.Module) -> LayerSize:
    """The size of an `nn.Linear` or of a form of `ddlr.layers`, from its weights.

    A layer that is not low-rank is sparse if it has zeros other than whole rows and columns.
    """
    if isinstance(layer, TWO_PART_FORMS):
        sizes = [layer_size(part) for part in layer.parts]
        return LayerSize(
            "sparse_factors" if isinstance(layer, SparseFactors) else "sparse_low_rank",
            sum(size.parameters for size in sizes),
            sum(size.bytes for size in sizes),
        )
    stored = layer.weight != 0
    if isinstance(layer, SeparableLinear):
        return _separable_size(layer, stored)
    rows, columns, rank = stored.any(dim=1), stored.any(dim=0), low_rank_of(layer)
    block = int(rows.sum()), int(columns.sum())
    if rank is not None:
        stored_in = low_rank_storage(rank, rows, columns)
        return LayerSize("low_rank", fewest_stored(rank, *block), stored_in.bytes)
    nonzeros = int(stored.sum())
    if nonzeros == block[0] * block[1]:
        return LayerSize("dense", nonzeros, dense_storage(rows, columns).bytes)
    size = _smaller(lambda *sides: _sparse_bytes(nonzeros, *sides), rows, columns)
    return LayerSize("sparse", nonzeros, size.bytes)


def separable_stored(terms: int, rows: int, kernel: tuple[int, int, int]) -> int:
    """The weights of a convolution of height x 1 to so many channels, and of 1 x width behind it.

    `kernel` is (channels, height, width), and `rows` the number of output channels.
    """
    channels, height, width = kernel
    return terms * (channels * height + rows * width)


def _separable_size(layer: SeparableLinear, stored: Tensor) -> LayerSize:
    rows = stored.any(dim=1)
    channels = stored.unflatten(1, (layer.in_channels, -1)).any(dim=2).any(dim=0)

    def parameters(rows: int, channels: int) -> int:
        return separable_stored(layer.terms, rows, (channels, layer.height, layer.width))

    size = _smaller(lambda *sides: BYTES_PER_VALUE * parameters(*sides), rows, channels)
    return LayerSize("separable", parameters(int(rows.sum()), int(channels.sum())), size.bytes)


def low_rank_of(layer: nn.Module) -> int | None:
    """The rank of a layer that is stored as a low-rank one, else None."""
    return getattr(layer, "rank", None)


@dataclass(frozen=True, order=True)
class Storage:
    """The bytes of a matrix, and whether only its rows and columns that are not zero are stored."""

    bytes: int
    selected: bool


def low_rank_storage(rank: int, rows: Tensor, columns: Tensor) -> Storage:
    """The smallest storage of a matrix of a rank, pivoted or dense.

    Parameters
    ----------
    rows, columns : Tensor of bool
        Which of them are not zero.
    """
    return _smaller(lambda *sides: _pivoted_bytes(rank, *sides), rows, columns)


def dense_storage(rows: Tensor, columns: Tensor) -> Storage:
    """The smallest storage of a matrix as an array; see `low_rank_storage`."""
    return _smaller(lambda *sides: BYTES_PER_VALUE * math.prod(sides), rows, columns)


def csr_bytes(nonzeros: int, rows: int, columns: int) -> int:
    """The bytes of a matrix in CSR: values, column indices and row pointers of smallest types."""
    pointers = (rows + 1) * index_bytes(nonzeros)
    return nonzeros * (BYTES_PER_VALUE + index_bytes(columns - 1)) + pointers


def _smaller(bytes_of: Callable[[int, int], int], rows: Tensor, columns: Tensor) -> Storage:
    """The smaller of a format's storages on all rows and columns, and on those not zero."""
    block = int(rows.sum()), int(columns.sum())
    names = set_bytes(block[0], len(rows)) + set_bytes(block[1], len(columns))
    every = Storage(bytes_of(len(rows), len(columns)), selected=False)
    return min(every, Storage(bytes_of(*block) + names, selected=True))


def _pivoted_bytes(rank: int, rows: int, columns: int) -> int:
    if not saves_weights(rank, columns, rows):
        return BYTES_PER_VALUE * rows * columns
    return BYTES_PER_VALUE * fewest_stored(rank, columns, rows) + set_bytes(rank, rows)


def _sparse_bytes(nonzeros: int, rows: int, columns: int) -> int:
    """The bytes of a matrix as dense array, values with a bitmap, or CSR, whichever is smallest."""
    bitmap = BYTES_PER_VALUE * nonzeros + math.ceil(rows * columns / 8)
    return min(BYTES_PER_VALUE * rows * columns, bitmap, csr_bytes(nonzeros, rows, columns))
