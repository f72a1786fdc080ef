"""The one walk over a network's layers: capture, solve, replace, report."""

import copy
import dataclasses
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from ddlr.arguments import as_number, as_whole_number
from ddlr.capture import LayerRecord, capture, checked, feeds_only, given_to, reaches, try_relu
from ddlr.constraints import ACTIVATIONS, OutputSet
from ddlr.dead_weights import has_dead_weights, remove_dead_weights
from ddlr.identity import StandIn, check_model, copied, is_linear_map, is_plain, shares_with
from ddlr.input_selection import regress_outputs as regress_onto
from ddlr.inputs import CentredInputs
from ddlr.layers import LowRankLinear, replace_layer, store_linear
from ddlr.measure import MeasuredLayer, layer_errors
from ddlr.problem import WarmStart, check_problem
from ddlr.reduced_rank import RIDGE
from ddlr.result import (
    CompressionResult,
    ConvergenceError,
    LayerReport,
    SolverResult,
)
from ddlr.routes import Route, called_several_times, noting_routes
from ddlr.trials import Trace, hooked, trace, traced_modules
from ddlr.untouched import random_state_kept, untouched

log = logging.getLogger(__name__)

REFITS = ("none", "layer", "network")
ORDERS = ("parallel", "cascade")
CASCADE_BOUNDS = ("tolerance", "inherited")

_CALIBRATION_BATCH = 1000
# Of the error that the original weights make on compressed inputs; as in Net-Trim's cascade.
_CASCADE_SLACK = math.sqrt(1.1)
_NOT_REPLACED = (
    "can not be replaced: something else reads its weight, or the model holds the layer where a "
    "copy can not put another (in a function, for instance)"
)
# Of the inputs of a layer in two passes of one network, which may be rounded differently.
_FITS, _FITS_HALF = 1e-5, 1e-2


@dataclass(frozen=True)
class CapturedLayer:
    """What one layer saw and gave on the calibration samples; serves any number of solves.

    Attributes
    ----------
    name : str
    inputs : Tensor, shape (samples, in_features)
    targets : Tensor, shape (samples, out_features)
        The layer's output, after its activation.
    activation : {"relu", "none"}
    weight, bias : Tensor
        Of the layer that was captured; a missing bias is zero.
    whole_targets : Tensor, optional
        The targets before those that nothing uses were set to zero.
    route : Route, optional
        Which samples reached the layer, see `ddlr.routes`; what cascade order goes by.
    """

    name: str
    inputs: Tensor
    targets: Tensor
    activation: str
    weight: Tensor
    bias: Tensor
    whole_targets: Tensor | None = None
    route: Route | None = field(default=None, repr=False)

    @property
    def dropped(self) -> int:
        """Outputs that are not always zero, but taken for that since nothing uses them."""
        if self.whole_targets is None:
            return 0
        return int(_live(self.whole_targets).sum() - self.live_out.sum())

    @cached_property
    def live_in(self) -> Tensor:
        return _live(self.inputs)

    @cached_property
    def live_out(self) -> Tensor:
        return _live(self.targets)

    @cached_property
    def live_inputs(self) -> CentredInputs:
        """The inputs that are not always zero, with the eigenvectors that all solves share."""
        return CentredInputs(self.inputs[:, self.live_in])


@dataclass(frozen=True)
class CapturedLayers:
    """The captured layers of one network, in its order. Stands in for the calibration set.

    Attributes
    ----------
    layers : tuple of CapturedLayer
        In the order in which the network calls them first.
    batches : tuple of Tensor
        The network inputs they were captured on.
    traces : tuple of Trace, optional
        What the network did on each batch that has samples. By it a network that is not the one
        that was captured is found out at once; without it by the activations alone.
    activations_given : frozenset of str
        Names of the layers whose activation the caller gave.
    """

    layers: tuple[CapturedLayer, ...]
    batches: tuple[Tensor, ...]
    traces: tuple[Trace, ...] | None = field(default=None, repr=False)
    activations_given: frozenset[str] = frozenset()

    def only(self, names: Sequence[str]) -> "CapturedLayers":
        """The same of some of the layers, in the network's order."""
        known = [layer.name for layer in self.layers]
        names = _distinct(names)
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"layer {unknown[0]!r} was not captured; captured are {known}")
        layers = tuple(layer for layer in self.layers if layer.name in names)
        return dataclasses.replace(self, layers=layers)


@dataclass(frozen=True)
class LayerProblem:
    """One layer to be solved: its live inputs and outputs, and the original weight for a start.

    `original_inputs` is false where layers before it have been compressed, in cascade order.
    """

    inputs: CentredInputs
    targets: Tensor
    radius: float
    activation: str
    weight: Tensor
    bias: Tensor
    original_inputs: bool = True


@dataclass(frozen=True)
class LayerSolver:
    """A solver for `compress_layers`: `solver` with options, begun at the original weight.

    On compressed inputs the set `nettrim` may be empty, while `hinge` always holds the original
    weight: there it takes the place of `nettrim`, with the same guarantee.

    Attributes
    ----------
    solver : callable
        `ddlr.solve_low_rank`, `ddlr.lowest_rank` or `nettrim.solve_sparse`.
    options : dict
        Keyword arguments for it.
    refit : callable, optional
        (problem, solver result) to a better weight and bias of the same size.
    memory : callable, optional
        Called with a function and its arguments in place of the function itself, for each solve and
        each refit, and may answer with what it remembers of an equal call.
    """

    solver: Callable[..., SolverResult]
    options: Mapping
    refit: Callable[[LayerProblem, SolverResult], tuple[Tensor, Tensor]] | None = None
    memory: Callable[..., SolverResult] | None = None

    def __call__(self, problem: LayerProblem) -> SolverResult:
        options = {
            **self.options,
            "activation": problem.activation,
            "warm_start": WarmStart(problem.weight, problem.bias),
        }
        if "constraint" in options and not problem.original_inputs:
            options["constraint"] = "hinge"
        arguments = (problem.inputs, problem.targets, problem.radius)
        try:
            solved = self._remembered(self.solver, *arguments, **options)
        except ConvergenceError as error:
            raise ConvergenceError(str(error), self._refitted(problem, error.result)) from error
        return self._refitted(problem, solved)

    def _refitted(self, problem: LayerProblem, solved: SolverResult) -> SolverResult:
        if self.refit is None:
            return solved
        return self._remembered(_with_refit, self.refit, problem, solved)

    def _remembered(self, compute: Callable[..., SolverResult], *arguments, **options):
        if self.memory is None:
            return compute(*arguments, **options)
        return self.memory(compute, *arguments, **options)


def _with_refit(refit: Callable, problem: LayerProblem, solved: SolverResult) -> SolverResult:
    started = time.perf_counter()
    weight, bias = refit(problem, solved)
    seconds = solved.seconds + time.perf_counter() - started
    return dataclasses.replace(solved, weight=weight, bias=bias, seconds=seconds)


def capture_layers(
    model: nn.Module,
    calibration: Tensor | Iterable[Tensor],
    *,
    layers: Sequence[str] | None = None,
    activations: Mapping[str, str] | None = None,
) -> CapturedLayers:
    """Run a network on calibration data once, for several compressions of it.

        captured = ddlr.capture_layers(model, calibration)
        for tolerance in (0.05, 0.1, 0.2):
            ddlr.compress(model, captured, relative_tolerance=tolerance)
            nettrim.prune(model, captured, relative_tolerance=tolerance)

    Activations and eigenvectors are computed here and shared by all of them; the results are those
    of separate calls. Holds the calibration data and each layer's inputs, twice, and its targets in
    memory.

    The network is run in evaluation mode, and is afterwards exactly as it was, see
    `ddlr.untouched.untouched`; hooks of its owner run with it. What is in doubt about it is tried
    out on all calibration samples: whether a ReLU follows a layer, see `ddlr.capture`, and whether
    anything but the layer's calls depends on its weights, which could not be replaced then. That
    costs about six passes, and one for each layer that may have a ReLU.

    By default every `nn.Linear` is captured that can be replaced. Those that can not stay as they
    are, with a warning that names them: layers that no calibration sample reaches, whose weights
    are read by something else (tied to an embedding, or by attention), that are more than a linear
    map (a subclass with a forward pass of its own), or that the network holds where no copy of it
    can put another layer (a closure). Named in `layers`, they are an error.

    Parameters and errors are those of `ddlr.compress`.
    """
    batches = _batches(calibration)
    found, traces = _capture(model, batches, layers, activations)
    captured = CapturedLayers(tuple(found), batches, traces, frozenset(activations or ()))
    for layer in captured.layers:
        _ = layer.live_inputs.eigen
    return captured


def compress_layers(
    model: nn.Module,
    calibration: Tensor | Iterable[Tensor] | CapturedLayers,
    *,
    relative_tolerance: float | Mapping[str, float],
    solve: Callable[[LayerProblem], SolverResult],
    store: Callable[[Tensor, Tensor], nn.Module | None],
    layers: Sequence[str] | None = None,
    activations: Mapping[str, str] | None = None,
    order: str = "parallel",
    raise_on_failure: bool = True,
    workers: int = 1,
    on_layer: Callable[[LayerReport], None] | None = None,
    drop_unused: bool = False,
    ridge: float = RIDGE,
    cascade_bound: str = "tolerance",
) -> CompressionResult:
    """Compress linear layers of a network one by one.

    In parallel order each layer is solved on the original network's activations. In cascade order
    it sees the compressed layers before it, and aims at the original output all the same. Its
    original weights may miss the tolerance there; from the second compressed layer on the bound is
    then raised to sqrt(1.1) times the error that they make (`relative_bound` in the report). By
    Net-Trim's own rule that is the bound in any case (`cascade_bound`).

    Inputs and outputs that are zero on every calibration sample are removed before a layer is
    solved: their weights become 0. A relative tolerance of 0 keeps a layer as it is. At the end
    what is dead in these layers is removed, whatever the method, without a change to any output of
    the network: see `ddlr.dead_weights`.

    Parameters
    ----------
    model : nn.Module
        Is left untouched.
    calibration : Tensor, iterable of Tensor, or CapturedLayers
        Network inputs, or batches of them, or what `capture_layers` made of them.
    relative_tolerance : float, or mapping of layer name to float
        Bound on each layer's output error, relative to the Frobenius norm of its output; a mapping
        has one for each layer.
    solve : callable
        The method: layer problem to solver result.
    store : callable
        Full weight and bias to the layer that takes the original's place, or None where storing
        the solved weight would not be smaller than the original.
    layers : sequence of str, optional
        Names of `nn.Linear` modules, in any order; they are taken in the order in which the network
        calls them first. By default all of them that can be replaced, see `capture_layers`.
    activations : mapping, optional
        "relu" or "none" by layer name, where `ddlr.capture` should not decide.
    order : {"parallel", "cascade"}
        "cascade" takes layers that are called once for each batch, on the same samples before and
        after compression.
    cascade_bound : {"tolerance", "inherited"}
        Of the layers after the first that is compressed, in cascade order: "tolerance", the larger
        of the relative tolerance and sqrt(1.1) times the error of the original weights on the
        compressed inputs; "inherited", the latter alone, so that only the first layer's tolerance
        counts, as in Net-Trim's cascade (Aghasi et al. 2020, arXiv 1806.06457).
    raise_on_failure : bool
        Whether a solve that does not converge raises, or is used as it is and shows in the report.
    workers : int
        Processes that solve layers side by side; they share this process's number of threads. At
        the same number of threads a solve the result is the same.
    on_layer : callable, optional
        Is called with each layer's report as soon as it is there, before what is dead is removed.
    drop_unused : bool
        Whether a layer is freed from the outputs that the next layer, solved before it, has no
        weights for. Its bound is then on the others, relative to their norm. So it is where the
        network has no other use for a layer's outputs, which is tried out, see
        `ddlr.capture.feeds_only`.
    ridge : float
        In cascade order, of the regression of a layer's weight on the inputs that are used.

    Raises
    ------
    ValueError
        If an argument makes no problem, or a capture is not of this network as it is; names the
        layer and the value.
    ConvergenceError
        If a solve does not converge; names the layer.
    ImportError
        If `workers` is more than 1 and joblib is not installed.
    """
    workers = as_whole_number(workers, "workers", lowest=1)
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}; choose one of {ORDERS}")
    if cascade_bound not in CASCADE_BOUNDS:
        raise ValueError(f"cascade_bound is {cascade_bound!r}; choose one of {CASCADE_BOUNDS}")
    if order == "cascade" and workers > 1:
        raise ValueError(
            f"workers is {workers}, but in cascade order a layer waits for those before it; "
            "set workers to 1, or order to 'parallel'"
        )
    if drop_unused and workers > 1:
        raise ValueError(f"workers is {workers}, but here a layer waits for the next; set it to 1")
    _check_tolerances(relative_tolerance)
    if isinstance(calibration, CapturedLayers):
        batches = calibration.batches
        selected = _select(model, calibration, layers, activations)
        tolerances = _tolerances(relative_tolerance, [layer.name for layer in selected])
        captured = iter(selected)
    else:
        batches = _batches(calibration)
        records, _ = _record(model, batches, layers, activations)
        tolerances = _tolerances(relative_tolerance, list(records))
        captured = _captured_one_by_one(records, activations)

    compressed = copied(model)
    measured: list[MeasuredLayer] = []
    known = {}
    adjacent: list[tuple[str, str]] = []
    captured = _noting_adjacent(captured, adjacent)
    if drop_unused:
        captured, known = _solve_backwards(model, list(captured), tolerances, solve, batches)
    if order == "cascade":
        if drop_unused:
            captured = (_on_used_inputs(layer, known[layer.name], ridge) for layer in captured)
        solutions = _solve_in_cascade(
            captured,
            tolerances,
            solve,
            model,
            lambda: compressed,
            batches,
            known,
            cascade_bound,
        )
    elif drop_unused:
        solutions = ((layer, tolerances[layer.name], known[layer.name]) for layer in captured)
    else:
        solutions = _solve_all(captured, tolerances, solve, workers)
    for layer, bound, solved in solutions:
        if isinstance(solved, ConvergenceError):
            if raise_on_failure:
                raise ConvergenceError(f"layer {layer.name!r}: {solved}", solved.result) from solved
            log.warning("layer %r: %s", layer.name, solved)
            solved = solved.result
        original = compressed.get_submodule(layer.name)
        replacement = _stored(original, layer, solved, store)
        own = replacement
        if replacement is original and not is_plain(original):
            own = _whole(original, layer)
        measured.append(_measure(own, layer, tolerances[layer.name], bound, solved))
        compressed = replace_layer(compressed, layer.name, replacement)
        report = measured[-1].report(own)
        log.info(
            "%s: %s, %d of %d weights, error %.4f, gap %.1e, violation %.1e, %d iterations, %.1f s",
            *(layer.name, report.form, report.parameters_kept, report.parameters_dense),
            *(report.relative_error_read, report.relative_gap, report.violation),
            *(report.iterations, report.seconds),
        )
        if on_layer is not None:
            on_layer(report)
    unread = _remove_dead(model, compressed, adjacent, batches)
    return CompressionResult(
        compressed,
        tuple(
            each.report(compressed.get_submodule(each.name), unread.get(each.name))
            for each in measured
        ),
        order=order,
        drops_unused=drop_unused,
        unread={each.name: each.unread(unread.get(each.name)) for each in measured},
    )


def _noting_adjacent(
    captured: Iterator[CapturedLayer], adjacent: list[tuple[str, str]]
) -> Iterator[CapturedLayer]:
    """The layers as they are; pairs of one and the next, which it is the input of, are noted."""
    before = None
    for layer in captured:
        if before is not None and _is_input_of(before, layer):
            adjacent.append((before.name, layer.name))
        before = layer
        yield layer


def _is_input_of(layer: CapturedLayer, following: CapturedLayer) -> bool:
    targets, inputs = layer.targets, following.inputs
    return targets.shape == inputs.shape and torch.equal(targets, inputs)


def _remove_dead(
    model: nn.Module,
    compressed: nn.Module,
    adjacent: Sequence[tuple[str, str]],
    batches: Sequence[Tensor],
) -> dict[str, Tensor]:
    """Remove what is dead in compressed layers, where trying it out shows that nothing reads it.

    Returns by layer which outputs nothing reads any longer, see `ddlr.dead_weights`.
    """
    layers = {name: compressed.get_submodule(name) for pair in adjacent for name in pair}
    pairs = [pair for pair in adjacent if all(_has_own_weights(layers[name]) for name in pair)]
    if not any(has_dead_weights(layers[one], layers[other]) for one, other in pairs):
        return {}
    pairs = [pair for pair in pairs if feeds_only(model, *pair, batches)]
    pairs = [
        pair for pair in pairs if not any(shares_with(compressed, layers[name]) for name in pair)
    ]
    return remove_dead_weights(compressed, pairs, batches)


def _has_own_weights(layer: nn.Module) -> bool:
    return isinstance(layer, LowRankLinear) or is_plain(layer)


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


def _check_tolerances(relative_tolerance: float | Mapping[str, float]) -> None:
    given = {"relative_tolerance": relative_tolerance}
    if isinstance(relative_tolerance, Mapping):
        given = {f"relative_tolerance[{name!r}]": x for name, x in relative_tolerance.items()}
    for what, value in given.items():
        as_number(value, what)


def _batches(calibration: Tensor | Iterable[Tensor]) -> tuple[Tensor, ...]:
    if isinstance(calibration, Tensor):
        calibration = calibration.split(_CALIBRATION_BATCH)
    with random_state_kept():  # a loader that shuffles draws from it
        return tuple(calibration)


@dataclass
class _Recorded:
    """A layer that was recorded: `refused` says why it can not be compressed."""

    layer: nn.Linear
    record: LayerRecord
    weight: Tensor | None = None
    bias: Tensor | None = None
    route: Route = ()
    refused: str = ""


def _capture(
    model: nn.Module,
    batches: Sequence[Tensor],
    layers: Sequence[str] | None,
    activations: Mapping[str, str] | None,
) -> tuple[list[CapturedLayer], tuple[Trace, ...]]:
    recorded, traces = _record(model, batches, layers, activations)
    return list(_captured_one_by_one(recorded, activations)), traces


def _captured_one_by_one(
    recorded: dict[str, _Recorded], activations: Mapping[str, str] | None
) -> Iterator[CapturedLayer]:
    """Layers that were recorded, one at a time, so that each can be let go of."""
    for name in list(recorded):
        one = recorded.pop(name)
        activation = (activations or {}).get(name, one.record.activation)
        yield _captured_layer(name, one, activation)


def _record(
    model: nn.Module,
    batches: Sequence[Tensor],
    layers: Sequence[str] | None,
    activations: Mapping[str, str] | None,
) -> tuple[dict[str, _Recorded], tuple[Trace, ...]]:
    """Run the network, and find out about its layers what `capture_layers` says.

    Returns the layers that can be compressed, in the order in which they are called first, and a
    trace of the network for each batch that has samples.
    """
    names = _linear_layers(model, layers)
    activations = dict(activations or {})
    _check_activations(activations, names)
    check_model(model, names)
    _check_weights(model, names)
    samples = list(checked(batches))
    recorded = _run(model, names, samples)
    for one in recorded.values():
        if not one.record.called:
            one.refused = (
                "was not called by any calibration sample (if it should have been, then its weight "
                "is read in another way, or torch.compile passes over it)"
            )
        elif not one.refused and (other := shares_with(model, one.layer)):
            one.refused = f"shares its weight with {other!r}"
    traces = _try_out(model, _usable(recorded), samples, activations)
    kept = _usable(recorded)
    refused = {name: one.refused for name, one in recorded.items() if one.refused}
    if refused:
        told = "; ".join(
            f"layer {', '.join(repr(name) for name in refused if refused[name] == why)} {why}"
            for why in dict.fromkeys(refused.values())
        )
        if layers is not None or not kept:
            can = f"; those that can be compressed are {list(kept)}" if kept else ""
            raise ValueError(f"{told}; leave such out of layers{can}")
        warnings.warn(f"left as it is, and not compressed: {told}", stacklevel=4)
    return kept, traces


def _usable(recorded: dict[str, _Recorded]) -> dict[str, _Recorded]:
    """Those that nothing speaks against, by their first call."""
    usable = [(name, one) for name, one in recorded.items() if not one.refused]
    return dict(sorted(usable, key=lambda item: item[1].record.place))


def _run(model: nn.Module, names: Sequence[str], samples: Sequence[Tensor]) -> dict[str, _Recorded]:
    """Run all batches, and record the layers, with the weights that they had in the passes."""
    with capture(model, names, decide=False) as records:
        recorded = {
            name: _Recorded(model.get_submodule(name), record) for name, record in records.items()
        }

        def check(one: _Recorded) -> Callable:
            def hook(layer, arguments, keywords, output):
                if one.refused:
                    return
                if one.weight is None:
                    # Cloned: the owner may train the layer further.
                    weight, bias = _weight_and_bias(layer)
                    one.weight, one.bias = weight.clone(), bias.clone()
                if "forward" in vars(layer) or not is_linear_map(
                    layer, given_to(arguments, keywords), output
                ):
                    one.refused = (
                        f"is a {type(layer).__name__} whose forward pass is not just "
                        "inputs @ weight.T + bias"
                    )

            return hook

        hooks = [
            (one.layer.register_forward_hook, check(one), {"with_kwargs": True, "prepend": True})
            for one in recorded.values()
        ]
        with hooked(*hooks), noting_routes(model, names) as routes, untouched(model) as device:
            for batch in samples:
                with routes.batch():
                    model(batch.to(device, copy=True))
    for name, one in recorded.items():
        one.route = routes.to(name)
    return recorded


def _try_out(
    model: nn.Module,
    recorded: dict[str, _Recorded],
    samples: Sequence[Tensor],
    activations: Mapping[str, str],
) -> tuple[Trace, ...]:
    """Try each layer's ReLU, and whether what takes its place is all that reads its weights."""
    names = traced_modules(model, list(recorded))
    relus = {name: one.record for name, one in recorded.items() if name not in activations}
    with untouched(model) as device:
        traces = tuple(try_relu(model, relus, (batch.to(device),), {}, names) for batch in samples)
    together = _why_not_replaced(model, list(recorded), samples, names)
    if together:
        # Beside a plain copy, since it may be the copying that fails for one of them.
        for name, one in recorded.items():
            one.refused = _why_not_replaced(copied(model), [name], samples, names)
        if not any(one.refused for one in recorded.values()):
            for one in recorded.values():
                one.refused = together
    return traces


def _why_not_replaced(
    model: nn.Module, layers: Sequence[str], samples: Sequence[Tensor], names: Sequence[str]
) -> str:
    """Why layers can not be replaced, if stand-ins for them do not act as they do; or ""."""
    if not layers:
        return ""
    with random_state_kept():
        twin = copied(model)
        standing = {}
        for layer in layers:
            standing[layer] = StandIn(twin.get_submodule(layer))
            twin = replace_layer(twin, layer, standing[layer])

    with untouched(model) as device, untouched(twin):
        for batch in (batch.to(device) for batch in samples):

            def run(model: nn.Module, batch: Tensor = batch) -> Trace:
                with random_state_kept():
                    return trace(model, names, (batch,), {})

            with capture(model, layers, decide=False) as records:
                before = run(model)
            if not all(record.called for record in records.values()):
                return _NOT_REPLACED  # by a copy, while the model does call them
            for layer, stand_in in standing.items():
                stand_in.outputs = list(map(records[layer].output, range(records[layer].calls)))
            try:
                same = run(twin) == before
            except Exception as error:
                return f"can not be replaced in a copy of the model: {error}"
            if not same or any(stand_in.outputs for stand_in in standing.values()):
                if run(model) != before:
                    return ""  # no two passes are equal, so nothing can be found out
                return _NOT_REPLACED
    return ""


def _captured_layer(name: str, recorded: _Recorded, activation: str) -> CapturedLayer:
    record = recorded.record
    # Half precision is for inference; the solve needs more.
    dtype = torch.promote_types(record.inputs.dtype, torch.float32)
    inputs, targets = record.inputs.to(dtype), record.outputs.to(dtype)
    if activation == "relu":
        targets = targets.relu()
    try:
        check_problem(inputs, targets, tolerance=1.0, max_iterations=1)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error
    weight, bias = recorded.weight.to(dtype), recorded.bias.to(dtype)
    route = recorded.route
    return CapturedLayer(name, inputs, targets, activation, weight, bias, route=route)


def _weight_and_bias(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    weight = layer.weight.detach()
    return weight, weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach()


def _select(
    model: nn.Module,
    captured: CapturedLayers,
    layers: Sequence[str] | None,
    activations: Mapping[str, str] | None,
) -> list[CapturedLayer]:
    """The captured layers of the given names, after a check that they are this model's."""
    if activations is not None:
        raise ValueError("activations were settled by capture_layers; give them there")
    names = [layer.name for layer in captured.layers] if layers is None else layers
    selected = captured.only(_linear_layers(model, names))
    _check_fit(model, selected)
    return list(selected.layers)


def _check_fit(model: nn.Module, captured: CapturedLayers) -> None:
    """Refuse a capture that is not of this network as it is now, by one pass over its batches.

    Raises
    ------
    ValueError
        If a layer has other weights or shapes, is given other inputs, or is read in another way.
    """
    names = [layer.name for layer in captured.layers]
    check_model(model, names)
    samples = list(checked(captured.batches))
    off = {name: torch.zeros(2, dtype=torch.float64) for name in names}
    places = dict.fromkeys(names, 0)
    wrong: dict[str, str] = {}

    def compare(layer: CapturedLayer) -> Callable:
        def hook(module, arguments, keywords, _output):
            inputs = given_to(arguments, keywords).detach().flatten(0, -2)
            place = places[layer.name]
            places[layer.name] += len(inputs)
            kept = layer.inputs[place : place + len(inputs)]
            weight, bias = _weight_and_bias(module)
            if not (_equal(layer.weight, weight) and _equal(layer.bias, bias)):
                wrong.setdefault(layer.name, "was captured with other weights")
            elif kept.shape != inputs.shape:
                wrong.setdefault(layer.name, "was captured on other inputs")
            elif layer.name not in wrong:
                moved = torch.linalg.vector_norm(kept - inputs.to(kept)).double()
                size = torch.linalg.vector_norm(kept).double()
                off[layer.name] += torch.stack([moved, size]).cpu() ** 2

        return hook

    modules = traced_modules(model, [layer.name for layer in captured.layers])
    traces = []
    with untouched(model) as device:
        hooks = [
            (
                *(model.get_submodule(layer.name).register_forward_hook, compare(layer)),
                {"with_kwargs": True, "prepend": True},
            )
            for layer in captured.layers
        ]
        with hooked(*hooks):
            for batch in samples:
                try:
                    traces.append(trace(model, modules, (batch.to(device),), {}))
                except Exception as error:
                    raise ValueError(
                        f"the network can not run on the batches of its capture: {error}"
                    ) from error
    for layer in captured.layers:
        moved, size = off[layer.name].sqrt().tolist()
        within = _FITS if torch.finfo(_dtype(model, layer.name)).bits >= 32 else _FITS_HALF
        if places[layer.name] != len(layer.inputs) or not moved <= within * size:
            wrong.setdefault(layer.name, "was captured on other inputs")
        if layer.name in wrong:
            raise ValueError(f"layer {layer.name!r} {wrong[layer.name]}; capture anew")
    if captured.traces is not None and captured.traces != tuple(traces):
        _check_activations_again(model, captured, samples)


def _dtype(model: nn.Module, name: str) -> torch.dtype:
    return next(model.get_submodule(name).parameters()).dtype


def _equal(kept: Tensor, now: Tensor) -> bool:
    return kept.shape == now.shape and torch.equal(kept, now.to(kept))


def _check_activations_again(
    model: nn.Module, captured: CapturedLayers, samples: Sequence[Tensor]
) -> None:
    """After a change that a layer is not reached by: whether it is still read as it was."""
    decided = [
        layer
        for layer in captured.layers
        if layer.activation == "relu" and layer.name not in captured.activations_given
    ]
    if not decided:
        return
    with untouched(model) as device:
        records = {layer.name: LayerRecord() for layer in decided}
        for batch in samples:
            try_relu(model, records, (batch.to(device),), {})
    for name, record in records.items():
        if record.refuted:
            raise ValueError(
                f"layer {name!r} was captured with a ReLU behind it, which is not so now; "
                "capture anew"
            )


def _solve_all(
    captured: Iterator[CapturedLayer],
    tolerances: Mapping[str, float],
    solve: Callable[[LayerProblem], SolverResult],
    workers: int,
) -> Iterator[tuple[CapturedLayer, float, SolverResult | ConvergenceError | None]]:
    """Each layer with its relative bound and its solution, in order.

    An error that carries an unfinished result stands in for it; None, for a layer left as it is.
    """
    if workers == 1 or not any(tolerances.values()):
        for layer in captured:
            bound = tolerances[layer.name]
            yield layer, bound, _solve(_problem(layer, bound), solve) if bound else None
        return
    try:
        import joblib
    except ImportError as error:
        raise ImportError(
            f"workers is {workers}, which needs joblib: pip install joblib, or workers=1"
        ) from error
    layers = list(captured)
    threads = max(1, torch.get_num_threads() // workers)
    solutions = joblib.Parallel(n_jobs=workers, backend="loky", return_as="generator")(
        joblib.delayed(_solve_in_worker)(_problem(layer, tolerances[layer.name]), solve, threads)
        for layer in layers
        if tolerances[layer.name]
    )
    for layer in layers:
        bound = tolerances[layer.name]
        yield layer, bound, next(solutions) if bound else None


def _solve_in_cascade(
    captured: Iterator[CapturedLayer],
    tolerances: Mapping[str, float],
    solve: Callable[[LayerProblem], SolverResult],
    model: nn.Module,
    compressed_so_far: Callable[[], nn.Module],
    batches: Iterable[Tensor],
    known: Mapping[str, SolverResult | ConvergenceError | None],
    cascade_bound: str,
) -> Iterator[tuple[CapturedLayer, float, SolverResult | ConvergenceError | None]]:
    """As `_solve_all`, each layer on the inputs that the compressed layers before it give.

    `known` has solutions on the original inputs, for the first layer.
    """
    original_inputs = True
    captured = _with_routes(model, list(captured), batches)
    for index, layer in enumerate(captured):
        later = [each.name for each in captured[index:] if tolerances[each.name]]
        if (
            layer.name in later
            and called_several_times(layer.route)
            and reaches(model, later, layer.name, list(checked(batches)))
        ):
            raise ValueError(
                f"layer {layer.name!r} is called several times in a pass, and what it is given "
                "then depends on how it, or a layer after it, is compressed; use order='parallel'"
            )
    for layer in captured:
        bound = tolerances[layer.name]
        if not bound:
            yield layer, bound, None
            continue
        if not original_inputs:
            layer = _with_inputs_of(compressed_so_far(), layer, batches)
            inherited = _CASCADE_SLACK * _error_of_original(layer)
            bound = inherited if cascade_bound == "inherited" else max(bound, inherited)
            if not bound:  # nothing before it has changed
                yield layer, bound, None
                continue
        if original_inputs and layer.name in known:
            yield layer, bound, known[layer.name]
        else:
            problem = dataclasses.replace(_problem(layer, bound), original_inputs=original_inputs)
            yield layer, bound, _solve(problem, solve)
        original_inputs = False


def _solve_backwards(
    model: nn.Module,
    captured: list[CapturedLayer],
    tolerances: Mapping[str, float],
    solve: Callable[[LayerProblem], SolverResult],
    batches: Sequence[Tensor],
) -> tuple[list[CapturedLayer], dict[str, SolverResult | ConvergenceError | None]]:
    """Solve layers from the last to the first, each for the outputs that the next one uses.

    On the original network's activations. Returns the layers, targets that are not used being
    zero, and the solutions by name.
    """
    layers, solutions = [], {}
    following = None
    for layer in reversed(captured):
        if following is not None and is_all_that_reads(model, following, layer, batches):
            layer = _with_targets(layer, layer.targets * _used_inputs(following, solutions))
        bound = tolerances[layer.name]
        solutions[layer.name] = _solve(_problem(layer, bound), solve) if bound else None
        layers.insert(0, layer)
        following = layer
    return layers, solutions


def is_all_that_reads(
    model: nn.Module, following: CapturedLayer, layer: CapturedLayer, batches: Sequence[Tensor]
) -> bool:
    """Whether one layer has another's outputs for its inputs, as they are, and nothing else does.

    On all calibration samples, see `ddlr.capture.feeds_only`. The answer is kept with the layer,
    since a captured layer is of one network.
    """
    known = vars(layer).setdefault("sole_readers", {})
    if following.name not in known:
        known[following.name] = _is_input_of(layer, following) and feeds_only(
            model, layer.name, following.name, batches
        )
    return known[following.name]


def _used_inputs(layer: CapturedLayer, solutions: Mapping) -> Tensor:
    """Which of a layer's inputs its solved weight is not zero for."""
    solved = _solution(solutions[layer.name])
    if solved is None:
        return layer.live_in
    used = torch.zeros_like(layer.live_in)
    used[layer.live_in] = (solved.weight != 0).any(dim=0)
    return used


def _solution(solved: SolverResult | ConvergenceError | None) -> SolverResult | None:
    return solved.result if isinstance(solved, ConvergenceError) else solved


def _with_targets(layer: CapturedLayer, targets: Tensor) -> CapturedLayer:
    changed = dataclasses.replace(layer, targets=targets, whole_targets=layer.targets)
    vars(changed)["live_inputs"] = layer.live_inputs  # the inputs are the same
    return changed


def _on_used_inputs(
    layer: CapturedLayer, solved: SolverResult | ConvergenceError | None, ridge: float
) -> CapturedLayer:
    """The layer with the weight of its live outputs regressed on the inputs that are used."""
    result = _solution(solved)
    if result is None:
        return layer
    used = (result.weight != 0).any(dim=0).nonzero()[:, 0]
    start = WarmStart(layer.weight[:, layer.live_in], layer.bias)
    regressed = regress_onto(layer.live_inputs, used, start, ridge)
    weight = torch.zeros_like(layer.weight)
    weight[:, layer.live_in.nonzero()[:, 0][used]] = regressed.weight
    weight *= layer.live_out[:, None]
    changed = dataclasses.replace(layer, weight=weight, bias=regressed.bias * layer.live_out)
    vars(changed)["live_inputs"] = layer.live_inputs
    return changed


def _with_routes(
    model: nn.Module, captured: Sequence[CapturedLayer], batches: Iterable[Tensor]
) -> list[CapturedLayer]:
    """The layers with their routes in the original network, by a pass where they are not known."""
    if all(layer.route is not None for layer in captured):
        return list(captured)
    names = [layer.name for layer in captured]
    with noting_routes(model, names) as routes, untouched(model) as device:
        for batch in checked(batches):
            with routes.batch():
                model(batch.to(device, copy=True))
    known = []
    for layer in captured:
        known.append(dataclasses.replace(layer, route=routes.to(layer.name)))
        vars(known[-1])["live_inputs"] = layer.live_inputs  # the inputs are the same
    return known


def _with_inputs_of(
    model: nn.Module, layer: CapturedLayer, batches: Iterable[Tensor]
) -> CapturedLayer:
    """The layer with the inputs that another network gives it.

    Raises
    ------
    ValueError
        If they are not of the same samples, row by row.
    """
    names = [layer.name]
    with (
        capture(model, names, decide=False) as records,
        noting_routes(model, names) as routes,
        untouched(model) as device,
    ):
        for batch in checked(batches):
            with routes.batch():
                model(batch.to(device, copy=True))
    record = records[layer.name]
    inputs = record.inputs.to(layer.inputs.dtype) if record.called else layer.inputs[:0]
    route = routes.to(layer.name)
    if len(inputs) != len(layer.inputs) or layer.route not in (None, route):
        raise ValueError(
            f"layer {layer.name!r} is given other samples, or in another order, once layers before "
            "it are compressed (as in a mixture of experts); use order='parallel'"
        )
    return dataclasses.replace(layer, inputs=inputs)


@torch.no_grad()
def _error_of_original(layer: CapturedLayer) -> float:
    """Norm of the original weights' deviation on the layer's inputs, relative to its targets."""
    outputs = OutputSet(layer.targets, 0.0, layer.activation, "hinge")
    produced = torch.addmm(layer.bias, layer.inputs, layer.weight.T)
    return outputs.violation(produced)


def _solve(
    problem: LayerProblem, solve: Callable[[LayerProblem], SolverResult]
) -> SolverResult | ConvergenceError:
    try:
        return solve(problem)
    except ConvergenceError as error:
        return error


def _solve_in_worker(
    problem: LayerProblem, solve: Callable[[LayerProblem], SolverResult], threads: int
) -> SolverResult | ConvergenceError:
    torch.set_num_threads(threads)
    return _solve(problem, solve)


def _problem(layer: CapturedLayer, relative_tolerance: float) -> LayerProblem:
    live_in, live_out = layer.live_in, layer.live_out
    return LayerProblem(
        layer.live_inputs,
        layer.targets[:, live_out],
        relative_tolerance * torch.linalg.vector_norm(layer.targets).item(),
        layer.activation,
        layer.weight[live_out][:, live_in],
        layer.bias[live_out],
    )


def _stored(
    original: nn.Linear,
    captured: CapturedLayer,
    solved: SolverResult | None,
    store: Callable[[Tensor, Tensor], nn.Module | None],
) -> nn.Module:
    """The layer that takes the original's place: the solved one where that is smaller."""
    if solved is None and not captured.dropped:
        return original
    live_in, live_out = captured.live_in, captured.live_out
    layer = None
    if solved is not None:
        bias = _embed(solved.bias[:, None], live_out)[:, 0]
        layer = store(_embed(solved.weight, live_out, live_in), bias)
    like = next(original.parameters())
    if layer is None:
        layer = copy.deepcopy(original) if is_plain(original) else _whole(original, captured)
        with torch.no_grad():
            layer.weight.mul_(live_out[:, None] & live_in)
            if layer.bias is not None:
                layer.bias.mul_(live_out)
    return layer.to(like)


def _whole(original: nn.Linear, captured: CapturedLayer) -> nn.Linear:
    """The layer with a weight of its own, where it computes it from others."""
    bias = None if original.bias is None else captured.bias
    return store_linear(captured.weight, bias).to(next(original.parameters()))


def _measure(
    layer: nn.Module,
    captured: CapturedLayer,
    relative_tolerance: float,
    relative_bound: float,
    solved: SolverResult | None,
) -> MeasuredLayer:
    """Measure the layer as it is stored. Without a solve the layer is the original one."""
    original = captured.targets if captured.whole_targets is None else captured.whole_targets
    return MeasuredLayer(
        captured.name,
        captured.activation,
        float(relative_tolerance),
        float(relative_bound),
        solved,
        layer_errors(layer, captured.inputs, captured.targets, original, captured.activation),
        captured.live_in,
    )


@torch.no_grad()
def measured_again(result: CompressionResult, captured: CapturedLayers) -> CompressionResult:
    """The errors and violations of a result whose layers have moved, at the sizes they had."""
    layers = {layer.name: layer for layer in captured.layers}
    reports = []
    for report in result.layers:
        layer = layers[report.name]
        if result.order == "cascade" and reports:
            layer = _with_inputs_of(result.model, layer, captured.batches)
        stored = result.model.get_submodule(report.name)
        unread = result.unread.get(report.name, torch.zeros_like(layer.live_out))
        if result.drops_unused:
            layer = _with_targets(layer, layer.targets * ~unread)
        found = _measure(stored, layer, report.relative_tolerance, report.relative_bound, None)
        measures = found.errors.measures(unread, report.relative_bound)
        reports.append(dataclasses.replace(report, **measures))
    return dataclasses.replace(result, layers=tuple(reports))


def _linear_layers(model: nn.Module, layers: Sequence[str] | None) -> list[str]:
    """Names of the model's linear layers, or those that are given, each module under one name."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if layers is None:
        if not linear:
            raise ValueError("the model has no nn.Linear layer to compress")
        return linear
    layers = _distinct(layers)
    if not layers:
        raise ValueError("layers is empty; name at least one layer, or leave it out for all")
    first_names = {module: name for name, module in model.named_modules()}
    modules = dict(model.named_modules(remove_duplicate=False))
    names = []
    for name in layers:
        if not isinstance(modules.get(name), nn.Linear):
            raise ValueError(f"layer {name!r} is not an nn.Linear of the model: {linear}")
        names.append(first_names[modules[name]])
        if names.index(names[-1]) < len(names) - 1:
            raise ValueError(
                f"layers has {layers[names.index(names[-1])]!r} and {name!r}, which are one layer "
                "under two names; give one of them"
            )
    return names


def _distinct(layers: Sequence[str]) -> list[str]:
    """Names of layers, after a check that they are a sequence of different names."""
    if isinstance(layers, str):
        raise ValueError(f"layers is {layers!r}; it must be a sequence of names: [{layers!r}]")
    try:
        layers = list(layers)
    except TypeError:
        raise ValueError(f"layers is {layers!r}; it must be a sequence of names") from None
    for index, name in enumerate(layers):
        if not isinstance(name, str):
            raise ValueError(f"layers has {name!r}; it must have names of layers, as strings")
        if name in layers[:index]:
            raise ValueError(f"layers has {name!r} twice; name each layer once")
    return layers


def _check_activations(activations: Mapping[str, str], names: Sequence[str]) -> None:
    for name, activation in activations.items():
        if name not in names:
            raise ValueError(f"activations names layer {name!r}, which is not among {names}")
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activations[{name!r}] is {activation!r}; choose one of {ACTIVATIONS}"
            )


@torch.no_grad()
def _check_weights(model: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        for kind, values in model.get_submodule(name).named_parameters():
            bad = int((~values.isfinite()).sum())
            if bad:
                raise ValueError(f"layer {name!r}: its {kind} has {bad} values that are not finite")


def _live(activations: Tensor) -> Tensor:
    """Which features are not zero on every sample; the first one at least."""
    live = (activations != 0).any(dim=0)
    live[0] |= ~live.any()
    return live


def _embed(block: Tensor, rows: Tensor, columns: Tensor | None = None) -> Tensor:
    """Put a block back among the rows and columns that were removed, which become zero."""
    full = block.new_zeros(len(rows), block.shape[1] if columns is None else len(columns))
    if columns is None:
        full[rows] = block
    else:
        full[rows.nonzero(), columns.nonzero()[:, 0]] = block
    return full
