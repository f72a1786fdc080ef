"""The one walk over a network's layers: capture, solve, replace, report."""

import copy
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddlr.admm import WarmStart, check_problem
from ddlr.capture import LayerRecord, capture, run_batches
from ddlr.constraints import ACTIVATIONS, OutputSet
from ddlr.layers import layer_size, numerical_rank
from ddlr.result import (
    CompressionResult,
    ConvergenceError,
    LayerReport,
    SolverResult,
    SolverStatus,
)

log = logging.getLogger(__name__)

_CALIBRATION_BATCH = 1000


@dataclass(frozen=True)
class LayerProblem:
    """One layer to be solved: its live inputs and outputs, and the original weight for a start."""

    inputs: Tensor
    targets: Tensor
    radius: float
    activation: str
    weight: Tensor
    bias: Tensor


def start_from_original(solver: Callable[..., SolverResult], **options) -> Callable:
    """A layer solver for `compress_layers`: `solver` with options, begun at the original weight."""

    def solve(problem: LayerProblem) -> SolverResult:
        return solver(
            problem.inputs,
            problem.targets,
            problem.radius,
            activation=problem.activation,
            warm_start=WarmStart(problem.weight, problem.bias),
            **options,
        )

    return solve


def compress_layers(
    model: nn.Module,
    calibration: Tensor | Iterable[Tensor],
    *,
    relative_tolerance: float,
    solve: Callable[[LayerProblem], SolverResult],
    store: Callable[[Tensor, Tensor], nn.Module | None],
    layers: Sequence[str] | None = None,
    activations: Mapping[str, str] | None = None,
    raise_on_failure: bool = True,
) -> CompressionResult:
    """Compress linear layers of a network one by one, each on the original network's activations.

    Inputs and outputs that are zero on every calibration sample are removed before a layer is
    solved: their weights become 0. A relative tolerance of 0 keeps the layers as they are.

    Parameters
    ----------
    model : nn.Module
        Is left untouched.
    calibration : Tensor or iterable of Tensor
        Network inputs, or batches of them.
    relative_tolerance : float
        Bound on each layer's output error, relative to the Frobenius norm of its output.
    solve : callable
        The method: layer problem to solver result.
    store : callable
        Full weight and bias to the layer that takes the original's place, or None where storing
        the solved weight would not be smaller than the original.
    layers : sequence of str, optional
        Names of `nn.Linear` modules. All of them by default.
    activations : mapping, optional
        "relu" or "none" by layer name, where `ddlr.capture` should not decide.
    raise_on_failure : bool
        Whether a solve that does not converge raises, or is used as it is and shows in the report.

    Raises
    ------
    ValueError
        If an argument makes no problem; names the layer and the value.
    ConvergenceError
        If a solve does not converge; names the layer.
    """
    if not (isinstance(relative_tolerance, int | float) and relative_tolerance >= 0):
        raise ValueError(
            f"relative_tolerance is {relative_tolerance!r}; it must be a number from 0 upwards"
        )
    names = _linear_layers(model, layers)
    activations = dict(activations or {})
    _check_activations(activations, names)
    _check_weights(model, names)
    if isinstance(calibration, Tensor):
        calibration = calibration.split(_CALIBRATION_BATCH)
    with capture(model, names) as records:
        run_batches(model, calibration)

    compressed = copy.deepcopy(model)
    reports = []
    for name in names:
        record = records.pop(name)
        if not record.called:
            raise ValueError(f"layer {name!r} was not called; leave it out of layers")
        activation = activations.get(name, record.activation)
        original = compressed.get_submodule(name)
        layer, report = _compress_layer(
            name, original, record, activation, relative_tolerance, solve, store, raise_on_failure
        )
        compressed = _replace(compressed, name, layer)
        reports.append(report)
        log.info(
            "%s: %s, %d of %d weights, error %.4f, gap %.1e, violation %.1e, %d iterations, %.1f s",
            *(name, report.form, report.parameters_kept, report.parameters_dense),
            *(report.relative_error, report.relative_gap, report.violation),
            *(report.iterations, report.seconds),
        )
    return CompressionResult(compressed, tuple(reports))


def _compress_layer(
    name: str,
    original: nn.Linear,
    record: LayerRecord,
    activation: str,
    relative_tolerance: float,
    solve: Callable[[LayerProblem], SolverResult],
    store: Callable[[Tensor, Tensor], nn.Module | None],
    raise_on_failure: bool,
) -> tuple[nn.Module, LayerReport]:
    # Half precision is for inference; the solve needs more.
    dtype = torch.promote_types(record.inputs.dtype, torch.float32)
    inputs, targets = record.inputs.to(dtype), record.outputs.to(dtype)
    if activation == "relu":
        targets = targets.relu()
    try:
        check_problem(inputs, targets, tolerance=1.0, max_iterations=1)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error
    radius = relative_tolerance * torch.linalg.vector_norm(targets).item()
    outputs = OutputSet(targets, radius, activation, "hinge")

    if relative_tolerance == 0:
        return original, _report(name, original, inputs, outputs, relative_tolerance, None)

    live_in, live_out = _live(inputs), _live(targets)
    bias = original.bias if original.bias is not None else original.weight.new_zeros(len(targets.T))
    weight, bias = original.weight.detach().to(dtype), bias.detach().to(dtype)
    problem = LayerProblem(
        inputs[:, live_in],
        targets[:, live_out],
        radius,
        activation,
        weight[live_out][:, live_in],
        bias[live_out],
    )
    try:
        solved = solve(problem)
    except ConvergenceError as error:
        if raise_on_failure:
            raise ConvergenceError(f"layer {name!r}: {error}", error.result) from error
        log.warning("layer %r: %s", name, error)
        solved = error.result

    layer = store(
        *(_embed(solved.weight, live_out, live_in), _embed(solved.bias[:, None], live_out)[:, 0])
    )
    if layer is None:
        layer = copy.deepcopy(original)
        with torch.no_grad():
            layer.weight.mul_(live_out[:, None] & live_in)
            if layer.bias is not None:
                layer.bias.mul_(live_out)
    layer = layer.to(original.weight)
    return layer, _report(name, layer, inputs, outputs, relative_tolerance, solved)


@torch.no_grad()
def _report(
    name: str,
    layer: nn.Module,
    inputs: Tensor,
    outputs: OutputSet,
    relative_tolerance: float,
    solved: SolverResult | None,
) -> LayerReport:
    """Measure the layer as it is stored. Without a solve the layer is the original one."""
    produced = layer(inputs.to(layer.weight)).to(inputs.dtype)
    final = produced.relu() if outputs.activation == "relu" else produced
    targets_norm = torch.linalg.vector_norm(outputs.targets).item()
    error = torch.linalg.vector_norm(final - outputs.targets).item()
    size = layer_size(layer)
    return LayerReport(
        name=name,
        in_features=layer.in_features,
        out_features=layer.out_features,
        activation=outputs.activation,
        form=size.form,
        rank=numerical_rank(layer.weight),
        nonzeros=int((layer.weight != 0).sum()),
        parameters_kept=size.parameters,
        parameters_dense=layer.in_features * layer.out_features,
        bytes_stored=size.bytes,
        relative_error=error / targets_norm if targets_norm else error,
        relative_tolerance=float(relative_tolerance),
        violation=outputs.violation(produced) if solved else 0.0,
        status=solved.status if solved else SolverStatus.UNCHANGED,
        relative_gap=solved.relative_gap if solved else math.nan,
        iterations=solved.iterations if solved else 0,
        seconds=solved.seconds if solved else 0.0,
    )


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


def _replace(model: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    if not name:
        return layer
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
    return model
