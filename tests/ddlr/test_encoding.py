"""A tensor comes back exactly from the encoding that is smallest, and from nothing damaged."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ddlr.encoding import PARTS, decode, encode
from ddlr.sizes import layer_size

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def sparse(shape: tuple[int, ...], density: float, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator)
    return (values * (torch.rand(shape, generator=generator) < density)).to(dtype)


def in_corner(tensor: torch.Tensor) -> torch.Tensor:
    tensor[len(tensor) // 2 :] = tensor[:, tensor.shape[1] // 2 :] = 0
    return tensor


def stored(parts: dict[str, torch.Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in parts.values())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=0, max_size=4),
    st.sampled_from((0.0, 0.02, 0.3, 0.9, 1.0)),
    st.sampled_from(FLOATS),
)
def test_weights_come_back_exactly(shape, density, dtype):
    tensor = sparse(tuple(shape), density, dtype)
    kind, parts = encode(tensor)
    again = decode(kind, parts, torch.empty(shape, device="meta"))
    assert again.dtype == dtype and torch.equal(again, tensor)
    assert stored(parts) <= tensor.numel() * tensor.element_size()


@settings(max_examples=60, deadline=None)
@given(
    st.sets(st.integers(0, 70_000), max_size=400),
    st.booleans(),
    st.sampled_from((torch.int64, torch.int32)),
)
def test_indices_come_back_exactly(numbers, ascending, dtype):
    tensor = torch.tensor(sorted(numbers, reverse=not ascending), dtype=dtype)
    kind, parts = encode(tensor)
    again = decode(kind, parts, torch.empty_like(tensor, device="meta"))
    assert again.dtype == dtype and torch.equal(again, tensor)


@pytest.mark.parametrize(
    ("density", "kind"), [(0.004, "csr"), (0.03, "csr"), (0.3, "bitmap"), (1.0, None)]
)
def test_a_weight_takes_the_bytes_that_are_counted_for_it(density, kind):
    layer = nn.Linear(784, 300)
    layer.weight.data = sparse((300, 784), density)
    layer.weight.data[:, 0] = layer.weight.data[0] = 1.0  # no row or column is left out
    chosen, parts = encode(layer.weight.detach())
    assert chosen == kind
    assert stored(parts) == layer_size(layer).bytes


@pytest.mark.parametrize(
    ("indices", "kind", "size"),
    [
        (torch.arange(0, 5000, 2), "marks", 625),  # the last is 4998
        (torch.arange(0, 65_000, 40), "small", 2 * 1625),
        (torch.arange(3000).flip(0), "small", 2 * 3000),
        (torch.tensor([5, -1]), None, 16),
    ],
    ids=["dense", "far apart", "not in order", "negative"],
)
def test_indices_are_bits_or_small_numbers(indices, kind, size):
    chosen, parts = encode(indices)
    assert (chosen, stored(parts)) == (kind, size)


@pytest.mark.parametrize(
    ("density", "kind"), [(0.004, "csr_of_block"), (0.3, "bitmap_of_block"), (1.0, "block")]
)
@pytest.mark.parametrize("kernel", [(), (3, 3)], ids=["linear", "convolution"])
def test_rows_and_columns_without_weights_take_no_room(density, kind, kernel):
    tensor = sparse((300, 784 // (9 if kernel else 1), *kernel), density)
    tensor[:, ::3] = tensor[:100] = 0
    chosen, parts = encode(tensor)
    assert chosen == kind
    inside = encode(tensor[100:][:, torch.arange(tensor.shape[1]) % 3 > 0])[1]
    sides = -(-(300 + tensor[0].numel()) // 8)
    assert stored(parts) <= stored(inside) + sides
    assert torch.equal(decode(kind, parts, tensor), tensor)


def damaged(kind: str) -> list[tuple[str, torch.Tensor]]:
    """A part by name, and what does not fit in its place."""
    return {
        "csr": [
            ("values", torch.ones(3)),
            ("columns", torch.full((29,), 200, dtype=torch.uint8)),
            ("columns", torch.zeros(28, dtype=torch.uint8)),
            ("pointers", torch.zeros(7, dtype=torch.uint8)),
            ("pointers", torch.arange(80, 0, -1, dtype=torch.uint8)[:51]),
        ],
        "bitmap": [
            ("values", torch.ones(3)),
            ("bitmap", torch.ones(5, dtype=torch.uint8)),
            ("bitmap", torch.ones(625)),
        ],
        "block": [
            ("values", torch.ones(3)),
            ("sides", torch.ones(5, dtype=torch.uint8)),
            ("sides", torch.zeros(19, dtype=torch.uint8)),
        ],
        "bitmap_of_block": [
            ("sides", torch.zeros(19, dtype=torch.uint8)),
            ("values", torch.ones(3)),
        ],
        "csr_of_block": [("sides", torch.ones(88)), ("columns", torch.zeros(2).byte())],
        "marks": [("marks", torch.ones(3)), ("marks", torch.ones(90, dtype=torch.uint8))],
        "small": [("small", torch.ones(7, dtype=torch.uint8))],
    }[kind]


@pytest.mark.parametrize("kind", PARTS)
def test_parts_that_make_no_such_tensor_are_refused(kind):
    tensor = {
        "csr": sparse((50, 100), 0.006),
        "bitmap": sparse((50, 100), 0.5),
        "block": in_corner(sparse((50, 100), 1.0)),
        "bitmap_of_block": in_corner(sparse((50, 100), 0.5)),
        "csr_of_block": in_corner(sparse((300, 400), 0.01)),
        "marks": torch.arange(900),
        "small": torch.arange(900).flip(0),
    }[kind]
    chosen, parts = encode(tensor)
    assert chosen == kind
    for name, wrong in damaged(kind):
        with pytest.raises(ValueError):
            decode(kind, {**parts, name: wrong}, tensor)
    for name in parts:
        with pytest.raises(ValueError, match=f"part '{name}' is missing"):
            decode(kind, {key: one for key, one in parts.items() if key != name}, tensor)
    with pytest.raises(ValueError, match=r"shape|rows|which are|values of"):
        decode(kind, parts, tensor.new_empty(7, 3))


def test_numbers_that_do_not_fit_their_type_are_refused():
    numbers = torch.arange(299, -1, -1)
    with pytest.raises(ValueError, match=r"do not fit torch\.uint8"):
        decode("small", {"small": numbers}, numbers.to(torch.uint8))
