"""What DDLR and Net-Trim are compared with: closed forms, each the smallest within the same bound.

All are methods of the same walk over a network's layers (`ddlr.layerwise`), on the original
network's activations and without labels. Each keeps the promise of the convex methods, with

    D = A - Y where Y > 0 and max(A, 0) elsewhere,   ||D||_F <= relative_tolerance * ||Y||_F,

of the pre-activations A = X Wt + 1 bt and the original output Y, and takes the lowest rank, or the
highest threshold on the weights, that does. Inputs and outputs that are always zero are removed
first, as for all methods. `activation_svd_selected` is a step from a closed form to the fewest
weights, for the ablation; its promise is on the outputs that the next layer reads, as theirs is.

Parameters, return value and errors of the methods are those of `ddlr.compress`; of refits they have
"none" and "network", which moves all layers together at the sizes that were found, towards outputs
that are logits of classes.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ddlr.compress import store_low_rank, store_selected
from ddlr.constraints import OutputSet
from ddlr.input_selection import select_inputs
from ddlr.layers import store_linear
from ddlr.layerwise import (
    CapturedLayers,
    LayerProblem,
    LayerSolver,
    capture_layers,
    compress_layers,
)
from ddlr.network_refit import refit_result
from ddlr.rank_search import lowest_truncation
from ddlr.reduced_rank import RIDGE, check_ridge
from ddlr.result import CompressionResult, LayerReport, SolverResult, SolverStatus

REFITS = ("none", "network")
Calibration = Tensor | Iterable[Tensor] | CapturedLayers
Tolerance = float | Mapping[str, float]
OnLayer = Callable[[LayerReport], None] | None


def svd(
    model: nn.Module,
    calibration: Calibration,
    *,
    relative_tolerance: Tolerance,
    refit: str = "none",
    workers: int = 1,
    on_layer: OnLayer = None,
) -> CompressionResult:
    """Truncate the singular value decomposition of each weight, and keep its bias.

    The best weight of its rank in the Frobenius norm of the weight, whatever the data; they only
    choose the rank.

    References
    ----------
    Eckart and Young (1936).
    """
    return _compress(
        *(model, calibration, _truncate_weight, store_low_rank),
        relative_tolerance=relative_tolerance,
        refit=refit,
        workers=workers,
        on_layer=on_layer,
    )


def activation_svd(
    model: nn.Module,
    calibration: Calibration,
    *,
    relative_tolerance: Tolerance,
    refit: str = "none",
    workers: int = 1,
    on_layer: OnLayer = None,
) -> CompressionResult:
    """Make each weight low-rank so that its pre-activations change least, and correct its bias.

        minimise ||X Vt + 1 ct - (X Wt + 1 bt)||_F   over V of rank r and c

    The solution is V = U Ut W, with U the first r left singular vectors of W G^(1/2) and G the Gram
    matrix of the centred inputs, and c = b + (W - V) mean(X), which keeps the mean output. Nothing
    is divided by G, so it may be singular. In directions in which the inputs do not vary V is the
    projection of W like everywhere else.

    References
    ----------
    Eckart and Young (1936), in the metric of the inputs; reduced-rank regression (Izenman 1975).
    """
    return _compress(
        *(model, calibration, _truncate_outputs, store_low_rank),
        relative_tolerance=relative_tolerance,
        refit=refit,
        workers=workers,
        on_layer=on_layer,
    )


def activation_svd_selected(
    model: nn.Module,
    calibration: Calibration,
    *,
    relative_tolerance: Tolerance,
    refit: str = "none",
    ridge: float = RIDGE,
    workers: int = 1,
    on_layer: OnLayer = None,
) -> CompressionResult:
    """As `activation_svd`, on selected inputs, without the outputs that the next layer ignores.

    It is the fewest weights in closed form: inputs are left out and outputs are dropped as by
    `ddlr.compress` with "fewest_weights" in parallel order, from the last layer backwards, and the
    truncation that `ddlr.input_selection.select_inputs` finds is taken as it is, without a search
    for a lower rank. So nothing is promised of the outputs that are dropped.

    Parameters
    ----------
    ridge : float
        Of the regression on the selected inputs, see `ddlr.compress`.
    workers : int
        1, since a layer waits for the next.
    """
    check_ridge(ridge)
    return _compress(
        *(model, calibration, LayerSolver(select_inputs, {"ridge": ridge}), store_selected),
        relative_tolerance=relative_tolerance,
        refit=refit,
        workers=workers,
        on_layer=on_layer,
        drop_unused=True,
    )


def magnitude(
    model: nn.Module,
    calibration: Calibration,
    *,
    relative_tolerance: Tolerance,
    refit: str = "none",
    workers: int = 1,
    on_layer: OnLayer = None,
) -> CompressionResult:
    """Set the smallest weights of each layer to zero, as many as its bound allows; keep its bias.

    The threshold is found by bisection, see `largest_threshold`.

    References
    ----------
    Han, Pool, Tran and Dally (2015), arXiv 1506.02626; without their retraining.
    """
    return _compress(
        *(model, calibration, _prune, store_linear),
        relative_tolerance=relative_tolerance,
        refit=refit,
        workers=workers,
        on_layer=on_layer,
    )


def magnitude_global(
    model: nn.Module,
    calibration: Calibration,
    *,
    relative_tolerance: float,
    refit: str = "none",
    workers: int = 1,
    on_layer: OnLayer = None,
) -> CompressionResult:
    """As `magnitude`, with one threshold for all layers, which each of them must allow."""
    if isinstance(relative_tolerance, Mapping):
        raise ValueError(
            "magnitude_global has one threshold for all layers, so none can have a tolerance of "
            "its own; for goals take magnitude"
        )
    if not isinstance(calibration, CapturedLayers):
        calibration = capture_layers(model, calibration)
    started = time.perf_counter()
    threshold = largest_threshold(
        [
            Prunable(
                layer.live_inputs.inputs,
                layer.weight[layer.live_out][:, layer.live_in],
                layer.bias[layer.live_out],
                OutputSet(
                    layer.targets[:, layer.live_out],
                    relative_tolerance * torch.linalg.vector_norm(layer.targets).item(),
                    layer.activation,
                    "hinge",
                ),
            )
            for layer in calibration.layers
        ]
    )
    share = (time.perf_counter() - started) / len(calibration.layers)
    return _compress(
        *(model, calibration, partial(_prune_at, threshold, share), store_linear),
        relative_tolerance=relative_tolerance,
        refit=refit,
        workers=workers,
        on_layer=on_layer,
    )


def _compress(
    model: nn.Module,
    calibration: Calibration,
    solve: Callable[[LayerProblem], SolverResult],
    store: Callable[[Tensor, Tensor], nn.Module | None],
    *,
    relative_tolerance: Tolerance,
    refit: str,
    workers: int,
    on_layer: OnLayer,
    drop_unused: bool = False,
) -> CompressionResult:
    if refit not in REFITS:
        raise ValueError(f"refit is {refit!r}; a method in closed form has {REFITS}")
    if refit == "network" and not isinstance(calibration, CapturedLayers):
        calibration = capture_layers(model, calibration)
    result = compress_layers(
        model,
        calibration,
        relative_tolerance=relative_tolerance,
        solve=solve,
        store=store,
        workers=workers,
        on_layer=on_layer,
        drop_unused=drop_unused,
    )
    if refit == "none":
        return result
    return refit_result(model, result, calibration, output="classes")


# --- low rank --------------------------------------------------------------------------------


@torch.no_grad()
def _truncate_weight(problem: LayerProblem) -> SolverResult:
    started = time.perf_counter()
    left, values, right = torch.linalg.svd(problem.weight, full_matrices=False)
    scores = problem.inputs.inputs @ (right.T * values)
    rank = lowest_truncation(_outputs(problem), problem.bias, scores, left.T)
    weight = (left[:, :rank] * values[:rank]) @ right[:rank]
    return _closed_form(problem, weight, problem.bias, rank, started)


@torch.no_grad()
def _truncate_outputs(problem: LayerProblem) -> SolverResult:
    started = time.perf_counter()
    inputs, weight = problem.inputs, problem.weight
    values, vectors = inputs.eigen
    # W G^(1/2), but for a rotation that its left singular vectors do not feel.
    left, _, _ = torch.linalg.svd((weight @ vectors) * values.sqrt(), full_matrices=False)
    mean = problem.bias + weight @ inputs.mean
    scores = inputs.centred @ (weight.T @ left)
    rank = lowest_truncation(_outputs(problem), mean, scores, left.T)
    truncated = left[:, :rank] @ (left[:, :rank].T @ weight)
    return _closed_form(problem, truncated, mean - truncated @ inputs.mean, rank, started)


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
def _prune(problem: LayerProblem) -> SolverResult:
    """Prune one layer at its own largest threshold."""
    started = time.perf_counter()
    threshold = largest_threshold([_prunable(problem)])
    return _prune_at(threshold, time.perf_counter() - started, problem)


@torch.no_grad()
def _prune_at(threshold: float, seconds: float, problem: LayerProblem) -> SolverResult:
    """Prune one layer at a threshold that took so many seconds to find."""
    started = time.perf_counter() - seconds
    weight = _prunable(problem).keep(threshold)
    return _closed_form(problem, weight, problem.bias, int((weight != 0).sum()), started)


def _prunable(problem: LayerProblem) -> Prunable:
    return Prunable(problem.inputs.inputs, problem.weight, problem.bias, _outputs(problem))


# --- both ------------------------------------------------------------------------------------


def _outputs(problem: LayerProblem) -> OutputSet:
    return OutputSet(problem.targets, problem.radius, problem.activation, "hinge")


def _closed_form(
    problem: LayerProblem, weight: Tensor, bias: Tensor, size: int, started: float
) -> SolverResult:
    """A result without a certificate: nothing is known of how small it could have been."""
    produced = torch.addmm(bias, problem.inputs.inputs, weight.T)
    return SolverResult(
        weight=weight,
        bias=bias,
        status=SolverStatus.CLOSED_FORM,
        iterations=0,
        objective=float(size),
        lower_bound=math.nan,
        relative_gap=math.nan,
        violation=_outputs(problem).violation(produced),
        dual=weight.new_empty(0),
        seconds=time.perf_counter() - started,
    )
