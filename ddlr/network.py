"""One path from a network to its compressed copy, for every method."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ddlr.calls import Forward, Samples, as_batches
from ddlr.capture_check import select_captured
from ddlr.captured import CapturedLayers
from ddlr.capturing import capture_layers, capture_lazily
from ddlr.goal_search import compress_to_goal
from ddlr.goals import GOALS, Goal
from ddlr.latency import Latency, as_rule
from ddlr.method import Method, SolveCache
from ddlr.network_refit import NetworkRefit, refit_if_asked
from ddlr.outputs import Output, check_output, check_trainable
from ddlr.result import CompressionResult, LayerReport
from ddlr.selection import Layers
from ddlr.walk import WalkSettings, check_tolerances, compress_layers


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Advanced settings of `ddlr.compress` and `nettrim.prune`. What is None is up to the method.

    Attributes
    ----------
    tolerance : float
        Bound on the certified gap of each convex solve; 1e-2.
    max_iterations : int
        The most iterations of each convex solve; 5000.
    ridge : float
        How strongly a weight stays where it began (in a refit at the solved weight, in a search for
        rank or inputs at the original one) in directions that the samples hardly show, in units of
        the inputs' mean eigenvalue; 1e-2. Where errors on further samples are well above those on
        the calibration samples, as with few of these for each input, 1 keeps a network of the same
        size closer to the original.
    cascade_bound : {"tolerance", "inherited", "reached"}
        In cascade order, of the layers after the first that is compressed. "tolerance": the larger
        of the relative tolerance and sqrt(1.1) times the error of the original weights on the
        compressed inputs. "inherited": the latter alone, so that only the first layer's tolerance
        counts, as in Net-Trim's cascade (Aghasi et al. 2020, arXiv 1806.06457). "reached": each
        layer has the size that it has in parallel order, and its refit, which must be asked for,
        goes by the compressed inputs; the bound is the error that it reaches, if larger than the
        tolerance. Where the network adds a skip connection to a layer's output, that is the error
        of the sum, relative to the layer's part in it.
    activations : mapping of layer name to {"relu", "none"}
        What follows a layer, where `ddlr.capture` should not find out by itself.
    workers : int
        Processes that solve layers side by side, by joblib; they share this process's threads. At
        the same number of threads per solve the result is the same.
    raise_on_failure : bool
        Whether a solve that does not converge raises; otherwise it is used as it is, and its status
        is in the report.
    break_even : {"parameters", "latency"} or ddlr.latency.Latency
        When a layer is kept in its compressed form. "parameters": where a low-rank one has fewer of
        them; deterministic. "latency": where it has fewer, and is measured to be faster than the
        dense layer at batches of 1 and of 256, on this machine, by whatever method; otherwise the
        original weight stays. A `ddlr.latency.Latency` has other batch sizes.
    solve_cache : callable
        Called as ``cache(function, *arguments, **keywords)`` for each solve and each refit of a
        layer; it may answer with what it knows of an equal call.
    network_refit : NetworkRefit
        How the layers are trained together where `refit` is "network"; on more samples than those
        of the calibration, if wanted.
    memory_limit, max_samples : int
        How much of the activations is kept, and where; see `ddlr.capture_layers`.
    """

    tolerance: float | None = None
    max_iterations: int | None = None
    ridge: float | None = None
    cascade_bound: str = "tolerance"
    activations: Mapping[str, str] | None = None
    workers: int = 1
    raise_on_failure: bool = True
    break_even: str | Latency = "parameters"
    solve_cache: SolveCache | None = None
    network_refit: NetworkRefit | None = None
    memory_limit: int | None = None
    max_samples: int | None = None


def compress_network(
    model: nn.Module,
    calibration: Any,
    method: Method,
    *,
    relative_tolerance: float | Mapping[str, float] | None = None,
    goal: Goal | None = None,
    refit: str = "none",
    order: str = "parallel",
    layers: Layers | None = None,
    exclude: Layers | None = None,
    forward: Forward | None = None,
    samples: Samples | None = None,
    output: Output | None = None,
    on_layer: Callable[[LayerReport], None] | None = None,
    settings: Settings | None = None,
) -> CompressionResult:
    """Compress the fully connected layers of a trained network by any `Method`.

    Capture, tolerances, walk, refit, report. Parameters, return value and errors are those of
    `ddlr.compress`, but for `method`, and for the goal, which is one object here.
    """
    settings = settings or Settings()
    method = method.with_options(
        tolerance=settings.tolerance, max_iterations=settings.max_iterations, ridge=settings.ridge
    )
    method.check(refit, order)
    network_refit = _network_refit(refit, settings.network_refit, forward)
    check_output(output)
    _check_one_of(relative_tolerance, goal, on_layer)
    if method.one_tolerance and (goal is not None or isinstance(relative_tolerance, Mapping)):
        raise ValueError(
            f"method {method.name!r} has one relative_tolerance for all layers, as a number; "
            "take another method for goals, or for a tolerance per layer"
        )
    if goal is None:
        check_tolerances(relative_tolerance)
        if refit == "network":
            check_trainable(output)
    walk = WalkSettings(
        order=order,
        refit_layers=refit != "none",
        cascade_bound=settings.cascade_bound,
        workers=settings.workers,
        raise_on_failure=settings.raise_on_failure,
        break_even=as_rule(settings.break_even),
        solve_cache=settings.solve_cache,
    )
    walk.check(method)
    captured = _captured(
        model,
        calibration,
        goal is not None,
        layers,
        exclude,
        forward=forward,
        samples=samples,
        activations=settings.activations,
        memory_limit=settings.memory_limit,
        max_samples=settings.max_samples,
    )
    _check_break_even(captured, walk.break_even)
    if goal is not None:
        return compress_to_goal(
            model, captured, method, goal, walk, output=output, refit=network_refit
        )
    result = compress_layers(model, captured, method, relative_tolerance, walk, on_layer=on_layer)
    return refit_if_asked(model, result, captured, refit=network_refit, output=output)


def _network_refit(
    refit: str, asked: NetworkRefit | None, forward: Forward | None
) -> NetworkRefit | None:
    """The refit of all layers together, its samples as batches; None where there is to be none."""
    if refit != "network":
        if asked is not None:
            raise ValueError(
                f'settings.network_refit is given with refit={refit!r}; it is for refit="network"'
            )
        return None
    asked = asked or NetworkRefit()
    if asked.calibration is None:
        return asked
    batches = as_batches(asked.calibration, forward=forward, what="network_refit.calibration")
    return dataclasses.replace(asked, calibration=batches)


def _check_one_of(relative_tolerance: object, goal: object, on_layer: object) -> None:
    if relative_tolerance is not None and goal is not None:
        raise ValueError("give a relative_tolerance or a goal, not both")
    if relative_tolerance is None and goal is None:
        raise ValueError(f"give a relative_tolerance, or a goal: one of {GOALS}")
    if goal is not None and not isinstance(goal, Goal):
        raise TypeError(
            f"goal is {goal!r}; it must be a ddlr.Goal, as ddlr.Goal(kept_fraction=0.1)"
        )
    if goal is not None and on_layer is not None:
        raise ValueError("on_layer is for a relative_tolerance; a goal tries each layer many times")


def _check_break_even(captured: CapturedLayers, break_even: object) -> None:
    convolutions = [layer.name for layer in captured.layers if layer.on_patches]
    if convolutions and break_even is not None:
        raise ValueError(
            f"break_even times products of matrices, which layer {convolutions[0]!r}, a "
            'convolution, is not; leave break_even at "parameters", or convolutions out of layers'
        )


def _captured(
    model: nn.Module,
    calibration: Any,
    again: bool,
    layers: Layers | None,
    exclude: Layers | None,
    **settings,
) -> CapturedLayers:
    """The layers to compress, captured now or before; `again` where they are solved repeatedly."""
    if isinstance(calibration, CapturedLayers):
        for name, value in settings.items():
            if value is not None:
                raise ValueError(
                    f"{name} was settled by capture_layers, whose result is the calibration; give "
                    "it there"
                )
        return select_captured(model, calibration, layers, exclude)
    capture = capture_layers if again else capture_lazily
    return capture(model, calibration, layers=layers, exclude=exclude, **settings)
