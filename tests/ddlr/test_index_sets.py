"""An index set stores itself in the fewest bytes, and comes back as it was."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddlr.index_sets import IndexSet, index_bytes, set_bytes


def mask(total: int, *indices: int) -> torch.Tensor:
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[list(indices)] = True
    return chosen


@given(st.lists(st.booleans(), max_size=40), st.integers(0, 300))
def test_it_comes_back_from_its_state_dict_and_takes_the_bytes_that_are_counted(some, more):
    chosen = torch.tensor([*some, *[False] * more], dtype=torch.bool)
    one, other = IndexSet.of(chosen), IndexSet(int(chosen.sum()), len(chosen))
    assert one.stored.nbytes == set_bytes(one.count, one.total)
    other.load_state_dict(one.state_dict())
    for each in (one, other):
        assert torch.equal(each.indices, chosen.nonzero()[:, 0])
        assert torch.equal(each.order.sort().values, torch.arange(len(chosen)))
        assert torch.equal(each.order[each.places], torch.arange(len(chosen)))
    assert list(one.state_dict()) == ["stored"]


@pytest.mark.parametrize(
    ("count", "total", "stored"),
    [
        (0, 1000, 0),
        (1000, 1000, 0),
        (2, 1000, 2 * 2),  # a list
        (2, 256, 2 * 1),
        (500, 1000, 125),  # a bitmap
        (100, 100_000, 4 * 100),
        (3, 3, 0),
    ],
)
def test_a_list_or_a_bitmap_whichever_is_smaller(count, total, stored):
    assert set_bytes(count, total) == stored == IndexSet(count, total).stored.nbytes


@pytest.mark.parametrize(("largest", "size"), [(255, 1), (256, 2), (65536, 4), (2**31, 8)])
def test_indices_take_the_smallest_integers(largest, size):
    assert index_bytes(largest) == size and index_bytes(largest - 1) <= size


@pytest.mark.parametrize(
    ("total", "stored", "kind"),
    [
        (1000, torch.tensor([5, 5], dtype=torch.uint16), "a list"),
        (1000, torch.tensor([5, 1001], dtype=torch.uint16), "a list"),
        (10, torch.tensor([255, 0], dtype=torch.uint8), "a bitmap"),
    ],
)
def test_a_state_dict_of_other_indices_is_refused(total, stored, kind):
    one = IndexSet(2 if kind == "a list" else 5, total)
    with pytest.raises(RuntimeError, match=f"different indices below {total}, as {kind}"):
        one.load_state_dict({"stored": stored})
