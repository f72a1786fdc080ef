"""Layers on some of their inputs: within the radius, in the fewest weights, in the best order."""

import math

import pytest
import torch
from torch import Tensor

import ddlr
from ddlr import (
    CentredInputs,
    ConvergenceError,
    SolverStatus,
    WarmStart,
    fewest_weights,
    lowest_rank,
)
from ddlr.captured import CapturedLayer
from ddlr.constraints import OutputSet
from ddlr.input_elimination import regress_outputs
from ddlr.input_selection import _eliminate_inputs, select_inputs
from ddlr.layers import numerical_rank
from ddlr.rank_search import RADIUS_SLACK
from ddlr.reduced_rank import RIDGE
from ddlr.sizes import fewest_stored
from made_up import made_up_layer


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def with_original(inputs: Tensor, out_features: int, activation: str, seed: int):
    """A random original weight for inputs, and the targets that are its own outputs."""
    start = WarmStart(
        normal(out_features, inputs.shape[1], seed=seed), normal(out_features, seed=1)
    )
    outputs = inputs @ start.weight.T + start.bias
    return start, outputs.relu() if activation == "relu" else outputs


def used(weight: Tensor) -> Tensor:
    return (weight != 0).any(dim=0)


def assert_within_and_counted(
    result, inputs, targets, radius, activation, status=SolverStatus.FITTED
) -> None:
    """The promise and the size of a result, from its weight alone."""
    outputs = OutputSet(targets, 0.0, activation, "hinge")
    error = outputs.deviation(inputs @ result.weight.T + result.bias).norm().item()
    assert error <= radius * (1 + RADIUS_SLACK)
    assert result.violation == pytest.approx(max(0, error / radius - 1), abs=1e-6)
    columns = int(used(result.weight).sum())
    stored = fewest_stored(numerical_rank(result.weight), columns, len(result.weight))
    assert result.objective == stored
    assert result.status is status
    assert math.isnan(result.lower_bound) and math.isnan(result.relative_gap)


@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("shape", [(300, 20, 12), (120, 8, 25), (15, 40, 12)], ids=str)
def test_a_layer_is_within_its_radius_and_stores_what_it_says(shape, fraction, activation):
    samples, in_features, out_features = shape
    inputs, _ = made_up_layer(samples, in_features, out_features, seed=samples)
    start, targets = with_original(inputs, out_features, activation, seed=2)
    radius = fraction * targets.norm().item()
    result = fewest_weights(inputs, targets, radius, activation=activation, warm_start=start)
    assert_within_and_counted(result, inputs, targets, radius, activation)
    again = fewest_weights(
        ddlr.CentredInputs(inputs), targets, radius, activation=activation, warm_start=start
    )
    assert torch.equal(again.weight, result.weight)


def solved_twice(layer: CapturedLayer, tolerance: float):
    """The lowest rank and the fewest weights of a captured layer, on its live part."""
    targets = layer.targets[:, layer.live_out]
    start = WarmStart(layer.weight[layer.live_out][:, layer.live_in], layer.bias[layer.live_out])
    radius = tolerance * targets.norm().item()
    return [
        solve(layer.live_inputs, targets, radius, activation=layer.activation, warm_start=start)
        for solve in (lowest_rank, fewest_weights)
    ]


def test_layers_of_digits_need_far_fewer_weights_than_at_the_lowest_rank(captured):
    for tolerance in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7):
        before = after = 0
        for layer in captured.layers:
            lowest, fewest = solved_twice(layer, tolerance)
            size = fewest_stored(int(lowest.objective), *lowest.weight.T.shape)
            assert fewest.objective <= size
            before, after = before + size, after + fewest.objective
        assert after < (0.9 if tolerance < 0.2 else 0.7) * before


@pytest.mark.parametrize("noise", [0.0, 0.01], ids=["copies", "near copies"])
@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("seed", range(3))
def test_of_inputs_that_are_copies_half_are_left_out_and_never_both(noise, activation, seed):
    inputs = normal(400, 20, seed=seed) + 0.5
    weight = normal(30, 6, seed=seed + 10) @ normal(6, 20, seed=seed + 20)
    share = normal(20, seed=seed + 30).sigmoid()
    start = WarmStart(torch.cat([share * weight, (1 - share) * weight], dim=1), normal(30, seed=1))
    inputs = torch.cat([inputs, inputs + noise * normal(400, 20, seed=seed + 40)], dim=1)
    outputs = inputs @ start.weight.T + start.bias
    targets = outputs.relu() if activation == "relu" else outputs
    radius = 0.02 * targets.norm().item()
    lowest, fewest = (
        solve(inputs, targets, radius, activation=activation, warm_start=start)
        for solve in (lowest_rank, fewest_weights)
    )
    assert used(lowest.weight).all()
    assert 20 <= int(used(fewest.weight).sum()) <= 25  # the latter of stages that keep 85 %
    assert used(fewest.weight).view(2, 20).any(dim=0).all()
    assert numerical_rank(fewest.weight) <= lowest.objective
    assert_within_and_counted(fewest, inputs, targets, radius, activation)


@pytest.mark.parametrize("activation", ["relu", "none"])
def test_inputs_go_by_what_they_bring_and_not_by_the_size_of_their_weights(activation):
    scale = torch.ones(24, dtype=torch.float64)
    scale[::2] = 0.1
    inputs = scale * normal(400, 24, seed=0)
    weight = normal(12, 24, seed=1) / (2 * scale.sqrt())  # the larger, the less it brings
    start = WarmStart(weight, torch.zeros(12, dtype=torch.float64))
    outputs = inputs @ weight.T
    targets = outputs.relu() if activation == "relu" else outputs
    radius = 0.5 * targets.norm().item()
    result = fewest_weights(inputs, targets, radius, activation=activation, warm_start=start)
    without = used(result.weight).logical_not()
    assert without[::2].all() and without[1::2].sum() <= 6
    assert_within_and_counted(result, inputs, targets, radius, activation)


@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("started", [True, False], ids=["started", "from nothing"])
def test_few_samples_and_dead_and_constant_inputs_are_no_obstacle(activation, started):
    inputs, targets = made_up_layer(15, 40, 12, activation=activation, seed=5)
    inputs[:, :4] = 0.0
    inputs[:, 4] = 0.1
    start = None
    if started:
        start, targets = with_original(inputs, 12, activation, seed=0)
    for fraction in (0.01, 0.1, 0.9):
        radius = fraction * targets.norm().item()
        result = fewest_weights(inputs, targets, radius, activation=activation, warm_start=start)
        assert result.weight.isfinite().all() and result.bias.isfinite().all()
        assert result.violation <= 1e-3
        assert not used(result.weight)[:4].any()
        assert result.objective == fewest_stored(
            numerical_rank(result.weight), int(used(result.weight).sum()), 12
        )


@pytest.mark.parametrize("solve", [lowest_rank, fewest_weights, select_inputs])
@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_inputs_that_do_not_vary_leave_a_bias(solve, activation, value):
    _, targets = made_up_layer(30, 6, 5, activation=activation)
    inputs = torch.full((30, 6), value, dtype=targets.dtype)
    radius = (targets - targets.mean(dim=0)).norm().item()
    for start in (None, WarmStart(normal(5, 6, seed=0), normal(5, seed=1))):
        options = {"activation": activation, "warm_start": start}
        result = solve(inputs, targets, 1.001 * radius, **options)
        assert result.objective == 0 and not result.weight.any()
        with pytest.raises(ConvergenceError, match=r"no (rank|truncation) is within the radius"):
            solve(inputs, targets, 0.9 * radius, **options)


@pytest.mark.parametrize("solve", [fewest_weights, select_inputs])
def test_the_start_is_given_back_where_nothing_smaller_is_within_the_radius(solve):
    inputs, _ = made_up_layer(300, 20, 12, seed=1)
    start, targets = with_original(inputs, 12, "relu", seed=0)
    result = solve(inputs, targets, 1e-4 * targets.norm().item(), warm_start=start)
    assert torch.equal(result.weight, start.weight)
    assert torch.equal(result.bias, start.bias)
    assert result.objective == 20 * 12
    assert result.violation == 0


def test_a_start_outside_the_radius_is_never_given_back():
    inputs, _ = made_up_layer(300, 20, 12, activation="none", seed=1)
    start, targets = with_original(inputs, 12, "none", seed=0)
    shifted = WarmStart(start.weight, start.bias + 1)
    radius = 1e-4 * targets.norm().item()
    result = fewest_weights(inputs, targets, radius, activation="none", warm_start=shifted)
    assert result.objective == 20 * 12
    assert not torch.equal(result.bias, shifted.bias)
    assert_within_and_counted(result, inputs, targets, radius, "none")
    with pytest.raises(ConvergenceError, match="no truncation is within the radius") as raised:
        select_inputs(inputs, targets, radius, activation="none", warm_start=shifted)
    assert raised.value.result.violation > 1
    assert raised.value.result.objective == 20 * 12


@pytest.mark.parametrize("activation", ["relu", "none"])
def test_a_bias_is_enough_where_the_radius_allows_it(activation):
    inputs, _ = made_up_layer(60, 12, 9, seed=0)
    start, targets = with_original(inputs, 9, activation, seed=0)
    radius = (targets - targets.mean(dim=0)).norm().item()
    result = fewest_weights(
        inputs, targets, 1.001 * radius, activation=activation, warm_start=start
    )
    assert result.objective == 0 and not result.weight.any()
    assert torch.allclose(result.bias, targets.mean(dim=0))
    result = fewest_weights(
        inputs, targets, 0.998 * radius, activation=activation, warm_start=start
    )
    assert result.objective > 0


def test_what_no_rank_can_reach_is_an_error_with_the_best_there_is():
    inputs, targets = made_up_layer(200, 5, 12, seed=0)
    shuffled = targets[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    for activation in ("relu", "none"):
        with pytest.raises(ConvergenceError, match="no rank is within the radius") as raised:
            fewest_weights(inputs, shuffled, 1e-2 * shuffled.norm().item(), activation=activation)
        assert raised.value.result.objective == 5
        assert raised.value.result.violation > 1


def test_what_the_lowest_rank_reaches_from_nothing_is_reached():
    """Also where the regression of the targets is far from outputs that give them by ReLU."""
    for seed in range(10):
        inputs, targets = made_up_layer(40, 2, 6, seed=seed)
        radius = 0.03 * targets.norm().item()
        try:
            lowest_rank(inputs, targets, radius)
        except ConvergenceError:
            continue
        assert fewest_weights(inputs, targets, radius).violation <= 1e-3


@pytest.mark.parametrize("solve", [fewest_weights, select_inputs])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.rand(19, 4)}, "inputs has 20 samples, targets has 19"),
        ({"targets": -torch.rand(20, 4)}, "targets of a ReLU layer must not be negative"),
        ({"inputs": torch.full((20, 5), float("nan"))}, "inputs has 100 values"),
        ({"radius": -1.0}, "radius is -1"),
        ({"radius": float("nan")}, "radius is nan"),
        ({"activation": "gelu"}, "activation is 'gelu'"),
        ({"ridge": 0}, "ridge is 0"),
        ({"warm_start": WarmStart(torch.zeros(4, 4), torch.zeros(4))}, r"warm_start\.weight has"),
    ],
)
def test_a_problem_that_is_none_is_refused(solve, change, message):
    problem = {"inputs": torch.rand(20, 5), "targets": torch.rand(20, 4), "radius": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        solve(**problem)


def test_no_iterations_are_refused():
    with pytest.raises(ValueError, match="max_iterations is 0"):
        fewest_weights(torch.rand(20, 5), torch.rand(20, 4), 1.0, max_iterations=0)


@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("shape", [(300, 20, 12), (120, 8, 25), (15, 40, 12)], ids=str)
def test_the_closed_form_is_within_its_radius_and_stores_what_it_says(shape, fraction, activation):
    samples, in_features, out_features = shape
    inputs, _ = made_up_layer(samples, in_features, out_features, seed=samples)
    start, targets = with_original(inputs, out_features, activation, seed=2)
    radius = fraction * targets.norm().item()
    result = select_inputs(inputs, targets, radius, activation=activation, warm_start=start)
    closed_form = SolverStatus.CLOSED_FORM
    assert_within_and_counted(result, inputs, targets, radius, activation, closed_form)
    assert result.iterations == 0


def regressed_and_truncated(inputs: Tensor, kept: Tensor, start: WarmStart, rank: int) -> WarmStart:
    """The activation-aware SVD of a regression on some inputs, from the centred data themselves.

    The ridge is written as further samples.
    """
    features = inputs.shape[1]
    centred = inputs - inputs.mean(dim=0)
    held = (RIDGE * centred.square().sum() / features).sqrt() * torch.eye(features).to(inputs)
    rows = torch.cat([centred, held])
    outputs = rows @ start.weight.T
    weight = torch.linalg.lstsq(rows[:, kept], outputs).solution.T
    left = torch.linalg.svd(rows[:, kept] @ weight.T, full_matrices=False).Vh[:rank]
    weight = left.T @ (left @ weight)
    mean = inputs.mean(dim=0) @ start.weight.T + start.bias
    return WarmStart(weight, mean - inputs[:, kept].mean(dim=0) @ weight.T)


@pytest.mark.parametrize("tolerance", [0.05, 0.1, 0.3])
def test_the_closed_form_is_what_the_rank_search_of_the_fewest_weights_begins_with(
    tolerance, captured
):
    lower = False
    for layer in captured.layers:
        inputs, targets = layer.live_inputs.inputs, layer.targets[:, layer.live_out]
        start = WarmStart(
            layer.weight[layer.live_out][:, layer.live_in], layer.bias[layer.live_out]
        )
        problem = (targets, tolerance * targets.norm().item())
        options = {"activation": layer.activation}
        closed, fewest = (
            solve(layer.live_inputs, *problem, **options, warm_start=start)
            for solve in (select_inputs, fewest_weights)
        )
        kept, rank = used(closed.weight).nonzero()[:, 0], numerical_rank(closed.weight)
        assert len(kept) < inputs.shape[1]

        # It is the truncated regression on its inputs, and of the lowest rank that will do.
        outputs = OutputSet(*problem, layer.activation, "hinge")
        exact = WarmStart(start.weight.double(), start.bias.double())
        expected = regressed_and_truncated(inputs.double(), kept, exact, rank)
        assert torch.allclose(closed.weight[:, kept].double(), expected.weight, atol=1e-4)
        assert torch.allclose(closed.bias.double(), expected.bias, atol=1e-4)
        for fewer in range(rank):
            less = regressed_and_truncated(inputs.double(), kept, exact, fewer)
            produced = inputs[:, kept].double() @ less.weight.T + less.bias
            assert outputs.deviation(produced).norm() > problem[1] * (1 - 1e-4)

        # The search of the fewest weights lowers the rank on the same inputs.
        regressed = regress_outputs(layer.live_inputs, kept, start, RIDGE)
        searched = lowest_rank(inputs[:, kept], *problem, **options, warm_start=regressed)
        assert torch.equal(fewest.weight[:, kept], searched.weight)
        assert torch.equal(fewest.bias, searched.bias)
        assert torch.equal(used(fewest.weight), used(closed.weight))
        assert fewest.objective <= closed.objective
        lower |= fewest.objective < closed.objective
    assert lower or tolerance > 0.05  # at larger ones these few ranks leave it nothing to do


@pytest.mark.parametrize("activation", ["relu", "none"])
def test_where_no_input_can_be_spared_the_closed_form_is_the_activation_aware_svd(activation):
    inputs = torch.linalg.qr(normal(300, 12, seed=0) - 0.5).Q
    weight = 10 * normal(30, 3, seed=1) @ torch.linalg.qr(normal(12, 3, seed=2)).Q.T
    start = WarmStart(weight, normal(30, seed=3))
    outputs = inputs @ start.weight.T + start.bias
    targets = outputs.relu() if activation == "relu" else outputs
    radius = 0.01 * targets.norm().item()
    result = select_inputs(inputs, targets, radius, activation=activation, warm_start=start)
    assert used(result.weight).all() and numerical_rank(result.weight) == 3
    produced = inputs @ result.weight.T + result.bias
    assert torch.allclose(produced, outputs, atol=1e-9)


@pytest.mark.parametrize("ridge", [1e-2, 1.0])
@pytest.mark.parametrize("samples", [12, 50, 400])
def test_regression_onto_some_inputs_is_ridge_regression_towards_the_weight(samples, ridge):
    """It minimises ||Xc (W - W0)t||_F^2 + ridge * ||W - W0||_F^2 over W on the inputs kept."""
    inputs, _ = made_up_layer(samples, 20, 6, seed=samples)
    start = WarmStart(normal(6, 20, seed=1), normal(6, seed=2))
    kept = torch.arange(0, 20, 3)
    regressed = regress_outputs(CentredInputs(inputs), kept, start, ridge)
    middle = inputs.mean(dim=0)
    centred = inputs - middle
    held = (ridge * centred.square().sum() / 20).sqrt()
    design = torch.cat([centred, held * torch.eye(20, dtype=inputs.dtype)])
    expected = torch.linalg.lstsq(design[:, kept], design @ start.weight.T).solution.T
    assert torch.allclose(regressed.weight, expected, atol=1e-8)
    # The mean output is that of the start.
    assert torch.allclose(
        regressed.weight @ middle[kept] + regressed.bias, start.weight @ middle + start.bias
    )


def test_a_regression_does_not_depend_on_how_often_the_samples_are_repeated():
    inputs, _ = made_up_layer(60, 20, 12, seed=2)
    start = WarmStart(normal(12, 20, seed=1), normal(12, seed=2))
    kept = torch.arange(0, 20, 2)
    once, repeated = (
        regress_outputs(CentredInputs(inputs.repeat(times, 1)), kept, start, 0.1).weight
        for times in (1, 5)
    )
    assert torch.allclose(once, repeated, atol=1e-6)


def missed_without(inputs: Tensor, weight: Tensor, kept: list[int]) -> float:
    """The smallest change of the outputs where only some inputs have weights, by least squares."""
    outputs, left = inputs @ weight.T, inputs[:, kept]
    return (outputs - left @ torch.linalg.lstsq(left, outputs).solution).norm().item()


def one_by_one(inputs: Tensor, weight: Tensor, leaving: int) -> list[int]:
    """The inputs that stay, of all ways to leave out one more the least missed each time."""
    stay = list(range(inputs.shape[1]))
    for _ in range(leaving):
        without = {gone: [each for each in stay if each != gone] for gone in stay}
        stay = min(without.values(), key=lambda kept: missed_without(inputs, weight, kept))
    return stay


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("features", [14, 20, 27])
def test_inputs_leave_in_the_order_in_which_they_are_missed_least(features, seed):
    """Among correlated inputs, of which what is left depends on what is gone."""
    inputs = normal(60, 5, seed=seed) @ normal(5, features, seed=seed + 100)
    inputs = inputs + 0.3 * normal(60, features, seed=seed + 200)
    weight = normal(4, features, seed=seed + 300)
    stays = _eliminate_inputs(weight, torch.linalg.inv(inputs.T @ inputs)).tolist()
    leaving = features - int(0.85 * features)
    assert len(stays) == features - leaving
    assert stays == one_by_one(inputs, weight, leaving)


@pytest.mark.parametrize("seed", range(5))
def test_of_near_copies_one_stays_however_little_each_matters(seed):
    """Either of a pair is missed least of all; without both something is lost."""
    once = normal(200, 10, seed=seed)
    inputs = torch.cat([once, once[:, :2] + 1e-3 * normal(200, 2, seed=seed + 50)], dim=1)
    weight = normal(6, 12, seed=seed + 100)
    stays = _eliminate_inputs(weight, torch.linalg.inv(inputs.T @ inputs)).tolist()
    assert len(stays) == 10
    assert all(len({place, 10 + place} & set(stays)) == 1 for place in (0, 1))
