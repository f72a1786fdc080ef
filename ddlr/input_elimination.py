"""Leaving out inputs of a layer, one at a time, the others making up for each."""

import math

import torch
from torch import Tensor

from ddlr.constraints import OutputSet
from ddlr.inputs import CentredInputs
from ddlr.problem import WarmStart
from ddlr.quadratic import ridged_gram
from ddlr.result import SolverResult

# Of ||D||_F^2, the most that outputs are taken to move where ||D||_F is still within a radius.
_HINGE_SHARE = 6


def order_of_elimination(
    weight: Tensor, inverse: Tensor, count: int, most: float = math.inf
) -> Tensor:
    """The first inputs to go, by index, the one that matters least once the others made up for it.

    An input j matters by ||W_j||^2 / (G^-1)_jj, what its removal adds to ||Xc (W - W0)t||_F^2 (as
    in the optimal brain surgeon). The second of a pair of copies matters as soon as the first is
    gone.

    Parameters
    ----------
    weight : Tensor, shape (out_features, in_features)
    inverse : Tensor, shape (in_features, in_features)
        The inverse of the inputs' Gram matrix G.
    count : int
        How many go at most.
    most : float
        Their importances add up to no more than this.

    References
    ----------
    Hassibi and Stork (1993), optimal brain surgeon.
    """
    weight, inverse = weight.clone(), inverse.clone()
    gone = torch.zeros(len(inverse), dtype=torch.bool, device=inverse.device)
    order: list[int] = []
    added = 0.0
    while len(order) < count:
        importance = weight.square().sum(dim=0) / inverse.diagonal()
        importance = importance.masked_fill(gone, math.inf)
        least = int(importance.argmin())
        added += importance[least].item()
        if added > most:
            break
        gone[least] = True
        order.append(least)
        row = inverse[least] / inverse[least, least]
        weight.addr_(weight[:, least].clone(), row, alpha=-1)
        inverse.addr_(inverse[:, least].clone(), row, alpha=-1)
    return torch.tensor(order, dtype=torch.int64, device=inverse.device)


def regress_outputs(
    inputs: CentredInputs, kept: Tensor, start: WarmStart, ridge: float
) -> WarmStart:
    """Regress the outputs of a start on some of the inputs.

        minimise ||Xc (W - W0)t||_F^2 + ridge * ||W - W0||_F^2   over W that is 0 off `kept`

    with Xc the centred inputs; the mean of the outputs stays that of the start.

    Parameters
    ----------
    inputs : CentredInputs
    kept : Tensor, shape (inputs kept,)
        Indices.
    start : WarmStart
        W0 and its bias, on all inputs.
    ridge : float
        Relative to the mean eigenvalue of the centred inputs' Gram matrix.

    Returns
    -------
    WarmStart
        With a weight of shape (out_features, inputs kept).
    """
    columns, _ = ridged_gram(inputs, ridge, kept)
    return regress_with_factor(inputs, columns, kept, start)[0]


def regress_with_factor(
    inputs: CentredInputs, columns: Tensor, kept: Tensor, start: WarmStart | SolverResult
) -> tuple[WarmStart, Tensor]:
    """The regression of `regress_outputs`, and the Cholesky factor of its inputs' Gram matrix.

    `columns`, of shape (in_features, inputs kept), are those of the Gram matrix of all inputs.
    """
    factor = torch.linalg.cholesky(columns[kept])
    weight = start.weight.double()
    regressed = torch.cholesky_solve((weight @ columns).T, factor).T
    mean = inputs.mean.double()
    moved = weight @ mean - regressed @ mean[kept]
    return WarmStart(regressed.to(start.weight), start.bias + moved.to(start.bias)), factor


def regress_on_fewest(
    inputs: CentredInputs,
    outputs: OutputSet,
    start: WarmStart | SolverResult,
    ridge: float,
    radius: float,
) -> tuple[Tensor, WarmStart]:
    """Regress the outputs of a start on the fewest inputs whose error is within a radius.

    Inputs go in the order of `order_of_elimination`; how many is found by bisection. All stay where
    the start itself is not within the radius.

    Parameters
    ----------
    inputs : CentredInputs
    outputs : OutputSet
        Measures the error; its own radius is not used.
    start : WarmStart or SolverResult
        Weight and bias on all inputs.
    ridge : float
        Relative to the mean eigenvalue of the centred inputs' Gram matrix.
    radius : float

    Returns
    -------
    kept : Tensor
        Indices of the inputs that stay, ascending.
    WarmStart
        With a weight of shape (out_features, inputs kept).
    """
    gram, _ = ridged_gram(inputs, ridge)
    factor = torch.linalg.cholesky(gram)
    # An error counts less than a movement, since what a ReLU cuts off does not count.
    most = _HINGE_SHARE * radius**2
    order = order_of_elimination(
        start.weight.double(), torch.cholesky_inverse(factor), len(gram) - 1, most
    )
    low, high = 0, len(order) + 1
    best = torch.arange(len(gram), device=gram.device), WarmStart(start.weight, start.bias)
    while high - low > 1:
        middle = (low + high) // 2
        stays = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
        stays[order[:middle]] = False
        kept = stays.nonzero()[:, 0]
        tried, _ = regress_with_factor(inputs, gram[:, kept], kept, start)
        produced = torch.addmm(tried.bias, inputs.inputs[:, kept], tried.weight.T)
        if torch.linalg.vector_norm(outputs.deviation(produced)) <= radius:
            low, best = middle, (kept, tried)
        else:
            high = middle
    return best
