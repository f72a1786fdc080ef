"""The layer solver agrees with independent ones, for both norms, and keeps what it promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddlr import ConvergenceError, SolverStatus, WarmStart, solve_low_rank
from experiments.methods.cone_solvers import solve_reference
from made_up import made_up_layer
from nettrim import solve_sparse

SOLVERS = {"nuclear": solve_low_rank, "l1": solve_sparse}
SETS = ["nettrim", "hinge"]
TOLERANCE = 1e-3

layers = st.fixed_dictionaries(
    {
        "samples": st.integers(1, 200),
        "in_features": st.integers(1, 40),
        "out_features": st.integers(1, 40),
        "activation": st.sampled_from(["relu", "none"]),
        "seed": st.integers(0, 10**6),
        "scale": st.sampled_from([1e-6, 1e-3, 1.0, 1e3, 1e6]),
        "kind": st.sampled_from(["plain", "rank_deficient", "dead", "constant", "positive"]),
    }
)
options = st.fixed_dictionaries(
    {
        "norm": st.sampled_from(sorted(SOLVERS)),
        "constraint": st.sampled_from(["nettrim", "hinge"]),
        "fraction": st.sampled_from([0.03, 0.1, 0.4]),
    }
)


def deviation(inputs, targets, weight, bias, activation):
    """D, written out once more."""
    outputs = inputs @ weight.T + bias
    if activation == "none":
        return outputs - targets
    return torch.where(targets > 0, outputs - targets, outputs.clamp(min=0))


@pytest.mark.parametrize("norm", SOLVERS)
@pytest.mark.parametrize("constraint", SETS)
@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("fraction", [0.05, 0.4])
def test_agrees_with_scs(norm, constraint, activation, fraction):
    inputs, targets = made_up_layer(40, 9, 7, activation=activation, seed=1)
    radius = fraction * targets.norm().item()
    options = {"activation": activation, "constraint": constraint}
    ours = SOLVERS[norm](inputs, targets, radius, tolerance=1e-5, max_iterations=20000, **options)
    reference = solve_reference(inputs, targets, radius, norm=norm, solver="SCS", **options)
    assert ours.objective == pytest.approx(reference.objective, rel=1e-4)
    miss = deviation(inputs, targets, ours.weight, ours.bias, activation)
    assert miss.norm() <= radius * (1 + 1e-5)
    if constraint == "nettrim" and activation == "relu":
        assert miss[targets == 0].norm() <= 0.01 * radius


@pytest.mark.parametrize("norm", SOLVERS)
@pytest.mark.parametrize("constraint", SETS)
def test_agrees_with_clarabel_on_the_smallest(norm, constraint):
    inputs, targets = made_up_layer(20, 5, 4, seed=2)
    radius = 0.1 * targets.norm().item()
    ours = SOLVERS[norm](
        inputs, targets, radius, constraint=constraint, tolerance=1e-6, max_iterations=50000
    )
    reference = solve_reference(
        inputs, targets, radius, norm=norm, constraint=constraint, solver="CLARABEL"
    )
    assert ours.objective == pytest.approx(reference.objective, rel=1e-5)
    assert ours.lower_bound <= reference.objective * (1 + 1e-7)


@pytest.mark.parametrize("norm", SOLVERS)
def test_hinge_is_never_above_nettrim(norm):
    inputs, targets = made_up_layer(60, 12, 10, seed=5)
    radius = 0.2 * targets.norm().item()
    optima = {
        constraint: SOLVERS[norm](
            inputs, targets, radius, constraint=constraint, tolerance=1e-4, max_iterations=20000
        ).objective
        for constraint in SETS
    }
    assert optima["hinge"] < optima["nettrim"]


@pytest.mark.parametrize("norm", SOLVERS)
def test_weight_is_exactly_low_rank_or_sparse(norm):
    inputs, targets = made_up_layer(80, 20, 15, seed=6)
    result = SOLVERS[norm](inputs, targets, 0.3 * targets.norm().item())
    if norm == "nuclear":
        values = torch.linalg.svdvals(result.weight)
        assert (values > 1e-12 * values[0]).sum() < 15
    else:
        assert (result.weight == 0).sum() > 0.2 * result.weight.numel()


@pytest.mark.parametrize("norm", SOLVERS)
def test_iteration_limit_is_an_error_that_carries_the_result(norm):
    inputs, targets = made_up_layer(60, 12, 10)
    with pytest.raises(ConvergenceError, match="after 1 iterations") as caught:
        SOLVERS[norm](inputs, targets, 0.1 * targets.norm().item(), max_iterations=1)
    result = caught.value.result
    assert result.status is SolverStatus.ITERATION_LIMIT
    assert result.iterations == 1
    assert result.weight.shape == (10, 12)


@pytest.mark.parametrize("norm", SOLVERS)
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_radius_of_the_targets_norm_gives_the_zero_weight(norm, activation):
    inputs, targets = made_up_layer(30, 6, 5, activation=activation)
    for factor in (1.0, 7.0):
        result = SOLVERS[norm](
            inputs, targets, factor * targets.norm().item(), activation=activation
        )
        assert not result.weight.any()
        assert (result.objective, result.relative_gap, result.violation) == (0, 0, 0)


@pytest.mark.parametrize("norm", SOLVERS)
def test_radius_zero_reproduces_the_targets(norm):
    inputs, targets = made_up_layer(60, 6, 5)
    result = SOLVERS[norm](inputs, targets, 0.0)
    outputs = (inputs @ result.weight.T + result.bias).relu()
    assert (outputs - targets).norm() <= 1e-3 * targets.norm()


@pytest.mark.parametrize("norm", SOLVERS)
@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("samples", [8, 50])
def test_scale_and_few_or_dependent_samples_do_not_matter(norm, scale, samples):
    plain = made_up_layer(samples, 12, 6, rank=5)
    inputs, targets = made_up_layer(samples, 12, 6, rank=5, scale=scale)
    inputs = torch.cat([inputs, torch.zeros(samples, 1).to(inputs)], dim=1)
    targets = torch.cat([targets, torch.zeros(samples, 1).to(targets)], dim=1)
    result = SOLVERS[norm](inputs, targets, 0.1 * targets.norm().item(), tolerance=1e-3)
    same = SOLVERS[norm](*plain, 0.1 * plain[1].norm().item(), tolerance=1e-3)
    assert result.objective == pytest.approx(same.objective, rel=2e-3)


@pytest.mark.parametrize("norm", SOLVERS)
def test_float32_is_followed_and_certified(norm):
    inputs, targets = (tensor.float() for tensor in made_up_layer(200, 30, 20))
    result = SOLVERS[norm](inputs, targets, 0.1 * targets.norm().item(), tolerance=1e-3)
    assert result.weight.dtype == result.bias.dtype == result.dual.dtype == torch.float32
    assert result.status is SolverStatus.CONVERGED


@pytest.mark.parametrize("norm", SOLVERS)
def test_a_neighbouring_solve_is_a_better_start(norm):
    inputs, targets = made_up_layer(200, 30, 20, seed=8)
    size = targets.norm().item()
    neighbour = SOLVERS[norm](inputs, targets, 0.11 * size, tolerance=1e-3)
    cold = SOLVERS[norm](inputs, targets, 0.1 * size, tolerance=1e-3)
    warm = SOLVERS[norm](inputs, targets, 0.1 * size, tolerance=1e-3, warm_start=neighbour)
    assert warm.iterations < cold.iterations
    assert warm.objective == pytest.approx(cold.objective, rel=3e-3)


@pytest.mark.parametrize("norm", SOLVERS)
def test_a_zero_solution_is_a_usable_start(norm):
    inputs, targets = made_up_layer(200, 30, 20, seed=8)
    size = targets.norm().item()
    zero = SOLVERS[norm](inputs, targets, size)
    assert not zero.weight.any()
    warm = SOLVERS[norm](inputs, targets, 0.1 * size, warm_start=zero)
    assert warm.status is SolverStatus.CONVERGED


@pytest.mark.parametrize("norm", SOLVERS)
def test_tensors_that_require_a_gradient_can_be_given(norm):
    layer = torch.nn.Linear(6, 5)
    inputs = torch.randn(40, 6)
    targets = layer(inputs).relu()
    start = WarmStart(layer.weight, layer.bias)
    result = SOLVERS[norm](inputs, targets, 0.1 * targets.norm().item(), warm_start=start)
    assert not any(value.requires_grad for value in (result.weight, result.bias, result.dual))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": torch.ones(3, 2)}, "inputs has 3 samples, targets has 4"),
        ({"inputs": torch.ones(0, 2), "targets": torch.ones(0, 2)}, "inputs has shape"),
        ({"inputs": torch.full((4, 2), float("nan"))}, "inputs has 8 values that are not finite"),
        ({"targets": torch.full((4, 2), float("inf"))}, "targets has 8 values that are not finite"),
        ({"targets": torch.ones(4)}, "targets has shape"),
        ({"inputs": torch.ones(4, 2, dtype=torch.int64)}, "floating-point"),
        ({"radius": -0.1}, "radius is -0.1"),
        ({"tolerance": 0.0}, "tolerance is 0.0"),
        ({"max_iterations": 0}, "max_iterations is 0"),
        ({"warm_start": WarmStart(torch.ones(3, 2), torch.ones(2))}, "warm_start.weight has shape"),
    ],
)
@pytest.mark.parametrize("norm", SOLVERS)
def test_bad_arguments_are_named(norm, change, message):
    arguments = {"inputs": torch.rand(4, 2), "targets": torch.rand(4, 2), "radius": 0.1, **change}
    with pytest.raises(ValueError, match=message):
        SOLVERS[norm](**arguments)


def make(samples, in_features, out_features, activation, seed, scale, kind):
    """A layer with an original weight behind it, so that the program is feasible."""
    rank = max(1, in_features // 3) if kind == "rank_deficient" else None
    inputs, _ = made_up_layer(samples, in_features, out_features, seed=seed, rank=rank)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator, dtype=torch.float64)
    bias = torch.randn(out_features, generator=generator, dtype=torch.float64)
    if kind == "constant":
        inputs = inputs[:1].expand(samples, -1).clone()
    outputs = inputs @ weight.T + bias
    if kind == "dead":
        outputs[:, ::2] -= outputs[:, ::2].amax(dim=0) + 1
    if kind == "positive":
        outputs -= outputs.amin(dim=0) - 1
    targets = outputs.relu() if activation == "relu" else outputs
    return scale * inputs, scale * targets


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True)
@given(layers, options)
def test_every_solve_keeps_its_promise(layer, option):
    inputs, targets = make(**layer)
    radius = option["fraction"] * targets.norm().item()
    result = SOLVERS[option["norm"]](
        inputs,
        targets,
        radius,
        activation=layer["activation"],
        constraint=option["constraint"],
        tolerance=TOLERANCE,
        max_iterations=20000,
    )
    assert abs(result.relative_gap) <= TOLERANCE
    assert result.lower_bound <= result.objective * (1 + TOLERANCE)
    outputs = inputs @ result.weight.T + result.bias
    final = outputs.relu() if layer["activation"] == "relu" else outputs
    assert (final - targets).norm() <= radius * (1 + TOLERANCE)
    miss = torch.where(targets > 0, outputs - targets, outputs.clamp(min=0))
    if layer["activation"] == "none":
        miss = outputs - targets
    assert result.violation == pytest.approx(
        max(0, miss.norm().item() / (radius or 1) - 1), abs=1e-9
    )


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.fixed_dictionaries(
        {
            "samples": st.integers(2, 40),
            "in_features": st.integers(1, 8),
            "out_features": st.integers(1, 6),
            "activation": st.sampled_from(["relu", "none"]),
            "seed": st.integers(0, 10**6),
            "scale": st.just(1.0),
            "kind": st.sampled_from(["plain", "rank_deficient", "dead", "positive"]),
        }
    ),
    options,
)
def test_random_layers_agree_with_scs(layer, option):
    inputs, targets = make(**layer)
    radius = option["fraction"] * targets.norm().item()
    choice = {"activation": layer["activation"], "constraint": option["constraint"]}
    ours = SOLVERS[option["norm"]](
        inputs, targets, radius, tolerance=1e-5, max_iterations=100_000, **choice
    )
    # Its weights are of size 1: an objective of 1e-8 may well stand for 0, whatever its gap.
    reference = solve_reference(
        inputs, targets, radius, norm=option["norm"], tolerance=math.inf, **choice
    )
    assert ours.objective == pytest.approx(reference.objective, rel=1e-4, abs=1e-6)
