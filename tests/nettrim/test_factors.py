"""Products of two sparse matrices: what is planted, their sizes, their promise, refits."""

import pytest
import torch

from ddlr import CentredInputs, SparseFactors
from ddlr.constraints import OutputSet
from ddlr.method import LayerProblem
from ddlr.problem import WarmStart
from ddlr.sizes import layer_size
from made_up_quadratics import normal, quadratic_of
from nettrim import fewest_nonzeros
from nettrim.factor_search import FactorSearch, split
from nettrim.factors import PARTS, refit_product, smallest_product, store_product


def planted(rows=24, columns=30, inner=8):
    """Two matrices of 60 nonzeros each; their product has far more."""
    return tuple(
        matrix_with(60, shape, seed) for shape, seed in (((rows, inner), 1), ((inner, columns), 2))
    )


def matrix_with(nonzeros, shape, seed):
    matrix = torch.zeros(shape, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(matrix.numel(), generator=generator)[:nonzeros]
    values = normal(nonzeros, seed=seed + 10)
    matrix.view(-1)[places] = values.sign() * (1 + values.abs())
    return matrix


def problem_of(weight, tolerance, activation="relu", dtype=torch.float64):
    rows, columns = weight.shape
    inputs, bias = normal(300, columns, seed=5).to(dtype), normal(rows, seed=6).to(dtype)
    targets = inputs @ weight.to(dtype).T + bias
    if activation == "relu":
        targets = targets.relu()
    radius = tolerance * targets.norm().item()
    return LayerProblem(CentredInputs(inputs), targets, radius, activation, weight.to(dtype), bias)


def error_of(fit, problem):
    outputs = OutputSet(problem.targets, 0.0, problem.activation, "hinge")
    produced = torch.addmm(fit.bias, problem.inputs.inputs, fit.weight.T)
    return outputs.deviation(produced).norm().item()


def found(problem):
    shared = {
        "activation": problem.activation,
        "warm_start": WarmStart(problem.weight, problem.bias),
    }
    given = problem.inputs, problem.targets, problem.radius
    sparse = fewest_nonzeros(*given, **shared)
    return smallest_product(*given, sparse=sparse, **shared), sparse


def assert_within_and_stored(result, problem):
    assert error_of(result, problem) <= problem.radius
    assert result.violation == 0
    assert torch.allclose(result.parts["left"] @ result.parts["right"], result.weight)
    stored = store_product(result.weight, result.bias, **result.parts)
    assert isinstance(stored, SparseFactors)
    assert layer_size(stored).parameters <= result.objective
    assert torch.allclose(stored.weight, result.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("shape", [(24, 30), (30, 24)], ids=["wide", "tall"])
def test_a_planted_product_is_within_the_radius_and_smaller_than_one_matrix(
    shape, activation, dtype
):
    left, right = planted(*shape)
    problem = problem_of(left @ right, 0.2, activation, dtype)
    result, sparse = found(problem)
    assert result.objective < 0.9 * sparse.objective
    assert_within_and_stored(result, problem)


@pytest.mark.parametrize("tolerance", [0.05, 0.1, 0.2])
def test_on_the_first_layer_of_a_network_products_have_far_fewer_nonzeros(tolerance, captured):
    problem = captured.layers[0].problem(tolerance)
    result, sparse = found(problem)
    assert result.objective < 0.8 * sparse.objective
    assert_within_and_stored(result, problem)
    assert set(used_inputs(result)) <= set(used_inputs(sparse))


def used_inputs(result):
    return result.weight.any(dim=0).nonzero()[:, 0].tolist()


def test_where_no_product_is_smaller_the_sparse_weight_is_the_answer():
    problem = problem_of(matrix_with(20, (12, 15), seed=1), 0.05)
    result, sparse = found(problem)
    assert result.parts is None
    assert torch.equal(result.weight, sparse.weight)


@pytest.mark.parametrize("shape", [(24, 30), (30, 24)], ids=["wide", "tall"])
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_a_refit_keeps_nonzeros_and_inputs_and_lowers_the_error(activation, shape):
    left, right = planted(*shape)
    problem = problem_of(left @ right, 0.3, activation)
    result, _ = found(problem)
    weight, bias, parts = refit_product(problem, result, ridge=1e-2)
    assert torch.allclose(parts["left"] @ parts["right"], weight)
    for name in PARTS:
        assert (parts[name] != 0).sum() <= (result.parts[name] != 0).sum()
    unused = ~result.weight.any(dim=0)
    assert not weight[:, unused].any()
    before, after = (error_of(each, problem) for each in (result, WarmStart(weight, bias)))
    assert after < before


# --- the search for both factors -------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)], ids=["wide", "tall"])
@pytest.mark.parametrize("budget", [1, 30, 100, 170])
def test_budgets_of_both_factors_are_exact(shape, budget):
    quadratic = quadratic_of(*shape, seed=0)
    sizes = split(budget, shape, 0.33)
    assert sum(sizes) == budget
    search = FactorSearch(quadratic.gram)
    start = None
    for _ in range(2):  # without a start, and from there
        start = search.factors(quadratic.cross, sizes, start)
        assert tuple(int((factor != 0).sum()) for factor in start) == sizes
        assert (start[0] @ start[1]).shape == shape


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=["wide", "tall"])
def test_what_a_smaller_product_left_idle_is_of_use_in_a_larger_one(shape):
    quadratic = quadratic_of(*shape, seed=2)
    search = FactorSearch(quadratic.gram)

    def found(nonzeros, start=None):
        factors = search.factors(quadratic.cross, split(nonzeros, shape, 0.5), start)
        left, right = search.improved(quadratic.cross, factors, sweeps=3)
        inner = ((left != 0).any(dim=0) & (right != 0).any(dim=1)).sum()
        return (left, right), int(inner), quadratic.excess(left @ right)

    small, few, _ = found(60)
    _, inner, grown = found(500, small)
    _, _, anew = found(500)
    assert few < min(shape) / 2
    assert inner > 2 * few
    assert grown <= 1.25 * anew


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)], ids=["wide", "tall"])
def test_factors_improved_on_their_supports_come_to_a_stationary_point(shape):
    quadratic = quadratic_of(*shape, seed=1)
    search = FactorSearch(quadratic.gram)
    factors = search.factors(quadratic.cross, split(80, shape, 0.33))
    reached = quadratic.excess(factors[0] @ factors[1])
    for _ in range(300):
        improved = search.improved(quadratic.cross, factors)
        excess = quadratic.excess(improved[0] @ improved[1])
        assert excess <= reached * (1 + 1e-9)
        assert all(
            torch.equal(one != 0, other != 0) for one, other in zip(factors, improved, strict=True)
        )
        factors, reached = improved, excess
    left, right = (factor.clone().requires_grad_() for factor in factors)
    weight = left @ right
    loss = ((weight @ quadratic.gram) * weight).sum() - 2 * (weight * quadratic.cross).sum()
    loss.backward()
    scale = quadratic.cross.norm() * max(left.detach().norm(), right.detach().norm())
    for factor in (left, right):
        assert (factor.grad * (factor != 0)).norm() <= 1e-4 * scale
