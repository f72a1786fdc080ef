"""Inputs go one by one, each time the one that is missed least once the others made up for it."""

import pytest
import torch
from torch import Tensor

from ddlr.input_selection import _that_matter


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def missed_without(inputs: Tensor, weight: Tensor, kept: list[int]) -> float:
    """The smallest change of the outputs where only some inputs have weights, by least squares."""
    wanted = inputs @ weight.T
    own = inputs[:, kept]
    return (wanted - own @ torch.linalg.lstsq(own, wanted).solution).norm().item()


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
    stays = _that_matter(weight, torch.linalg.inv(inputs.T @ inputs)).tolist()
    leaving = features - int(0.85 * features)
    assert len(stays) == features - leaving
    assert stays == one_by_one(inputs, weight, leaving)


@pytest.mark.parametrize("seed", range(5))
def test_of_near_copies_one_stays_however_little_each_matters(seed):
    """Either of a pair is missed least of all; without both something is lost."""
    once = normal(200, 10, seed=seed)
    inputs = torch.cat([once, once[:, :2] + 1e-3 * normal(200, 2, seed=seed + 50)], dim=1)
    weight = normal(6, 12, seed=seed + 100)
    stays = _that_matter(weight, torch.linalg.inv(inputs.T @ inputs)).tolist()
    assert len(stays) == 10
    assert all(len({place, 10 + place} & set(stays)) == 1 for place in (0, 1))
