"""Allocations that none beats: exact where layers see each other; thinned, both ends stay."""

import itertools

import pytest
import torch

from ddlr.allocate import frontier
from ddlr.goals import Option


def random_options(seed: int, layers: int = 4, choices: int = 4) -> dict[str, list[Option]]:
    """Layers of which each leaves inputs unread that cost the one before it weights."""
    generator = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    return {
        f"fc{layer}": [
            Option(
                tolerance=choice / 10,
                parameters=whole(10, 18),
                divergence=whole(0, 8) / 8,  # some are equal, as are sizes
                inputs_dropped=whole(0, 4),
                parameters_per_output=whole(1, 3),
            )
            for choice in range(choices)
        ]
        for layer in range(layers)
    }


def size_and_effect(choice: tuple[Option, ...]) -> tuple[int, float]:
    """Of one option a layer; inputs left unread take their outputs off the layer before."""
    saved = sum(
        before.parameters_per_output * after.inputs_dropped
        for before, after in itertools.pairwise(choice)
    )
    return sum(each.parameters for each in choice) - saved, sum(each.divergence for each in choice)


@pytest.mark.parametrize("seed", range(10))
def test_the_frontier_counts_outputs_that_the_next_layer_does_not_read(seed):
    options = random_options(seed)
    every = {size_and_effect(choice) for choice in itertools.product(*options.values())}
    unbeaten = sorted(
        mine
        for mine in every
        if not any(other[0] <= mine[0] and other[1] <= mine[1] and other != mine for other in every)
    )
    found = frontier(options)
    assert [(each.parameters, each.divergence) for each in found] == unbeaten
    for each in found:  # and its tolerances are those that give it
        choice = tuple(options[name][round(10 * t)] for name, t in each.tolerances.items())
        assert size_and_effect(choice) == (each.parameters, each.divergence)


def two_layers_of(choices: int) -> dict[str, list[Option]]:
    """Every size from 0 to choices ** 2 - 1 once, and none beats another."""
    return {
        "coarse": [
            Option(float(place), choices * place, float(choices * (choices - place)))
            for place in range(choices)
        ],
        "fine": [Option(float(place), place, float(choices - place)) for place in range(choices)],
    }


@pytest.mark.parametrize("choices", [3, 64])
def test_up_to_4096_allocations_are_all_kept(choices):
    sizes = [each.parameters for each in frontier(two_layers_of(choices))]
    assert sizes == list(range(choices**2))


@pytest.mark.parametrize("choices", [65, 100])
def test_beyond_4096_allocations_they_are_thinned_out_evenly_and_both_ends_stay(choices):
    found = frontier(two_layers_of(choices))
    sizes = [each.parameters for each in found]
    assert len(set(sizes)) == len(sizes) == 4096
    assert (sizes[0], sizes[-1]) == (0, choices**2 - 1)
    widest = choices**2 / 4095 + 1
    assert all(0 < after - before <= widest for before, after in itertools.pairwise(sizes))
    for each in found:
        assert choices * each.tolerances["coarse"] + each.tolerances["fine"] == each.parameters
