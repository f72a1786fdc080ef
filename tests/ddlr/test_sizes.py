"""Storage counts: what is not zero, in the smallest format, and nothing else."""

import pytest
import torch
from torch import nn

from ddlr import LowRankLinear
from ddlr.sizes import fewest_stored, layer_size, low_rank_storage, saves_weights


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
    assert (size.form, size.parameters) == ("low_rank", 2 * (8 + 5 - 2))
    # A bitmap of 7 inputs takes a byte, one of 9 outputs two; one of 8 says which are pivots.
    assert size.bytes == 4 * 2 * (8 + 5 - 2) + 1 + 2 + 1


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
    assert layer_size(low_rank).bytes == 4 * (4 + 2 - 1) + 2 * 2 + 1


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
    assert saves_weights(6, 10, 7)
    assert not saves_weights(7, 10, 7)


@pytest.mark.parametrize(
    ("rank", "stored"), [(0, 0), (1, 19), (2, 36), (5, 75), (9, 99), (10, 100), (12, 100)]
)
def test_a_layer_of_a_rank_is_stored_in_as_many_weights_as_it_has_degrees_of_freedom(rank, stored):
    assert fewest_stored(rank, 10, 10) == stored
    assert saves_weights(rank, 10, 10) == (stored < 100)


def test_a_low_rank_layer_of_full_rank_on_what_is_left_counts_as_dense():
    layer = LowRankLinear.from_weight(weight_of_rank(3), torch.zeros(9))
    with torch.no_grad():
        layer[1].weight[2:] = 0
    size = layer_size(layer)
    assert (size.form, size.parameters) == ("low_rank", 2 * 7)
    assert size.bytes == 4 * 2 * 7 + 2  # a bitmap of 9 outputs


def test_two_factors_never_take_fewer_bytes_than_pivots():
    for rows, columns in ((1, 9), (5, 5), (9, 1), (300, 5), (70_000, 3)):
        for rank in range(1, min(rows, columns) + 1):
            every = [torch.ones(side, dtype=torch.bool) for side in (rows, columns)]
            assert low_rank_storage(rank, *every).bytes <= 4 * rank * (rows + columns)
