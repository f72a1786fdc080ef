"""Kernels that are split in columns and rows: k x 1 and 1 x k."""

import itertools

import pytest
import torch
from torch import nn

import ddlr
from ddlr import LowRankConvolution, SeparableConvolution
from ddlr.capturing import capture_layers
from ddlr.constraints import OutputSet
from ddlr.convolutions import convolution_of, patches
from ddlr.inputs import CentredInputs
from ddlr.layers import SeparableLinear
from ddlr.linear_maps import as_layer
from ddlr.problem import WarmStart
from ddlr.separable import Kernel, PatchMoments, SeparableFit, smaller_separable

GEOMETRIES = [
    {"kernel_size": size, "stride": stride, "padding": padding, "dilation": spread}
    for size, stride, padding, spread in itertools.product(
        ((3, 3), (2, 5)), (1, (2, 3)), (0, (2, 1), "same"), (1, (2, 1))
    )
    if padding != "same" or stride == 1
]
MODES = ("zeros", "circular", "reflect", "replicate")


@pytest.fixture(scope="module")
def inputs(digits) -> torch.Tensor:
    return digits.calibration(200, seed=0)


@pytest.fixture(scope="module")
def trained(digits) -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding="same", padding_mode="reflect"),
        nn.ReLU(),
        nn.Conv2d(16, 12, (2, 3), stride=2, bias=False),
        nn.Flatten(),
        nn.Linear(12 * 4 * 3, 10),
    )
    optimiser = torch.optim.Adam(network.parameters(), lr=5e-3)
    images, labels = digits.train.images, digits.train.labels
    for _ in range(60):
        loss = nn.functional.cross_entropy(network(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return network.eval()


@pytest.fixture(scope="module")
def compressed(trained, inputs) -> ddlr.CompressionResult:
    return ddlr.compress(
        trained, inputs, relative_tolerance=0.2, method="lowest_rank", layers="all"
    )


@torch.no_grad()
def make_separable(convolution: nn.Conv2d, terms: int) -> None:
    """Give it a kernel of so many products of a column and a row."""
    rows, channels, height, width = convolution.weight.shape
    down, across = torch.randn(terms, channels, height), torch.randn(terms, rows, width)
    convolution.weight.copy_(torch.einsum("sci,soj->ocij", down, across) / (channels * height))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@torch.no_grad()
def test_the_split_equals_one_convolution_of_the_product_kernel(geometry, mode):
    torch.manual_seed(0)
    split = SeparableConvolution(3, 5, 4, padding_mode=mode, **geometry)
    one = nn.Conv2d(3, 5, padding_mode=mode, **geometry)
    one.weight.copy_(split.weight)
    one.bias.copy_(split.bias)
    for shape in ((2, 3, 9, 11), (3, 9, 11)):
        given = torch.randn(shape)
        torch.testing.assert_close(split(given), one(given), atol=1e-5, rtol=1e-5)
        rows = as_layer(split)(patches(split.whole(), given))
        expected = one(given).movedim(-3, -1).flatten(0, -2)
        torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(as_layer(split).weight, one.weight.flatten(1))
    again = convolution_of(one, as_layer(split))
    assert str(again) == str(split)
    assert torch.equal(again(given), split(given))


@torch.no_grad()
def test_a_weight_is_factorised_with_its_terms_and_zeros():
    torch.manual_seed(0)
    convolution = nn.Conv2d(6, 20, 3)
    make_separable(convolution, 2)
    convolution.weight[3] = 0
    convolution.weight[:, 1] = 0
    weight = convolution.weight.flatten(1)
    layer = SeparableLinear.from_weight(weight, convolution.bias, (6, 3, 3))
    assert layer.terms == 2
    torch.testing.assert_close(layer.weight, weight)
    assert torch.equal(layer.weight == 0, weight == 0)
    kernel = Kernel((6, 3, 3), 5)
    assert kernel.terms_of(weight) == kernel.terms_of(weight[:, weight.any(dim=0)]) == 2
    assert kernel.terms_of(torch.randn(20, 54)) is None
    assert kernel.terms_of(torch.zeros(20, 54)) is None


@torch.no_grad()
def test_a_sweep_lowers_the_loss_to_that_of_least_squares(trained, inputs):
    """The loss of each step is computed anew, and in the end no gradient is left on the factors."""
    captured = capture_layers(trained, inputs, layers=["2"], max_samples=2000)
    layer = captured.layers[0]
    outputs = OutputSet(layer.targets, 0.0, layer.activation, "hinge")
    centred = CentredInputs.of(layer.inputs)
    moments = PatchMoments(centred, (8, 3, 3), layer.weight, 1e-2)
    ridge = 1e-2 * centred.centred.square().sum().item() / 72
    fit = SeparableFit(moments, outputs, layer.weight, 6, layer.bias + layer.weight @ centred.mean)
    losses = []
    for _ in range(150):
        losses.append(fit.loss)
        fit.step()
        weight, bias = fit.answer()
        square = outputs.deviation(layer.inputs @ weight.T + bias).square().sum().item()
        assert fit.square == pytest.approx(square, rel=1e-3)
        expected = square + ridge * (weight - layer.weight).square().sum().item()
        assert fit.loss == pytest.approx(expected, rel=1e-3)
        assert Kernel((8, 3, 3), 8).terms_of(weight) == 6
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]
    split = SeparableLinear.from_weight(*fit.answer(), (8, 3, 3))
    with torch.enable_grad():
        produced = split(layer.inputs)
        loss = (produced - outputs.nearest(produced.detach())).square().sum()
        loss = loss + ridge * (split.weight - layer.weight).square().sum()
        loss.backward()
    for factor in (split.down, split.across):
        turned = (factor.grad * factor).abs().sum() / loss  # relative to a change of its own size
        assert turned < 0.05


@torch.no_grad()
def test_the_fewest_terms_are_within_any_radius(trained, inputs):
    layer = capture_layers(trained, inputs, layers=["2"], max_samples=2000).layers[0]
    start = WarmStart(layer.weight, layer.bias)
    found = []
    for activation in ("relu", "none"):
        produced = layer.inputs @ layer.weight.T + layer.bias
        targets = produced.relu() if activation == "relu" else produced
        for share in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4):
            radius = share * targets.norm().item()
            options = {"activation": activation, "warm_start": start}
            lowest = ddlr.lowest_rank(layer.inputs, targets, radius, **options)
            kernel = Kernel((8, 3, 3), 8)
            solved = smaller_separable(
                lowest, layer.inputs, targets, radius, kernel=kernel, **options
            )
            if solved is None:
                continue
            moved = layer.inputs @ solved.weight.T + solved.bias
            error = moved - targets
            if activation == "relu":
                error = torch.where(targets > 0, error, moved.relu())
            assert error.norm().item() <= radius * (1 + 1e-5)
            assert solved.violation == pytest.approx(0, abs=1e-5)
            assert solved.objective == kernel.terms_of(solved.weight)
            found.append((activation, solved.objective))
    terms = [[count for name, count in found if name == each] for each in ("relu", "none")]
    for counts in terms:
        assert len(counts) > 3 and counts == sorted(counts, reverse=True)
    assert sum(terms[0]) < sum(terms[1])  # errors where the unit is off are free


@torch.no_grad()
def test_bounds_are_kept_and_reports_are_true(trained, inputs, compressed):
    given = inputs
    reports = {report.name: report for report in compressed.layers}
    for name, layer in trained.named_children():
        outputs = layer(given)
        if name in reports:
            moved, report = compressed.model.get_submodule(name)(given), reports[name]
            if name in ("0", "2"):
                outputs, moved = outputs.relu(), moved.relu()
            error = ((moved - outputs).norm() / outputs.norm()).item()
            assert error <= 0.2 * 1.002
            assert report.violation == 0
            assert report.relative_error == pytest.approx(error, rel=0.05)
        given = layer(given)
    for name in ("2", "4"):
        split, report = compressed.model.get_submodule(name), reports[name]
        assert isinstance(split, SeparableConvolution)
        assert report.form == "separable"
        weights = sum(int((part.weight != 0).sum()) for part in split)
        assert report.parameters_kept == weights < report.parameters_dense
        assert 4 * weights <= report.bytes_stored <= 4 * sum(x.weight.numel() for x in split)
        assert report.rank == torch.linalg.matrix_rank(split.weight.flatten(1))
        assert report.nonzeros == int((split.weight != 0).sum())


def test_the_form_of_fewer_weights_is_taken(trained, inputs, compressed):
    nuclear = ddlr.compress(trained, inputs, relative_tolerance=0.2, method="nuclear", layers="all")
    assert isinstance(nuclear.model[2], LowRankConvolution)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(6, 20, 5), nn.ReLU(), nn.Conv2d(20, 16, 3)).eval()
    make_separable(network[0], 3)
    with torch.no_grad():  # of rank 1, as a matrix: 1 x 1 behind it takes fewer
        network[2].weight.copy_(torch.randn(16, 1, 1, 1) * network[2].weight[:1])
    given = torch.randn(50, 6, 11, 11)
    for refit in ("none", "layer"):
        result = ddlr.compress(
            network, given, relative_tolerance=0.05, method="lowest_rank", layers="all", refit=refit
        )
        first, second = result.layers
        assert isinstance(result.model[0], SeparableConvolution)
        assert first.form == "separable"
        assert first.parameters_kept == 3 * (6 * 5 + 20 * 5) < first.rank * (150 + 20 - first.rank)
        assert isinstance(result.model[2], LowRankConvolution)
        assert second.form == "low_rank" and second.rank == 1
        assert first.violation == second.violation == 0


def test_channels_without_inputs_and_without_outputs_are_left_out(inputs):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3)).eval()
    for place in (0, 2):
        make_separable(network[place], 2)
    with torch.no_grad():
        network[0].bias[4] = -100.0  # never on
    given = torch.cat([inputs, 0 * inputs, inputs.flip(-1)], dim=1)
    result = ddlr.compress(
        network, given, relative_tolerance=0.1, method="lowest_rank", layers="all"
    )
    first, second = result.model[0], result.model[2]
    assert isinstance(first, SeparableConvolution) and isinstance(second, SeparableConvolution)
    assert not first.weight[:, 1].any() and not first.weight[4].any()
    assert not second.weight[:, 4].any()
    assert result.layers[0].parameters_kept == first.terms * (2 * 3 + 11 * 3)
    assert result.layers[1].parameters_kept == second.terms * (11 * 3 + 8 * 3)
    assert all(report.violation == 0 for report in result.layers)


def test_a_refit_of_the_layer_lowers_its_error(trained, inputs, compressed):
    refitted = ddlr.compress(
        trained, inputs, relative_tolerance=0.2, method="lowest_rank", layers="all", refit="layer"
    )
    for before, after in zip(compressed.layers, refitted.layers, strict=True):
        assert after.form == before.form and after.parameters_kept == before.parameters_kept
        assert after.relative_error <= before.relative_error * (1 + 1e-5)
    assert refitted.layers[1].relative_error < compressed.layers[1].relative_error


def test_a_refit_of_the_network_moves_both_parts(trained, inputs, compressed):
    refitted = ddlr.refit_network(
        trained, compressed.model, inputs, ["2"], output="classes", epochs=1
    )
    for before, after in zip(compressed.model[2], refitted[2], strict=True):
        assert not torch.equal(before.weight, after.weight)
    assert torch.equal(refitted[4].weight, compressed.model[4].weight)


def test_a_split_kernel_is_compressed_again(trained, inputs, compressed):
    options = {"method": "lowest_rank", "layers": "all"}
    again = ddlr.compress(compressed.model, inputs, relative_tolerance=0.4, **options)
    assert isinstance(again.model[2], SeparableConvolution)
    assert 0 < again.model[2].terms < compressed.model[2].terms
    assert again.model[2].padding_mode == "reflect"
    assert all(report.violation == 0 for report in again.layers)
    for tolerance, method in ((0.0, "nuclear"), (1e-3, "lowest_rank")):
        same = ddlr.compress(
            compressed.model, inputs, relative_tolerance=tolerance, method=method, layers=["2"]
        )
        assert isinstance(same.model[2], SeparableConvolution)
        assert same.layers[0].parameters_kept == compressed.layers[1].parameters_kept
    cascade = ddlr.compress(trained, inputs, relative_tolerance=0.2, order="cascade", **options)
    assert isinstance(cascade.model[2], SeparableConvolution)


def test_files_compaction_and_export(trained, inputs, compressed, tmp_path):
    path = tmp_path / "small.safetensors"
    ddlr.save(compressed, path)
    for loaded in (ddlr.load(path), ddlr.load(path, trained)):
        loaded = getattr(loaded, "model", loaded)
        assert isinstance(loaded[2], SeparableConvolution)
        torch.testing.assert_close(loaded(inputs), compressed.model(inputs), atol=1e-4, rtol=1e-4)
    small = ddlr.compact(compressed.model)
    assert isinstance(small[2], SeparableConvolution)
    assert torch.equal(small[2](small[:2](inputs)), compressed.model[2](small[:2](inputs)))
    exported = torch.export.export(compressed.model, (inputs[:4],)).module()
    torch.testing.assert_close(exported(inputs[:4]), compressed.model(inputs[:4]))
    ddlr.to_onnx(compressed, inputs[:2], tmp_path / "small.onnx")  # which compares outputs
