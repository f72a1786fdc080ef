"""The baselines: each the smallest of its kind within the bound, on digits and made-up layers."""

import copy
import math
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor, nn

from ddlr import (
    CapturedLayers,
    LowRankLinear,
    SolverStatus,
    WarmStart,
    capture_layers,
    fewest_weights,
)
from ddlr import compress as compress_network
from ddlr.captured import CapturedLayer
from ddlr.constraints import OutputSet
from ddlr.input_selection import select_inputs
from ddlr.rank_search import lowest_truncation
from ddlr.sizes import fewest_stored
from doors import activation_svd, activation_svd_selected, magnitude, magnitude_global, svd
from experiments import compress
from experiments.collect import merge
from experiments.configuration import CONFIG_PATH, REPOSITORY
from experiments.networks import mlp_digits
from experiments.runs import preparation
from experiments.runs.checkpoints import checkpoint_path, load_checkpoint
from experiments.runs.units import read_record, record_path, run_key

METHODS = {
    "svd": svd,
    "activation_svd": activation_svd,
    "magnitude": magnitude,
    "magnitude_global": magnitude_global,
}
# Of the outputs that the next layer reads alone.
SELECTED = {"activation_svd_selected": activation_svd_selected}
LOW_RANK = {"svd": svd, "activation_svd": activation_svd}
CHECKPOINTS = REPOSITORY / "results/checkpoints"


@pytest.fixture(scope="module")
def network() -> nn.Module:
    model = mlp_digits()
    load_checkpoint(checkpoint_path(CHECKPOINTS, "mlp_digits", "digits", 0), model, "")
    return model


@pytest.fixture(scope="module")
def captured(network, digits) -> CapturedLayers:
    return capture_layers(network, digits.calibration(300, seed=0))


def deviation(
    layer: CapturedLayer, weight: Tensor, bias: Tensor, read: Tensor | None = None
) -> float:
    """||D||_F relative to ||Y||_F, written out anew, in float64; over all outputs, or some."""
    outputs = layer.inputs.double() @ weight.double().T + bias.double()
    targets = layer.targets.double()
    off = (targets == 0) & (layer.activation == "relu")
    missed = torch.where(off, outputs.clamp(min=0), outputs - targets)
    return ((missed if read is None else missed[:, read]).norm() / targets.norm()).item()


def live(layer: CapturedLayer) -> Tensor:
    """The original weight without the rows and columns that are removed for all methods."""
    return layer.weight * (layer.live_out[:, None] & layer.live_in)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tolerance", [0.05, 0.2, 0.5])
def test_each_layer_keeps_the_promise_of_the_convex_methods(method, tolerance, network, captured):
    before = copy.deepcopy(network.state_dict())
    result = METHODS[method](network, captured, relative_tolerance=tolerance)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    for layer, report in zip(captured.layers, result.layers, strict=True):
        stored = result.model.get_submodule(layer.name)
        # Of outputs that nothing reads nothing is promised: they count as if they were right.
        read = ~result.unread[layer.name]
        assert deviation(layer, stored.weight, stored.bias, read) <= tolerance * (1 + 1e-4)
        assert report.violation <= 1e-4
        assert report.relative_error_read <= tolerance * (1 + 1e-4)
        assert report.status is SolverStatus.CLOSED_FORM
        assert report.iterations == 0
        assert math.isnan(report.relative_gap)


@pytest.mark.parametrize("activation", ["relu", "none"])
def test_the_lowest_rank_is_that_of_a_search_over_all(activation):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    found = []
    for _ in range(40):
        directions = torch.linalg.qr(normal(8, 8)).Q
        # Neither ordered nor fitted to the offset, so the deviation rises and falls with the rank.
        scores, offset = normal(30, 8) * normal(8).exp(), normal(8)
        targets = scores @ directions + offset
        targets = targets.relu() if activation == "relu" else targets
        off = (targets == 0) & (activation == "relu")
        norms = []
        for rank in range(9):
            outputs = offset + scores[:, :rank] @ directions[:rank]
            wrong = torch.where(off, outputs.clamp(min=0), outputs - targets)
            norms.append(wrong.norm().item())
        for share in (0.02, 0.2, 0.5, 0.9):
            radius = share * targets.norm().item()
            wanted = next((rank for rank in range(8) if norms[rank] <= radius), 8)
            outputs = OutputSet(targets, radius, activation, "hinge")
            assert lowest_truncation(outputs, offset, scores, directions) == wanted
            found.append(wanted)
    assert len(set(found)) > 4


@pytest.mark.parametrize("method", LOW_RANK)
def test_one_rank_less_breaks_the_promise(method, network, captured):
    result = LOW_RANK[method](network, captured, relative_tolerance=0.2)
    assert [report.form for report in result.layers][:2] == ["low_rank", "low_rank"]
    for layer, report in zip(captured.layers, result.layers, strict=True):
        if report.form != "low_rank":
            continue
        weight, inputs = live(layer).double(), layer.inputs.double()
        bias = layer.bias.double() * layer.live_out
        u, values, vh = torch.linalg.svd(weight, full_matrices=False)
        for rank in range(report.rank):
            if method == "svd":
                lower, shift = (u[:, :rank] * values[:rank]) @ vh[:rank], bias
            else:
                lower, shift = best_in_outputs(inputs, weight, bias, rank)
            assert deviation(layer, lower, shift) > 0.2 * (1 - 1e-5)


def best_in_outputs(inputs: Tensor, weight: Tensor, bias: Tensor, rank: int) -> tuple:
    """Rank-r weight and bias from the SVD of the centred pre-activations themselves."""
    outputs = inputs @ weight.T + bias
    mean = outputs.mean(dim=0)
    right = torch.linalg.svd(outputs - mean, full_matrices=False).Vh[:rank]
    lower = right.T @ (right @ weight)
    return lower, mean - lower @ inputs.mean(dim=0)


def test_activation_svd_is_the_optimum_of_its_rank_and_keeps_the_mean_output(network, captured):
    ours = activation_svd(network, captured, relative_tolerance=0.3)
    for layer, report in zip(captured.layers, ours.layers, strict=True):
        if report.form != "low_rank":
            continue
        inputs, weight = layer.inputs.double(), live(layer).double()
        outputs = inputs @ weight.T + layer.bias * layer.live_out
        stored = ours.model.get_submodule(layer.name)
        left_out = inputs @ stored.weight.double().T + stored.bias.double() - outputs
        # Eckart and Young: what is left is the tail of the singular values.
        tail = torch.linalg.svdvals(outputs - outputs.mean(dim=0))[report.rank :]
        assert left_out.norm().item() == pytest.approx(tail.norm().item(), rel=1e-4)
        assert left_out.mean(dim=0).abs().max() < 1e-4 * outputs.abs().max()
        u, values, vh = torch.linalg.svd(weight, full_matrices=False)
        plain = (u[:, : report.rank] * values[: report.rank]) @ vh[: report.rank]
        assert left_out.norm() < (inputs @ (plain - weight).T).norm()


def awkward(case: str) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(fc1=nn.Linear(20, 16), relu=nn.ReLU(), fc2=nn.Linear(16, 14)))
    inputs = torch.randn(200, 20)
    if case == "singular":
        inputs = inputs[:, :4] @ torch.randn(4, 20)
    elif case == "few samples":
        inputs = inputs[:6]
    elif case == "one sample":
        inputs = inputs[:1]
    elif case == "dead inputs":
        inputs[:, ::2] = 0
    elif case == "a dead unit":
        nn.init.constant_(model.fc1.bias[:3], -100.0)
    elif case == "double":
        model, inputs = model.double(), inputs.double()
    return model, inputs


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "case", ["singular", "few samples", "one sample", "dead inputs", "a dead unit", "double"]
)
@pytest.mark.parametrize("tolerance", [0, 1e-3, 0.3, 2])
def test_awkward_layers(method, case, tolerance):
    model, inputs = awkward(case)
    layers = capture_layers(model, inputs)
    result = METHODS[method](model, inputs, relative_tolerance=tolerance)
    for layer, report in zip(layers.layers, result.layers, strict=True):
        stored = result.model.get_submodule(layer.name)
        assert stored.weight.isfinite().all() and stored.bias.isfinite().all()
        read = ~result.unread[layer.name]
        assert deviation(layer, stored.weight, stored.bias, read) <= tolerance * (1 + 1e-4) + 1e-6
        assert report.status is (SolverStatus.CLOSED_FORM if tolerance else SolverStatus.UNCHANGED)
        if isinstance(stored, LowRankLinear):
            varying = torch.linalg.matrix_rank(layer.inputs - layer.inputs.mean(dim=0))
            if method == "activation_svd":
                assert stored.rank <= varying


def test_magnitude_keeps_the_largest_entries_and_as_few_as_the_bound_allows(network, captured):
    result = magnitude(network, captured, relative_tolerance=0.2)
    for layer in captured.layers:
        stored = result.model.get_submodule(layer.name)
        kept, weight = stored.weight != 0, live(layer)
        assert torch.equal(stored.weight, weight * kept)
        assert torch.equal(stored.bias, layer.bias * layer.live_out)
        assert weight[kept].abs().min() > weight[~kept].abs().max()
        fewer = weight * (weight.abs() > weight[kept].abs().min())
        assert deviation(layer, fewer, stored.bias) > 0.2


def test_the_global_threshold_is_one_and_as_high_as_all_layers_allow(network, captured):
    result = magnitude_global(network, captured, relative_tolerance=0.2)
    stored = [result.model.get_submodule(layer.name) for layer in captured.layers]
    weights = [live(layer) for layer in captured.layers]
    pairs = list(zip(weights, stored, strict=True))
    pruned = torch.cat([weight[layer.weight == 0].abs() for weight, layer in pairs])
    kept = torch.cat([weight[layer.weight != 0].abs() for weight, layer in pairs])
    assert kept.min() > pruned.max()
    broken = [
        deviation(layer, weight * (weight.abs() > kept.min()), layer.bias * layer.live_out) > 0.2
        for layer, weight in zip(captured.layers, weights, strict=True)
    ]
    assert sum(broken) == 1
    own = magnitude(network, captured, relative_tolerance=0.2)
    sizes = [[report.nonzeros for report in each.layers] for each in (own, result)]
    assert all(few <= many for few, many in zip(*sizes, strict=True))


def test_a_captured_network_gives_what_its_calibration_data_give(network, captured, digits):
    images = digits.calibration(300, seed=0)
    for method in (METHODS | SELECTED).values():
        both = [method(network, data, relative_tolerance=0.3).model for data in (captured, images)]
        first, second = (model.state_dict().values() for model in both)
        assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("tolerance", [0.05, 0.2, 0.5])
def test_on_selected_inputs_the_outputs_that_are_read_keep_the_promise(
    tolerance, network, captured
):
    before = copy.deepcopy(network.state_dict())
    result = activation_svd_selected(network, captured, relative_tolerance=tolerance)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert result.drops_unread and result.order == "parallel"
    stored = [result.model.get_submodule(report.name) for report in result.layers]
    places = zip(captured.layers, result.layers, stored, [*stored[1:], None], strict=True)
    for layer, report, here, following in places:
        read = layer.live_out
        if following is not None:
            read = read & (following.weight != 0).any(dim=0)
        assert report.outputs_dropped == int((layer.live_out & ~read).sum())
        assert not here.weight[~read].any() and not here.bias[~read].any()
        rows = WarmStart(layer.weight[read][:, layer.live_in], layer.bias[read])
        targets = layer.targets[:, read]
        inputs = layer.inputs.double()
        produced = (inputs @ here.weight.double().T + here.bias.double())[:, read]
        outputs = OutputSet(targets.double(), 0.0, layer.activation, "hinge")
        error = (outputs.deviation(produced).norm() / targets.double().norm()).item()
        assert error <= tolerance * (1 + 1e-3)
        assert report.violation <= 1e-3
        assert report.status is SolverStatus.CLOSED_FORM
        assert report.iterations == 0 and math.isnan(report.relative_gap)

        # It is the selection on the outputs that are read, and is stored as it is.
        problem = (layer.live_inputs, targets, tolerance * targets.norm().item())
        options = {"activation": layer.activation, "warm_start": rows}
        found, fewest = (solve(*problem, **options) for solve in (select_inputs, fewest_weights))
        torch.testing.assert_close(
            here.weight[read][:, layer.live_in], found.weight, rtol=1e-4, atol=1e-4
        )
        assert report.parameters_kept == found.objective >= fewest.objective
        columns = int((here.weight != 0).any(dim=0).sum())
        assert report.parameters_kept == fewest_stored(report.rank, columns, int(read.sum()))
    if tolerance > 0.05:
        assert sum(report.outputs_dropped for report in result.layers) > 30


def test_it_is_the_fewest_weights_without_the_search_and_smaller_than_on_all_inputs(
    network, captured
):
    for tolerance in (0.05, 0.1, 0.2, 0.3):
        whole, selected, fewest = (
            sum(report.parameters_kept for report in each.layers)
            for each in (
                activation_svd(network, captured, relative_tolerance=tolerance),
                activation_svd_selected(network, captured, relative_tolerance=tolerance),
                compress_network(
                    network, captured, relative_tolerance=tolerance, method="fewest_weights"
                ),
            )
        )
        assert fewest <= 1.05 * selected  # the search may cost the layer before an output
        assert selected < 0.7 * whole


def test_the_network_refit_leaves_sizes_and_dropped_outputs_as_they_are(network, captured):
    alone, together = (
        activation_svd_selected(
            network, captured, relative_tolerance=0.3, refit=refit, output="classes"
        )
        for refit in ("none", "network")
    )
    for before, after in zip(alone.layers, together.layers, strict=True):
        assert before.parameters_kept == after.parameters_kept
        assert before.outputs_dropped == after.outputs_dropped
        one, other = (each.model.get_submodule(before.name) for each in (alone, together))
        assert torch.equal(one.weight != 0, other.weight != 0)
    assert not torch.equal(alone.model.fc1.weight, together.model.fc1.weight)


def test_more_ridge_holds_weights_more_and_keeps_more_of_them(network, captured):
    little, much = (
        sum(
            report.parameters_kept
            for report in activation_svd_selected(
                network, captured, relative_tolerance=0.1, ridge=ridge
            ).layers
        )
        for ridge in (1e-2, 1.0)
    )
    assert little < much


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refit": "layer"}, "refit is 'layer'; method 'activation_svd_selected' has"),
        ({"ridge": 0.0}, "ridge is 0.0; it must be a positive number"),
        ({"ridge": -1}, "ridge is -1"),
        ({"workers": 2}, "workers is 2, but here a layer waits for the next"),
        ({"relative_tolerance": -0.1}, "relative_tolerance is -0.1"),
    ],
)
def test_what_the_selection_does_not_have_is_refused(options, message, network, captured):
    with pytest.raises(ValueError, match=message):
        activation_svd_selected(network, captured, **{"relative_tolerance": 0.2, **options})


def configured(folder: Path, *overrides: str) -> DictConfig:
    places = (
        *(f"results_dir={folder}/results", f"output_dir={folder}/outputs"),
        *(f"checkpoint_dir={CHECKPOINTS}", "tracking=csv", "device=cpu"),
    )
    digits = ("dataset=digits", "model=mlp_digits", "calibration_samples=200")
    with initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        return compose("compress", overrides=[*digits, *places, *overrides])


def test_the_runner_judges_and_records_them_as_it_does_the_others(tmp_path):
    preparation.forget()
    rows = []
    for method in METHODS | SELECTED:
        sizes = []
        # On selected inputs as little is left at half the tolerance.
        for tolerance in (0.1, 0.3) if method in METHODS else (0.05, 0.15):
            choice = (f"method={method}", f"method.relative_tolerance={tolerance}")
            cfg = configured(tmp_path, *choice)
            record, skipped = compress.run(cfg, group="g")
            assert not skipped
            row = read_record(record_path(cfg, run_key(cfg)))["row"]
            chosen = {"method": method, "constraint": "hinge", "refit": "none", "order": "parallel"}
            assert chosen.items() <= row.items()
            assert row["status"] == "closed_form"
            assert row["worst_relative_gap"] is None  # strict JSON has no nan
            assert row["worst_violation"] <= 1e-4
            assert row["accuracy"] > 50
            assert [layer["layer"] for layer in record["layers"]] == ["fc1", "fc2", "fc3"]
            sizes.append(row["kept_fraction"])
            rows.append(row)
        assert all(more > less for more, less in pairwise(sizes))
    merge(tmp_path / "sweeps.csv", pd.DataFrame(rows))
    assert pd.read_csv(tmp_path / "sweeps.csv")["worst_relative_gap"].isna().all()
    preparation.forget()
