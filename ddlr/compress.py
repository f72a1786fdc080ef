"""DDLR for whole networks: network in, compressed copy and reports out."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from ddlr.allocate import compress_to_goal, remember_layers
from ddlr.arguments import as_number, as_whole_number
from ddlr.held_out import HeldOut
from ddlr.input_selection import fewest_weights
from ddlr.inputs import CentredInputs
from ddlr.layers import LowRankLinear, numerical_rank, store_linear
from ddlr.layerwise import (
    REFITS,
    CapturedLayers,
    LayerProblem,
    LayerSolver,
    capture_layers,
    compress_layers,
)
from ddlr.low_rank import solve_low_rank
from ddlr.network_refit import refit_result
from ddlr.outputs import Output, check_output, check_trainable
from ddlr.rank_search import lowest_rank
from ddlr.reduced_rank import RIDGE, check_ridge, refit_low_rank
from ddlr.result import CompressionResult, LayerReport, SolverResult
from ddlr.sizes import saves_weights


def compress(
    model: nn.Module,
    calibration: Tensor | Iterable[Tensor] | CapturedLayers,
    *,
    relative_tolerance: float | Mapping[str, float] | None = None,
    max_parameters: int | None = None,
    kept_fraction: float | None = None,
    max_output_error: float | None = None,
    max_accuracy_drop: float | None = None,
    min_agreement: float | None = None,
    held_out: HeldOut | None = None,
    output: Output | None = None,
    method: str = "nuclear",
    constraint: str = "nettrim",
    refit: str = "none",
    order: str = "parallel",
    cascade_bound: str = "tolerance",
    ridge: float = RIDGE,
    layers: Sequence[str] | None = None,
    activations: Mapping[str, str] | None = None,
    tolerance: float = 1e-2,
    max_iterations: int = 5000,
    raise_on_failure: bool = True,
    workers: int = 1,
    on_layer: Callable[[LayerReport], None] | None = None,
    memory: Callable[..., SolverResult] | None = None,
) -> CompressionResult:
    """Make the fully connected layers of a trained network low-rank, without retraining.

    Each `nn.Linear` is solved on its own, by `ddlr.solve_low_rank` or `ddlr.lowest_rank` with the
    bound ``relative_tolerance * ||its output||_F``, and replaced by a `LowRankLinear`. A layer
    whose rank does not save weights stays dense, as it was.

    Parameters
    ----------
    model : nn.Module
        Is left untouched, in its mode, on its device.
    calibration : Tensor, iterable of Tensor, or CapturedLayers
        Network inputs, or batches of them, without labels; or what `ddlr.capture_layers` made of
        them, where one network is compressed several times.
    relative_tolerance : float, or mapping of layer name to float
        Bound on the output error of each layer, relative to its output; the same for all, or one
        for each. 0 keeps a layer; 1 or more makes its weight zero.
    max_parameters, kept_fraction, max_output_error, max_accuracy_drop, min_agreement
        In place of the tolerance a goal for the network, for which each layer gets its own: see
        `ddlr.compress_to_goal`, and `CompressionResult.goal` for how it is met.
    held_out : Tensor, (Tensor, Tensor), or iterable of either
        For the last two goals: network inputs other than `calibration`, and their labels; or
        batches of them.
    output : {"classes", "binary", "values"} or callable, optional
        What the network's outputs are, for a goal and for the refit "network": logits of classes
        along the last dimension, logits that each say yes or no, real numbers, or a function that
        says how far two outputs are apart; see `ddlr.compress_to_goal`. Where it is needed and not
        certain, it has to be given.
    method : {"nuclear", "lowest_rank", "fewest_weights"}
        "nuclear" is the convex program of DDLR, with a certificate; "lowest_rank" looks for the
        lowest rank itself, see `ddlr.lowest_rank`; "fewest_weights" also leaves out inputs of a
        layer that others can make up for, see `ddlr.fewest_weights`, and with them the outputs of
        the layer before, of which nothing is promised then; it goes from the last layer backwards.
    constraint : {"nettrim", "hinge"}
        The output set of "nuclear", see `ddlr.solve_low_rank`; the others keep to "hinge".
    refit : {"none", "layer", "network"}
        "layer" moves each solved weight, at its rank, to a smaller output error: the nuclear norm
        finds the rank at the price of shrunken singular values, and the search for the lowest rank
        ends as soon as the bound is met. See `ddlr.refit_low_rank`. "network" then also trains all
        these layers together towards the original outputs, without labels: more accurate, but
        training, and not within the layers' bounds. It needs `output`, unless a goal says what that
        is. See `ddlr.refit_network`.
    order : {"parallel", "cascade"}
        "parallel" solves each layer on the original network's activations, and promises the bound
        for it. "cascade" solves it on those that the compressed layers before it give, towards the
        original output, in the set `hinge` from the second layer on; where the original weights
        already miss the bound there, it is raised to sqrt(1.1) times their error. The report has
        both, as `relative_tolerance` and `relative_bound`.
    cascade_bound : {"tolerance", "inherited"}
        In cascade order. "inherited" is Net-Trim's own rule: only the first layer that is
        compressed has a tolerance, every later bound is sqrt(1.1) times the error of the original
        weights. See `ddlr.layerwise.compress_layers`.
    ridge : float
        Of the refits, "lowest_rank" and "fewest_weights": how strongly weights stay where they
        began (a refit at the solved weight, the other two at the original one) in directions that
        the samples hardly show, see `ddlr.refit_low_rank`. Where errors on further
        samples are well above those on the calibration samples, as with few of these for each
        input, 1 keeps a network of the same size closer to the original.
    layers : sequence of str, optional
        Names of the layers to compress; every `nn.Linear` by default.
    activations : mapping of str to {"relu", "none"}, optional
        What follows a layer, where `ddlr.capture` should not find out by itself.
    tolerance, max_iterations
        Of each solve by "nuclear", see `ddlr.solve_low_rank`.
    raise_on_failure : bool
        Whether a solve that does not converge raises; otherwise its status is in the report.
    workers : int
        Processes that solve layers side by side, by joblib; they share this process's threads.
    on_layer : callable, optional
        Is called with each `LayerReport` as soon as it is there; not with a goal.
    memory : callable, optional
        For keeping solves between calls, see `ddlr.layerwise.LayerSolver`.

    Returns
    -------
    CompressionResult
        The compressed copy and one `LayerReport` a layer.

    Raises
    ------
    ValueError
        If an argument, a weight or an activation is not usable; names the layer and the value.
    ConvergenceError
        If a solve does not reach its tolerance; carries its result.

    References
    ----------
    Papadimitriou and Jain (2021), arXiv 2107.05787.
    """
    goals = {
        "max_parameters": max_parameters,
        "kept_fraction": kept_fraction,
        "max_output_error": max_output_error,
        "max_accuracy_drop": max_accuracy_drop,
        "min_agreement": min_agreement,
    }
    check_refit(refit)
    check_output(output)
    ridge = check_ridge(ridge)
    tolerance = as_number(tolerance, "tolerance", positive=True)
    max_iterations = as_whole_number(max_iterations, "max_iterations", lowest=1)
    has_goal = any(wanted is not None for wanted in goals.values())
    if has_goal and relative_tolerance is not None:
        raise ValueError("give a relative_tolerance or a goal, not both")
    if not has_goal and relative_tolerance is None:
        raise ValueError(f"give a relative_tolerance, or one goal of {tuple(goals)}")
    if refit == "network" and not has_goal:
        check_trainable(output)
    if has_goal or refit == "network":
        if not isinstance(calibration, CapturedLayers):
            calibration = capture_layers(model, calibration, layers=layers, activations=activations)
            activations = None
        elif layers is not None:
            calibration = calibration.only(layers)
        layers = None
    to_tolerance = partial(
        compress,
        method=method,
        constraint=constraint,
        cascade_bound=cascade_bound,
        ridge=ridge,
        layers=layers,
        activations=activations,
        tolerance=tolerance,
        max_iterations=max_iterations,
        raise_on_failure=raise_on_failure,
        workers=workers,
    )
    layer_refit = "layer" if refit == "network" else refit
    if has_goal:
        to_tolerance = partial(to_tolerance, memory=memory or remember_layers(calibration))
        return compress_to_goal(
            *(partial(to_tolerance, refit=layer_refit), model, calibration),
            **goals,
            held_out=held_out,
            output=output,
            order=order,
            refit_network=refit == "network",
        )
    if refit == "network":
        layer_by_layer = to_tolerance(
            *(model, calibration),
            relative_tolerance=relative_tolerance,
            refit=layer_refit,
            order=order,
            on_layer=on_layer,
            memory=memory,
        )
        return refit_result(model, layer_by_layer, calibration, output=output)
    nuclear = {"constraint": constraint, "tolerance": tolerance, "max_iterations": max_iterations}
    solvers = {
        "nuclear": (solve_low_rank, nuclear),
        "lowest_rank": (lowest_rank, {"ridge": ridge}),
        "fewest_weights": (fewest_weights, {"ridge": ridge}),
    }
    if method not in solvers:
        raise ValueError(f"method is {method!r}; choose one of {tuple(solvers)}")
    refit_weight = partial(_refit, ridge=ridge) if refit == "layer" else None
    solve = LayerSolver(*solvers[method], refit=refit_weight, memory=memory)
    return compress_layers(
        model,
        calibration,
        relative_tolerance=relative_tolerance,
        solve=solve,
        store=store_selected if method == "fewest_weights" else store_low_rank,
        layers=layers,
        activations=activations,
        order=order,
        cascade_bound=cascade_bound,
        raise_on_failure=raise_on_failure,
        workers=workers,
        on_layer=on_layer,
        drop_unused=method == "fewest_weights",
        ridge=ridge,
    )


def check_refit(refit: str) -> None:
    if refit not in REFITS:
        raise ValueError(f"refit is {refit!r}; choose one of {REFITS}")


def _refit(problem: LayerProblem, solved: SolverResult, ridge: float) -> tuple[Tensor, Tensor]:
    """The best weight of the solved one's rank on its inputs, unless it will not be stored."""
    weight = solved.weight
    used = (weight != 0).any(dim=0)
    selected = not bool(used.all())
    inputs, rank = int(used.sum()), numerical_rank(weight)
    if not saves_weights(rank, inputs, len(weight)):
        if not selected:
            return weight, solved.bias
        rank = min(inputs, len(weight))
    if rank == 0:
        return weight, solved.bias
    refitted = weight.clone()
    refitted[:, used], bias = refit_low_rank(
        CentredInputs(problem.inputs.inputs[:, used]) if selected else problem.inputs,
        problem.targets,
        weight[:, used],
        solved.bias,
        rank=rank,
        activation=problem.activation,
        ridge=ridge,
    )
    return refitted, bias


def store_low_rank(weight: Tensor, bias: Tensor) -> LowRankLinear | None:
    """Factorise a weight, or None where the factors would not be smaller than its live part."""
    live_out, live_in = (weight != 0).any(dim=1), (weight != 0).any(dim=0)
    if weight.any() and not saves_weights(
        numerical_rank(weight), int(live_in.sum()), int(live_out.sum())
    ):
        return None
    return LowRankLinear.from_weight(weight, bias)


def store_selected(weight: Tensor, bias: Tensor) -> nn.Module:
    """As `store_low_rank`, but dense on the inputs that are used where factors are larger."""
    return store_low_rank(weight, bias) or store_linear(weight, bias)
