"""Where the nonzeros of a weight are, and the best weight with nonzeros there, for one quadratic.

The quadratic is tr(W G Wt) - 2 tr(W Bt), see `ddlr.quadratic.OutputQuadratic`: G, the Gram matrix
of a layer's inputs, stays the same where its targets, and with them B, change.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ddlr.eigen import symmetric_eigen

_FIRST_PENALTY = 0.1
_RAISE_INTERVAL = 3
# By what the penalty is raised where more than a share of the support has changed.
_RAISES = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
_FEWEST_ITERATIONS, _MOST_ITERATIONS = 30, 300
# A share of the support; after the fewest iterations smaller changes end the loop.
_SETTLED = 3e-4
# Numbers in the Gram matrices that are factored at once, and in all factors that are kept.
_BATCH_NUMBERS, _KEPT_NUMBERS = 2**22, 2**27


class SupportSearch:
    """Looks for the places of the nonzeros of the best weight with so many.

        minimise tr(W G Wt) - 2 tr(W Bt)   over W with at most k nonzeros

    by the alternating direction method of multipliers, which splits W from a copy that is truncated
    to its k largest entries. Inputs are scaled so that G has a diagonal of 1; the entries are then
    of one kind. The penalty that holds both together rises every third iteration, the faster, the
    more the support still changes, until it does not.

    Penalties are those of the authors' public code, which can also start anew with a lower one.
    Not theirs: the support taken is that of the truncated copy with the least loss on the way,
    beginning with where the search starts; on small layers the last may be worse than the first.

    Parameters
    ----------
    gram : Tensor, shape (in_features, in_features), float64
        Positive definite.
    dtype : torch.dtype
        In which to iterate; the eigenvectors of G are computed in float64, once.

    References
    ----------
    Meng, Behdin, Wang and Mazumder (2024), ALPS, NeurIPS, arXiv 2406.07831.
    """

    def __init__(self, gram: Tensor, dtype: torch.dtype = torch.float64):
        scale = gram.diagonal().sqrt()
        values, vectors = symmetric_eigen(gram / torch.outer(scale, scale))
        self._scale, self._values, self._vectors = (
            each.to(dtype) for each in (scale, values, vectors)
        )

    def support(self, cross: Tensor, nonzeros: int, start: Tensor | None = None) -> Tensor:
        """The places, as a mask of shape (out_features, in_features).

        Parameters
        ----------
        cross : Tensor, shape (out_features, in_features)
            B.
        nonzeros : int
        start : Tensor, shape (out_features, in_features), optional
            A weight near which to begin; else it is the smallest one without a limit.
        """
        values, vectors, penalty = self._values, self._vectors, _FIRST_PENALTY
        # In the coordinates of the eigenvectors, as what follows.
        pulled = (cross.to(values) / self._scale) @ vectors
        dense = pulled / values
        first = dense @ vectors.T if start is None else start * self._scale
        support = before = best = largest_places(first, nonzeros)
        sparse = (first * support) @ vectors
        least = _excess(sparse - dense, values)
        multiplier = torch.zeros_like(dense)
        for iteration in range(1, _MOST_ITERATIONS + 1):
            weight = (pulled - multiplier + penalty * sparse) / (values + penalty)
            entries = (weight + multiplier / penalty) @ vectors.T
            support = largest_places(entries, nonzeros)
            sparse = (entries * support) @ vectors
            multiplier = multiplier + penalty * (weight - sparse)
            excess = _excess(sparse - dense, values)
            if excess < least:
                least, best = excess, support
            if iteration % _RAISE_INTERVAL:
                continue
            changed = (support != before).sum().item() / nonzeros
            if changed == 0 or (iteration >= _FEWEST_ITERATIONS and changed < _SETTLED):
                break
            penalty *= next(factor for share, factor in _RAISES if changed > share)
            before = support
        return best


def largest_places(weight: Tensor, count: int) -> Tensor:
    """A mask of the entries that are largest in magnitude."""
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[weight.abs().flatten().topk(count, sorted=False).indices] = True
    return mask.view_as(weight)


def largest_entries(matrix: Tensor, number: int) -> Tensor:
    """A matrix with zeros in the place of all entries but the largest in magnitude."""
    return matrix * largest_places(matrix, number)


def minimise_on_support(
    product: Callable[[Tensor], Tensor],
    cross: Tensor,
    start: Tensor,
    diagonal: Tensor,
    *,
    iterations: int = 10,
) -> Tensor:
    """Minimise a quadratic over the matrices that are zero where the start is.

        minimise <W, product(W)> - 2 <W, cross>   over W = 0 where start = 0

    by conjugate gradients with a diagonal preconditioner. It never ends above the start.

    Parameters
    ----------
    product : callable
        A linear map that is symmetric and positive.
    cross, start : Tensor, shape (rows, columns)
    diagonal : Tensor
        That of `product`, in a shape that broadcasts to theirs; positive.
    iterations : int
    """
    support = start != 0
    found = start.clone()
    residual = (cross - product(found)) * support
    step = residual / diagonal
    direction, size = step, (residual * step).sum()
    first = size
    for _ in range(iterations):
        if size <= torch.finfo(size.dtype).eps ** 2 * first or not size > 0:
            break
        curved = product(direction)
        length = size / (direction * curved).sum()
        found = found + length * direction
        residual = residual - length * (curved * support)
        step = residual / diagonal
        following = (residual * step).sum()
        direction, size = step + (following / size) * direction, following
    return found


def _excess(moved: Tensor, values: Tensor) -> float:
    """How much larger than its minimum the quadratic is, so far away from it."""
    return (moved.square() * values).sum().item()


class SupportRegression:
    """The weight at which a quadratic is smallest among those that are 0 off a support.

    Each row is a linear system of its own, solved with a Cholesky factor; rows with about as many
    nonzeros are solved together, and filled up with ones on the diagonal. The factors serve any
    number of B; beyond 2^27 numbers, of 1 GiB, they are made anew for each.

    Parameters
    ----------
    gram : Tensor, shape (in_features, in_features), float64
        G.
    support : Tensor of bool, shape (out_features, in_features)
    """

    def __init__(self, gram: Tensor, support: Tensor):
        self._gram, self._support = gram, support
        self._groups = _rows_of_like_size(support.sum(dim=1))
        self._factors: list[tuple[Tensor, Tensor, Tensor]] = []
        numbers = sum(len(rows) * self._width(rows) ** 2 for rows in self._groups)
        if numbers <= _KEPT_NUMBERS:
            self._factors = [self._factor(rows) for rows in self._groups]

    def __call__(self, cross: Tensor) -> Tensor:
        """The weight for a B, shape (out_features, in_features), float64."""
        cross = cross.double()
        weight = torch.zeros_like(cross)
        for index, rows in enumerate(self._groups):
            factor, columns, used = self._factors[index] if self._factors else self._factor(rows)
            right = (cross[rows[:, None], columns] * used)[:, :, None]
            solved = torch.cholesky_solve(right, factor)[:, :, 0]
            weight[rows[:, None], columns] = solved * used
        return weight

    def _width(self, rows: Tensor) -> int:
        return int(self._support[rows].sum(dim=1).max())

    def _factor(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cholesky factors of some rows, the columns they are of, and which of these count."""
        used, columns = self._support[rows].to(torch.uint8).topk(self._width(rows), dim=1)
        used = used.bool()
        gram = self._gram[columns[:, :, None], columns[:, None, :]]
        gram *= used[:, :, None] & used[:, None, :]
        gram.diagonal(dim1=1, dim2=2).add_(~used)
        return torch.linalg.cholesky(gram), columns, used


def _rows_of_like_size(sizes: Tensor) -> list[Tensor]:
    """Indices of the rows that have a size, in groups of ascending size that fit in memory."""
    groups, group = [], []
    ascending, order = sizes.sort()
    for size, row in zip(ascending.tolist(), order.tolist(), strict=True):
        if group and (len(group) + 1) * size**2 > _BATCH_NUMBERS:
            groups.append(group)
            group = []
        if size:
            group.append(row)
    groups += [group] if group else []
    return [torch.tensor(group, device=sizes.device) for group in groups]
