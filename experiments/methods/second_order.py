"""SparseGPT, a rival: a layer is pruned column by column, and later columns make up for it."""

from functools import partial

import torch
from torch import Tensor

from ddlr.arguments import as_whole_number
from ddlr.inputs import CentredInputs
from ddlr.layers import store_linear
from ddlr.method import Method
from ddlr.problem import WarmStart
from ddlr.quadratic import OutputQuadratic
from ddlr.reduced_rank import RIDGE
from ddlr.result import SolverResult
from experiments.methods.pruning import fewest_nonzeros
from nettrim.pruning import refit_support
from nettrim.support import largest_places

_BLOCK_SIZE = 128


def prune_by_columns(
    inputs: CentredInputs,
    targets: Tensor,
    radius: float,
    *,
    activation: str,
    warm_start: WarmStart,
    ridge: float = RIDGE,
    block_size: int = _BLOCK_SIZE,
) -> SolverResult:
    """Find the layer that SparseGPT prunes to the fewest nonzeros within a bound.

        minimise nonzeros(W)   subject to   ||D||_F <= radius,   over the weights of `SecondOrder`

    with D as in `ddlr.lowest_rank`. The pruning begins at the regression of the outputs, which on
    the original inputs is the original weight.

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
    block_size : int
        Columns among which the entries that go are chosen.

    Returns
    -------
    SolverResult
        `objective` is the number of nonzeros, `iterations` that of budgets tried; the status is
        "fitted". The `warm_start` itself where no smaller budget is within the radius.

    Raises
    ------
    ValueError
        If an option is not usable; names it and its value.

    References
    ----------
    Frantar and Alistarh (2023), SparseGPT, ICML, arXiv 2301.00774. The budget's search, the free
    bias and the targets of compressed inputs are not theirs.
    """
    block_size = as_whole_number(block_size, "block_size", lowest=1)
    return fewest_nonzeros(
        partial(SecondOrder, block_size=block_size),
        inputs,
        targets,
        radius,
        activation=activation,
        ridge=ridge,
        warm_start=warm_start,
    )


class SecondOrder:
    """A function from a number of nonzeros to a weight that is pruned by SparseGPT.

    With U the upper Cholesky factor of the inverse Gram matrix, G^-1 = Ut U, columns j are gone
    through from the first to the last. An entry w of column j that goes is made up for by the later
    columns of its row, which move by -w U_j / U_jj: the optimal brain surgeon's step when columns
    up to j are fixed. In each block of columns the entries with the least (w / U_jj)^2 go, as the
    block is when its turn comes. All blocks have the same density.

    Parameters
    ----------
    quadratic : OutputQuadratic
        Of a layer of shape (out_features, in_features).
    block_size : int
    """

    def __init__(self, quadratic: OutputQuadratic, block_size: int = _BLOCK_SIZE):
        self._dense = quadratic.minimiser
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(quadratic.gram))
        self._factor = torch.linalg.cholesky(inverse, upper=True)
        self._block_size = block_size

    def __call__(self, nonzeros: int) -> Tensor:
        """The pruned weight, shape (out_features, in_features), float64."""
        weight, columns = self._dense.clone(), self._dense.shape[1]
        for begin in range(0, columns, self._block_size):
            end = min(begin + self._block_size, columns)
            count = nonzeros * end // columns - nonzeros * begin // columns
            kept = self._largest(weight[:, begin:end], begin, count)
            self._prune_block(weight, begin, kept)
        return weight

    def _largest(self, block: Tensor, begin: int, count: int) -> Tensor:
        """Which entries of a block stay, as a mask of its shape."""
        own = slice(begin, begin + block.shape[1])
        return largest_places(block / self._factor.diagonal()[own], count)

    def _prune_block(self, weight: Tensor, begin: int, kept: Tensor) -> None:
        """Clear the entries of a block that do not stay; move all later ones. In place."""
        end = begin + kept.shape[1]
        moves = torch.zeros_like(weight[:, begin:end])
        for column in range(begin, end):
            row, place = self._factor[column], column - begin
            moves[:, place] = weight[:, column] / row[column] * ~kept[:, place]
            weight[:, column:end].addr_(moves[:, place], row[column:end], alpha=-1)
            weight[:, column] *= kept[:, place]  # exactly 0, whatever the rounding
        # Later blocks in one product; they are not looked at before.
        weight[:, end:] -= moves @ self._factor[begin:end, end:]


SPARSEGPT = Method(
    name="sparsegpt",
    solver=prune_by_columns,
    options={"ridge": RIDGE, "block_size": _BLOCK_SIZE},
    refit=refit_support,
    refit_options={"ridge": RIDGE},
    store=store_linear,
)
