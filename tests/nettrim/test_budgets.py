"""The search for the smallest budget: its answer on known errors, and how many fits it takes."""

import pytest
import torch

from ddlr.constraints import OutputSet
from ddlr.inputs import CentredInputs
from ddlr.problem import WarmStart
from nettrim.budgets import RESOLUTION, next_size, smallest_of_several, smallest_within

LARGEST = 200_000


@pytest.fixture
def layer():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    return CentredInputs.of(inputs), WarmStart(weight, torch.zeros(3, dtype=torch.float64))


def fit_of(errors, layer, tried):
    """A fit whose outputs have a known error relative to those of the layer."""
    _, start = layer

    def fit(budget):
        tried.append(budget)
        return WarmStart((1 - errors(budget)) * start.weight, start.bias)

    return fit


def outputs_of(layer, tolerance):
    inputs, start = layer
    targets = inputs.inputs @ start.weight.T
    return OutputSet(targets, tolerance * targets.norm().item(), "none", "hinge")


def power_law(budget):
    return 0.9 * budget**-0.35


def steps(budget):
    return power_law(2 ** (budget.bit_length() - 1))


@pytest.mark.parametrize("tolerance", [0.03, 0.1, 0.3, 0.7])
@pytest.mark.parametrize("errors", [power_law, steps])
def test_the_budget_found_is_within_and_one_per_cent_less_is_not(errors, tolerance, layer):
    tried = []
    found = smallest_within(
        fit_of(errors, layer, tried), LARGEST, layer[0], outputs_of(layer, tolerance), layer[1]
    )
    budget = int(found.objective)
    assert found.violation == 0
    assert found.iterations == len(tried) == len(set(tried))
    assert all(1 <= each < LARGEST for each in tried)
    assert budget == LARGEST or errors(budget) <= tolerance
    assert budget <= 1 or errors(int(budget / RESOLUTION) - 1 or 1) > tolerance
    # Bisection of the whole range, in logarithms, takes 11.
    assert len(tried) <= (8 if errors is power_law else 20)


@pytest.mark.parametrize("radius", [0.0, 1e-30])
def test_where_nothing_smaller_is_within_the_start_is_the_answer(radius, layer):
    tried = []
    fit = fit_of(power_law, layer, tried)
    found = smallest_within(fit, 100, layer[0], outputs_of(layer, radius), layer[1])
    assert found.objective == 100
    assert torch.equal(found.weight, layer[1].weight)


def test_another_way_is_searched_only_where_it_is_smaller(layer):
    tried_worse, tried_better = [], []
    worse = fit_of(lambda budget: 1.2 * power_law(budget), layer, tried_worse)
    better = fit_of(lambda budget: 0.7 * power_law(budget), layer, tried_better)
    first = fit_of(power_law, layer, [])
    outputs = outputs_of(layer, 0.1)
    alone = smallest_within(first, LARGEST, layer[0], outputs, layer[1])
    best = smallest_of_several([first, worse, better], LARGEST, layer[0], outputs, layer[1])
    assert len(tried_worse) == 1
    assert best.objective < alone.objective / 2
    assert best.objective == pytest.approx((0.7 * 0.9 / 0.1) ** (1 / 0.35), rel=0.011)
    assert best.iterations == alone.iterations + 1 + len(tried_better)


@pytest.mark.parametrize("kept", range(40_000, 40_050))
def test_a_size_at_the_end_of_the_range_ends_the_search_if_it_misses(kept):
    missed = kept - 900
    tried = next_size({missed: 0.1, kept: -1e-9}, missed, kept)
    assert missed < tried < kept <= RESOLUTION * tried
