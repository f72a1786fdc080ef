"""How a tensor stands in a file: as it is, or without what says nothing, if that is smaller.

Many weights of a compressed network are zero, and its indices are small numbers in order. The
encodings are those that `ddlr.sizes` counts. All are exact.

- ``bitmap``: the entries that are not zero, and one bit per position.
- ``csr``: the entries that are not zero, their columns, and where each row begins.
- ``block``, ``bitmap_of_block``, ``csr_of_block``: all entries, or these, of the rows and columns
  that are not zero, and one bit for each row and column.
- ``marks``: ascending indices as one bit for each number up to the last.
- ``small``: whole numbers in the smallest type that holds them.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

# What a further tensor costs in the header of a safetensors file, about.
_HEADER_BYTES = 100
_UNSIGNED = ((8, torch.uint8), (16, torch.uint16), (32, torch.uint32))
_WHOLE = (
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
)

# By encoding the parts that a tensor has in it.
PARTS = {
    "bitmap": ("values", "bitmap"),
    "csr": ("values", "columns", "pointers"),
    "block": ("sides", "values"),
    "bitmap_of_block": ("sides", "values", "bitmap"),
    "csr_of_block": ("sides", "values", "columns", "pointers"),
    "marks": ("marks",),
    "small": ("small",),
}


def encode(tensor: Tensor) -> tuple[str | None, dict[str, Tensor]]:
    """The smallest form of a tensor: the encoding, None for as it is, and its parts.

    A tensor as it is has the part "" alone.

    Parameters
    ----------
    tensor : Tensor
        On the CPU, strided.
    """
    tried = [(None, {"": tensor.contiguous()})]
    if tensor.is_floating_point() and tensor.ndim:
        tried += _sparse(tensor)
    elif tensor.dtype in _WHOLE and tensor.ndim:
        tried += _whole(tensor)
    return min(tried, key=lambda each: _cost(*each))


def _cost(kind: str | None, parts: Mapping[str, Tensor]) -> int:
    stored = sum(each.numel() * each.element_size() for each in parts.values())
    return stored + (0 if kind is None else _HEADER_BYTES * len(parts))


def _sparse(tensor: Tensor) -> list[tuple[str, dict[str, Tensor]]]:
    matrix = tensor.reshape(_matrix_shape(tensor.shape))
    kept = matrix != 0
    if kept.all():
        return []
    tried = _sparse_matrix(matrix, kept)
    rows, columns = kept.any(dim=1), kept.any(dim=0)
    if not (rows.all() and columns.all()):
        sides = {"sides": _bits(torch.cat([rows, columns]))}
        block, kept = (each[rows][:, columns] for each in (matrix, kept))
        tried.append(("block", {**sides, "values": block.flatten()}))
        inside = [] if kept.all() else _sparse_matrix(block, kept)
        tried += [(f"{kind}_of_block", {**sides, **parts}) for kind, parts in inside]
    return tried


def _sparse_matrix(matrix: Tensor, kept: Tensor) -> list[tuple[str, dict[str, Tensor]]]:
    values = matrix[kept]
    tried = [("bitmap", {"values": values, "bitmap": _bits(kept.flatten())})]
    if 8 * len(values) < matrix.numel():  # otherwise columns of a byte take more than a bitmap
        begins = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(dim=1).cumsum(0)])
        places = {"columns": _smallest(kept.nonzero()[:, 1]), "pointers": _smallest(begins)}
        tried.append(("csr", {"values": values, **places}))
    return tried


def _whole(tensor: Tensor) -> list[tuple[str, dict[str, Tensor]]]:
    wide = tensor.to(torch.int64)
    if not wide.numel() or int(wide.min()) < 0:
        return []
    tried = [("small", {"small": _smallest(wide)})]
    # At more bits than indices of four bytes have, a bitmap is not smaller.
    if wide.ndim == 1 and int(wide[-1]) < 32 * len(wide) and bool((wide.diff() > 0).all()):
        marks = torch.zeros(int(wide[-1]) + 1, dtype=torch.bool)
        marks[wide] = True
        tried.append(("marks", {"marks": _bits(marks)}))
    return tried


def decode(kind: str | None, parts: Mapping[str, Tensor], expected: Tensor) -> Tensor:
    """The tensor that `encode` was given.

    Parameters
    ----------
    kind : str, optional
    parts : mapping of str to Tensor
    expected : Tensor
        One of the shape that it must have, also on the meta device, and of its type if that is one
        of whole numbers. The shape is checked before memory is taken for it.

    Raises
    ------
    ValueError
        If these do not make such a tensor; says why.
    """
    missing = set(PARTS[kind] if kind is not None else ("",)) - set(parts)
    if missing:
        raise ValueError(f"its part {min(missing)!r} is missing" if kind else "it is missing")
    if kind is not None and "values" in parts:
        return _filled(kind, parts, _matrix_shape(expected.shape)).reshape(expected.shape)
    if kind is None:
        tensor = parts[""]
    else:
        tensor = _marked(parts["marks"]) if kind == "marks" else parts["small"]
    if tensor.shape != expected.shape:
        raise ValueError(
            f"it has shape {tuple(tensor.shape)}, and should have {tuple(expected.shape)}"
        )
    if kind is None:
        return tensor
    wide = tensor.to(torch.int64)
    if expected.dtype not in _WHOLE or int(wide.max()) > torch.iinfo(expected.dtype).max:
        raise ValueError(f"it has whole numbers that do not fit {expected.dtype}")
    return wide.to(expected.dtype)


def _filled(kind: str, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    if "sides" in parts:
        sides = _checked_bits(parts["sides"], sum(shape), "of its rows and columns")
        rows, columns = sides.split(shape)
        inside = int(rows.sum()), int(columns.sum())
        if kind == "block":
            _check_count(parts["values"], math.prod(inside))
            block = parts["values"].reshape(inside)
        else:
            others = {name: each for name, each in parts.items() if name != "sides"}
            block = _filled(kind.removesuffix("_of_block"), others, inside)
        matrix = block.new_zeros(shape)
        matrix[rows.nonzero(), columns.nonzero()[:, 0]] = block
        return matrix
    return (_from_bitmap if kind == "bitmap" else _from_csr)(parts, shape)


def _from_bitmap(parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    values, kept = (
        parts["values"],
        _checked_bits(parts["bitmap"], math.prod(shape), "of its entries"),
    )
    _check_count(values, int(kept.sum()))
    matrix = values.new_zeros(shape)
    matrix[kept.reshape(shape)] = values
    return matrix


def _from_csr(parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    values, (rows, columns) = parts["values"], shape
    pointers, places = (parts[each].to(torch.int64) for each in ("pointers", "columns"))
    if pointers.shape != (rows + 1,) or int(pointers[0]) or bool((pointers.diff() < 0).any()):
        raise ValueError(f"its row pointers do not ascend from 0 over {rows} rows")
    _check_count(values, int(pointers[-1]))
    if places.shape != values.shape or bool(((places < 0) | (places >= columns)).any()):
        raise ValueError(f"its columns are not of {columns}")
    row = torch.repeat_interleave(torch.arange(rows), pointers.diff())
    matrix = values.new_zeros(shape)
    matrix[row, places] = values
    return matrix


def _checked_bits(bits: Tensor, count: int, what: str) -> Tensor:
    if bits.dtype != torch.uint8 or bits.shape != (math.ceil(count / 8),):
        raise ValueError(f"it does not have one bit for each {what}, which are {count}")
    return _unpacked(bits, count)


def _check_count(values: Tensor, count: int) -> None:
    if values.shape != (count,):
        raise ValueError(f"it has values of shape {tuple(values.shape)} for {count} entries")


def _matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """Rows and columns of a tensor as a matrix: a vector is one row."""
    if len(shape) == 1:
        return 1, shape[0]
    return shape[0], math.prod(shape[1:])


def _smallest(numbers: Tensor) -> Tensor:
    largest = int(numbers.max()) if numbers.numel() else 0
    dtype = next((dtype for bits, dtype in _UNSIGNED if largest < 2**bits), torch.int64)
    return numbers.to(dtype)


def _bits(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.numpy(), bitorder="little"))


def _unpacked(bits: Tensor, count: int) -> Tensor:
    unpacked = np.unpackbits(bits.numpy(), count=count, bitorder="little")
    return torch.from_numpy(unpacked).to(torch.bool)


def _marked(bits: Tensor) -> Tensor:
    if bits.dtype != torch.uint8 or bits.ndim != 1:
        raise ValueError("its marks are no bits")
    return _unpacked(bits, 8 * len(bits)).nonzero()[:, 0]
