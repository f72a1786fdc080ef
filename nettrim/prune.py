"""Net-Trim for whole networks: network in, pruned copy and reports out."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from ddlr.arguments import as_number, as_whole_number
from ddlr.compress import check_refit
from ddlr.layers import store_linear
from ddlr.layerwise import (
    CapturedLayers,
    LayerProblem,
    LayerSolver,
    capture_layers,
    compress_layers,
)
from ddlr.network_refit import refit_result
from ddlr.outputs import Output, check_output, check_trainable
from ddlr.reduced_rank import RIDGE, check_ridge
from ddlr.result import CompressionResult, LayerReport, SolverResult
from nettrim.sparse import refit_sparse, solve_sparse


def prune(
    model: nn.Module,
    calibration: Tensor | Iterable[Tensor] | CapturedLayers,
    *,
    relative_tolerance: float | Mapping[str, float],
    constraint: str = "nettrim",
    refit: str = "none",
    output: Output | None = None,
    order: str = "parallel",
    cascade_bound: str = "tolerance",
    penalise_bias: bool = False,
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
    """Make the fully connected layers of a trained network sparse, without retraining.

    Each `nn.Linear` is solved on its own, by `nettrim.solve_sparse` with the bound
    ``relative_tolerance * ||its output||_F``, and replaced by an `nn.Linear` with that weight.

    Parameters, return value and errors are those of `ddlr.compress`, and

    refit : {"none", "layer", "network"}
        "layer" moves each solved weight, on its support, to a smaller output error. See
        `nettrim.refit_sparse`. "network" then trains all nonzeros together towards the original
        outputs, without labels. See `ddlr.refit_network`.
    output : {"classes", "binary", "values"} or callable, optional
        What the network's outputs are; the refit "network" needs it.
    penalise_bias : bool
        Whether the bias counts in the l1 norm, as a further column of the weight. So it does in
        Net-Trim's own code; here it is free unless asked for.
    ridge : float
        Of the refits, see `nettrim.refit_sparse`.

    References
    ----------
    Aghasi, Abdi, Nguyen and Romberg (2017), Net-Trim, NIPS; Aghasi, Abdi and Romberg (2020),
    arXiv 1806.06457: the parallel and the cascade scheme.
    """
    check_refit(refit)
    check_output(output)
    ridge = check_ridge(ridge)
    tolerance = as_number(tolerance, "tolerance", positive=True)
    max_iterations = as_whole_number(max_iterations, "max_iterations", lowest=1)
    if refit == "network":
        check_trainable(output)
        if not isinstance(calibration, CapturedLayers):
            calibration = capture_layers(model, calibration, layers=layers, activations=activations)
            activations = None
        layer_by_layer = prune(
            *(model, calibration),
            relative_tolerance=relative_tolerance,
            constraint=constraint,
            refit="layer",
            order=order,
            cascade_bound=cascade_bound,
            penalise_bias=penalise_bias,
            ridge=ridge,
            layers=layers,
            activations=activations,
            tolerance=tolerance,
            max_iterations=max_iterations,
            raise_on_failure=raise_on_failure,
            workers=workers,
            on_layer=on_layer,
            memory=memory,
        )
        return refit_result(model, layer_by_layer, calibration, output=output)
    options = {"constraint": constraint, "tolerance": tolerance, "max_iterations": max_iterations}
    if penalise_bias:
        options["penalise_bias"] = True
    refit_weight = partial(_refit, ridge=ridge) if refit == "layer" else None
    solve = LayerSolver(solve_sparse, options, refit=refit_weight, memory=memory)
    return compress_layers(
        model,
        calibration,
        relative_tolerance=relative_tolerance,
        solve=solve,
        store=store_linear,
        layers=layers,
        activations=activations,
        order=order,
        cascade_bound=cascade_bound,
        raise_on_failure=raise_on_failure,
        workers=workers,
        on_layer=on_layer,
    )


def _refit(problem: LayerProblem, solved: SolverResult, ridge: float) -> tuple[Tensor, Tensor]:
    return refit_sparse(
        problem.inputs,
        problem.targets,
        solved.weight,
        solved.bias,
        activation=problem.activation,
        ridge=ridge,
    )
