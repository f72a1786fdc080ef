"""Net-Trim for whole networks: network in, pruned copy and reports out."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ddlr.arguments import one_of
from ddlr.calls import Forward, Samples
from ddlr.compression import LOWEST_RANK
from ddlr.goals import goal_of
from ddlr.layers import store_linear
from ddlr.method import LayerProblem, Method
from ddlr.network import Settings, compress_network
from ddlr.outputs import Output
from ddlr.reduced_rank import RIDGE
from ddlr.result import CompressionResult, LayerReport, SolverResult
from ddlr.selection import Layers
from nettrim.nonzeros import fewest_nonzeros, refit_fewest
from nettrim.smallest import PARTS, refit_smallest, smallest_layer, store_smallest
from nettrim.sparse import refit_sparse, solve_sparse


def prune(
    model: nn.Module,
    calibration: Any,
    *,
    relative_tolerance: float | Mapping[str, float] | None = None,
    method: str = "l1",
    constraint: str | None = None,
    penalise_bias: bool = False,
    selection: float | None = None,
    minimise: str | None = None,
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
    """Make the fully connected layers of a trained network sparse, without retraining.

    Each `nn.Linear` is solved on its own, by `nettrim.solve_sparse`, `nettrim.fewest_nonzeros` or
    `nettrim.smallest_layer` with the bound ``relative_tolerance * ||its output||_F``, and replaced
    by an `nn.Linear` with that weight; or by a `ddlr.LowRankLinear`, `ddlr.SparsePlusLowRank` or
    `ddlr.SparseFactors` where the last finds one.

    Parameters, return value and errors are those of `ddlr.compress`. Different, or beside them:

    Parameters
    ----------
    method : {"l1", "fewest_nonzeros", "smallest"}
        "l1" is the convex program of Net-Trim, with a certificate; "fewest_nonzeros" looks for the
        sparsest layer itself, see `nettrim.fewest_nonzeros`. It goes from the last layer backwards,
        and leaves out inputs where that frees the layer before from outputs, of which nothing is
        promised then. "smallest" gives each layer that form, sparse, of low rank on some of its
        inputs, a sum of both, or a product of two sparse matrices, that is the smallest one, see
        `nettrim.smallest_layer`; a convolution, which can not leave out single inputs, gets the
        lowest rank.
    selection : float, optional
        Of "fewest_nonzeros" and "smallest": the share of each squared bound that goes into such
        inputs.
    minimise : {"parameters", "bytes", "latency"}, optional
        Of "smallest": what is to be small, the weights stored unless given.
    refit : {"none", "layer", "network"}
        "layer" moves each solved weight to a smaller output error: of "l1" on its support, see
        `nettrim.refit_sparse`, and of "fewest_nonzeros" with as many nonzeros, see
        `nettrim.refit_nonzeros`; of "smallest" in the form it has. "network" then trains all that
        is stored together towards the original outputs, without labels. See `ddlr.refit_network`.
    penalise_bias : bool
        Whether the bias counts in the l1 norm, as a further column of the weight. So it does in
        Net-Trim's own code; here it is free unless asked for.

    References
    ----------
    Aghasi, Abdi, Nguyen and Romberg (2017), Net-Trim, NIPS; Aghasi, Abdi and Romberg (2020),
    arXiv 1806.06457: the parallel and the cascade scheme.
    """
    chosen = METHODS[one_of(method, "method", tuple(METHODS))].with_options(
        constraint=constraint,
        penalise_bias=penalise_bias or None,
        selection=selection,
        minimise=minimise,
    )
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


def refit_support(
    problem: LayerProblem, solved: SolverResult, *, ridge: float
) -> tuple[Tensor, Tensor]:
    """The best weight on the support of a solved one, see `nettrim.refit_sparse`."""
    return refit_sparse(
        problem.inputs,
        problem.targets,
        solved.weight,
        solved.bias,
        activation=problem.activation,
        ridge=ridge,
    )


L1 = Method(
    name="nettrim",
    solver=solve_sparse,
    options={
        "constraint": "nettrim",
        "penalise_bias": False,
        "tolerance": 1e-2,
        "max_iterations": 5000,
    },
    # On compressed inputs the set `nettrim` may be empty; `hinge` always holds the original weight.
    on_compressed_inputs={"constraint": "hinge"},
    refit=refit_support,
    refit_options={"ridge": RIDGE},
    store=store_linear,
)
FEWEST_NONZEROS = Method(
    name="fewest_nonzeros",
    solver=fewest_nonzeros,
    options={"ridge": RIDGE, "selection": 0.5},
    refit=refit_fewest,
    refit_options={"ridge": RIDGE},
    store=store_linear,
    drops_unread=True,
    freeing_nothing={"selection": 0.0},
)
SMALLEST = Method(
    name="smallest",
    solver=smallest_layer,
    options={"ridge": RIDGE, "selection": 0.5, "minimise": "parameters"},
    refit=refit_smallest,
    refit_options={"ridge": RIDGE},
    store=store_smallest,
    parts=PARTS,
    drops_unread=True,
    freeing_nothing={"selection": 0.0},
    in_parts=True,
    on_patches=LOWEST_RANK,
)
METHODS = {"l1": L1, "fewest_nonzeros": FEWEST_NONZEROS, "smallest": SMALLEST}
