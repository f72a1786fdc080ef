"""Convolutions are linear maps on patches, and are compressed as such."""

import itertools

import pytest
import torch
from torch import nn

import ddlr
import nettrim
from ddlr import LowRankConvolution, LowRankLinear
from ddlr.capturing import capture_layers
from ddlr.convolutions import MOST_PATCHES, PATCHES_PER_INPUT, convolution_of, patches
from ddlr.linear_maps import as_layer, kind_of, weight_and_bias
from experiments.networks import lenet5

SIDES = {nn.Conv1d: (13,), nn.Conv2d: (9, 11)}
PADDINGS = (0, 2, "same")
GEOMETRIES = [
    {"kernel_size": size, "stride": stride, "padding": padding, "dilation": spread}
    for size, stride, padding, spread in itertools.product(
        (1, 3, 4), (1, 2), (0, 2, "same"), (1, 2)
    )
    if padding != "same" or stride == 1
]
MODES = ("zeros", "circular", "reflect", "replicate")


def made(kind: type[nn.Module], seed: int = 0, channels: tuple[int, int] = (3, 5), **geometry):
    torch.manual_seed(seed)
    return kind(*channels, **geometry)


def images(kind: type[nn.Module], *samples: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*samples, 3, *SIDES[kind], generator=generator)


@pytest.fixture(scope="module")
def inputs(digits) -> torch.Tensor:
    return digits.calibration(300, seed=0)


@pytest.fixture(scope="module")
def trained(digits) -> nn.Sequential:
    """A ReLU behind a maximum, one directly behind a convolution, and a strided one without."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(12, 24, 3, padding="same", padding_mode="reflect"),
        nn.ReLU(),
        nn.Conv2d(24, 16, 2, stride=2, bias=False),
        nn.AvgPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    optimiser = torch.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(8):
        for some in torch.randperm(len(digits.train)).split(100):
            loss = nn.functional.cross_entropy(
                network(digits.train.images[some]), digits.train.labels[some]
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return network.eval()


# --- patches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [(4,), ()], ids=["batch", "one image"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", SIDES)
def test_patches_times_the_kernel_are_the_outputs(kind, mode, samples):
    given = images(kind, *samples)
    for geometry, bias in itertools.product(GEOMETRIES, (True, False)):
        layer = made(kind, bias=bias, padding_mode=mode, **geometry)
        outputs, one = layer(given), kind_of(layer)
        rows = one.input_rows(layer, given, None)
        weight, offset = weight_and_bias(layer)
        assert weight.shape == one.features(layer)[::-1]
        expected = one.output_rows(layer, outputs, None)
        torch.testing.assert_close(rows @ weight.T + offset, expected, atol=1e-5, rtol=1e-5)
        assert one.leading_shape(layer, outputs) == (*samples, *outputs.shape[-len(SIDES[kind]) :])
        some = torch.tensor([0, 2, len(rows) - 1])
        assert torch.equal(one.input_rows(layer, given, some), rows[some])
        assert torch.equal(one.output_rows(layer, outputs, some), expected[some])


def test_some_patches_of_large_images_take_no_more_memory_than_these():
    layer = nn.Conv2d(1, 1, 65)
    given = torch.randn(1, 1, 4000, 4000)  # all patches of it would take 260 GB
    rows = patches(layer, given, torch.tensor([0, 3936 * 3936 - 1]))
    assert torch.equal(rows[0], given[0, 0, :65, :65].flatten())
    assert torch.equal(rows[1], given[0, 0, -65:, -65:].flatten())


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", SIDES)
def test_a_low_rank_convolution_gives_what_its_layer_gives_on_patches(kind, mode, rank):
    for geometry, samples in itertools.product(GEOMETRIES, [(4,), ()]):
        original = made(kind, padding_mode=mode, **geometry)
        layer = LowRankLinear.from_weight(*weight_and_bias(original), rank)
        given = images(kind, *samples)
        convolution = kind_of(original).wrapped(original, layer)
        outputs, one = convolution(given), kind_of(convolution)
        assert outputs.shape == original(given).shape
        rows = one.input_rows(convolution, given, None)
        assert torch.equal(rows, kind_of(original).input_rows(original, given, None))
        torch.testing.assert_close(
            one.output_rows(convolution, outputs, None), layer(rows), atol=1e-5, rtol=1e-5
        )
        again = as_layer(convolution)
        assert type(again) is LowRankLinear and again.rank == rank
        torch.testing.assert_close(again.weight, layer.weight)
        torch.testing.assert_close(convolution.weight.flatten(1), layer.weight)
        small = ddlr.compact(convolution)
        torch.testing.assert_close(small(given), outputs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(small.weight, convolution.weight, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(as_layer(small).weight, layer.weight, atol=1e-5, rtol=1e-5)


def test_a_layer_of_another_form_is_no_convolution():
    with pytest.raises(TypeError, match="can not be stored as a Bilinear"):
        convolution_of(nn.Conv2d(1, 2, 3), nn.Bilinear(9, 1, 2))


# --- which are taken -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.Conv2d(4, 8, 3, padding=1, groups=2), "is a Conv2d of 2 groups"),
        (nn.ConvTranspose2d(4, 8, 3, padding=1), "is a ConvTranspose2d"),
        (nn.Sequential(nn.Unflatten(1, (4, 1)), nn.Conv3d(4, 8, 1), nn.Flatten(1, 2)), "Conv3d"),
    ],
    ids=["groups", "transposed", "three sides"],
)
def test_other_convolutions_are_left_out_with_the_reason(layer, why):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), layer).eval()
    name = "2.1" if isinstance(layer, nn.Sequential) else "2"
    given = torch.randn(20, 1, 6, 6)
    with pytest.raises(ValueError, match=f"layer '{name}' .*{why}"):
        ddlr.compress(network, given, relative_tolerance=0.3, layers=["0", name])
    for layers in ("all", ["*"]):
        with pytest.warns(UserWarning, match="left as it is, and not compressed"):
            result = ddlr.compress(network, given, relative_tolerance=0.3, layers=layers)
        assert [report.name for report in result.layers] == ["0"]
        [skipped] = result.skipped
        assert skipped.name == name and why in skipped.reason
        assert skipped.status == "not_replaceable"
        assert skipped.parameters == network.get_submodule(name).weight.numel()


def test_convolutions_are_taken_only_if_they_are_asked_for(trained, inputs):
    names = [["9"], ["0", "3", "5", "9"], ["0"], ["3", "5"]]
    chosen = [None, "all", ["0"], lambda _name, layer: getattr(layer, "in_channels", 1) > 1]
    for layers, expected in zip(chosen, names, strict=True):
        captured = capture_layers(trained, inputs, layers=layers)
        assert [layer.name for layer in captured.layers] == expected


# --- what is captured ------------------------------------------------------------------------


def test_a_relu_is_found_behind_a_maximum_and_not_behind_a_mean(trained, inputs):
    captured = capture_layers(trained, inputs, layers="all")
    activations = {layer.name: layer.activation for layer in captured.layers}
    assert activations == {"0": "relu", "3": "relu", "5": "none", "9": "none"}


def test_patches_are_capped_and_the_same_in_each_pass():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1))
    batches = [torch.randn(60, 3, 16, 16), torch.randn(40, 3, 16, 16)]
    captured = capture_layers(network, batches, layers="all")
    for layer in captured.layers:
        assert len(layer.inputs) == MOST_PATCHES
        produced = layer.inputs @ layer.weight.T + layer.bias
        produced = produced.relu() if layer.activation == "relu" else produced
        torch.testing.assert_close(produced, layer.targets, atol=1e-5, rtol=1e-5)
    assert torch.equal(captured.layers[0].targets, captured.layers[1].inputs)
    few = capture_layers(network, batches, layers="all", max_samples=500)
    assert {len(layer.inputs) for layer in few.layers} == {500}
    wide = nn.Conv2d(400, 1, 3)
    assert kind_of(wide).most_rows(wide) == PATCHES_PER_INPUT * 400 * 9 > MOST_PATCHES


def test_outputs_keep_their_order_in_memory_where_a_stand_in_gives_them():
    class Last(nn.Module):
        def forward(self, images):
            return images.permute(0, 2, 3, 1).view(len(images), -1)  # of no other order in memory

    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), Last(), nn.Linear(8 * 36, 4)).eval()
    network = network.to(memory_format=torch.channels_last)
    given = torch.randn(200, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    result = ddlr.compress(
        network, given, relative_tolerance=0.7, method="lowest_rank", layers="all"
    )
    assert [report.name for report in result.layers] == ["0", "2"] and not result.skipped
    assert isinstance(result.model[0], LowRankConvolution)


# --- whole networks --------------------------------------------------------------------------


def errors_on_patches(network: nn.Module, result: ddlr.CompressionResult, inputs: torch.Tensor):
    """Errors of convolutions that are given what the original network gives, by torch alone."""
    after = {"0": [1, 2], "3": [4], "5": [], "9": []}
    given, found = inputs, {}
    for name, layer in network.named_children():
        if name in after:
            outputs, moved = layer(given), result.model.get_submodule(name)(given)
            if after[name]:
                outputs, moved = outputs.relu(), moved.relu()
            found[name] = ((moved - outputs).norm() / outputs.norm()).item()
        given = layer(given)
    return found


@pytest.mark.parametrize("method", ["nuclear", "lowest_rank", "nettrim"])
@torch.no_grad()
def test_the_bound_of_each_convolution_is_kept(trained, inputs, method):
    options = {"relative_tolerance": 0.2, "layers": "all"}
    if method == "nettrim":
        result = nettrim.prune(trained, inputs, **options)
    else:
        result = ddlr.compress(trained, inputs, method=method, refit="layer", **options)
    found = errors_on_patches(trained, result, inputs)
    kept = {report.name: report for report in result.layers}
    assert set(kept) == {"0", "3", "5", "9"}
    for name, report in kept.items():
        assert found[name] <= 0.2 * 1.002
        # Rows that are left out by the cap are none here but in the first two.
        assert report.relative_error == pytest.approx(found[name], rel=0.05, abs=1e-6)
    kinds = [type(result.model.get_submodule(name)) for name in ("3", "5")]
    if method == "nettrim":
        assert kinds == [nn.Conv2d, nn.Conv2d]
        assert kept["3"].form == "sparse"
    else:
        assert kinds == [LowRankConvolution, LowRankConvolution]
    weights = [each for each in ddlr.compact(result.model).parameters() if each.ndim > 1]
    stored = sum(int((each != 0).sum()) for each in weights)
    dense = sum(trained[place].weight.numel() for place in (0, 3, 5, 9))
    assert sum(report.parameters_kept for report in result.layers) == stored < dense
    assert sum(report.parameters_dense for report in result.layers) == dense


def test_fewest_weights_takes_the_lowest_rank_of_convolutions(trained, inputs):
    options = {"relative_tolerance": 0.2, "layers": "all"}
    fewest = ddlr.compress(trained, inputs, method="fewest_weights", **options)
    lowest = ddlr.compress(trained, inputs, method="lowest_rank", **options)
    for name in ("0", "3", "5"):
        ours, theirs = (as_layer(each.model.get_submodule(name)) for each in (fewest, lowest))
        assert torch.equal(ours.weight, theirs.weight)
    # Single outputs of convolutions are not dropped, whatever the next layer reads.
    assert all(report.inputs_dropped == 0 for report in fewest.layers[:3])
    cascade = ddlr.compress(trained, inputs, method="fewest_weights", order="cascade", **options)
    assert isinstance(cascade.model[3], LowRankConvolution)


def test_a_dropped_output_of_a_convolution_of_one_place_is_kept():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 30, 4), nn.ReLU(), nn.Flatten(), nn.Linear(30, 4)).eval()
    given = torch.randn(400, 1, 4, 4)
    result = ddlr.compress(
        network, given, relative_tolerance=0.3, method="fewest_weights", layers="all"
    )
    first = result.layers[0]
    assert int((result.model[3].weight != 0).any(dim=0).sum()) < 30
    assert first.outputs_dropped == 0
    assert first.relative_error == first.relative_error_read <= 0.3 * 1.001


def test_cascade_refit_goal_and_compact(trained, inputs, digits):
    result = ddlr.compress(
        trained,
        inputs,
        kept_fraction=0.4,
        method="lowest_rank",
        refit="network",
        order="cascade",
        layers="all",
        output="classes",
    )
    assert result.goal.met
    assert sum(report.parameters_kept for report in result.layers) <= 0.4 * sum(
        report.parameters_dense for report in result.layers
    )
    small = ddlr.compact(result.model)
    moved = (small(inputs) - result.model(inputs)).norm() / result.model(inputs).norm()
    assert moved < 1e-4
    test = digits.train.images[:500]
    same = small(test).argmax(1) == trained(test).argmax(1)
    assert same.float().mean() > 0.8


def test_a_compressed_network_is_compressed_again_as_one_map(trained, inputs):
    options = {"method": "lowest_rank", "layers": "all"}
    once = ddlr.compress(trained, inputs, relative_tolerance=0.1, **options)
    twice = ddlr.compress(once.model, inputs, relative_tolerance=0.3, **options)
    assert [report.name for report in twice.layers] == [report.name for report in once.layers]
    for name in ("3", "5"):
        first, second = (each.model.get_submodule(name) for each in (once, twice))
        assert isinstance(first, LowRankConvolution) and isinstance(second, LowRankConvolution)
        assert 0 < second.rank < first.rank
        assert isinstance(second[0], nn.Conv2d)
        assert second[0].padding_mode == trained.get_submodule(name).padding_mode
    compact = ddlr.compress(ddlr.compact(once.model), inputs, relative_tolerance=0.3, **options)
    ranks = [[report.rank for report in each.layers] for each in (twice, compact)]
    assert ranks[0] == ranks[1]
    same = ddlr.compress(twice.model, inputs, relative_tolerance=1e-6, **options)
    torch.testing.assert_close(same.model(inputs), twice.model(inputs), atol=1e-3, rtol=1e-3)
    for before, after in zip(twice.layers, same.layers, strict=True):
        assert after.parameters_kept <= before.parameters_kept


def test_a_layer_of_rank_0_keeps_its_bias(trained, inputs, tmp_path):
    tolerances = {"0": 0.0, "3": 1.0, "5": 0.0, "9": 0.0}
    result = ddlr.compress(
        trained, inputs, relative_tolerance=tolerances, method="lowest_rank", layers="all"
    )
    assert result.layers[1].rank == result.layers[1].parameters_kept == 0
    assert result.model[3].rank == 0
    assert result.model(inputs).shape == trained(inputs).shape
    ddlr.to_onnx(result, inputs[:2], tmp_path / "rank_0.onnx")  # which compares outputs


def test_weights_of_dead_inputs_are_zeros_inside_the_kernel():
    torch.manual_seed(0)
    given = torch.randn(300, 2, 6, 6)
    given[:, 1] = 0  # a channel that is always dark
    network = nn.Sequential(nn.Conv2d(2, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 4)).eval()
    result = ddlr.compress(
        network, given, relative_tolerance=0.7, method="lowest_rank", layers=["0"]
    )
    first = result.model[0]
    assert isinstance(first, LowRankConvolution)
    assert first[0].weight.shape == (first.rank, 2, 3, 3)
    assert not first[0].weight[:, 1].any() and first[0].weight[:, 0].any()


def test_weight_normed_and_hooked_convolutions_are_replaced_by_plain_ones(trained, inputs):
    network = nn.Sequential(*trained)
    network[3] = torch.nn.utils.parametrizations.weight_norm(
        made(nn.Conv2d, channels=(12, 24), kernel_size=3, padding=1)
    )
    result = ddlr.compress(
        network, inputs, relative_tolerance=0.2, method="lowest_rank", layers=["3"]
    )
    assert isinstance(result.model[3], LowRankConvolution)
    assert result.layers[0].relative_error <= 0.2 * 1.001


def test_a_subclass_with_another_forward_pass_is_refused():
    class Scaled(nn.Conv2d):
        def forward(self, input):
            return 2 * super().forward(input)

    with pytest.raises(ValueError, match="layer '0' is a Scaled whose forward pass is not just"):
        ddlr.compress(
            nn.Sequential(Scaled(1, 2, 3)),
            torch.randn(9, 1, 5, 5),
            relative_tolerance=0.1,
            layers="all",
        )


def test_the_latency_rule_does_not_speak_of_convolutions(trained, inputs):
    with pytest.raises(ValueError, match="which layer '0', a convolution, is not"):
        ddlr.compress(
            trained,
            inputs,
            relative_tolerance=0.2,
            layers="all",
            settings=ddlr.Settings(break_even="latency"),
        )


def test_lenet_5_goes_through_compression_files_and_export(digits, tmp_path):
    torch.manual_seed(0)
    network = lenet5().eval()
    given = nn.functional.interpolate(digits.calibration(40, seed=0), size=(28, 28))
    result = ddlr.compress(
        network, given, relative_tolerance=0.3, method="lowest_rank", order="cascade", layers="all"
    )
    assert isinstance(result.model.conv2, LowRankConvolution)
    small = ddlr.compact(result.model)
    exported = torch.export.export(small, (given[:4],)).module()
    torch.testing.assert_close(exported(given[:4]), small(given[:4]))
    ddlr.to_onnx(small, given[:4], tmp_path / "small.onnx")  # which compares outputs
    ddlr.save(result, tmp_path / "small.safetensors")
    for fresh in ((), (lenet5(),)):
        loaded = ddlr.load(tmp_path / "small.safetensors", *fresh)
        torch.testing.assert_close(loaded(given[:4]), small(given[:4]))
