"""Pivot rows span all others, with small coefficients, whatever the columns are like."""

import pytest
import torch

from ddlr.pivoting import LARGEST_COEFFICIENT, choose_pivots


def random(rows: int, rank: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, rank, generator=generator, dtype=torch.float64)


def kahan(size: int) -> torch.Tensor:
    """The rows that elimination with pivoting grows the most on, and as many again."""
    growing = torch.eye(size, dtype=torch.float64) - torch.ones(size, size).tril(-1)
    growing[:, -1] = 1
    return torch.cat([growing, -0.9 * growing.flip(0)])


CASES = {
    "random": random(50, 12),
    "columns of very different norms": random(50, 12) * torch.logspace(0, -12, 12),
    "dependent columns": random(50, 6) @ random(6, 12, seed=1),
    "zero": torch.zeros(8, 3, dtype=torch.float64),
    "growing": kahan(20),
    "one column": random(9, 1),
    "no columns": random(9, 0),
    "square": random(6, 6),
    "rows of zeros": random(20, 4) * (torch.arange(20) % 3 == 0)[:, None],
}


@pytest.mark.parametrize("left", CASES.values(), ids=CASES)
def test_the_other_rows_are_combinations_of_the_pivots(left):
    pivots, coefficients = choose_pivots(left)
    rows, rank = left.shape
    assert int(pivots.sum()) == rank and coefficients.shape == (rows - rank, rank)
    assert (coefficients.abs() <= LARGEST_COEFFICIENT + 1e-9).all()
    rest = left[~pivots] - coefficients @ left[pivots]
    assert (rest.abs() <= 1e-12 * left.norm()).all()


def test_exchanges_make_coefficients_small_where_elimination_leaves_large_ones(monkeypatch):
    left = random(200, 40)
    limit = choose_pivots(left)[1].abs().max()
    monkeypatch.setattr("ddlr.pivoting.LARGEST_COEFFICIENT", 1.1)
    pivots, coefficients = choose_pivots(left)
    assert coefficients.abs().max() <= 1.1 < limit
    assert torch.allclose(coefficients @ left[pivots], left[~pivots], atol=1e-10)


def test_fewer_rows_than_columns_are_refused():
    with pytest.raises(ValueError, match="left has 3 rows and 4 columns"):
        choose_pivots(random(3, 4))
