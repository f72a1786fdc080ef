"""What a solve promises holds for layers of every shape, scale and degeneracy."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddlr import solve_low_rank
from experiments.methods.cone_solvers import solve_reference
from made_up import made_up_layer
from nettrim import solve_sparse

SOLVERS = {"nuclear": solve_low_rank, "l1": solve_sparse}
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
