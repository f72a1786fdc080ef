"""`ddlr.compress` and `nettrim.prune`, on a network trained on real digits and on odd ones."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

import ddlr
import doors
from ddlr import LowRankLinear, SolverStatus, unread_outputs
from ddlr.constraints import OutputSet
from doors import activation_svd
from experiments.metrics import accuracy
from experiments.networks import mlp_digits
from experiments.training import train

METHODS = {"ddlr": doors.compress, "nettrim": doors.prune}


@pytest.fixture(scope="module")
def network(digits) -> nn.Module:
    torch.manual_seed(0)
    model = mlp_digits()
    recipe = {"epochs": 15, "batch_size": 32, "learning_rate": 5e-3, "weight_decay": 1e-2}
    train(model, digits, **recipe, seed=0, device=torch.device("cpu"))
    assert accuracy(model, digits.held_out) > 90
    return model


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 5))


INPUTS = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("constraint", ["nettrim", "hinge"])
def test_each_layer_keeps_its_promise(method, constraint, network, digits):
    calibration = digits.calibration(300, seed=0)
    before = copy.deepcopy(network.state_dict())
    result = METHODS[method](network, calibration, relative_tolerance=0.2, constraint=constraint)

    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert [report.name for report in result.layers] == ["fc1", "fc2", "fc3"]
    assert [report.activation for report in result.layers] == ["relu", "relu", "none"]
    # In parallel order each layer answers for the original network's activations.
    activations = calibration.flatten(1)
    for report in result.layers:
        original = network.get_submodule(report.name)
        compressed = result.model.get_submodule(report.name)
        wanted, got = original(activations), compressed(activations)
        if report.activation == "relu":
            wanted, got = wanted.relu(), got.relu()
        error = ((got - wanted).norm() / wanted.norm()).item()
        assert report.relative_error_read <= 0.2 * (1 + 1e-3)
        assert report.relative_error == pytest.approx(error, rel=1e-3)
        assert report.status is SolverStatus.CONVERGED
        assert abs(report.relative_gap) <= 1e-2
        assert report.violation <= 1e-3
        assert 0 < report.parameters_kept < report.parameters_dense
        assert report.rank == torch.linalg.matrix_rank(compressed.weight, rtol=1e-5)
        assert report.form == ("low_rank" if method == "ddlr" else "sparse")
        activations = wanted


@pytest.mark.parametrize("order", ["parallel", "cascade"])
def test_the_lowest_rank_keeps_the_promise_with_fewer_weights(order, network, digits):
    calibration = digits.calibration(300, seed=0)
    options = {"relative_tolerance": 0.2, "order": order}
    nuclear = doors.compress(network, calibration, constraint="hinge", **options)
    lowest = doors.compress(network, calibration, method="lowest_rank", **options)
    closed = activation_svd(network, calibration, relative_tolerance=0.2)
    for report, other, simple in zip(lowest.layers, nuclear.layers, closed.layers, strict=True):
        assert report.relative_error_read <= report.relative_tolerance * (1 + 1e-3)
        assert report.violation <= 1e-3
        assert report.rank <= other.rank
        if order == "parallel":
            assert report.rank <= simple.rank
    assert [report.status.value for report in lowest.layers] == ["fitted", "fitted", "converged"]
    assert sum(report.parameters_kept for report in lowest.layers) < 0.85 * sum(
        report.parameters_kept for report in nuclear.layers
    )
    with pytest.raises(ValueError, match="method is 'lowest'"):
        doors.compress(network, calibration, method="lowest", relative_tolerance=0.2)


@pytest.mark.parametrize("method", METHODS)
def test_pixels_and_units_that_are_never_on_are_removed(method, network, digits):
    calibration = digits.calibration(300, seed=0)
    dead = ~calibration.flatten(1).any(dim=0)
    assert dead.any()
    result = METHODS[method](network, calibration, relative_tolerance=0.1, layers=["fc1"])
    assert not result.model.fc1.weight[:, dead].any()
    report = result.layers[0]
    live_pixels = int((~dead).sum())
    live_units = int((network.fc1(calibration.flatten(1)) > 0).any(dim=0).sum())
    if method == "ddlr":
        assert report.parameters_kept == report.rank * (live_pixels + live_units - report.rank)
    else:
        assert report.parameters_kept == report.nonzeros


@pytest.mark.parametrize("method", METHODS)
def test_tolerance_zero_keeps_the_function_and_one_gives_zero_weights(method):
    model = small_network()
    same = METHODS[method](model, INPUTS, relative_tolerance=0)
    assert torch.equal(same.model(INPUTS), model(INPUTS))
    assert {report.status for report in same.layers} == {SolverStatus.UNCHANGED}
    for tolerance in (1, 2.5):
        nothing = METHODS[method](model, INPUTS, relative_tolerance=tolerance)
        assert all(not nothing.model[layer].weight.any() for layer in (0, 2))
        assert all(report.parameters_kept == 0 for report in nothing.layers)
        assert all(report.relative_error <= 1 + 1e-6 for report in nothing.layers)
        assert nothing.model(INPUTS).shape == (100, 5)


def test_a_layer_that_would_not_shrink_stays_as_it_was():
    model = small_network()
    result = doors.compress(model, INPUTS, relative_tolerance=1e-3)
    assert result.layers[0].form == "dense"
    assert torch.equal(result.model[0].weight, model[0].weight)
    assert result.layers[0].relative_error == 0
    assert result.layers[0].parameters_kept == 8 * 12


def test_the_compressed_network_can_be_saved_loaded_and_exported(tmp_path):
    result = doors.compress(small_network(), INPUTS, relative_tolerance=0.3)
    assert any(isinstance(layer, LowRankLinear) for layer in result.model)
    torch.save(result.model.state_dict(), tmp_path / "compressed.pt")
    again = copy.deepcopy(result.model)
    again.load_state_dict(torch.load(tmp_path / "compressed.pt"))
    exported = torch.export.export(result.model, (INPUTS,)).module()
    assert torch.equal(again(INPUTS), result.model(INPUTS))
    assert torch.allclose(exported(INPUTS), result.model(INPUTS), atol=1e-6)


class Odd(nn.Module):
    """No bias, a functional ReLU, nested modules, an output that is never positive."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleDict({"inner": nn.Linear(8, 12, bias=False)})
        self.head = nn.Linear(12, 5)
        self.unused = nn.Linear(3, 3)
        self.body["inner"].weight.data[0] = 0

    def forward(self, x):
        return functional.log_softmax(self.head(functional.relu(self.body["inner"](x))), dim=1)


@pytest.mark.parametrize("method", METHODS)
def test_odd_networks(method):
    model = Odd().double()
    layers = ["body.inner", "head"]
    batches = (batch.double() for batch in INPUTS.split(30))
    result = METHODS[method](model, batches, relative_tolerance=0.3, layers=layers)
    assert [report.activation for report in result.layers] == ["relu", "none"]
    assert not result.model.body["inner"].weight[0].any()
    assert result.model(INPUTS.double()).shape == (100, 5)
    with pytest.warns(UserWarning, match="layer 'unused' was not called"):
        result = METHODS[method](model, INPUTS.double(), relative_tolerance=0.3)
    assert [report.name for report in result.layers] == layers
    with pytest.raises(ValueError, match="layer 'unused' was not called"):
        METHODS[method](model, INPUTS.double(), relative_tolerance=0.3, layers=["unused", "head"])


def test_an_explicit_activation_overrides_what_is_found():
    result = doors.compress(
        small_network(), INPUTS, relative_tolerance=0.3, activations={"0": "none"}
    )
    assert [report.activation for report in result.layers] == ["none", "none"]


@pytest.mark.parametrize("method", METHODS)
def test_a_solve_that_does_not_converge_raises_or_is_reported(method):
    arguments = {"relative_tolerance": 0.1, "max_iterations": 1}
    with pytest.raises(ddlr.ConvergenceError, match="layer '0': the iteration limit") as caught:
        METHODS[method](small_network(), INPUTS, **arguments)
    assert caught.value.result.iterations == 1
    result = METHODS[method](small_network(), INPUTS, **arguments, raise_on_failure=False)
    assert result.layers[0].status is SolverStatus.ITERATION_LIMIT


def broken_weight() -> nn.Module:
    model = small_network()
    model[2].weight.data[0, 0] = float("nan")
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"relative_tolerance": -0.1}, "relative_tolerance is -0.1"),
        ({"relative_tolerance": float("nan")}, "relative_tolerance is nan"),
        ({"relative_tolerance": "a lot"}, "relative_tolerance is 'a lot'"),
        ({"calibration": torch.full((4, 8), float("inf"))}, "layer '0': inputs has 32 values"),
        ({"calibration": torch.zeros(0, 8)}, "calibration set is empty"),
        ({"calibration": []}, "calibration set is empty"),
        ({"layers": ["1"]}, "layer '1', named in layers, is a ReLU, and no linear layer"),
        ({"layers": ["fc9"]}, "layer 'fc9', named in layers, is no layer"),
        ({"activations": {"7": "relu"}}, "activations names layer '7'"),
        ({"activations": {"0": "gelu"}}, r"activations\['0'\] is 'gelu'"),
        ({"constraint": "ball"}, "constraint is 'ball'"),
        ({"ridge": 0}, "ridge is 0; it must be a positive number"),
        ({"ridge": float("nan")}, "ridge is nan"),
        ({"ridge": "a lot"}, "ridge is 'a lot'"),
        ({"model": broken_weight()}, "layer '2': its weight has 1 values that are not finite"),
        ({"model": nn.Sequential(nn.Conv2d(1, 1, 1))}, "no fully connected layer"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_bad_arguments_are_named(method, change, message):
    arguments = {
        "model": small_network(),
        "calibration": INPUTS,
        "relative_tolerance": 0.1,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        METHODS[method](**arguments)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("refit", ["none", "layer"])
def test_in_cascade_each_layer_keeps_its_promise_on_compressed_inputs(
    method, refit, network, digits, monkeypatch
):
    # The original weights read units that the compressed ones do not.
    monkeypatch.setattr(unread_outputs, "remove_dead_weights", lambda model, pairs, batches: {})
    calibration = digits.calibration(300, seed=0)
    options = {"relative_tolerance": 0.2, "refit": refit}
    result = METHODS[method](network, calibration, order="cascade", **options)
    wanted = got = calibration.flatten(1)
    for report in result.layers:
        wanted = network.get_submodule(report.name)(wanted)
        inputs, got = got, result.model.get_submodule(report.name)(got)
        if report.activation == "relu":
            wanted, got = wanted.relu(), got.relu()
        error = ((got - wanted).norm() / wanted.norm()).item()
        assert report.relative_error == pytest.approx(error, rel=1e-3)
        assert report.relative_error_read <= report.relative_bound * (1 + 1e-3)
        assert report.violation <= 1e-3
        # No more than sqrt(1.1) times what the original weights make of those inputs.
        by_original = network.get_submodule(report.name)(inputs)
        outputs = OutputSet(wanted, 0.0, report.activation, "hinge")
        bound = max(0.2, 1.1**0.5 * outputs.violation(by_original))
        assert report.relative_tolerance == 0.2
        assert report.relative_bound == pytest.approx(bound, rel=1e-4)
    captured = ddlr.capture_layers(network, calibration)
    again = METHODS[method](network, captured, order="cascade", **options)
    for one, other in zip(result.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("method", METHODS)
def test_a_refit_keeps_the_size_and_brings_the_accuracy_back(method, network, digits):
    calibration = digits.calibration(300, seed=0)
    plain, refitted = (
        METHODS[method](network, calibration, relative_tolerance=0.3, refit=refit)
        for refit in ("none", "layer")
    )
    for before, after in zip(plain.layers, refitted.layers, strict=True):
        assert after.parameters_kept == before.parameters_kept
        assert after.relative_error_read < before.relative_error_read
        assert after.violation <= before.violation
    gained = accuracy(refitted.model, digits.held_out) - accuracy(plain.model, digits.held_out)
    assert gained > 5


@pytest.mark.parametrize(
    "compress",
    [
        partial(doors.compress, refit="layer"),
        partial(doors.compress, method="lowest_rank"),
        partial(doors.compress, method="fewest_weights", order="cascade"),
        partial(doors.prune, refit="layer"),
    ],
    ids=["ddlr", "lowest_rank", "fewest_weights", "nettrim"],
)
def test_the_ridge_is_that_of_fits_and_refits_and_the_promise_is_kept(compress, network, digits):
    calibration = digits.calibration(100, seed=0)  # of 64 inputs
    usual, more = (
        compress(network, calibration, relative_tolerance=0.2, ridge=ridge).layers
        for ridge in (1e-2, 10)
    )
    assert all(report.violation <= 1e-3 for report in (*usual, *more))
    assert [report.relative_error for report in usual] != [report.relative_error for report in more]
    sizes = [sum(report.parameters_kept for report in reports) for reports in (usual, more)]
    assert sizes[0] <= sizes[1]


def test_unknown_choices_and_cascade_with_workers_are_refused():
    for method in METHODS.values():
        for options, message in (
            ({"refit": "full"}, "refit is 'full'"),
            ({"order": "backwards"}, "order is 'backwards'"),
            ({"order": "cascade", "workers": 2}, "workers is 2, but in cascade order"),
        ):
            with pytest.raises(ValueError, match=message):
                method(small_network(), INPUTS, relative_tolerance=0.1, **options)


def test_an_unfinished_solve_is_refitted_all_the_same():
    options = {"relative_tolerance": 0.1, "max_iterations": 2, "raise_on_failure": False}
    errors = {
        refit: [
            report.relative_error
            for report in doors.prune(small_network(), INPUTS, refit=refit, **options).layers
        ]
        for refit in ("none", "layer")
    }
    assert all(
        after < before for before, after in zip(errors["none"], errors["layer"], strict=True)
    )
