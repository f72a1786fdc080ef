"""SparseGPT: its columns' updates are the optimal brain surgeon's, and its budgets are exact."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from experiments.methods.second_order import SPARSEGPT, SecondOrder
from made_up_quadratics import (
    compress_made_up,
    magnitude_pruned,
    normal,
    orthonormal_quadratic,
    quadratic_of,
)


def surgeon(gram: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    """Remove entries one by one, from left to right, each with an inverse of its own.

    Hassibi and Stork's step for an entry that goes, in the columns from its own on: those before
    it are fixed by then.
    """
    weight = weight.clone()
    for column in range(len(gram)):
        inverse = torch.linalg.inv(gram[column:, column:])
        for index in (~kept[:, column]).nonzero()[:, 0]:
            weight[index, column:] -= weight[index, column] / inverse[0, 0] * inverse[0]
            weight[index, column] = 0
    return weight


def costs(gram: Tensor, weight: Tensor) -> Tensor:
    """What the removal of an entry costs when the columns before it are fixed."""
    curvatures = [torch.linalg.inv(gram[column:, column:])[0, 0] for column in range(len(gram))]
    return weight.square() / torch.stack(curvatures)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("nonzeros", [1, 7, 24, 47, 48])
def test_orthonormal_inputs_give_the_largest_entries(seed, nonzeros):
    weight = normal(6, 8, seed=seed)
    pruned = SecondOrder(orthonormal_quadratic(weight))(nonzeros)
    torch.testing.assert_close(pruned, magnitude_pruned(weight, nonzeros))


def test_blocks_have_the_same_density():
    weight = normal(6, 8, seed=0)
    pruned = SecondOrder(orthonormal_quadratic(weight), block_size=2)(24)
    expected = [magnitude_pruned(block, 6) for block in weight.split(2, dim=1)]
    torch.testing.assert_close(pruned, torch.cat(expected, dim=1))


@pytest.mark.parametrize("moved", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_one_block_is_the_surgeon_on_the_cheapest_entries(seed, moved):
    quadratic = quadratic_of(4, 7, seed=seed, moved=moved)
    start = torch.linalg.solve(quadratic.gram, quadratic.cross.T).T
    for nonzeros in (3, 10, 20):
        pruned = SecondOrder(quadratic)(nonzeros)
        kept = magnitude_pruned(costs(quadratic.gram, start), nonzeros) != 0
        expected = surgeon(quadratic.gram, start, kept)
        torch.testing.assert_close(pruned, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("block_size", [1, 3, 5])
def test_each_block_is_chosen_after_those_before_have_moved_it(block_size):
    quadratic = quadratic_of(5, 9, seed=3)
    expected, before = quadratic.minimiser, 0
    for begin in range(0, 9, block_size):
        block = slice(begin, begin + block_size)
        upto = 20 * min(begin + block_size, 9) // 9
        kept = torch.ones(5, 9, dtype=torch.bool)
        if upto > before:
            chosen = magnitude_pruned(costs(quadratic.gram, expected)[:, block], upto - before)
            kept[:, block] = chosen != 0
        else:
            kept[:, block] = False
        expected, before = surgeon(quadratic.gram, expected, kept), upto
    pruned = SecondOrder(quadratic, block_size)(20)
    torch.testing.assert_close(pruned, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("block_size", [4, 128])
def test_budgets_are_exact_and_more_of_them_is_hardly_ever_worse(block_size):
    for seed in range(4):
        quadratic = quadratic_of(6, 10, seed=seed)
        prune = SecondOrder(quadratic, block_size)
        weights = [prune(nonzeros) for nonzeros in range(1, 61)]
        assert [int((weight != 0).sum()) for weight in weights] == list(range(1, 61))
        losses = [quadratic.excess(weight) for weight in weights]
        assert losses[-1] < 1e-12 * losses[0]
        assert all(more <= fewer + 0.1 * losses[0] for fewer, more in pairwise(losses))


def test_what_goes_is_made_up_for():
    for seed in range(4):
        quadratic = quadratic_of(6, 10, seed=seed)
        pruned = SecondOrder(quadratic)(30)
        cut = quadratic.minimiser * (pruned != 0)
        assert quadratic.excess(pruned) < quadratic.excess(cut)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("order", ["parallel", "cascade"])
def test_each_layer_keeps_its_promise(order, relu):
    plain, refitted = (
        compress_made_up(SPARSEGPT, order=order, relu=relu, refit=refit)
        for refit in ("none", "layer")
    )
    assert refitted.layers[0].nonzeros == plain.layers[0].nonzeros
    assert refitted.layers[0].relative_error_read < plain.layers[0].relative_error_read


def test_an_option_that_is_not_usable_is_named():
    with pytest.raises(ValueError, match="block_size is 0"):
        compress_made_up(SPARSEGPT.with_options(block_size=0), order="parallel", relu=True)
