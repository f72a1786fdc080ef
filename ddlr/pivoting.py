"""Rows of a matrix that all its rows are combinations of, with small coefficients."""

import torch
from torch import Tensor

# No coefficient is larger, so that rounding in the pivot rows does not grow in the other ones. A
# smaller limit takes more exchanges of rows; below 1 there may be no such rows.
LARGEST_COEFFICIENT = 2.0


@torch.no_grad()
def choose_pivots(left: Tensor) -> tuple[Tensor, Tensor]:
    """Choose as many rows of a matrix as it has columns, of which the others are combinations.

    Gaussian elimination with partial pivoting chooses rows; they are then exchanged one by one,
    each time for the row with the largest coefficient, until none is above 2. Every exchange
    multiplies the volume of the chosen rows by that coefficient, so this ends. It is done on an
    orthonormal basis of the columns, which leaves coefficients as they are and makes a matrix whose
    columns are dependent or of very different norms no special case.

    Parameters
    ----------
    left : Tensor, shape (rows, rank)

    Returns
    -------
    pivots : Tensor, shape (rows,)
        A mask, True at the rows that are chosen.
    coefficients : Tensor of float64, shape (rows - rank, rank)
        ``left[~pivots] == coefficients @ left[pivots]`` up to rounding.

    Raises
    ------
    ValueError
        If there are fewer rows than columns.

    References
    ----------
    Goreinov, Oseledets, Savostyanov, Tyrtyshnikov and Zamarashkin (2010), How to find a good
    submatrix.
    """
    count, rank = left.shape
    if count < rank:
        raise ValueError(f"left has {count} rows and {rank} columns; pivots need as many rows")
    chosen = torch.zeros(count, dtype=torch.bool, device=left.device)
    basis = torch.linalg.qr(left.double()).Q
    if rank:
        chosen[_exchanged(basis, _by_elimination(basis))] = True
    # Anew, since every exchange adds rounding.
    return chosen, torch.linalg.solve(basis[chosen], basis[~chosen], left=False)


def _by_elimination(basis: Tensor) -> Tensor:
    """The rows that partial pivoting takes, by index."""
    _, exchanges = torch.linalg.lu_factor(basis)
    rows = list(range(len(basis)))
    for place, other in enumerate(exchanges.tolist()):
        rows[place], rows[other - 1] = rows[other - 1], rows[place]
    return torch.tensor(rows[: basis.shape[1]], device=basis.device)


def _exchanged(basis: Tensor, pivots: Tensor) -> Tensor:
    """Pivot rows after exchanges, by index, so that no coefficient is above the largest allowed."""
    coefficients = torch.linalg.solve(basis[pivots], basis, left=False)
    while True:
        place = int(coefficients.abs().argmax())
        row, pivot = divmod(place, len(pivots))
        factor = coefficients[row, pivot].clone()
        if not factor.abs() > LARGEST_COEFFICIENT:
            return pivots
        change = coefficients[row].clone()
        change[pivot] -= 1
        coefficients -= torch.outer(coefficients[:, pivot] / factor, change)
        pivots[pivot] = row
