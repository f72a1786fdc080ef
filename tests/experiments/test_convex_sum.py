"""The convex program for both structures as a method: promises, forms, and a refit that helps."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

import ddlr
from ddlr.method import LayerProblem
from experiments.methods.convex_sum import LOW_RANK_PLUS_SPARSE, store_smaller_sum
from made_up_quadratics import normal


def planted(rows=14, columns=12):
    """A matrix of rank 1 plus six large entries."""
    weight = normal(rows, 1, seed=1) @ normal(1, columns, seed=2)
    places = torch.arange(6)
    weight[2 * places, places] += 6.0
    return weight


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    layers = OrderedDict(fc1=nn.Linear(12, 14), relu1=nn.ReLU(), fc2=nn.Linear(14, 5))
    with torch.no_grad():
        layers["fc1"].weight.copy_(planted())
    return nn.Sequential(layers).eval()


@pytest.mark.parametrize("refit", ["none", "layer"])
def test_a_planted_sum_is_stored_as_one_within_its_promise(network, refit):
    inputs = torch.randn(400, 12)
    result = ddlr.compress_network(
        network, inputs, LOW_RANK_PLUS_SPARSE, relative_tolerance=0.02, refit=refit
    )
    first = result.layers[0]
    assert first.form == "sparse_low_rank"
    assert first.violation <= 1e-6
    assert 0 <= first.relative_gap <= 1e-2
    assert first.parameters_kept < first.parameters_dense


def test_a_refit_lowers_the_error_on_the_rank_and_support_that_were_found():
    inputs, weight, bias = normal(400, 12, seed=3), planted(), normal(14, seed=4)
    targets = (inputs @ weight.T + bias).relu()
    radius = 0.1 * targets.norm().item()
    problem = LayerProblem(ddlr.CentredInputs(inputs), targets, radius, "relu", weight, bias)
    solved = LOW_RANK_PLUS_SPARSE.solver(inputs, targets, radius)
    refitted, moved, parts = LOW_RANK_PLUS_SPARSE.refit(problem, solved, ridge=1e-2)
    errors = [
        ((inputs @ each.T + shift).relu() - targets).norm()
        for each, shift in ((solved.weight, solved.bias), (refitted, moved))
    ]
    assert errors[1] < 0.9 * errors[0]
    assert ((parts["sparse"] != 0) <= (solved.parts["sparse"] != 0)).all()
    ranks = [torch.linalg.matrix_rank(each["low_rank"]) for each in (solved.parts, parts)]
    assert ranks[1] <= ranks[0]


def test_parts_that_store_no_less_than_the_weight_leave_the_layer():
    weight = normal(6, 5, seed=5)
    parts = {"sparse": weight / 2, "low_rank": weight / 2}
    assert store_smaller_sum(weight, normal(6, seed=6), **parts) is None
