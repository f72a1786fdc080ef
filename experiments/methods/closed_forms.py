"""What DDLR and Net-Trim are compared with: closed forms, each the smallest within the same bound.

All are methods of the same walk over a network's layers (`ddlr.method.Method`), on the original
network's activations and without labels. Each keeps the promise of the convex methods, with

    D = A - Y where Y > 0 and max(A, 0) elsewhere,   ||D||_F <= relative_tolerance * ||Y||_F,

of the pre-activations A = X Wt + 1 bt and the original output Y, and takes the lowest rank, or the
highest threshold on the weights, that does. Inputs and outputs that are always zero are removed
first, as for all methods. None has a refit of a layer by itself; that of the whole network moves
all layers together at the sizes that were found.

    ddlr.compress_network(model, calibration, SVD, relative_tolerance=0.1)
"""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddlr.captured import CapturedLayer
from ddlr.compression import store_low_rank, store_selected
from ddlr.constraints import OutputSet
from ddlr.input_selection import select_inputs
from ddlr.inputs import CentredInputs
from ddlr.layers import store_linear
from ddlr.method import Method
from ddlr.problem import WarmStart
from ddlr.rank_search import lowest_truncation
from ddlr.reduced_rank import RIDGE
from ddlr.result import SolverResult, SolverStatus

_PARALLEL = ("parallel",)


# --- low rank --------------------------------------------------------------------------------


@torch.no_grad()
def truncate_weight(
    inputs: CentredInputs,
    targets: Tensor,
    radius: float,
    *,
    activation: str,
    warm_start: WarmStart,
) -> SolverResult:
    """Truncate the singular value decomposition of a weight, and keep its bias.

    The best weight of its rank in the Frobenius norm of the weight, whatever the data; they only
    choose the rank.

    References
    ----------
    Eckart and Young (1936).
    """
    started = time.perf_counter()
    outputs = OutputSet(targets, radius, activation, "hinge")
    left, values, right = torch.linalg.svd(warm_start.weight, full_matrices=False)
    scores = inputs.inputs @ (right.T * values)
    rank = lowest_truncation(outputs, warm_start.bias, scores, left.T)
    weight = (left[:, :rank] * values[:rank]) @ right[:rank]
    return _closed_form(inputs, outputs, weight, warm_start.bias, rank, started)


@torch.no_grad()
def truncate_outputs(
    inputs: CentredInputs,
    targets: Tensor,
    radius: float,
    *,
    activation: str,
    warm_start: WarmStart,
) -> SolverResult:
    """Make a weight low-rank so that its pre-activations change least, and correct its bias.

        minimise ||X Vt + 1 ct - (X Wt + 1 bt)||_F   over V of rank r and c

    The solution is V = U Ut W, with U the first r left singular vectors of W G^(1/2) and G the Gram
    matrix of the centred inputs, and c = b + (W - V) mean(X), which keeps the mean output. Nothing
    is divided by G, so it may be singular. In directions in which the inputs do not vary V is the
    projection of W like everywhere else.

    References
    ----------
    Eckart and Young (1936), in the metric of the inputs; reduced-rank regression (Izenman 1975).
    """
    started = time.perf_counter()
    outputs = OutputSet(targets, radius, activation, "hinge")
    weight = warm_start.weight
    terms = output_terms(inputs, weight, warm_start.bias)
    left = terms.directions
    rank = lowest_truncation(outputs, terms.mean, terms.scores, left.T)
    truncated = left[:, :rank] @ (left[:, :rank].T @ weight)
    shift = terms.mean - truncated @ inputs.mean
    return _closed_form(inputs, outputs, truncated, shift, rank, started)


@dataclass(frozen=True)
class OutputTerms:
    """The pre-activations of a layer as a sum of terms, the largest first.

    They are ``mean + scores @ directions.T``; the first r terms are those of rank r.

    Attributes
    ----------
    directions : Tensor, shape (out_features, terms)
        Orthonormal columns: the left singular vectors of W G^(1/2).
    values : Tensor, shape (terms,)
        Its singular values, which are the norms of the scores' columns.
    scores : Tensor, shape (samples, terms)
    mean : Tensor, shape (out_features,)
    """

    directions: Tensor
    values: Tensor
    scores: Tensor
    mean: Tensor


def output_terms(inputs: CentredInputs, weight: Tensor, bias: Tensor) -> OutputTerms:
    """The terms of the activation-aware singular value decomposition of a layer."""
    values, vectors = inputs.eigen
    # W G^(1/2), but for a rotation that its left singular vectors do not feel.
    whitened = (weight @ vectors) * values.sqrt()
    left, singular, _ = torch.linalg.svd(whitened, full_matrices=False)
    scores = inputs.centred @ (weight.T @ left)
    return OutputTerms(left, singular, scores, bias + weight @ inputs.mean)


# --- thresholds ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prunable:
    """A layer whose weights are to meet a threshold.

    Attributes
    ----------
    inputs : Tensor, shape (samples, in_features)
    weight : Tensor, shape (out_features, in_features)
    bias : Tensor, shape (out_features,)
    outputs : OutputSet
        The bound on its outputs.
    """

    inputs: Tensor
    weight: Tensor
    bias: Tensor
    outputs: OutputSet

    def keep(self, threshold: float) -> Tensor:
        """The weight with zeros in place of the entries below a threshold."""
        return self.weight * (self.weight.abs() >= threshold)

    def allows(self, threshold: float) -> bool:
        """Whether the outputs of that weight are within the bound."""
        produced = torch.addmm(self.bias, self.inputs, self.keep(threshold).T)
        deviation = torch.linalg.vector_norm(self.outputs.deviation(produced)).item()
        return deviation <= self.outputs.radius


@torch.no_grad()
def largest_threshold(layers: Sequence[Prunable]) -> float:
    """The largest magnitude, of all their weights, that every layer allows as its threshold.

    Found by bisection, as if a layer that allows a threshold allowed all lower ones. That need not
    be so, since pruning an entry can make up for another; what holds without it is that every
    layer allows the threshold, and not all of them the next larger magnitude. It is infinite, and
    nothing is kept, where the biases alone are within the bounds.
    """
    magnitudes = torch.cat([layer.weight.abs().flatten() for layer in layers]).unique()
    candidates = [*magnitudes.tolist(), math.inf]
    allowed, refused = 0, len(candidates)  # the first keeps every weight
    while refused - allowed > 1:
        middle = (allowed + refused) // 2
        if all(layer.allows(candidates[middle]) for layer in layers):
            allowed = middle
        else:
            refused = middle
    return candidates[allowed]


@torch.no_grad()
def prune_weight(
    inputs: CentredInputs,
    targets: Tensor,
    radius: float,
    *,
    activation: str,
    warm_start: WarmStart,
) -> SolverResult:
    """Set the smallest weights of a layer to zero, as many as its bound allows; keep its bias.

    The threshold is found by bisection, see `largest_threshold`.

    References
    ----------
    Han, Pool, Tran and Dally (2015), arXiv 1506.02626; without their retraining.
    """
    started = time.perf_counter()
    outputs = OutputSet(targets, radius, activation, "hinge")
    layer = Prunable(inputs.inputs, warm_start.weight, warm_start.bias, outputs)
    weight = layer.keep(largest_threshold([layer]))
    size = int((weight != 0).sum())
    return _closed_form(inputs, outputs, weight, warm_start.bias, size, started)


@torch.no_grad()
def prune_weight_at(
    inputs: CentredInputs,
    targets: Tensor,
    radius: float,
    *,
    activation: str,
    warm_start: WarmStart,
    threshold: float,
    seconds: float,
) -> SolverResult:
    """Prune a layer at a threshold that took so many seconds to find."""
    started = time.perf_counter() - seconds
    outputs = OutputSet(targets, radius, activation, "hinge")
    layer = Prunable(inputs.inputs, warm_start.weight, warm_start.bias, outputs)
    weight = layer.keep(threshold)
    size = int((weight != 0).sum())
    return _closed_form(inputs, outputs, weight, warm_start.bias, size, started)


def _with_one_threshold(
    method: Method, layers: Sequence[CapturedLayer], tolerances: Mapping[str, float]
) -> Method:
    """The method with the threshold that all layers allow."""
    started = time.perf_counter()
    problems = [layer.problem(tolerances[layer.name]) for layer in layers]
    threshold = largest_threshold(
        [
            Prunable(
                problem.inputs.inputs,
                problem.weight,
                problem.bias,
                OutputSet(problem.targets, problem.radius, problem.activation, "hinge"),
            )
            for problem in problems
        ]
    )
    share = (time.perf_counter() - started) / len(layers)
    return dataclasses.replace(method, options={"threshold": threshold, "seconds": share})


def _closed_form(
    inputs: CentredInputs,
    outputs: OutputSet,
    weight: Tensor,
    bias: Tensor,
    size: int,
    started: float,
) -> SolverResult:
    """A result without a certificate: nothing is known of how small it could have been."""
    produced = torch.addmm(bias, inputs.inputs, weight.T)
    return SolverResult(
        weight=weight,
        bias=bias,
        status=SolverStatus.CLOSED_FORM,
        iterations=0,
        objective=float(size),
        lower_bound=math.nan,
        relative_gap=math.nan,
        violation=outputs.violation(produced),
        dual=weight.new_empty(0),
        seconds=time.perf_counter() - started,
    )


# --- methods ---------------------------------------------------------------------------------

SVD = Method("svd", truncate_weight, store_low_rank, orders=_PARALLEL)
ACTIVATION_SVD = Method("activation_svd", truncate_outputs, store_low_rank, orders=_PARALLEL)
# The fewest weights in closed form, for the ablation: inputs are left out and outputs are dropped
# as by `ddlr.compress` with "fewest_weights", and the truncation that `select_inputs` finds is
# taken as it is, without a search for a lower rank. Nothing is promised of the dropped outputs.
ACTIVATION_SVD_SELECTED = Method(
    "activation_svd_selected",
    select_inputs,
    store_selected,
    options={"ridge": RIDGE},
    orders=_PARALLEL,
    drops_unread=True,
)
MAGNITUDE = Method("magnitude", prune_weight, store_linear, orders=_PARALLEL)
# As `MAGNITUDE`, with one threshold for all layers, which each of them must allow.
MAGNITUDE_GLOBAL = Method(
    "magnitude_global",
    prune_weight_at,
    store_linear,
    orders=_PARALLEL,
    prepare=_with_one_threshold,
    one_tolerance=True,
)
