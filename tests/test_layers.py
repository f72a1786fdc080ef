"""Low-rank layers compute what their weight says, and sizes are counted as they are defined."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ddlr
from ddlr import LowRankLinear
from ddlr.layers import factorise, layer_size, numerical_rank, saves_weights
from experiments.configuration import REPOSITORY
from experiments.networks import mlp_digits


def weight_of_rank(rank: int, rows: int = 9, columns: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    left = torch.randn(rows, rank, generator=generator)
    return left @ torch.randn(rank, columns, generator=generator)


@pytest.mark.parametrize("rank", [0, 1, 3, 7])
def test_low_rank_linear_is_the_linear_layer_of_its_product(rank):
    weight, bias = weight_of_rank(rank), torch.arange(9.0)
    layer = LowRankLinear.from_weight(weight, bias)
    inputs = torch.randn(5, 7)
    assert layer.rank == rank
    assert torch.allclose(layer(inputs), inputs @ weight.T + bias, atol=1e-4)
    assert torch.allclose(layer.weight, weight, atol=1e-5)
    assert [type(part) for part in layer] == [nn.Linear, nn.Linear]
    assert sum(p.numel() for p in layer.parameters()) == rank * (9 + 7) + 9


def test_truncation_is_the_best_of_its_rank():
    weight = weight_of_rank(5)
    left, right = factorise(weight, rank=2)
    error = torch.linalg.matrix_norm(weight - left @ right)
    assert error == pytest.approx(torch.linalg.svdvals(weight)[2:].norm().item(), rel=1e-4)
    assert left.norm() == pytest.approx(right.norm().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [0, 1, 6])
def test_numerical_rank_sees_through_rounding(rank, dtype):
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 80, rank, generator=generator, dtype=torch.float64)
    assert numerical_rank((left @ right.T).to(dtype)) == rank


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


def linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data.copy_(weight)
    return layer


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


def test_break_even():
    assert saves_weights(4, 10, 7)
    assert not saves_weights(5, 10, 10)


@pytest.mark.parametrize("method", ["nuclear", "fewest_weights"])
def test_a_compact_copy_stores_what_is_counted_and_gives_the_same(method, digits):
    model = mlp_digits().eval()
    path = REPOSITORY / "results/checkpoints/mlp_digits_digits_seed0.safetensors"
    model.load_state_dict(load_file(path))
    calibration = digits.calibration(200, seed=0)
    result = ddlr.compress(model, calibration, relative_tolerance=0.3, method=method)
    small = ddlr.compact(result.model)
    images = digits.held_out.images
    assert torch.allclose(small(images), result.model(images), atol=1e-5)
    weights = sum(p.numel() for p in small.parameters() if p.ndim == 2)
    assert weights == sum(report.parameters_kept for report in result.layers)
    assert weights < sum(p.numel() for p in result.model.parameters() if p.ndim == 2)
    again = ddlr.compact(small)  # nothing is left to be left out
    assert [p.shape for p in again.parameters()] == [p.shape for p in small.parameters()]
    small.load_state_dict(small.state_dict())


def test_a_compact_copy_keeps_what_has_no_zeros_and_lone_layers():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False))
    assert [type(layer) for layer in ddlr.compact(model)] == [nn.Linear] * 2
    with torch.no_grad():
        model[1].weight[:, 1] = 0
    small = ddlr.compact(model[1])
    assert isinstance(small, ddlr.SelectedLinear) and small.layer.weight.shape == (2, 2)
    inputs = torch.rand(2, 5, 3)
    assert torch.allclose(small(inputs), model[1](inputs), atol=1e-6)
