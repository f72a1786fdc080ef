"""How a tensor stands in a file: as it is, or without what says nothing, if that is smaller.

Many weights of a compressed network are zero, and its indices are small numbers in order. The
encodings are those that `ddlr.sizes` counts. All are exact.

- ``bitmap``: the entries that are not zero, and one bit per position.
- ``csr``: the entries that are not zero, their columns, and where each row begins.
- ``marks``: ascending indices as one bit for each number up to the last.
- ``small``: whole numbers in the smallest type that holds them.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What a further tensor costs in the header of a safetensors file, about.
_HEADER_BYTES = 100
_UNSIGNED = ((8, torch.uint8), (16, torch.uint16), (32, torch.uint32))
_WHOLE = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.int8, torch.int16, torch.int32, torch.int64),
    )
}

# The parts of an encoded tensor by what they are; one that stands as it is has the part "" alone.
Parts = Mapping[str, Tensor]


def encode(tensor: Tensor) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The smallest form of a tensor: its parts, and what `decode` must be told.

    Parameters
    ----------
    tensor : Tensor
        On the CPU, strided.

    Returns
    -------
    parts : dict of str to Tensor
    how : dict, or None
        Plain values, as JSON has them; None where the tensor stands as it is.
    """
    best: tuple[dict[str, Tensor], dict[str, Any] | None] = {"": tensor.contiguous()}, None
    if tensor.is_floating_point() and tensor.ndim:
        tried = _sparse(tensor)
    elif tensor.dtype in _WHOLE.values() and tensor.ndim:
        tried = _whole(tensor)
    else:
        tried = []
    return min([best, *tried], key=lambda each: _cost(*each))


def _cost(parts: Parts, how: Mapping | None) -> int:
    stored = sum(each.numel() * each.element_size() for each in parts.values())
    return stored + (0 if how is None else _HEADER_BYTES * len(parts))


def _sparse(tensor: Tensor) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
    matrix = tensor.reshape(_matrix_shape(tensor.shape))
    kept = matrix != 0
    nonzeros, shape = int(kept.sum()), list(tensor.shape)
    if nonzeros == matrix.numel():
        return []
    values = matrix[kept]
    tried = [
        ({"values": values, "bitmap": _bits(kept.flatten())}, {"kind": "bitmap", "shape": shape})
    ]
    if 8 * nonzeros < matrix.numel():  # otherwise columns of a byte each take more than a bitmap
        begins = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(dim=1).cumsum(0)])
        columns = kept.nonzero()[:, 1]
        places = {"columns": _smallest(columns), "pointers": _smallest(begins)}
        tried.append(({"values": values, **places}, {"kind": "csr", "shape": shape}))
    return tried


def _whole(tensor: Tensor) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
    wide = tensor.to(torch.int64)
    if not wide.numel() or int(wide.min()) < 0:
        return []
    dtype = str(tensor.dtype).removeprefix("torch.")
    tried = [({"small": _smallest(wide)}, {"kind": "small", "dtype": dtype})]
    # At more bits than indices of four bytes have, a bitmap is not smaller.
    if wide.ndim == 1 and int(wide[-1]) < 32 * len(wide) and bool((wide.diff() > 0).all()):
        marks = torch.zeros(int(wide[-1]) + 1, dtype=torch.bool)
        marks[wide] = True
        tried.append(({"marks": _bits(marks)}, {"kind": "marks", "dtype": dtype}))
    return tried


def decode(how: Mapping[str, Any] | None, parts: Parts, expected: torch.Size) -> Tensor:
    """The tensor that `encode` was given.

    Parameters
    ----------
    how : mapping, or None
    parts : mapping of str to Tensor
    expected : torch.Size
        The shape that it must have, checked before memory is taken for it.

    Raises
    ------
    ValueError
        If these do not make a tensor of that shape; says why.
    """
    if how is None:
        tensor = _part(parts, "")
        _check(tensor.shape == expected, f"it has shape {tuple(tensor.shape)}", expected)
        return tensor
    kind = how.get("kind")
    if kind in ("bitmap", "csr"):
        _check(how.get("shape") == list(expected), f"it has shape {how.get('shape')}", expected)
        return _filled(kind, parts, expected)
    if kind in ("marks", "small"):
        dtype = _WHOLE.get(how.get("dtype"))
        if dtype is None:
            raise ValueError(f"it has the type {how.get('dtype')!r}, which is no whole number's")
        marked = kind == "marks"
        tensor = _marked(_part(parts, "marks")) if marked else _part(parts, "small")
        _check(tensor.shape == expected, f"it has shape {tuple(tensor.shape)}", expected)
        wide = tensor.to(torch.int64)
        if wide.numel() and int(wide.max()) > torch.iinfo(dtype).max:
            raise ValueError(f"it has numbers that do not fit {dtype}")
        return wide.to(dtype)
    raise ValueError(f"it has the encoding {kind!r}, which this version does not know")


def _filled(kind: str, parts: Parts, shape: torch.Size) -> Tensor:
    rows, columns = _matrix_shape(shape)
    values = _part(parts, "values")
    if kind == "bitmap":
        bitmap = _part(parts, "bitmap")
        if bitmap.dtype != torch.uint8 or bitmap.shape != (math.ceil(rows * columns / 8),):
            raise ValueError("its bitmap does not have one bit for each entry")
        kept = _unpacked(bitmap, rows * columns).reshape(rows, columns)
        _check_count(values, int(kept.sum()))
        matrix = values.new_zeros(rows, columns)
        matrix[kept] = values
        return matrix.reshape(shape)
    pointers, places = (_part(parts, each).to(torch.int64) for each in ("pointers", "columns"))
    if pointers.shape != (rows + 1,) or int(pointers[0]) or bool((pointers.diff() < 0).any()):
        raise ValueError("its row pointers do not ascend from 0")
    _check_count(values, int(pointers[-1]))
    if places.shape != values.shape or (len(places) and not 0 <= int(places.max()) < columns):
        raise ValueError("its columns are out of range")
    if len(places) and int(places.min()) < 0:
        raise ValueError("its columns are out of range")
    row = torch.repeat_interleave(torch.arange(rows), pointers.diff())
    matrix = values.new_zeros(rows, columns)
    matrix[row, places] = values
    return matrix.reshape(shape)


def _check(fits: bool, found: str, expected: torch.Size) -> None:
    if not fits:
        raise ValueError(f"{found}, and should have {tuple(expected)}")


def _check_count(values: Tensor, count: int) -> None:
    if values.shape != (count,):
        raise ValueError(f"it has values of shape {tuple(values.shape)} for {count} entries")


def _part(parts: Parts, name: str) -> Tensor:
    if name not in parts:
        raise ValueError(f"its part {name!r} is missing" if name else "it is missing")
    return parts[name]


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
