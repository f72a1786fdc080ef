"""Rivals that find a sum or a product: what is planted, exact budgets, and the promise."""

import copy
import dataclasses
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import ddlr
from ddlr import CentredInputs, SparseFactors, SparsePlusLowRank, WarmStart
from ddlr.constraints import OutputSet
from ddlr.layers import numerical_rank
from ddlr.method import LayerProblem
from ddlr.quadratic import OutputQuadratic
from ddlr.sizes import fewest_stored, layer_size
from experiments.methods.double_sparse import DOUBLE_SPARSE, FactorFits
from experiments.methods.sparse_low_rank import SPARSE_LOW_RANK, SumFits
from nettrim.sparse import refit_sparse
from nettrim.support import largest_entries, minimise_on_support

METHODS = {"sparse_low_rank": SPARSE_LOW_RANK, "double_sparse": DOUBLE_SPARSE}


@dataclasses.dataclass
class Random:
    seed: int = 0

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def sparse(self, rows: int, columns: int, kept: float) -> Tensor:
        chosen = torch.rand(rows, columns, generator=self.generator) < kept
        return self.normal(rows, columns) * chosen


def quadratic_of(inputs: Tensor, weight: Tensor, bias: Tensor, activation: str = "none"):
    produced = inputs @ weight.T + bias
    targets = produced.relu() if activation == "relu" else produced
    outputs = OutputSet(targets, 0.0, activation, "hinge")
    return OutputQuadratic.of(CentredInputs(inputs), outputs, WarmStart(weight, bias), 1e-6)


def test_a_planted_sum_is_told_apart():
    random = Random()
    sparse, low_rank = (
        random.sparse(20, 30, 0.05),
        random.normal(20, 2) @ random.normal(2, 30),
    )
    inputs, bias = random.normal(400, 30), random.normal(20)
    quadratic = quadratic_of(inputs, sparse + low_rank, bias)
    fit = SumFits(quadratic, torch.float64).fit(2, int((sparse != 0).sum()))
    assert torch.equal(fit.parts["sparse"] != 0, sparse != 0)
    assert torch.allclose(fit.parts["sparse"], sparse, atol=1e-3)
    assert torch.allclose(fit.parts["low_rank"], low_rank, atol=1e-3)
    assert torch.allclose(fit.bias, bias, atol=1e-3)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)], ids=["wide", "tall"])
@pytest.mark.parametrize("budget", [1, 30, 100, 170])
def test_budgets_are_exact(shape, budget):
    random = Random()
    rows, columns = shape
    inputs, weight = random.normal(100, columns), random.normal(rows, columns)
    quadratic = quadratic_of(inputs, weight, random.normal(rows), "relu")
    for rank in (0, 1, 3):
        fit = SumFits(quadratic, torch.float64).of_size(budget, most_ranks=rank)
        nonzeros = int((fit.parts["sparse"] != 0).sum())
        found = numerical_rank(fit.parts["low_rank"])
        assert found == min(rank, 0 if budget < 31 else 3 if budget > 100 else rank)
        assert nonzeros + fewest_stored(found, columns, rows) == budget
        assert torch.equal(fit.parts["sparse"] + fit.parts["low_rank"], fit.weight)
    fit = FactorFits(quadratic, torch.float64).of_size(budget, square_share=0.25)
    assert sum(int((part != 0).sum()) for part in fit.parts.values()) == budget
    assert torch.equal(fit.parts["left"] @ fit.parts["right"], fit.weight)


@pytest.fixture(scope="module")
def layers() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(14, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU())
    inputs = torch.randn(300, 5) @ torch.randn(5, 14) + 0.3 * torch.randn(300, 14)
    inputs[:, [2, 9]] = 0
    with torch.no_grad():
        model[0].bias[4] = -100.0
    return model, inputs


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("order", ["parallel", "cascade"])
@pytest.mark.parametrize("refit", ["none", "layer"])
def test_the_promise_is_kept_by_the_layers_that_are_stored(name, order, refit, layers):
    model, inputs = layers
    before = copy.deepcopy(model.state_dict())
    result = ddlr.compress_network(
        model, inputs, METHODS[name], relative_tolerance=0.2, order=order, refit=refit
    )
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert {"sparse_low_rank", "sparse_factors", "sparse"} & {each.form for each in result.layers}
    given, wanted = inputs, inputs
    for place, report in zip((0, 2), result.layers, strict=True):
        stored = result.model[place]
        target = model[place](wanted).relu()
        produced = given @ stored.weight.T + stored.bias
        read = ~result.unread[report.name]
        missed = torch.where(target > 0, produced - target, produced.clamp(min=0))[:, read]
        assert missed.norm() <= report.relative_bound * target.norm() * (1 + 1e-4)
        assert math.isclose(report.relative_bound, 0.2) or order == "cascade"
        assert report.parameters_kept == layer_size(stored).parameters < report.parameters_dense
        wanted = target
        given = target if order == "parallel" else result.model[place + 1](stored(given))


@pytest.mark.parametrize("name", METHODS)
def test_the_stored_weight_is_the_solved_one_and_counts_what_was_sought(name, layers):
    model, inputs = layers
    layer = ddlr.capture_layers(model, inputs).layers[0]
    problem = layer.problem(0.1)
    solved = METHODS[name].solver(
        problem.inputs,
        problem.targets,
        problem.radius,
        activation=problem.activation,
        warm_start=WarmStart(problem.weight, problem.bias),
    )
    stored = METHODS[name].store(solved.weight, solved.bias, **solved.parts)
    assert isinstance(stored, SparsePlusLowRank | SparseFactors | nn.Linear)
    assert torch.allclose(stored.weight, solved.weight, atol=1e-5)
    # What does not count in a product is not stored.
    assert layer_size(stored).parameters <= solved.objective < problem.weight.numel()


@pytest.mark.parametrize("name", METHODS)
def test_sizes_of_parallel_order_stay_in_cascade_where_asked_for(name, layers):
    model, inputs = layers
    compressed = partial(
        ddlr.compress_network, model, inputs, METHODS[name], relative_tolerance=0.2, refit="layer"
    )
    alone = compressed()
    behind = compressed(order="cascade", settings=ddlr.Settings(cascade_bound="reached"))
    sizes = [[report.parameters_kept for report in each.layers] for each in (alone, behind)]
    assert sizes[1][0] == sizes[0][0] and sizes[1][1] <= sizes[0][1]
    assert behind.layers[1].form == alone.layers[1].form


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("tolerance", [0.0, 1e-7, 5.0])
def test_without_room_the_layer_stays_and_with_much_a_bias_is_left(name, tolerance, layers):
    model, inputs = layers
    result = ddlr.compress_network(model, inputs, METHODS[name], relative_tolerance=tolerance)
    for report in result.layers:
        if tolerance > 1:
            assert report.parameters_kept == 0
        else:
            assert report.form == "dense" and report.violation <= 1e-4


# --- with a given structure ------------------------------------------------------------------


def test_largest_entries_are_as_many_as_asked_for():
    matrix = torch.tensor([[1.0, -5.0, 2.0], [2.0, 0.5, -3.0]])
    assert largest_entries(matrix, 2).tolist() == [[0, -5, 0], [0, 0, -3]]
    assert int((largest_entries(torch.ones(3, 4), 5) != 0).sum()) == 5
    assert not largest_entries(matrix, 0).any()


def test_the_minimum_on_a_support_is_that_of_its_normal_equations():
    random = Random()
    inputs, cross = random.normal(50, 6), random.normal(4, 6)
    gram, start = inputs.T @ inputs, random.sparse(4, 6, 0.5)
    found = minimise_on_support(
        lambda weight: weight @ gram, cross, start, gram.diagonal(), iterations=100
    )
    for row in range(4):
        on = start[row] != 0
        assert not found[row, ~on].any()
        assert torch.allclose(found[row, on], torch.linalg.solve(gram[on][:, on], cross[row, on]))


def refit_problem_of(name: str):
    random = Random(3)
    inputs, weight, bias = random.normal(200, 10), random.normal(8, 10), random.normal(8)
    targets = (inputs @ weight.T + bias).relu()
    problem = LayerProblem(CentredInputs(inputs), targets, 1.0, "relu", weight, bias)
    quadratic = quadratic_of(inputs, weight, bias, "relu")
    if name == "sparse_low_rank":
        fit = SumFits(quadratic, torch.float64).fit(0, 40)
    else:
        fit = FactorFits(quadratic, torch.float64).fit((12, 40))
    return problem, fit


def deviation(problem: LayerProblem, weight: Tensor, bias: Tensor) -> float:
    outputs = OutputSet(problem.targets, 0.0, "relu", "hinge")
    return outputs.deviation(problem.inputs.inputs @ weight.T + bias).norm().item()


def test_the_refit_of_a_sum_without_a_rank_is_that_of_a_sparse_weight():
    problem, fit = refit_problem_of("sparse_low_rank")
    weight, bias, _ = SPARSE_LOW_RANK.refit(problem, fit, ridge=1e-2)
    expected = refit_sparse(
        problem.inputs, problem.targets, fit.weight, fit.bias, ridge=1e-2, tolerance=1e-8
    )
    before, after, best = (
        deviation(problem, *each) for each in ((fit.weight, fit.bias), (weight, bias), expected)
    )
    assert after < 0.99 * before
    assert after == pytest.approx(best, rel=1e-2)


def test_the_refit_of_a_product_lowers_the_error_on_its_supports():
    problem, fit = refit_problem_of("double_sparse")
    weight, bias, parts = DOUBLE_SPARSE.refit(problem, fit, ridge=1e-2)
    assert deviation(problem, weight, bias) < 0.99 * deviation(problem, fit.weight, fit.bias)
    assert torch.allclose(parts["left"] @ parts["right"], weight)
    for side in ("left", "right"):
        assert torch.equal(parts[side] != 0, fit.parts[side] != 0)
