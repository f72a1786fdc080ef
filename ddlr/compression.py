"""DDLR for whole networks: network in, compressed copy and reports out."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from ddlr.arguments import one_of
from ddlr.calls import Forward, Samples
from ddlr.goals import goal_of
from ddlr.input_selection import fewest_weights
from ddlr.inputs import CentredInputs
from ddlr.layers import (
    LowRankLinear,
    SeparableLinear,
    factorise,
    numerical_rank,
    store_linear,
)
from ddlr.low_rank import solve_low_rank
from ddlr.method import LayerProblem, Method
from ddlr.network import Settings, compress_network
from ddlr.outputs import Output
from ddlr.rank_search import lowest_rank
from ddlr.reduced_rank import RIDGE, refit_low_rank
from ddlr.result import CompressionResult, LayerReport, SolverResult
from ddlr.selection import Layers
from ddlr.separable import Kernel, refit_separable, smaller_separable
from ddlr.sizes import saves_weights


def compress(
    model: nn.Module,
    calibration: Any,
    *,
    relative_tolerance: float | Mapping[str, float] | None = None,
    method: str = "nuclear",
    constraint: str | None = None,
    refit: str = "none",
    order: str = "parallel",
    layers: Layers | None = None,
    exclude: Layers | None = None,
    forward: Forward | None = None,
    samples: Samples | None = None,
    output: Output | None = None,
    on_layer: Callable[[LayerReport], None] | None = None,
    settings: Settings | None = None,
    **goal,
) -> CompressionResult:
    """Make the fully connected layers of a trained network low-rank, without retraining.

    Each linear layer (`nn.Linear`, or `Conv1D` of transformers) is solved on its own, by
    `ddlr.solve_low_rank` or `ddlr.lowest_rank` with the bound ``relative_tolerance * ||its
    output||_F``, and replaced by a `LowRankLinear`. A layer whose rank does not save weights stays
    dense, as it was. Convolutions are compressed alike where `layers` chooses them, each as a
    linear map on patches, and become a `LowRankConvolution`; see `ddlr.convolutions`. By
    "lowest_rank" they become a `SeparableConvolution` where that stores fewer weights.

    Parameters
    ----------
    model : nn.Module
        Is left untouched, in its mode, on its device.
    calibration : Tensor, iterable of batches, or CapturedLayers
        Network inputs without labels, or batches of them: tensors; dicts of keyword arguments;
        tuples of positional ones; or anything, with `forward`. An iterable may be one that ends,
        such as a generator. Or what `ddlr.capture_layers` made of them, where one network is
        compressed several times.
    relative_tolerance : float, or mapping of layer name to float
        Bound on the output error of each layer, relative to its output; the same for all, or one
        for each. 0 keeps a layer; 1 or more makes its weight zero.
    method : {"nuclear", "lowest_rank", "fewest_weights"}
        "nuclear" is the convex program of DDLR, with a certificate; "lowest_rank" looks for the
        lowest rank itself, see `ddlr.lowest_rank`; "fewest_weights" also leaves out inputs of a
        layer that others can make up for, see `ddlr.fewest_weights`, and with them the outputs of
        the layer before, of which nothing is promised then; it goes from the last layer backwards.
        Convolutions, which can not leave out single inputs, get the lowest rank then.
    constraint : {"nettrim", "hinge"}, optional
        The output set of "nuclear", see `ddlr.solve_low_rank`; "nettrim" unless given. The other
        methods have "hinge" alone, and refuse the argument.
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
        both, as `relative_tolerance` and `relative_bound`. `Settings(cascade_bound="reached")`
        keeps the sizes of "parallel", and makes up for skip connections.
    layers : str, sequence of str, or callable, optional
        The layers to compress: names and globs, as ``["fc1", "encoder.*"]``; a function of name and
        module that says yes or no; or "all", for convolutions too. All linear layers that can be
        replaced by default, see `ddlr.capture_layers`.
    exclude : optional
        Layers to leave out of these, of the same forms.
    forward : callable, optional
        ``(model, batch)`` to the output that counts: how the network is called, where a batch does
        not say so, and which part of what it gives is its output, as
        ``lambda model, batch: model(**batch).logits``. A goal and a refit of the network need an
        output that is one tensor.
    samples : callable, optional
        ``(batch)`` to a mask, a tensor of bool, True where a position counts, such as tokens that
        are no padding. It holds for layers whose inputs begin with its shape. Unless given, the
        entry "attention_mask" of a dict is that mask.
    output : {"classes", "binary", "values"} or callable, optional
        What the network's outputs are. "classes": logits along the last dimension, of which the
        largest is the prediction. "binary": logits, each of which is a prediction by itself, 1
        above 0, with labels 0 and 1. "values": real numbers. Or a function of the original and the
        new outputs, two tensors: one number that is 0 for equal outputs and larger the more they
        differ. It decides what a layer is worth to a goal, see `ddlr.outputs.divergence`, what a
        prediction is, and what a refit of the network trains towards. Unless it is given, a goal
        of size or error weighs layers by "values", and the others take (samples, classes) for
        "classes", or what labels of the same leading dimensions show; whatever is less certain is
        refused.
    on_layer : callable, optional
        Is called with each `LayerReport` as soon as it is there, before what is dead is removed;
        not with a goal.
    settings : ddlr.Settings, optional
        Advanced settings: of the solver, the ridge, the cascade, processes, a cache.
    **goal
        In place of the tolerance what is wanted of the whole network, as ``kept_fraction=0.1``: the
        attributes of `ddlr.Goal`. Each layer then gets a tolerance of its own, and
        `CompressionResult.goal` says how the goal is met.

    Returns
    -------
    CompressionResult
        The compressed copy and one `LayerReport` per layer.

    Raises
    ------
    TypeError
        If there is no such argument, or what the network gives is not a tensor.
    ValueError
        If an argument, a weight or an activation is not usable, or the method does not have an
        option; names the layer and the value.
    ConvergenceError
        If a solve does not reach its tolerance; carries its result.
    ImportError
        If several workers are asked for and joblib is not installed.

    References
    ----------
    Papadimitriou and Jain (2021), arXiv 2107.05787.
    """
    chosen = METHODS[one_of(method, "method", tuple(METHODS))].with_options(constraint=constraint)
    return compress_network(
        model,
        calibration,
        chosen,
        relative_tolerance=relative_tolerance,
        goal=goal_of(goal),
        refit=refit,
        order=order,
        layers=layers,
        exclude=exclude,
        forward=forward,
        samples=samples,
        output=output,
        on_layer=on_layer,
        settings=settings,
    )


def refit_rank(
    problem: LayerProblem, solved: SolverResult, *, ridge: float
) -> tuple[Tensor, Tensor]:
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
    """Factorise a weight, or None where it has full rank on the rows and columns that are live."""
    live_out, live_in = (weight != 0).any(dim=1), (weight != 0).any(dim=0)
    left, right = factorise(weight)
    if weight.any() and not saves_weights(len(right), int(live_in.sum()), int(live_out.sum())):
        return None
    return LowRankLinear.from_factors(left, right, bias)


def store_selected(weight: Tensor, bias: Tensor) -> nn.Module:
    """As `store_low_rank`, but dense on the inputs that are used where it has full rank there."""
    return store_low_rank(weight, bias) or store_linear(weight, bias)


def lowest_of_kernel(
    inputs: Tensor | CentredInputs, targets: Tensor, radius: float, *, kernel: Kernel, **options
) -> SolverResult:
    """The lowest rank of a convolution's layer on patches, or of its split kernel if smaller."""
    solved = lowest_rank(inputs, targets, radius, **options)
    return smaller_separable(solved, inputs, targets, radius, kernel=kernel, **options) or solved


def refit_kernel(
    problem: LayerProblem, solved: SolverResult, *, ridge: float, kernel: Kernel
) -> tuple[Tensor, Tensor]:
    """As `refit_rank`, of the form that the solved weight will be stored in."""
    terms = kernel.terms_of(solved.weight)
    if terms is None:
        return refit_rank(problem, solved, ridge=ridge)
    return refit_separable(
        problem.inputs,
        problem.targets,
        solved.weight,
        solved.bias,
        kernel=kernel,
        terms=terms,
        activation=problem.activation,
        ridge=ridge,
    )


def store_kernel(kernel: Kernel, weight: Tensor, bias: Tensor) -> nn.Module | None:
    """As `store_low_rank`, or split in columns and rows where that stores fewer weights."""
    if kernel.terms_of(weight) is None:
        return store_low_rank(weight, bias)
    return SeparableLinear.from_weight(weight, bias, kernel.shape)


def method_of_kernel(method: Method, kernel: Kernel) -> Method:
    """The lowest rank of a kernel in either of its two splits."""
    return dataclasses.replace(
        method,
        solver=lowest_of_kernel,
        options={**method.options, "kernel": kernel},
        refit=refit_kernel,
        refit_options={**method.refit_options, "kernel": kernel},
        store=partial(store_kernel, kernel),
    )


NUCLEAR = Method(
    name="nuclear",
    solver=solve_low_rank,
    options={"constraint": "nettrim", "tolerance": 1e-2, "max_iterations": 5000},
    # On compressed inputs the set `nettrim` may be empty; `hinge` always holds the original weight.
    on_compressed_inputs={"constraint": "hinge"},
    refit=refit_rank,
    refit_options={"ridge": RIDGE},
    store=store_low_rank,
)
LOWEST_RANK = Method(
    name="lowest_rank",
    solver=lowest_rank,
    options={"ridge": RIDGE},
    refit=refit_rank,
    refit_options={"ridge": RIDGE},
    store=store_low_rank,
    of_kernel=method_of_kernel,
)
FEWEST_WEIGHTS = Method(
    name="fewest_weights",
    solver=fewest_weights,
    options={"ridge": RIDGE},
    refit=refit_rank,
    refit_options={"ridge": RIDGE},
    store=store_selected,
    drops_unread=True,
    on_patches=LOWEST_RANK,  # a kernel holds weights for all places of a patch
)
METHODS = {each.name: each for each in (NUCLEAR, LOWEST_RANK, FEWEST_WEIGHTS)}
