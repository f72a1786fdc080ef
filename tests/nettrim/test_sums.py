"""Sums of a sparse and a low-rank matrix: what is planted, their sizes, their promise, refits."""

import pytest
import torch

from ddlr import CentredInputs, fewest_weights
from ddlr.constraints import OutputSet
from ddlr.layers import numerical_rank
from ddlr.method import LayerProblem
from ddlr.problem import WarmStart
from ddlr.sizes import layer_size
from made_up_quadratics import normal
from nettrim import fewest_nonzeros
from nettrim.sums import SumFit, SumProblem, refit_sum, smallest_sum, store_sum

OUT, IN = 24, 30


def planted(rank=2, nonzeros=40):
    """A matrix of a rank, and one of so many larger nonzeros."""
    low_rank = normal(OUT, rank, seed=1) @ normal(rank, IN, seed=2)
    sparse = torch.zeros(OUT * IN, dtype=torch.float64)
    places = torch.randperm(OUT * IN, generator=torch.Generator().manual_seed(3))[:nonzeros]
    sparse[places] = 6 * normal(nonzeros, seed=4).sign()
    return sparse.view(OUT, IN), low_rank


def layer(activation="relu", weight=None):
    inputs = normal(500, IN, seed=5)
    start = WarmStart(sum(planted()) if weight is None else weight, normal(OUT, seed=6))
    targets = inputs @ start.weight.T + start.bias
    if activation == "relu":
        targets = targets.relu()
    return CentredInputs.of(inputs), targets, start


def error_of(fit, inputs, targets, activation="relu"):
    outputs = OutputSet(targets, 0.0, activation, "hinge")
    return outputs.deviation(torch.addmm(fit.bias, inputs.inputs, fit.weight.T)).norm().item()


def found(activation, tolerance, *, dtype=torch.float64):
    inputs, targets, start = layer(activation)
    inputs, targets = CentredInputs.of(inputs.inputs.to(dtype)), targets.to(dtype)
    start = WarmStart(start.weight.to(dtype), start.bias.to(dtype))
    radius = tolerance * targets.norm().item()
    shared = {"activation": activation, "warm_start": start}
    sparse = fewest_nonzeros(inputs, targets, radius, **shared)
    low_rank = fewest_weights(inputs, targets, radius, **shared)
    result = smallest_sum(inputs, targets, radius, sparse=sparse, low_rank=low_rank, **shared)
    return (
        result,
        sparse,
        low_rank,
        LayerProblem(inputs, targets, radius, activation, *[start.weight, start.bias]),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("tolerance", [0.02, 0.1, 0.3])
def test_a_planted_sum_is_found_within_the_radius_and_smaller_than_either_form(
    tolerance, activation, dtype
):
    result, sparse, low_rank, problem = found(activation, tolerance, dtype=dtype)
    assert error_of(result, problem.inputs, problem.targets, activation) <= problem.radius
    assert result.objective < sparse.objective
    assert torch.equal(result.parts["sparse"] + result.parts["low_rank"], result.weight)
    size = layer_size(store_sum(result.weight, result.bias, **result.parts)).parameters
    assert size <= result.objective
    # Planted are 2 * (24 + 30 - 2) weights of rank 2, and 40 nonzeros.
    assert size <= 104 + 40 + 4
    assert (
        size
        < layer_size(
            store_sum(
                low_rank.weight, low_rank.bias, torch.zeros_like(low_rank.weight), low_rank.weight
            )
        ).parameters
    )


def test_where_no_sum_is_smaller_the_sparse_weight_is_the_answer():
    sparse_only = planted(nonzeros=20)[0]
    inputs, targets, start = layer(weight=sparse_only)
    radius = 0.05 * targets.norm().item()
    sparse = fewest_nonzeros(inputs, targets, radius, warm_start=start)
    low_rank = fewest_weights(inputs, targets, radius, warm_start=start)
    result = smallest_sum(
        inputs, targets, radius, sparse=sparse, low_rank=low_rank, warm_start=start
    )
    assert result.parts is None
    assert torch.equal(result.weight, sparse.weight)


@pytest.mark.parametrize("activation", ["relu", "none"])
def test_a_refit_keeps_rank_nonzeros_and_inputs_and_lowers_the_error(activation):
    result, _, _, problem = found(activation, 0.2)
    weight, bias, parts = refit_sum(problem, result, ridge=1e-2)
    assert torch.allclose(parts["sparse"] + parts["low_rank"], weight)
    assert (parts["sparse"] != 0).sum() == (result.parts["sparse"] != 0).sum()
    assert numerical_rank(parts["low_rank"]) == numerical_rank(result.parts["low_rank"])
    unused = ~result.weight.any(dim=0)
    assert not weight[:, unused].any()
    before, after = (
        error_of(each, problem.inputs, problem.targets, activation)
        for each in (result, WarmStart(weight, bias))
    )
    assert after < before


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_the_matrix_of_a_rank_is_the_nearest_in_outputs(shape):
    rows, columns = shape
    inputs = normal(50, columns, seed=1)
    weight = normal(rows, columns, seed=2)
    targets = inputs @ weight.T
    outputs = OutputSet(targets, 0.0, "none", "hinge")
    start = WarmStart(weight, torch.zeros(rows, dtype=torch.float64))
    problem = SumProblem(CentredInputs.of(inputs), outputs, start, 1e-12)
    centred = inputs - inputs.mean(dim=0)
    values = torch.linalg.svdvals(centred @ weight.T)
    for rank in range(min(shape) + 1):
        nearest = problem.of_rank(weight, rank)
        missed = (centred @ (nearest - weight).T).square().sum().item()
        assert missed == pytest.approx(values[rank:].square().sum().item(), rel=1e-6, abs=1e-9)
        assert torch.linalg.matrix_rank(nearest, rtol=1e-6) == rank


def test_a_fit_never_reads_what_was_never_written(monkeypatch):
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda like: empty_like(like).fill_(float("nan")))
    inputs, targets, start = layer("none")
    problem = SumProblem(inputs, OutputSet(targets, 0.0, "none", "hinge"), start, 1e-2)
    support = planted()[0] != 0
    # The best weight on a support is there at once, so that no step succeeds.
    fit = SumFit(problem, support, targets, 0, torch.zeros_like(start.weight))
    reached = fit.loss
    for _ in range(5):
        fit.step()
    assert fit.loss == reached
