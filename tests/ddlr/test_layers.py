"""The forms of a layer compute what their weight says, and hold as much as they say."""

import copy

import pytest
import torch
from torch import nn

from ddlr import LowRankLinear, PivotedLinear, SelectedLinear
from ddlr.layers import factorise, numerical_rank, store_linear


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


@pytest.mark.parametrize(
    ("dtype", "smallest"), [(torch.float32, 1e-5), (torch.float64, 1e-13)], ids=str
)
def test_numerical_rank_counts_what_is_above_rounding(dtype, smallest):
    """A singular value ten times above the noise of the entries belongs to the weight."""
    generator = torch.Generator().manual_seed(0)
    sides = torch.randn(2, 30, 4, generator=generator, dtype=torch.float64)
    left, right = torch.linalg.qr(sides).Q
    values = torch.tensor([1.0, 0.1, 1e-3, smallest], dtype=torch.float64)
    for scale in (1e-6, 1.0, 1e6):
        weight = (scale * (left * values) @ right.T).to(dtype)
        assert numerical_rank(weight) == 4
        one, other = factorise(weight)
        assert one.shape[1] == len(other) == 4
        rest = torch.linalg.matrix_norm((one @ other - weight).double(), 2)
        assert rest <= 0.3 * smallest * scale
    assert numerical_rank(torch.zeros(3, 5)) == numerical_rank(torch.zeros(0, 5)) == 0


def test_factors_share_the_singular_values_evenly():
    weight = weight_of_rank(5).double()
    left, right = factorise(weight, rank=3)
    roots = torch.diag(torch.linalg.svdvals(weight)[:3])
    assert torch.allclose(left.T @ left, roots, atol=1e-9)
    assert torch.allclose(right @ right.T, roots, atol=1e-9)


def test_zeros_that_are_no_whole_rows_or_columns_are_part_of_the_weight():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    weight[2, 1:] = weight[:3, 4] = 0
    left, right = factorise(weight)
    assert torch.allclose(left @ right, weight, atol=1e-12)


EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float16, torch.bfloat16)}
EPS |= {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}


def factors(rows: int, columns: int, rank: int, dtype=torch.float32) -> tuple:
    """Two factors with singular values that fall by a thousand, and a bias."""
    generator = torch.Generator().manual_seed(rank)
    left = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    right *= torch.logspace(0, -3, rank, dtype=torch.float64)[:, None]
    bias = torch.randn(rows, generator=generator, dtype=torch.float64)
    return left.to(dtype), right.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "rank"), [(40, 30, 8), (12, 9, 0), (7, 20, 7), (1, 6, 1), (6, 1, 1)]
)
def test_a_pivoted_layer_gives_what_its_factors_give(rows, columns, rank, dtype):
    left, right, bias = factors(rows, columns, rank, dtype)
    layer = PivotedLinear.from_factors(left, right, bias)
    inputs = torch.randn(2, 5, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    outputs = layer(inputs)
    assert outputs.dtype == dtype and outputs.shape == (2, 5, rows)
    weight = left.double() @ right.double()
    expected = inputs.double() @ weight.T + bias.double()
    # Roundings of the weight, of the pivots' outputs and of the sums, each times coefficients.
    scale = inputs.double().norm(dim=-1).max() * weight.norm() + bias.double().abs().max()
    assert (outputs.double() - expected).abs().max() <= 8 * EPS[dtype] * scale
    assert (layer.weight.double() - weight).abs().max() <= 8 * EPS[dtype] * (1e-30 + weight.norm())
    assert torch.equal(layer.bias, bias)
    assert (layer.in_features, layer.out_features, layer.rank) == (columns, rows, rank)
    dense = layer.dense()
    assert type(dense) is nn.Linear and torch.equal(dense.weight, layer.weight)
    linear = [part for part in layer.modules() if isinstance(part, nn.Linear)]
    assert sum(part.weight.numel() for part in linear) == rank * (rows + columns - rank)


def test_pivot_rows_are_stored_as_they_are_and_coefficients_stay_small():
    for rank in (1, 5, 20):
        left, right, bias = factors(60, 30, rank, torch.float64)
        layer = PivotedLinear.from_factors(left, right, bias)
        assert layer.other_rows.weight.abs().max() <= 2
        places = layer.pivots.indices
        assert torch.allclose(layer.pivot_rows.weight, (left @ right)[places], atol=1e-12)


@pytest.mark.parametrize("form", ["low rank", "pivoted", "selected"])
def test_a_form_is_saved_loaded_and_moved(form, tmp_path):
    layers = []
    for seed in (0, 1):
        left, right, bias = factors(20, 15, 4)
        left = left.roll(7 * seed, 0)
        if form == "low rank":
            layers.append(LowRankLinear.from_weight(left @ right, bias, rank=4))
            continue
        layers.append(PivotedLinear.from_factors(left, right, bias))
        if form == "selected":
            inputs, outputs = torch.rand(40) > 2, torch.rand(30) > 2
            inputs[seed : seed + 15] = outputs[2 * seed : 2 * seed + 20] = True
            layers[-1] = SelectedLinear(layers[-1], inputs, outputs)
    one, other = layers
    samples = torch.randn(3, one.in_features)
    assert not torch.equal(one(samples), other(samples))
    torch.save(one.state_dict(), tmp_path / "layer.pt")
    other.load_state_dict(torch.load(tmp_path / "layer.pt"))
    assert torch.equal(one(samples), other(samples))
    moved = copy.deepcopy(one).to(torch.float64)
    assert torch.allclose(moved(samples.double()).float(), one(samples), atol=1e-5)
    assert torch.allclose(one.dense()(samples), one(samples), atol=1e-5)
    whole = nn.Sequential(one)
    torch.save(whole, tmp_path / "whole.pt")
    assert torch.equal(torch.load(tmp_path / "whole.pt", weights_only=False)(samples), one(samples))


def test_training_a_pivoted_layer_reaches_all_that_it_holds():
    layer = PivotedLinear.from_factors(*factors(9, 7, 3))
    layer(torch.randn(4, 7)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


def test_more_pivots_than_rows_are_refused():
    with pytest.raises(ValueError, match="rank is 5; it must be at most out_features, 4"):
        PivotedLinear(7, 4, 5)


def test_outputs_without_weights_may_have_a_bias():
    small = store_linear(torch.randn(2, 3), None)
    outputs = torch.tensor([True, False, True, False])
    bias = torch.arange(4.0)
    layer = SelectedLinear(small, torch.ones(3, dtype=torch.bool), outputs, bias)
    samples = torch.randn(5, 3)
    assert torch.allclose(layer(samples), layer.dense()(samples), atol=1e-6)
    assert torch.equal(layer(samples)[:, [1, 3]], bias[[1, 3]].expand(5, 2))
