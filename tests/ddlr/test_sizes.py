"""Storage counts: what is not zero, in the smallest format, and nothing else."""

import pytest
import torch
from torch import nn

from ddlr import LowRankLinear
from ddlr.sizes import fewest_stored, layer_size, saves_weights


def weight_of_rank(rank: int, rows: int = 9, columns: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    left = torch.randn(rows, rank, generator=generator)
    return left @ torch.randn(rank, columns, generator=generator)


def linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data.copy_(weight)
    return layer


def test_removed_rows_and_columns_stay_exactly_zero_and_are_not_counted():
    weight = weight_of_rank(2)
    weight[3] = 0
    weight[:, [0, 5]] = 0
    layer = LowRankLinear.from_weight(weight, torch.zeros(9))
    assert not layer.weight[3].any()
    assert not layer.weight[:, [0, 5]].any()
    size = layer_size(layer)
    assert (size.form, size.parameters) == ("low_rank", 2 * (8 + 5))
    # A bitmap of 7 inputs takes a byte, one of 9 outputs two.
    assert size.bytes == 4 * 2 * (8 + 5) + 1 + 2


def test_dense_size_leaves_out_removed_rows_and_columns():
    weight = torch.ones(10, 20)
    weight[:, :5] = 0
    size = layer_size(linear(weight))
    # Which 15 of the 20 inputs: three bytes as a bitmap, 15 as a list.
    assert (size.form, size.parameters, size.bytes) == ("dense", 150, 600 + 3)


def test_few_selected_inputs_are_listed_and_all_of_them_cost_nothing():
    weight = torch.zeros(4, 1000)
    weight[:, [3, 999]] = 1.0
    assert layer_size(linear(weight)).bytes == 4 * 8 + 2 * 2  # a bitmap would take 125
    assert layer_size(linear(torch.ones(4, 1000))).bytes == 4 * 4000
    low_rank = LowRankLinear.from_weight(weight, torch.zeros(4))
    assert layer_size(low_rank).bytes == 4 * (4 + 2) + 2 * 2


def test_a_sparse_weight_with_many_values_is_smallest_with_a_bitmap():
    weight = torch.zeros(80, 300)
    weight.view(-1)[::3] = 1.0
    weight[0] = weight[:, 0] = 1.0
    nonzeros = int((weight != 0).sum())
    size = layer_size(linear(weight))
    assert (size.form, size.bytes) == ("sparse", 4 * nonzeros + 80 * 300 // 8)
    assert size.bytes < nonzeros * (4 + 2)  # column indices take two bytes


def test_sparse_size_counts_values_and_the_smallest_indices_that_fit():
    weight = torch.zeros(100, 300)
    weight.view(-1)[::50] = 1.0  # 600 nonzeros in 6 columns, which all fit one byte
    weight[0] = 1.0  # all 300 columns live: column indices need two bytes
    nonzeros = int((weight != 0).sum())
    size = layer_size(linear(weight))
    assert (size.form, size.parameters) == ("sparse", nonzeros)
    assert size.bytes == nonzeros * (4 + 2) + 101 * 2


def test_a_hardly_sparse_weight_is_cheapest_as_a_dense_array():
    weight = torch.ones(100, 300)
    weight[0, 0] = 0
    size = layer_size(linear(weight))
    assert (size.form, size.parameters, size.bytes) == ("sparse", 29999, 4 * 30000)


@pytest.mark.parametrize(("columns", "index_bytes"), [(256, 1), (257, 2)])
def test_column_indices_take_a_second_byte_when_one_does_not_tell_all_columns(columns, index_bytes):
    weight = torch.zeros(100, columns)
    for row in range(100):
        weight[row, torch.arange(5 * row, 5 * row + 5) * 13 % columns] = 1.0
    assert (weight != 0).any(dim=0).all()
    size = layer_size(linear(weight))
    assert (size.form, size.parameters) == ("sparse", 500)
    assert size.bytes == 500 * (4 + index_bytes) + 101 * 2  # a bitmap takes more than 3000


def test_break_even():
    assert saves_weights(4, 10, 7)
    assert not saves_weights(5, 10, 10)


@pytest.mark.parametrize(("rank", "stored"), [(0, 0), (2, 40), (5, 100), (7, 100)])
def test_of_two_forms_a_layer_is_stored_in_the_smaller(rank, stored):
    assert fewest_stored(rank, 10, 10) == stored
    assert saves_weights(rank, 10, 10) == (stored < 100)
