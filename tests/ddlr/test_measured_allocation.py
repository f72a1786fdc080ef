"""Allocations by networks that are made: better than curves that add up, within their trials."""

import itertools
import math

import pytest
import torch
from torch import nn

import ddlr
from ddlr.allocate import frontier
from ddlr.goals import Allocation, Option
from ddlr.measured_allocation import measured_frontier

# Of two layers, by tolerance: weights and divergence of each alone.
OPTIONS = {
    name: [Option(0.0, 100, 0.0)]
    + [Option(0.1 * step, round(100 * 0.7**step), 0.01 * 2.0**step) for step in range(1, 8)]
    for name in ("first", "last")
}


class Network:
    """Divergences that are not the sums of the curves: later layers make up for the first one."""

    def __init__(self):
        self.made: list[tuple[float, ...]] = []

    def __call__(self, tolerances) -> Allocation:
        self.made.append(tuple(tolerances.values()))
        chosen = {
            name: next(each for each in OPTIONS[name] if each.tolerance == tolerance)
            for name, tolerance in tolerances.items()
        }
        lost = 0.05 * chosen["first"].divergence + 3 * chosen["last"].divergence
        weights = sum(each.parameters for each in chosen.values())
        return Allocation(weights, lost, dict(tolerances), measured=True)


def least_lost(allocations, budget):
    return min(each.divergence for each in allocations if each.parameters <= budget)


def test_the_networks_that_are_made_lose_less_than_those_that_curves_would_choose():
    predicted, network = frontier(OPTIONS), Network()
    found = measured_frontier(network, predicted, OPTIONS, trials=30)
    for budget in (40, 60, 90):
        by_curves = min(
            (each for each in predicted if each.parameters <= budget),
            key=lambda each: each.divergence,
        )
        assert least_lost(found, budget) < 0.8 * Network()(by_curves.tolerances).divergence


def test_with_enough_trials_no_allocation_beside_them_is_better():
    network = Network()
    found = measured_frontier(network, frontier(OPTIONS), OPTIONS, trials=1000)
    assert len(network.made) == len(set(network.made)) < 1000
    ladder = [each.tolerance for each in OPTIONS["first"]]
    for each in found[:-1]:
        for name, step in itertools.product(OPTIONS, (-1, 1)):
            place = ladder.index(each.tolerances[name]) + step
            if not 0 <= place < len(ladder):
                continue
            beside = Network()({**each.tolerances, name: ladder[place]})
            if any(beside.tolerances.values()):
                assert least_lost(found, beside.parameters) <= beside.divergence


@pytest.mark.parametrize("trials", [1, 2, 7, 20])
def test_no_more_networks_are_made_than_asked_for_and_none_twice(trials):
    network = Network()
    found = measured_frontier(network, frontier(OPTIONS), OPTIONS, trials=trials)
    assert len(network.made) == len(set(network.made)) <= trials
    sizes = [each.parameters for each in found]
    assert sizes == sorted(sizes)
    assert not any(found[-1].tolerances.values())
    assert all(each.measured for each in found)
    divergences = [each.divergence for each in found]
    assert divergences == sorted(divergences, reverse=True)


def test_networks_of_other_sizes_are_not_made():
    network = Network()
    measured_frontier(network, frontier(OPTIONS), OPTIONS, trials=50, sizes=(30, 70))
    sizes = [Network()(dict(zip(OPTIONS, key, strict=True))).parameters for key in network.made]
    assert sizes
    assert all(30 <= size <= 70 for size in sizes)


def test_a_network_whose_outputs_are_not_finite_is_left_out():
    def measure(tolerances):
        made = Network()(tolerances)
        broken = tolerances["last"] > 0.35
        return Allocation(made.parameters, math.inf if broken else made.divergence, tolerances)

    found = measured_frontier(measure, frontier(OPTIONS), OPTIONS, trials=60)
    assert all(each.tolerances["last"] <= 0.35 for each in found)


def test_a_budget_is_met_and_never_at_a_larger_error_for_more_trials():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)
    )
    inputs = torch.randn(400, 12)
    goal = {"kept_fraction": 0.5, "tolerances": (0.05, 0.1, 0.2, 0.3, 0.5)}
    common = {"method": "lowest_rank", "refit": "layer", "order": "cascade"}
    without, tried = (
        ddlr.compress(model, inputs, **common, **goal, trials=trials) for trials in (0, 25)
    )
    assert without.goal.met and tried.goal.met
    assert tried.goal.output_error <= without.goal.output_error * (1 + 1e-6)


def test_trials_that_are_no_number_are_refused_by_name():
    with pytest.raises(ValueError, match="trials"):
        ddlr.Goal(kept_fraction=0.5, trials=-1)
