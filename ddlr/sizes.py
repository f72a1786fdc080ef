"""Storage counts of layers: the break-even rule, the weights, and the bytes of each form."""

import math
from dataclasses import dataclass

from torch import Tensor, nn

from ddlr.layers import LowRankLinear

BYTES_PER_VALUE = 4
_INDEX_BYTES = ((8, 1), (16, 2), (32, 4), (64, 8))


def saves_weights(rank: int, in_features: int, out_features: int) -> bool:
    """Whether two factors of a rank hold fewer weights than the dense layer: break-even."""
    return rank * (in_features + out_features) < in_features * out_features


def fewest_stored(rank: int, in_features: int, out_features: int) -> int:
    """The number of weights of a layer in the smaller of its two forms, factors and dense."""
    return min(rank * (in_features + out_features), in_features * out_features)


@dataclass(frozen=True)
class LayerSize:
    """The storage that a layer takes, without its bias.

    Attributes
    ----------
    form : {"low_rank", "sparse", "dense"}
    parameters : int
        Factor entries, or nonzero entries. Zero rows and columns are removed, not counted.
    bytes : int
        4 bytes per value, and the positions of the values, in the smallest of these formats:

        - low rank and dense: an array on the rows and columns that are not zero, which are named,
          or on all of them;
        - sparse, on either: values and a bitmap of one bit per position; values, column indices and
          row pointers (CSR); or a dense array.

        Rows and columns are named by a list of indices or a bitmap. An index takes the smallest of
        1, 2, 4 and 8 bytes that fits.
    """

    form: str
    parameters: int
    bytes: int


def layer_size(layer: nn.Module) -> LayerSize:
    """The size of an `nn.Linear` or a `LowRankLinear`, from its weights.

    A linear layer is sparse if it has zeros other than whole rows and columns.
    """
    if isinstance(layer, LowRankLinear):
        rows, columns = (layer[1].weight != 0).any(dim=1), (layer[0].weight != 0).any(dim=0)
        parameters = layer.rank * int(rows.sum() + columns.sum())
        on_all = BYTES_PER_VALUE * layer.rank * (len(rows) + len(columns))
        selected = BYTES_PER_VALUE * parameters + _selection_bytes(rows) + _selection_bytes(columns)
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
    """The bytes of a matrix as dense array, values with a bitmap, or CSR, whichever is smallest."""
    bitmap = BYTES_PER_VALUE * nonzeros + math.ceil(rows * columns / 8)
    return min(BYTES_PER_VALUE * rows * columns, bitmap, csr_bytes(nonzeros, rows, columns))


def csr_bytes(nonzeros: int, rows: int, columns: int) -> int:
    """The bytes of a matrix in CSR: values, column indices and row pointers of smallest types."""
    pointers = (rows + 1) * _index_bytes(nonzeros)
    return nonzeros * (BYTES_PER_VALUE + _index_bytes(columns - 1)) + pointers


def _selection_bytes(kept: Tensor) -> int:
    """The bytes that name the rows or columns kept: none, if all or none are kept."""
    count = int(kept.sum())
    if count in (0, len(kept)):
        return 0
    return min(count * _index_bytes(len(kept) - 1), math.ceil(len(kept) / 8))


def _index_bytes(largest: int) -> int:
    return next(size for bits, size in _INDEX_BYTES if largest < 2**bits)
