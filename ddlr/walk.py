"""The one walk over a network's layers: solve, replace, measure."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddlr.arguments import as_number, as_whole_number, one_of
from ddlr.captured import CapturedLayer, CapturedLayers, released
from ddlr.cascade import (
    CASCADE_BOUNDS,
    Behind,
    bound_behind,
    check_cascade,
    on_used_inputs,
    with_routes,
)
from ddlr.compacting import without_larger_factors
from ddlr.identity import copied
from ddlr.latency import Latency
from ddlr.layers import replace_layer
from ddlr.linear_maps import as_layer, kind_of
from ddlr.measure import MeasuredLayer, measured_layer
from ddlr.method import LayerProblem, Method, SolveCache, refit_problem, solve_problem
from ddlr.result import CompressionResult, ConvergenceError, LayerReport, SolverResult
from ddlr.storing import as_it_is, on_all_features, on_live_features, stored
from ddlr.unread_outputs import remove_unread, used_inputs

log = logging.getLogger(__name__)

Solution = SolverResult | ConvergenceError
# What was solved on the original network's activations: by layer, bound and outputs that are read.
Solved = dict[tuple[str, float, bytes], Solution]


@dataclass(frozen=True, kw_only=True)
class WalkSettings:
    """How layers are walked over, whatever the method; see `ddlr.Settings`."""

    order: str = "parallel"
    refit_layers: bool = False
    cascade_bound: str = "tolerance"
    workers: int = 1
    raise_on_failure: bool = True
    break_even: Latency | None = None  # the rule by which a smaller layer is kept; always if None
    solve_cache: SolveCache | None = None

    @property
    def keeps_sizes(self) -> bool:
        """Whether layers in cascade have the size that they have on the original activations."""
        return self.cascade_bound == "reached"

    @property
    def of_solves(self) -> dict:
        """The keyword arguments of `solve_problem`."""
        return {"refit": self.refit_layers, "cache": self.solve_cache}

    def in_parallel(self) -> "WalkSettings":
        """The same for layers that are solved on the original network's activations."""
        return dataclasses.replace(self, order="parallel", cascade_bound="tolerance")

    def check(self, method: Method) -> None:
        """Raise a ValueError where settings contradict each other or the method."""
        workers = as_whole_number(self.workers, "workers", lowest=1)
        one_of(self.cascade_bound, "cascade_bound", CASCADE_BOUNDS)
        if self.cascade_bound != "tolerance" and self.order != "cascade":
            raise ValueError(
                f"cascade_bound is {self.cascade_bound!r}, which is for order='cascade'"
            )
        if self.keeps_sizes and not (self.refit_layers and method.refit is not None):
            raise ValueError(
                "cascade_bound is 'reached', which refits each layer; it needs refit='layer', or "
                f"'network', and a method with a refit of layers, which {method.name!r} "
                f"{'has' if method.refit is not None else 'has not'}"
            )
        if self.order == "cascade" and not self.keeps_sizes and workers > 1:
            raise ValueError(
                f"workers is {workers}, but in cascade order a layer waits for those before it; "
                "set workers to 1, or order to 'parallel'"
            )
        if method.drops_unread and workers > 1:
            raise ValueError(
                f"workers is {workers}, but here a layer waits for the next; set it to 1"
            )


def compress_layers(
    model: nn.Module,
    captured: CapturedLayers,
    method: Method,
    relative_tolerance: float | Mapping[str, float],
    settings: WalkSettings,
    *,
    on_layer: Callable[[LayerReport], None] | None = None,
    solved: Solved | None = None,
) -> CompressionResult:
    """Compress the captured layers of a network one by one.

    In parallel order each layer is solved on the original network's activations. In cascade order
    it sees the compressed layers before it, and aims at the original output all the same.

    Inputs and outputs that are zero on every calibration sample are removed before a layer is
    solved: their weights become 0. A relative tolerance of 0 keeps a layer as it is. At the end
    what is dead in these layers is removed, whatever the method, without a change to any output of
    the network: see `ddlr.dead_weights`.

    Parameters
    ----------
    model : nn.Module
        Is left untouched.
    captured : CapturedLayers
        What was captured of this network.
    method : Method
    relative_tolerance : float, or mapping of layer name to float
        Bound on each layer's output error, relative to the Frobenius norm of its output.
    settings : WalkSettings
    on_layer : callable, optional
        Is called with each layer's report as soon as it is there, before what is dead is removed.
    solved : dict, optional
        What earlier walks with this method have solved; it is used and added to.

    Raises
    ------
    ValueError
        If an argument makes no problem; names the layer and the value.
    ConvergenceError
        If a solve does not converge; names the layer.
    """
    solved = {} if solved is None else solved
    tolerances = _tolerances(relative_tolerance, [layer.name for layer in captured.layers])
    if method.prepare is not None:
        method = method.prepare(method, captured.layers, tolerances)
    if method.freeing_nothing:
        captured = captured.noting_what_frees(model)
    layers, ahead = _solve_ahead(model, captured, method, tolerances, settings, solved)
    if settings.order == "cascade":
        layers = with_routes(model, layers, captured.batches)
        check_cascade(model, captured, layers, tolerances)
    compressed = copied(model)
    measured: list[MeasuredLayer] = []
    behind: Behind | None = None  # once a layer before this one has changed, in cascade
    for layer in released(layers):
        bound, result = tolerances[layer.name], None
        if bound and (behind is None or settings.keeps_sizes):
            if ahead is not None:
                result = next(ahead)
            else:
                result = _solve_once(method, layer, bound, settings, solved)
        if bound and behind is not None:
            whole, layer = layer, behind.layer(compressed, layer.name)
            if settings.keeps_sizes:
                found = _checked(layer.name, result, settings.raise_on_failure)
                result = _refit_behind(method, whole, layer, found, settings)
            bound = bound_behind(layer, bound, settings.cascade_bound, result)
            if not settings.keeps_sizes:
                result = _solve(method, layer, bound, settings, original_inputs=False)
        elif result is not None and settings.order == "cascade":
            behind = _layers_behind(model, captured, layers, layer, tolerances, settings)
        result = _checked(layer.name, result, settings.raise_on_failure)
        original = compressed.get_submodule(layer.name)
        replacement = stored(original, layer, result, method, settings.break_even)
        if replacement is None:
            replacement = as_it_is(original, layer)
        else:
            wrapped = kind_of(original).wrapped(original, replacement)
            compressed = replace_layer(compressed, layer.name, wrapped)
        measured.append(measured_layer(replacement, layer, tolerances[layer.name], bound, result))
        report = measured[-1].report(replacement)
        _log(report)
        if on_layer is not None:
            on_layer(report)
    unread = remove_unread(model, compressed, captured)
    return CompressionResult(
        layers=tuple(
            each.report(as_layer(compressed.get_submodule(each.name)), unread.get(each.name))
            for each in measured
        ),
        model=without_larger_factors(compressed, [each.name for each in measured]),
        order=settings.order,
        drops_unread=method.drops_unread,
        unread={each.name: each.unread(unread.get(each.name)) for each in measured},
        skipped=captured.skipped,
    )


def _solve_ahead(
    model: nn.Module,
    captured: CapturedLayers,
    method: Method,
    tolerances: Mapping[str, float],
    settings: WalkSettings,
    solved: Solved,
) -> tuple[Iterator[CapturedLayer] | list[CapturedLayer], Iterator[Solution] | None]:
    """The layers to be walked over, and solutions that are there before, or come from elsewhere.

    Solutions are in the order of the layers that have a bound.
    """
    on_original = settings.order == "parallel" or settings.keeps_sizes
    if method.drops_unread:
        layers, results = _solve_backwards(model, captured, method, tolerances, settings, solved)
        if on_original:
            return layers, (result for result in results if result is not None)
        layers = [
            layer
            if result is None or layer.on_patches
            else on_used_inputs(layer, _unfinished(result), method.ridge)
            for layer, result in zip(layers, results, strict=True)
        ]
        return layers, None
    if on_original and settings.workers > 1 and any(tolerances.values()):
        return list(captured.layers), _solve_side_by_side(captured, method, tolerances, settings)
    in_turn = captured.for_solving()
    return in_turn if settings.order == "parallel" else list(in_turn), None


def _layers_behind(
    model: nn.Module,
    captured: CapturedLayers,
    layers: Sequence[CapturedLayer],
    first: CapturedLayer,
    tolerances: Mapping[str, float],
    settings: WalkSettings,
) -> Behind:
    """The layers that are compressed behind the first one."""
    names = [layer.name for layer in layers]
    rest = layers[names.index(first.name) + 1 :]
    bounded = [layer for layer in rest if tolerances[layer.name]]
    return Behind(model, bounded, captured.batches, made_up=settings.keeps_sizes)


def _solve_backwards(
    model: nn.Module,
    captured: CapturedLayers,
    method: Method,
    tolerances: Mapping[str, float],
    settings: WalkSettings,
    solved: Solved,
) -> tuple[list[CapturedLayer], list[Solution | None]]:
    """Solve layers from the last to the first, each for the outputs that the next one uses.

    On the original network's activations. Returns the layers, targets that are not used being
    zero, and their solutions.
    """
    layers: list[CapturedLayer] = []
    results: list[Solution | None] = []
    for layer in released(reversed(captured.layers)):
        if layers and captured.is_sole_consumer(model, layers[0], layer):
            layer = layer.reading(used_inputs(layers[0], _unfinished(results[0])))
        bound, result = tolerances[layer.name], None
        if bound:
            result = _solve_once(method, layer, bound, settings, solved)
        layers.insert(0, layer)
        results.insert(0, result)
    return layers, results


def _solve(
    method: Method,
    layer: CapturedLayer,
    bound: float,
    settings: WalkSettings,
    *,
    original_inputs: bool = True,
) -> Solution:
    problem = layer.problem(bound, original_inputs=original_inputs)
    return solve_problem(layer.method_of(method), problem, **settings.of_solves)


def _solve_once(
    method: Method, layer: CapturedLayer, bound: float, settings: WalkSettings, solved: Solved
) -> Solution:
    """What is known of a layer on the original network's activations; solved where it is not."""
    key = (layer.name, bound, _bytes(layer.read))
    if key not in solved:
        solved[key] = _solve(method, layer, bound, settings)
    return solved[key]


def _refit_behind(
    method: Method,
    layer: CapturedLayer,
    behind: CapturedLayer,
    solved: SolverResult,
    settings: WalkSettings,
) -> SolverResult:
    """A layer's solution refitted, in its size, to what compressed layers give it."""
    method = behind.method_of(method)
    full = on_all_features(solved, method, layer.live_out, layer.live_in)
    begun = on_live_features(full, method, behind.live_out, behind.live_in)
    problem = behind.problem(1.0, original_inputs=False)
    return refit_problem(method, problem, begun, cache=settings.solve_cache)


def _solve_side_by_side(
    captured: CapturedLayers,
    method: Method,
    tolerances: Mapping[str, float],
    settings: WalkSettings,
) -> Iterator[Solution]:
    """Solutions of the layers that have a bound, in their order, by several processes."""
    try:
        import joblib
    except ImportError as error:
        raise ImportError(
            f"workers is {settings.workers}, which needs joblib: pip install joblib, or workers=1"
        ) from error
    threads = max(1, torch.get_num_threads() // settings.workers)
    return joblib.Parallel(n_jobs=settings.workers, backend="loky", return_as="generator")(
        joblib.delayed(_solve_in_worker)(
            layer.method_of(method),
            layer.problem(tolerances[layer.name]),
            settings,
            threads,
        )
        for layer in captured.layers
        if tolerances[layer.name]
    )


def _solve_in_worker(
    method: Method, problem: LayerProblem, settings: WalkSettings, threads: int
) -> Solution:
    torch.set_num_threads(threads)
    return solve_problem(method, problem, **settings.of_solves)


def _unfinished(result: Solution | None) -> SolverResult | None:
    return result.result if isinstance(result, ConvergenceError) else result


def _checked(name: str, result: Solution | None, raise_on_failure: bool) -> SolverResult | None:
    if isinstance(result, ConvergenceError):
        if raise_on_failure:
            raise ConvergenceError(f"layer {name!r}: {result}", result.result) from result
        log.warning("layer %r: %s", name, result)
        return result.result
    return result


def _bytes(read: Tensor | None) -> bytes:
    return b"" if read is None else bytes(read.cpu().tolist())


def _log(report: LayerReport) -> None:
    log.info(
        "%s: %s, %d of %d weights, error %.4f, gap %.1e, violation %.1e, %d iterations, %.1f s",
        report.name,
        report.form,
        report.parameters_kept,
        report.parameters_dense,
        report.relative_error_read,
        report.relative_gap,
        report.violation,
        report.iterations,
        report.seconds,
    )


def _tolerances(
    relative_tolerance: float | Mapping[str, float], names: Sequence[str]
) -> dict[str, float]:
    """The bound of each layer by its name."""
    if not isinstance(relative_tolerance, Mapping):
        relative_tolerance = dict.fromkeys(names, relative_tolerance)
    if set(relative_tolerance) != set(names):
        raise ValueError(
            f"relative_tolerance is for {sorted(relative_tolerance)}; it must have a number for "
            f"each of the layers {list(names)}"
        )
    return {name: float(relative_tolerance[name]) for name in names}


def check_tolerances(relative_tolerance: float | Mapping[str, float]) -> None:
    """Raise a ValueError where a tolerance is no number from 0 upwards; names the layer."""
    given = {"relative_tolerance": relative_tolerance}
    if isinstance(relative_tolerance, Mapping):
        given = {f"relative_tolerance[{name!r}]": x for name, x in relative_tolerance.items()}
    for what, value in given.items():
        as_number(value, what)
