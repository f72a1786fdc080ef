"""ALPS, a rival: the best weight of a layer with a given number of nonzeros, by splitting."""

import torch
from torch import Tensor

from ddlr.inputs import CentredInputs
from ddlr.layers import store_linear
from ddlr.method import Method
from ddlr.problem import WarmStart
from ddlr.quadratic import OutputQuadratic
from ddlr.reduced_rank import RIDGE
from ddlr.result import SolverResult
from experiments.methods.budgets import fewest_nonzeros
from nettrim.pruning import refit_support

_FIRST_PENALTY = 0.1
_RAISE_INTERVAL = 3
# By what the penalty is raised where more than a share of the support has changed.
_RAISES = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
_FEWEST_ITERATIONS, _MOST_ITERATIONS = 30, 300
# A share of the support; after the fewest iterations smaller changes end the loop.
_SETTLED = 3e-4
# Numbers in the Gram matrices that are factored at once, 32 MB.
_BATCH_NUMBERS = 2**22


def prune_by_splitting(
    inputs: CentredInputs,
    targets: Tensor,
    radius: float,
    *,
    activation: str,
    warm_start: WarmStart,
    ridge: float = RIDGE,
) -> SolverResult:
    """Find the layer that ALPS gives the fewest nonzeros within a bound.

        minimise nonzeros(W)   subject to   ||D||_F <= radius,   over the weights of `BestSupport`

    with D as in `ddlr.lowest_rank`.

    Parameters
    ----------
    inputs : CentredInputs of shape (samples, in_features)
    targets : Tensor, shape (samples, out_features)
        Output of the original layer, after its activation.
    radius : float
        Frobenius bound on the output error, in units of `targets`.
    activation : {"relu", "none"}
    warm_start : WarmStart
        Weight and bias of the original layer.
    ridge : float
        Relative to the mean eigenvalue of the centred inputs' Gram matrix.

    Returns
    -------
    SolverResult
        `objective` is the number of nonzeros, `iterations` that of budgets tried; the status is
        "fitted". The `warm_start` itself where no smaller budget is within the radius.

    Raises
    ------
    ValueError
        If the ridge is not usable; names its value.

    References
    ----------
    Meng, Behdin, Wang and Mazumder (2024), ALPS, NeurIPS, arXiv 2406.07831. The budget's search,
    the free bias and the targets of compressed inputs are not theirs.
    """
    return fewest_nonzeros(
        BestSupport,
        inputs,
        targets,
        radius,
        activation=activation,
        ridge=ridge,
        warm_start=warm_start,
    )


class BestSupport:
    """A function from a number of nonzeros to a weight that ALPS finds with so many.

        minimise tr(W G Wt) - 2 tr(W Bt)   over W with at most k nonzeros

    The support is found by the alternating direction method of multipliers, which splits W from a
    copy that is truncated to its k largest entries. Inputs are scaled so that G has a diagonal of
    1; the entries are then of one kind. The penalty that holds both together rises every third
    iteration, the faster, the more the support still changes, until it does not. The weight on the
    support is the best one, see `regress_on_support`.

    Penalties are those of the authors' public code, which can also start anew with a lower one.
    Two things here are not theirs. The support taken is that of the truncated copy with the least
    loss on the way, beginning with the largest entries of the minimiser; on small layers the last
    may be worse than the first. And the last regression is exact, where theirs is by conjugate
    gradients.

    Parameters
    ----------
    quadratic : OutputQuadratic
        Of a layer of shape (out_features, in_features).
    """

    def __init__(self, quadratic: OutputQuadratic):
        self._quadratic = quadratic
        scale = quadratic.gram.diagonal().sqrt()
        values, vectors = torch.linalg.eigh(quadratic.gram / torch.outer(scale, scale))
        precision = quadratic.mean_targets  # a support needs no more than the layer's own
        self._values, self._vectors = values.to(precision), vectors.to(precision)
        self._dense = (quadratic.minimiser * scale).to(precision)

    def __call__(self, nonzeros: int) -> Tensor:
        """The sparse weight, shape (out_features, in_features), float64."""
        return regress_on_support(self._quadratic, self.support(nonzeros))

    def support(self, nonzeros: int) -> Tensor:
        """Where the nonzeros are, as a mask of shape (out_features, in_features)."""
        values, vectors, penalty = self._values, self._vectors, _FIRST_PENALTY
        dense = self._dense @ vectors  # in the coordinates of the eigenvectors, as what follows
        multiplier = torch.zeros_like(dense)
        support = before = best = largest(self._dense, nonzeros)
        sparse = (self._dense * support) @ vectors
        least = _loss(sparse - dense, values)
        for iteration in range(1, _MOST_ITERATIONS + 1):
            weight = (values * dense - multiplier + penalty * sparse) / (values + penalty)
            entries = (weight + multiplier / penalty) @ vectors.T
            support = largest(entries, nonzeros)
            sparse = (entries * support) @ vectors
            multiplier = multiplier + penalty * (weight - sparse)
            loss = _loss(sparse - dense, values)
            if loss < least:
                least, best = loss, support
            if iteration % _RAISE_INTERVAL:
                continue
            changed = (support != before).sum().item() / nonzeros
            if changed == 0 or (iteration >= _FEWEST_ITERATIONS and changed < _SETTLED):
                break
            penalty *= next(factor for share, factor in _RAISES if changed > share)
            before = support
        return best


def largest(weight: Tensor, count: int) -> Tensor:
    """A mask of the entries that are largest in magnitude."""
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[weight.abs().flatten().topk(count, sorted=False).indices] = True
    return mask.view_as(weight)


def _loss(moved: Tensor, values: Tensor) -> float:
    return (moved.square() * values).sum().item()


def regress_on_support(quadratic: OutputQuadratic, support: Tensor) -> Tensor:
    """The weight at which a quadratic is smallest among those that are 0 off a support.

    Each row is a linear system of its own, solved with a Cholesky factor; rows with about as many
    nonzeros are solved together, and filled up with ones on the diagonal.

    Parameters
    ----------
    support : Tensor of bool, shape (out_features, in_features)
    """
    weight = torch.zeros_like(quadratic.cross)
    for rows in _rows_of_like_size(support.sum(dim=1)):
        width = int(support[rows].sum(dim=1).max())
        used, columns = support[rows].to(torch.uint8).topk(width, dim=1)
        used = used.bool()
        gram = quadratic.gram[columns[:, :, None], columns[:, None, :]]
        gram *= used[:, :, None] & used[:, None, :]
        gram.diagonal(dim1=1, dim2=2).add_(~used)
        right = (quadratic.cross[rows[:, None], columns] * used)[:, :, None]
        solved = torch.cholesky_solve(right, torch.linalg.cholesky(gram))[:, :, 0]
        weight[rows[:, None], columns] = solved * used
    return weight


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


ALPS = Method(
    name="alps",
    solver=prune_by_splitting,
    options={"ridge": RIDGE},
    refit=refit_support,
    refit_options={"ridge": RIDGE},
    store=store_linear,
)
