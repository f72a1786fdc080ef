"""A compact copy gives the same outputs, and stores what is counted, to the byte."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ddlr
from ddlr import LowRankLinear, PivotedLinear, SelectedLinear, SparseLinear
from ddlr.layers import store_linear
from ddlr.sizes import dense_storage, layer_size
from experiments.configuration import REPOSITORY
from experiments.networks import mlp_digits


def bytes_held(layer: nn.Module) -> int:
    """What the state dict of a layer takes, without biases."""
    state = layer.state_dict()
    return sum(value.nbytes for name, value in state.items() if not name.endswith("bias"))


@pytest.mark.parametrize("method", ["nuclear", "fewest_weights"])
def test_a_compact_copy_stores_what_is_counted_and_gives_the_same(method, digits):
    model = mlp_digits().eval()
    path = REPOSITORY / "results/checkpoints/mlp_digits_digits_seed0.safetensors"
    model.load_state_dict(load_file(path))
    calibration = digits.calibration(200, seed=0)
    result = ddlr.compress(model, calibration, relative_tolerance=0.2, method=method)
    small = ddlr.compact(result.model)
    images = digits.held_out.images
    assert torch.allclose(small(images), result.model(images), atol=1e-4)
    weights = sum(p.numel() for p in small.parameters() if p.ndim == 2)
    assert weights == sum(report.parameters_kept for report in result.layers)
    assert weights < sum(p.numel() for p in result.model.parameters() if p.ndim == 2)
    for report in result.layers:
        assert bytes_held(small.get_submodule(report.name)) == report.bytes_stored
        assert layer_size(small.get_submodule(report.name)).bytes == report.bytes_stored
    again = ddlr.compact(small)  # nothing is left to be made smaller
    assert [p.shape for p in again.parameters()] == [p.shape for p in small.parameters()]
    assert [type(one) for one in again.modules()] == [type(one) for one in small.modules()]
    small.load_state_dict(small.state_dict())


def live(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of which all, most or few are True, in turn."""
    generator = torch.Generator().manual_seed(seed)
    shares = ((1, 1), (0.9, 0.9), (0.1, 1), (1, 0.1), (0.02, 0.5), (0.98, 1))[seed % 6]
    return tuple(
        torch.rand(side, generator=generator) <= share
        for side, share in zip((rows, columns), shares, strict=True)
    )


@pytest.mark.parametrize("rank", [0, 1, 2, 3, 7, 30, 100])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("rows", "columns"), [(10, 10), (9, 300), (300, 9), (400, 300), (100, 1000)]
)
def test_low_rank_layers_take_the_bytes_that_are_counted(rows, columns, seed, rank):
    generator = torch.Generator().manual_seed(seed)
    rank = min(rank, rows, columns)
    layer = LowRankLinear(columns, rows, rank)
    kept_rows, kept_columns = live(rows, columns, seed)
    with torch.no_grad():
        layer[1].weight.copy_(torch.randn(rows, rank, generator=generator) * kept_rows[:, None])
        layer[0].weight.copy_(torch.randn(rank, columns, generator=generator) * kept_columns)
    small = ddlr.compact(nn.Sequential(layer))[0]
    size = layer_size(layer)
    assert bytes_held(small) == size.bytes == layer_size(small).bytes
    assert size.parameters == layer_size(small).parameters
    inputs = torch.randn(3, columns, generator=generator)
    expected = layer(inputs)
    assert (small(inputs) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("rows", "columns"), [(10, 10), (9, 300), (400, 300)])
def test_dense_layers_take_the_bytes_that_are_counted(rows, columns, seed):
    kept_rows, kept_columns = live(rows, columns, seed)
    layer = store_linear(1.0 * (kept_rows[:, None] & kept_columns), torch.ones(rows))
    small = ddlr.compact(nn.Sequential(layer))[0]
    assert bytes_held(small) == layer_size(layer).bytes == layer_size(small).bytes


def test_a_compact_copy_keeps_what_has_no_zeros_and_lone_layers():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False))
    assert [type(layer) for layer in ddlr.compact(model)] == [nn.Linear] * 2
    with torch.no_grad():
        model[1].weight[:, 1] = 0
    small = ddlr.compact(model[1])
    assert isinstance(small, SelectedLinear) and small.layer.weight.shape == (2, 2)
    inputs = torch.rand(2, 5, 3)
    assert torch.allclose(small(inputs), model[1](inputs), atol=1e-6)


@pytest.mark.parametrize("low_rank", [True, False], ids=["low rank", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alone", [True, False], ids=["bias alone", "no bias alone"])
@pytest.mark.parametrize(
    ("inputs_gone", "outputs_gone"), [([0, 3], []), ([], [1, 4]), ([0, 3], [1, 4])], ids=str
)
def test_a_compact_layer_gives_what_its_layer_gives(
    low_rank, dtype, inputs_gone, outputs_gone, alone
):
    generator = torch.Generator().manual_seed(0)
    left, right, bias = (
        torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((6, 2), (2, 5), (6,))
    )
    weight = left @ right
    weight[:, inputs_gone], weight[outputs_gone] = 0, 0
    bias[outputs_gone[alone:]] = 0  # an output without weights may have a bias
    if low_rank:
        layer = LowRankLinear.from_weight(weight, bias)
    else:
        layer = store_linear(weight, bias)
    model = nn.Sequential(layer, nn.ReLU())
    small = ddlr.compact(model)
    assert model[0] is layer and isinstance(small[0], SelectedLinear)
    inputs = torch.randn(4, 5, generator=generator).to(dtype)
    assert small(inputs).dtype == dtype
    assert torch.allclose(small(inputs), model(inputs), atol=1e-6)
    assert torch.equal(small[0].bias, bias)
    kept_in, kept_out = 5 - len(inputs_gone), 6 - len(outputs_gone)
    stored = sum(p.numel() for p in small[0].layer.parameters() if p.ndim == 2)
    assert stored == (2 * (kept_in + kept_out - 2) if low_rank else kept_in * kept_out)
    biases = sum(p.numel() for p in small[0].parameters() if p.ndim == 1)
    assert biases == (6 if alone and outputs_gone else kept_out)


@pytest.mark.parametrize(
    ("kept", "form"), [(0.02, SparseLinear), (0.08, SparseLinear), (0.2, nn.Linear)]
)
def test_a_layer_with_few_weights_runs_on_these_alone(kept, form):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(100, 300, generator=generator)
    weight *= torch.rand(100, 300, generator=generator) < kept
    model = nn.Sequential(store_linear(weight, torch.ones(100)), nn.ReLU())
    small = ddlr.compact(model)
    assert type(small[0]) is form
    inputs = torch.randn(5, 300, generator=generator)
    assert torch.allclose(small(inputs), model(inputs), atol=1e-4)
    assert bytes_held(small) <= dense_storage(*((weight != 0).any(dim=1 - d) for d in (0, 1))).bytes
    assert layer_size(small[0]) == layer_size(model[0])


def test_a_sparse_layer_that_is_smaller_as_an_array_stays_one():
    weight = torch.zeros(40, 40)
    weight[:2, :2] = torch.tensor([[1.0, 0], [0, 1]])  # half of what is left
    assert not isinstance(ddlr.compact(store_linear(weight, None)), SparseLinear)


def shares_a_weight() -> nn.Module:
    layer = half_empty()
    model = nn.Sequential(layer, nn.Linear(6, 6))
    model[1].weight = layer.weight
    return model


def shares_a_factor() -> nn.Module:
    layer = LowRankLinear.from_weight(half_empty().weight.detach(), torch.zeros(6))
    model = nn.Sequential(layer, nn.Linear(6, layer.rank))
    model[1].weight = layer[0].weight
    return model


def computes_its_weight() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(half_empty()))


def has_its_own_forward() -> nn.Module:
    class Twice(nn.Linear):
        def forward(self, inputs):
            return 2 * super().forward(inputs)

    model = nn.Sequential(Twice(6, 6))
    model[0].load_state_dict(half_empty().state_dict())
    return model


def without_values() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6, device="meta"))


def half_empty() -> nn.Linear:
    weight = torch.randn(6, 6)
    weight[:, :3] = 0
    return store_linear(weight, torch.ones(6))


@pytest.mark.parametrize(
    "build",
    [shares_a_weight, shares_a_factor, computes_its_weight, has_its_own_forward, without_values],
)
def test_layers_that_can_not_be_changed_stay(build):
    model = build()
    small = ddlr.compact(model)
    assert [type(one) for one in small.modules()] == [type(one) for one in model.modules()]


def test_a_low_rank_layer_inside_a_selection_becomes_pivoted():
    left, right = torch.randn(9, 2), torch.randn(2, 8)
    inner = LowRankLinear.from_weight(left @ right, torch.zeros(9))
    layer = SelectedLinear(inner, torch.arange(20) < 8, torch.arange(9) >= 0)
    small = ddlr.compact(layer)
    assert isinstance(small.layer, PivotedLinear)
    inputs = torch.randn(4, 20)
    assert torch.allclose(small(inputs), layer(inputs), atol=1e-5)
