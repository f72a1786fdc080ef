"""ALPS: supports against all there are on tiny layers, the best weight on them, exact budgets."""

from itertools import pairwise

import pytest
import torch

from ddlr.inputs import CentredInputs
from ddlr.problem import WarmStart
from experiments.methods.alps import ALPS, BestSupport
from made_up_quadratics import (
    compress_made_up,
    least_squares,
    magnitude_pruned,
    normal,
    orthonormal_quadratic,
    quadratic_of,
    supports,
)
from nettrim import support as supports_module
from nettrim.support import SupportRegression


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("nonzeros", [1, 7, 24, 47, 48])
def test_orthonormal_inputs_give_the_largest_entries(seed, nonzeros):
    weight = normal(6, 8, seed=seed)
    pruned = BestSupport(orthonormal_quadratic(weight))(nonzeros)
    torch.testing.assert_close(pruned, magnitude_pruned(weight, nonzeros))


def test_tiny_layers_are_near_the_best_support_of_all():
    ratios = []
    for seed in range(8):
        for nonzeros in (2, 4):
            quadratic = quadratic_of(2, 4, seed=seed)
            best = min(
                quadratic.excess(least_squares(quadratic, support))
                for support in supports(2, 4, nonzeros)
            )
            ratios.append(quadratic.excess(BestSupport(quadratic)(nonzeros)) / best)
    assert min(ratios) > 1 - 1e-9
    assert max(ratios) < 2
    assert sum(ratio < 1 + 1e-6 for ratio in ratios) >= len(ratios) / 2


@pytest.mark.parametrize("common", [1.0, 3.0])
def test_larger_layers_are_well_below_the_largest_scaled_entries(common):
    for seed in range(3):
        quadratic = quadratic_of(20, 40, seed=seed, common=common)
        scaled = quadratic.minimiser * quadratic.gram.diagonal().sqrt()
        magnitude = SupportRegression(quadratic.gram, magnitude_pruned(scaled, 80) != 0)(
            quadratic.cross
        )
        assert quadratic.excess(BestSupport(quadratic)(80)) < 0.95 * quadratic.excess(magnitude)


@pytest.mark.parametrize("numbers", [1, 60, 2**22])  # a row at a time, some, all
@pytest.mark.parametrize("moved", [0.0, 0.3])
def test_the_weight_on_a_support_is_that_of_least_squares(numbers, moved, monkeypatch):
    monkeypatch.setattr(supports_module, "_BATCH_NUMBERS", numbers)
    monkeypatch.setattr(supports_module, "_KEPT_NUMBERS", numbers)
    for seed in range(3):
        quadratic = quadratic_of(5, 7, seed=seed, moved=moved)
        support = normal(5, 7, seed=seed + 1) > normal(5, 1, seed=seed + 2)
        support[1] = False
        found = SupportRegression(quadratic.gram, support)(quadratic.cross)
        torch.testing.assert_close(found, least_squares(quadratic, support))
        assert not found[~support].any()


def test_what_is_returned_is_the_best_on_its_support():
    quadratic = quadratic_of(5, 7, seed=0)
    found = BestSupport(quadratic)(12)
    torch.testing.assert_close(found, least_squares(quadratic, found != 0))


def test_budgets_are_exact_and_more_of_them_is_hardly_ever_worse():
    for seed in range(4):
        quadratic = quadratic_of(6, 10, seed=seed)
        prune = BestSupport(quadratic)
        weights = [prune(nonzeros) for nonzeros in range(1, 61)]
        assert [int((weight != 0).sum()) for weight in weights] == list(range(1, 61))
        losses = [quadratic.excess(weight) for weight in weights]
        assert losses[-1] < 1e-12 * losses[0]
        assert all(more <= fewer + 0.05 * losses[0] for fewer, more in pairwise(losses))


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("order", ["parallel", "cascade"])
def test_each_layer_keeps_its_promise(order, relu):
    plain, refitted = (
        compress_made_up(ALPS, order=order, relu=relu, refit=refit) for refit in ("none", "layer")
    )
    assert refitted.layers[0].nonzeros == plain.layers[0].nonzeros
    # Without a ReLU the weight on the support is the best one already, but for the ridge.
    error, before = (each.layers[0].relative_error_read for each in (refitted, plain))
    assert error < before if relu else error == pytest.approx(before, rel=1e-2)


def test_inputs_that_do_not_vary_leave_the_layer_as_it_is():
    start = WarmStart(torch.ones(2, 3), torch.zeros(2))
    solved = ALPS.solver(
        CentredInputs(torch.ones(6, 3)),
        normal(6, 2, seed=0).float(),
        1e-3,
        activation="none",
        warm_start=start,
    )
    assert torch.equal(solved.weight, start.weight)
    assert solved.objective == 6
