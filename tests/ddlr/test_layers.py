"""Low-rank layers compute what their weight says, and sizes are counted as they are defined."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ddlr
from ddlr import LowRankLinear
from ddlr.layers import factorise, numerical_rank
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


def linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data.copy_(weight)
    return layer


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


@pytest.mark.parametrize("low_rank", [True, False], ids=["low rank", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("inputs_gone", "outputs_gone"), [([0, 3], []), ([], [1, 4]), ([0, 3], [1, 4])], ids=str
)
def test_a_compact_layer_gives_what_its_layer_gives(low_rank, dtype, inputs_gone, outputs_gone):
    generator = torch.Generator().manual_seed(0)
    left, right, bias = (
        torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((6, 2), (2, 5), (6,))
    )
    weight = left @ right
    weight[:, inputs_gone], weight[outputs_gone] = 0, 0
    bias[outputs_gone[:1]] = 0  # the other output is left with its bias alone
    if low_rank:
        layer = LowRankLinear.from_weight(weight, bias)
    else:
        layer = nn.Linear(5, 6, dtype=dtype)
        layer.load_state_dict({"weight": weight, "bias": bias})
    model = nn.Sequential(layer, nn.ReLU())
    small = ddlr.compact(model)
    assert model[0] is layer and isinstance(small[0], ddlr.SelectedLinear)
    inputs = torch.randn(4, 5, generator=generator).to(dtype)
    assert small(inputs).dtype == dtype
    assert torch.allclose(small(inputs), model(inputs), atol=1e-6)
    kept_in, kept_out = 5 - len(inputs_gone), 6 - len(outputs_gone[:1])
    stored = sum(p.numel() for p in small[0].layer.parameters() if p.ndim == 2)
    assert stored == (2 * (kept_in + kept_out) if low_rank else kept_in * kept_out)
    assert len(small[0].layer.bias) == kept_out
