"""OSSCAR: inputs chosen on the quadratic, against brute force; promises and sizes of its layers."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import ddlr
from ddlr import CapturedLayers, CentredInputs, Settings, SolverStatus, WarmStart, capture_layers
from ddlr.constraints import OutputSet
from ddlr.layers import numerical_rank
from ddlr.quadratic import OutputQuadratic
from ddlr.sizes import fewest_stored
from experiments.configuration import REPOSITORY
from experiments.methods.osscar import (
    OSSCAR,
    Regression,
    prune_inputs,
    remove_inputs,
    swap_gains,
    swap_inputs,
)
from experiments.networks import mlp_digits
from experiments.runs.checkpoints import checkpoint_path, load_checkpoint

CHECKPOINTS = REPOSITORY / "results/checkpoints"


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def made_up(seed: int, in_features: int = 7, activation: str = "relu"):
    """Dependent inputs, an original layer, and its outputs."""
    inputs = normal(60, in_features, seed=seed) @ (
        torch.eye(in_features) + 0.5 * normal(in_features, in_features, seed=seed + 1000)
    )
    start = WarmStart(normal(3, in_features, seed=seed + 2000), normal(3, seed=seed + 3000))
    outputs = inputs @ start.weight.T + start.bias
    return inputs, start, outputs.relu() if activation == "relu" else outputs


def quadratic_of(inputs, start, targets, activation: str = "relu", ridge: float = 1e-2):
    outputs = OutputSet(targets, 0.0, activation, "hinge")
    return OutputQuadratic.of(CentredInputs(inputs), outputs, start, ridge)


def loss(quadratic: OutputQuadratic, kept) -> float:
    """The least value on some inputs, above that on all, by a plain solve."""
    kept = torch.as_tensor(kept)
    weight = torch.zeros_like(quadratic.cross)
    gram = quadratic.gram[kept][:, kept]
    weight[:, kept] = torch.linalg.solve(gram, quadratic.cross[:, kept].T).T
    return quadratic.excess(weight)


def test_of_orthogonal_inputs_those_with_the_largest_columns_stay():
    for seed in range(10):
        inputs = torch.linalg.qr(
            normal(80, 12, seed=seed) - normal(80, 12, seed=seed).mean(dim=0)
        ).Q
        start = WarmStart(normal(4, 12, seed=seed + 50), normal(4, seed=1))
        targets = inputs @ start.weight.T + start.bias
        quadratic = quadratic_of(inputs, start, targets, "none")
        columns = start.weight.norm(dim=0)
        for number in (1, 5, 11):
            largest = columns.topk(number).indices.sort().values
            assert torch.equal(remove_inputs(quadratic, torch.arange(12), number), largest)
            smallest = columns.topk(number, largest=False).indices.sort().values
            assert torch.equal(swap_inputs(quadratic, smallest), largest)


def test_inputs_that_go_one_by_one_are_each_the_least_of_all():
    for seed in range(10):
        quadratic = quadratic_of(*made_up(seed))
        left = list(range(7))
        while len(left) > 2:
            left.remove(min(left, key=lambda out: loss(quadratic, [i for i in left if i != out])))
        assert remove_inputs(quadratic, torch.arange(7), 2).tolist() == left


def test_a_regression_without_some_inputs_is_that_on_the_others():
    quadratic = quadratic_of(*made_up(0))
    going = torch.tensor([False, True, True, False, False, True, False])
    updated = Regression.on(quadratic, torch.arange(7)).without(going)
    anew = Regression.on(quadratic, (~going).nonzero()[:, 0])
    assert torch.equal(updated.kept, anew.kept)
    torch.testing.assert_close(updated.weight, anew.weight)
    torch.testing.assert_close(updated.inverse, anew.inverse)


def test_what_a_swap_gains_is_the_difference_of_two_losses():
    for seed in range(5):
        quadratic = quadratic_of(*made_up(seed))
        kept = [0, 2, 5]
        gains, others = swap_gains(Regression.on(quadratic, torch.tensor(kept)))
        assert others.tolist() == [1, 3, 4, 6]
        before = loss(quadratic, kept)
        for row, going in enumerate(kept):
            for column, coming in enumerate(others.tolist()):
                after = loss(quadratic, [*(each for each in kept if each != going), coming])
                assert gains[row, column].item() == pytest.approx(before - after, abs=1e-7)


def test_the_local_search_is_nearly_always_the_best_choice_and_never_above_it_or_its_start():
    best = improved = 0
    cases = [(seed, number) for seed in range(30) for number in (2, 3, 4)]
    for seed, number in cases:
        quadratic = quadratic_of(*made_up(seed))
        least = min(loss(quadratic, kept) for kept in itertools.combinations(range(7), number))
        removed = remove_inputs(quadratic, torch.arange(7), number)
        swapped = swap_inputs(quadratic, removed)
        assert len(swapped.unique()) == number
        before, after = loss(quadratic, removed), loss(quadratic, swapped)
        assert least * (1 - 1e-9) <= after <= before * (1 + 1e-9)
        gains, _ = swap_gains(Regression.on(quadratic, swapped))
        assert gains.max() <= 1e-6 * quadratic.cross.square().sum()  # no single swap helps
        best += after <= least * (1 + 1e-9)
        improved += after < before * (1 - 1e-6)
    assert best >= 0.9 * len(cases)
    assert improved >= 5


@pytest.mark.parametrize("activation", ["relu", "none"])
def test_a_layer_is_the_truncated_regression_on_its_inputs_and_as_small_as_it_says(activation):
    inputs, start, targets = made_up(3, in_features=15, activation=activation)
    radius = 0.3 * targets.norm().item()
    solved = prune_inputs(
        CentredInputs(inputs), targets, radius, activation=activation, warm_start=start
    )
    outputs = OutputSet(targets, radius, activation, "hinge")
    assert outputs.violation(inputs @ solved.weight.T + solved.bias) <= 1e-3
    assert solved.status is SolverStatus.FITTED
    used, rank = (solved.weight != 0).any(dim=0), numerical_rank(solved.weight)
    assert 0 < int(used.sum()) < 15
    assert solved.objective == fewest_stored(rank, int(used.sum()), 3)
    quadratic = quadratic_of(inputs, start, targets, activation).on_inputs(used.nonzero()[:, 0])
    whitened = quadratic.cross @ torch.linalg.inv(torch.linalg.cholesky(quadratic.gram)).T
    left = torch.linalg.svd(whitened).U[:, :rank]
    truncated = left @ left.T @ quadratic.minimiser
    torch.testing.assert_close(solved.weight[:, used], truncated)


def test_layers_that_need_no_inputs_or_all_of_them():
    inputs, start, targets = made_up(0)
    problem = {"activation": "relu", "warm_start": start}
    norm = targets.norm().item()
    nothing = prune_inputs(CentredInputs(inputs), targets, norm, **problem)
    assert nothing.objective == 0 and not nothing.weight.any()
    whole = prune_inputs(CentredInputs(inputs), targets, 1e-6 * norm, **problem)
    assert torch.equal(whole.weight, start.weight) and whole.objective == 21
    still = torch.ones_like(inputs)
    same = (still @ start.weight.T + start.bias).relu()
    constant = prune_inputs(CentredInputs(still), same, 0.1, **problem)
    assert constant.objective == 0 and math.isclose(constant.violation, 0)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    model = mlp_digits()
    load_checkpoint(checkpoint_path(CHECKPOINTS, "mlp_digits", "digits", 0), model, "")
    return model


@pytest.fixture(scope="module")
def captured(network, digits) -> CapturedLayers:
    return capture_layers(network, digits.calibration(300, seed=0))


@pytest.mark.parametrize("refit", ["none", "layer"])
@pytest.mark.parametrize("order", ["parallel", "cascade"])
def test_promises_are_kept_and_layers_freed_from_what_is_not_read(
    order, refit, network, captured, digits
):
    result = ddlr.compress_network(
        network, captured, OSSCAR, relative_tolerance=0.2, order=order, refit=refit
    )
    inputs = digits.calibration(300, seed=0)
    seen = {}
    for name, module in result.model.named_modules():
        module.register_forward_hook(lambda _, given, out, name=name: seen.update({name: given[0]}))
    with torch.no_grad():
        result.model(inputs)
    stored = [result.model.get_submodule(layer.name) for layer in captured.layers]
    for place, (layer, report) in enumerate(zip(captured.layers, result.layers, strict=True)):
        here, given = stored[place], layer.inputs if order == "parallel" else seen[layer.name]
        read = layer.live_out.clone()
        if place + 1 < len(stored):
            read &= (stored[place + 1].weight != 0).any(dim=0)
        outputs = OutputSet(layer.targets[:, read], 0.0, layer.activation, "hinge")
        produced = (given @ here.weight.T + here.bias)[:, read]
        error = outputs.deviation(produced).norm().item()
        # In cascade the bound is on some outputs that then turn out to be read by nothing.
        promised = layer.targets[:, read] if order == "parallel" else layer.targets
        assert error <= report.relative_bound * promised.norm() * (1 + 1e-3)
        assert report.relative_bound == 0.2 or order == "cascade"
        assert report.violation <= 1e-3
    assert sum(report.outputs_dropped for report in result.layers) > 0
    assert sum(report.parameters_kept for report in result.layers) < 0.7 * captured.weights


def test_cascade_at_the_sizes_of_the_original_activations_keeps_the_inputs(network, captured):
    parallel, reached = (
        ddlr.compress_network(
            network,
            captured,
            OSSCAR,
            relative_tolerance=0.2,
            refit="layer",
            order=order,
            settings=settings,
        )
        for order, settings in (
            ("parallel", Settings()),
            ("cascade", Settings(cascade_bound="reached")),
        )
    )
    sizes = [[report.parameters_kept for report in each.layers] for each in (parallel, reached)]
    assert sizes[0] == sizes[1]
