"""The one walk over a network's layers: capture, solve, replace, report."""

import copy
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ddlr.admm import CentredInputs, WarmStart, check_problem
from ddlr.arguments import as_number, as_whole_number
from ddlr.capture import LayerRecord, capture, feeds_only, run_batches
from ddlr.constraints import ACTIVATIONS, OutputSet
from ddlr.input_selection import regress_onto
from ddlr.layers import gives_outputs, layer_size, numerical_rank, replace_layer
from ddlr.reduced_rank import RIDGE
from ddlr.result import (
    CompressionResult,
    ConvergenceError,
    LayerReport,
    SolverResult,
    SolverStatus,
)

log = logging.getLogger(__name__)

REFITS = ("none", "fixed", "network")
ORDERS = ("parallel", "cascade")

_CALIBRATION_BATCH = 1000
# Of the error that the original weights make on compressed inputs; as in Net-Trim's cascade.
_CASCADE_SLACK = math.sqrt(1.1)


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
    """

    name: str
    inputs: Tensor
    targets: Tensor
    activation: str
    weight: Tensor
    bias: Tensor
    whole_targets: Tensor | None = None

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
    batches : tuple of Tensor
        The network inputs they were captured on.
    """

    layers: tuple[CapturedLayer, ...]
    batches: tuple[Tensor, ...]

    def only(self, names: Sequence[str]) -> "CapturedLayers":
        """The same of some of the layers."""
        known = {layer.name: layer for layer in self.layers}
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"layer {unknown[0]!r} was not captured; captured are {list(known)}")
        return CapturedLayers(tuple(known[name] for name in names), self.batches)


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

    On compressed inputs the set `net_trim` may be empty, while `hinge` always holds the original
    weight: there it takes the place of `net_trim`, with the same guarantee.

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

    Parameters and errors are those of `ddlr.compress`.
    """
    batches = _batches(calibration)
    captured = CapturedLayers(tuple(_capture(model, batches, layers, activations)), batches)
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
) -> CompressionResult:
    """Compress linear layers of a network one by one.

    In parallel order each layer is solved on the original network's activations. In cascade order
    it sees the compressed layers before it, and aims at the original output all the same; its
    bound then is the larger of ``relative_tolerance * ||output||_F`` and sqrt(1.1) times the error
    that its original weights make on those inputs (Aghasi et al. 2020, arXiv 1806.06457).

    Inputs and outputs that are zero on every calibration sample are removed before a layer is
    solved: their weights become 0. A relative tolerance of 0 keeps a layer as it is.

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
        Names of `nn.Linear` modules. All of them by default.
    activations : mapping, optional
        "relu" or "none" by layer name, where `ddlr.capture` should not decide.
    order : {"parallel", "cascade"}
        For "cascade" the layers must be given in the order in which the network calls them.
    raise_on_failure : bool
        Whether a solve that does not converge raises, or is used as it is and shows in the report.
    workers : int
        Processes that solve layers side by side; they share this process's number of threads. At
        the same number of threads a solve the result is the same.
    on_layer : callable, optional
        Is called with each layer's report as soon as it is there.
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
        If an argument makes no problem; names the layer and the value.
    ConvergenceError
        If a solve does not converge; names the layer.
    ImportError
        If `workers` is more than 1 and joblib is not installed.
    """
    workers = as_whole_number(workers, "workers", lowest=1)
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}; choose one of {ORDERS}")
    if order == "cascade" and workers > 1:
        raise ValueError(
            f"workers is {workers}, but in cascade order a layer waits for those before it; "
            "set workers to 1, or order to 'parallel'"
        )
    if drop_unused and workers > 1:
        raise ValueError(f"workers is {workers}, but here a layer waits for the next; set it to 1")
    if isinstance(calibration, CapturedLayers):
        batches = calibration.batches
        selected = _select(model, calibration, layers, activations)
        tolerances = _tolerances(relative_tolerance, [layer.name for layer in selected])
        captured = iter(selected)
    else:
        tolerances = _tolerances(relative_tolerance, _linear_layers(model, layers))
        again = order == "cascade" or drop_unused
        batches = _batches(calibration) if again else calibration
        captured = _capture(model, batches, layers, activations)

    compressed = copy.deepcopy(model)
    reports = []
    known = {}
    if drop_unused:
        captured, known = _solve_backwards(model, list(captured), tolerances, solve, batches)
    if order == "cascade":
        if drop_unused:
            captured = (_on_used_inputs(layer, known[layer.name], ridge) for layer in captured)
        solutions = _solve_in_cascade(
            *(captured, tolerances, solve, lambda: compressed, batches, known)
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
        report = _report(replacement, layer, bound, solved)
        compressed = replace_layer(compressed, layer.name, replacement)
        reports.append(report)
        log.info(
            "%s: %s, %d of %d weights, error %.4f, gap %.1e, violation %.1e, %d iterations, %.1f s",
            *(layer.name, report.form, report.parameters_kept, report.parameters_dense),
            *(report.relative_error, report.relative_gap, report.violation),
            *(report.iterations, report.seconds),
        )
        if on_layer is not None:
            on_layer(report)
    return CompressionResult(compressed, tuple(reports), order=order, drops_unused=drop_unused)


def _tolerances(
    relative_tolerance: float | Mapping[str, float], names: Sequence[str]
) -> dict[str, float]:
    """The bound of each layer by its name."""
    if not isinstance(relative_tolerance, Mapping):
        given = {"relative_tolerance": relative_tolerance}
        tolerances = dict.fromkeys(names, relative_tolerance)
    else:
        given = {f"relative_tolerance[{name!r}]": x for name, x in relative_tolerance.items()}
        tolerances = relative_tolerance
    if set(tolerances) != set(names):
        raise ValueError(
            f"relative_tolerance is for {sorted(tolerances)}; it must have a number for each of "
            f"the layers {list(names)}"
        )
    for what, value in given.items():
        as_number(value, what)
    return {name: float(tolerances[name]) for name in names}


def _batches(calibration: Tensor | Iterable[Tensor]) -> tuple[Tensor, ...]:
    if isinstance(calibration, Tensor):
        calibration = calibration.split(_CALIBRATION_BATCH)
    return tuple(calibration)


def _capture(
    model: nn.Module,
    calibration: Tensor | Iterable[Tensor],
    layers: Sequence[str] | None,
    activations: Mapping[str, str] | None,
) -> Iterator[CapturedLayer]:
    """Run the network, then give its layers one at a time, so that each can be let go of."""
    names = _linear_layers(model, layers)
    activations = dict(activations or {})
    _check_activations(activations, names)
    _check_weights(model, names)
    if isinstance(calibration, Tensor):
        calibration = _batches(calibration)
    with capture(model, names) as records:
        run_batches(model, calibration)
    for name in names:
        record = records.pop(name)
        if not record.called:
            raise ValueError(f"layer {name!r} was not called; leave it out of layers")
        activation = activations.get(name, record.activation)
        yield _captured_layer(name, model.get_submodule(name), record, activation)


def _captured_layer(
    name: str, layer: nn.Linear, record: LayerRecord, activation: str
) -> CapturedLayer:
    # Half precision is for inference; the solve needs more.
    dtype = torch.promote_types(record.inputs.dtype, torch.float32)
    inputs, targets = record.inputs.to(dtype), record.outputs.to(dtype)
    if activation == "relu":
        targets = targets.relu()
    try:
        check_problem(inputs, targets, tolerance=1.0, max_iterations=1)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error
    weight, bias = _weight_and_bias(layer)
    return CapturedLayer(name, inputs, targets, activation, weight.to(dtype), bias.to(dtype))


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
    names = [layer.name for layer in captured.layers] if layers is None else list(layers)
    selected = list(captured.only(_linear_layers(model, names)).layers)
    for layer in selected:
        for kept, now in zip(
            (layer.weight, layer.bias),
            _weight_and_bias(model.get_submodule(layer.name)),
            strict=True,
        ):
            if not torch.equal(kept, now.to(kept)):
                raise ValueError(
                    f"layer {layer.name!r} was captured with other weights; capture anew"
                )
    return selected


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
    compressed_so_far: Callable[[], nn.Module],
    batches: Iterable[Tensor],
    known: Mapping[str, SolverResult | ConvergenceError | None],
) -> Iterator[tuple[CapturedLayer, float, SolverResult | ConvergenceError | None]]:
    """As `_solve_all`, each layer on the inputs that the compressed layers before it give.

    `known` has solutions on the original inputs, for the first layer.
    """
    original_inputs = True
    for layer in captured:
        bound = tolerances[layer.name]
        if not bound:
            yield layer, bound, None
            continue
        if not original_inputs:
            layer = _with_inputs_of(compressed_so_far(), layer, batches)
            bound = max(bound, _CASCADE_SLACK * _error_of_original(layer))
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

    On the calibration samples, see `ddlr.capture.feeds_only`.
    """
    inputs = following.inputs
    if not (layer.targets.shape == inputs.shape and torch.equal(layer.targets, inputs)):
        return False
    batch = next(each for each in batches if len(each))
    return feeds_only(model, layer.name, following.name, batch)


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


def _with_inputs_of(
    model: nn.Module, layer: CapturedLayer, batches: Iterable[Tensor]
) -> CapturedLayer:
    with capture(model, [layer.name]) as records:
        run_batches(model, batches)
    inputs = records[layer.name].inputs.to(layer.inputs.dtype)
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
    if layer is None:
        layer = copy.deepcopy(original)
        with torch.no_grad():
            layer.weight.mul_(live_out[:, None] & live_in)
            if layer.bias is not None:
                layer.bias.mul_(live_out)
    return layer.to(original.weight)


@torch.no_grad()
def _report(
    layer: nn.Module,
    captured: CapturedLayer,
    relative_tolerance: float,
    solved: SolverResult | None,
) -> LayerReport:
    """Measure the layer as it is stored. Without a solve the layer is the original one."""
    error, violation = _errors(layer, captured, relative_tolerance)
    size = layer_size(layer)
    return LayerReport(
        name=captured.name,
        in_features=layer.in_features,
        out_features=layer.out_features,
        activation=captured.activation,
        form=size.form,
        rank=numerical_rank(layer.weight),
        nonzeros=int((layer.weight != 0).sum()),
        parameters_kept=size.parameters,
        parameters_dense=layer.in_features * layer.out_features,
        bytes_stored=size.bytes,
        relative_error=error,
        relative_tolerance=float(relative_tolerance),
        violation=violation if solved else 0.0,
        status=solved.status if solved else SolverStatus.UNCHANGED,
        relative_gap=solved.relative_gap if solved else math.nan,
        iterations=solved.iterations if solved else 0,
        seconds=solved.seconds if solved else 0.0,
        outputs_dropped=captured.dropped,
        inputs_dropped=int((captured.live_in & ~(layer.weight != 0).any(dim=0)).sum()),
    )


def _errors(
    layer: nn.Module, captured: CapturedLayer, relative_tolerance: float
) -> tuple[float, float]:
    """The relative error of a layer's output, and by how much ||D||_F exceeds its bound."""
    inputs, targets = captured.inputs, captured.targets
    norm = torch.linalg.vector_norm(targets).item()
    outputs = OutputSet(targets, relative_tolerance * norm, captured.activation, "hinge")
    produced = layer(inputs.to(layer.weight)).to(inputs.dtype)
    final = produced.relu() if captured.activation == "relu" else produced
    error = torch.linalg.vector_norm(final - targets).item()
    return error / norm if norm else error, outputs.violation(produced)


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
        if report.outputs_dropped:
            layer = _with_targets(layer, layer.targets * gives_outputs(stored))
        error, violation = _errors(stored, layer, report.relative_tolerance)
        reports.append(dataclasses.replace(report, relative_error=error, violation=violation))
    return dataclasses.replace(result, layers=tuple(reports))


def _linear_layers(model: nn.Module, layers: Sequence[str] | None) -> list[str]:
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if layers is None:
        if not linear:
            raise ValueError("the model has no nn.Linear layer to compress")
        return linear
    for name in layers:
        if name not in linear:
            raise ValueError(f"layer {name!r} is not an nn.Linear of the model: {linear}")
    return list(layers)


def _check_activations(activations: Mapping[str, str], names: Sequence[str]) -> None:
    for name, activation in activations.items():
        if name not in names:
            raise ValueError(f"activations names layer {name!r}, which is not among {names}")
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activations[{name!r}] is {activation!r}; choose one of {ACTIVATIONS}"
            )


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
