"""ALPS, a rival: the best weight of a layer with a given number of nonzeros, by splitting."""

from torch import Tensor

from ddlr.inputs import CentredInputs
from ddlr.layers import store_linear
from ddlr.method import Method
from ddlr.problem import WarmStart
from ddlr.quadratic import OutputQuadratic
from ddlr.reduced_rank import RIDGE
from ddlr.result import SolverResult
from experiments.methods.pruning import fewest_nonzeros
from nettrim.pruning import refit_support
from nettrim.support import SupportRegression, SupportSearch


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

    The support is that of `nettrim.support.SupportSearch`, and the weight the best one on it; the
    authors' last regression is by conjugate gradients, this one is exact.

    Parameters
    ----------
    quadratic : OutputQuadratic
        Of a layer of shape (out_features, in_features).
    """

    def __init__(self, quadratic: OutputQuadratic):
        self._quadratic = quadratic
        # A support needs no more than the layer's own precision.
        self._search = SupportSearch(quadratic.gram, quadratic.mean_targets.dtype)

    def __call__(self, nonzeros: int) -> Tensor:
        """The sparse weight, shape (out_features, in_features), float64."""
        support = self._search.support(self._quadratic.cross, nonzeros)
        return SupportRegression(self._quadratic.gram, support)(self._quadratic.cross)


ALPS = Method(
    name="alps",
    solver=prune_by_splitting,
    options={"ridge": RIDGE},
    refit=refit_support,
    refit_options={"ridge": RIDGE},
    store=store_linear,
)
