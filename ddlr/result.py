"""What solvers and compressions return, and the error that carries an unfinished result."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from torch import Tensor, nn


class SolverStatus(StrEnum):
    """How a solve ended. The values stand in records and tables."""

    CONVERGED = "converged"
    ITERATION_LIMIT = "iteration_limit"
    UNCHANGED = "unchanged"
    CLOSED_FORM = "closed_form"
    FITTED = "fitted"
    REFITTED = "refitted"

    @property
    def message(self) -> str:
        return {
            SolverStatus.CONVERGED: "the certified gap and the violation are within tolerance",
            SolverStatus.ITERATION_LIMIT: "the iteration limit was reached before the tolerance",
            SolverStatus.UNCHANGED: "nothing was solved: a tolerance of 0 keeps the layer",
            SolverStatus.CLOSED_FORM: "the weight is a closed form within the bound, not certified",
            SolverStatus.FITTED: "the weight is within the bound; a smaller one may be, too",
            SolverStatus.REFITTED: "moved towards the network's outputs; its bound may not hold",
        }[self]


@dataclass(frozen=True)
class SolverResult:
    """A solved layer with its certificate; without one its bound and gap are nan.

    So it is for closed forms, and for `ddlr.lowest_rank` of a layer that ReLU follows.

    Attributes
    ----------
    weight : Tensor, shape (out_features, in_features)
        The exactly low-rank or exactly sparse iterate.
    bias : Tensor, shape (out_features,)
    status : SolverStatus
    iterations : int
    objective : float
        Norm of `weight`; its rank or number of nonzeros where that was minimised.
    lower_bound : float
        Proven lower bound on the optimal objective, from `dual`.
    relative_gap : float
        (objective - lower_bound) / objective; 0 where the objective is 0: how far above the optimum
        the objective is at most. Slightly negative where sign violations of `nettrim` buy an
        objective below the optimum, and then no more so than the `shortfall`.
    shortfall : float
        How far the objective may be below the optimum, relative to it: 0, and proven, where
        `weight` is feasible; for `nettrim` the price of its sign violations, to first order.
    violation : float
        max(0, ||D||_F / radius - 1) of `weight` and `bias`, D the deviation from the output set.
        0 where a solver of `ddlr` or `nettrim` has converged, but for a radius of 0.
    dual : Tensor, shape (samples, out_features)
        Dual variable of the output constraint; `ddlr.certify` repairs and scales it. Empty where
        no norm was minimised.
    seconds : float
    parts : mapping of str to Tensor, optional
        The matrices whose sum `weight` is, "low_rank" and "sparse", where a solver finds both.
    """

    weight: Tensor
    bias: Tensor
    status: SolverStatus
    iterations: int
    objective: float
    lower_bound: float
    relative_gap: float
    violation: float
    dual: Tensor
    seconds: float
    shortfall: float = math.nan
    parts: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class LayerReport:
    """One layer of a compressed network, measured on the calibration samples.

    Attributes
    ----------
    name : str
        The layer's name in ``model.named_modules()``.
    in_features, out_features : int
    activation : {"relu", "none"}
        What follows the layer, as far as the bound is concerned.
    form : {"low_rank", "separable", "sparse", "dense"}
        How the layer is stored. "separable" is two convolutions, k x 1 and 1 x k. "dense" is the
        original weight: no smaller form was found.
    rank : int
        Numerical rank of the stored weight.
    nonzeros : int
        Nonzero entries of the stored weight.
    parameters_kept, parameters_dense : int
        Weights stored, and weights of the original layer; no biases. What is not counted as kept:
        inputs and outputs that are zero on every calibration sample, and what is dead in the
        compressed network, see `ddlr.dead_weights`.
    bytes_stored : int
        See `ddlr.layers.LayerSize`.
    relative_error : float
        ||stored layer's output - original output||_F / ||original output||_F, over all outputs:
        those that were dropped are zero, and count with their whole size.
    relative_tolerance : float
        The bound that was asked for.
    violation : float
        max(0, ||D||_F / radius - 1) of the stored layer, over the outputs that something reads.
    status, relative_gap, iterations, seconds
        They are those of the solve that chose the weight.
    outputs_dropped : int
        Outputs without weights because the next layer has none for them. Nothing is promised of
        them, and nothing reads them.
    inputs_dropped : int
        Inputs that are not always zero and have no weights.
    relative_bound : float
        The bound that was promised, relative to the original output: `relative_tolerance`, or in
        cascade what it was raised to, see `ddlr.compress`.
    relative_error_read : float
        The same over the outputs that something reads, which is what the bound is about. Relative
        to the norm of the original outputs that the bound was given for: all of them, or for
        "fewest_weights" those that the next layer reads.
    shortfall : float
        That of the solve, see `SolverResult`.
    """

    name: str
    in_features: int
    out_features: int
    activation: str
    form: str
    rank: int
    nonzeros: int
    parameters_kept: int
    parameters_dense: int
    bytes_stored: int
    relative_error: float
    relative_tolerance: float
    violation: float
    status: SolverStatus
    relative_gap: float
    iterations: int
    seconds: float
    outputs_dropped: int = 0
    inputs_dropped: int = 0
    relative_bound: float = math.nan
    relative_error_read: float = math.nan
    shortfall: float = math.nan


class SkippedStatus(StrEnum):
    """Why weights were left as they are."""

    NOT_CALLED = "not_called"
    NOT_REPLACEABLE = "not_replaceable"
    PACKED = "packed"


@dataclass(frozen=True)
class SkippedWeights:
    """Weights of a network that were left as they are, though layers like them are compressed.

    Attributes
    ----------
    name : str
        Of the layer, or of the parameter where that is part of something else.
    parameters : int
        How many weights.
    share : float
        Their share of all weights of this kind in the network, compressed or not.
    status : SkippedStatus
        "not_called": no calibration sample reaches the layer. "not_replaceable": something speaks
        against replacing it. "packed": they are part of a module that is no layer by itself, such
        as the projections of `nn.MultiheadAttention` or an `nn.LSTM`.
    reason : str
        In words.
    """

    name: str
    parameters: int
    share: float
    status: SkippedStatus
    reason: str


@dataclass(frozen=True)
class GoalReport:
    """How a network that was compressed to a goal meets it.

    Attributes
    ----------
    name : str
        The goal, as the keyword of `ddlr.Goal`.
    wanted, measured : float
        In its units; measured on calibration or held-out samples, which the search has seen.
    interval : tuple of float, optional
        That holds 99 % of what other samples of as many would measure; of goals on held-out data.
    met : bool
    tried : int
        Networks that were made and measured.
    output_error, output_bound : float
        ||outputs - original outputs||_F / ||original outputs||_F on the calibration inputs, and the
        bound that is proven for it; nan where none is, see `ddlr.output_bound`.
    """

    name: str
    wanted: float
    measured: float
    interval: tuple[float, float] | None
    met: bool
    tried: int
    output_error: float = math.nan
    output_bound: float = math.nan


@dataclass(frozen=True)
class CompressionResult:
    """A compressed copy of a network, and a report on each of its compressed layers.

    `goal` is there if the network was compressed to one. `order` says on which inputs the layers
    were solved and measured: "parallel", the original network's; "cascade", those that the
    compressed layers before them give. `drops_unread` says whether the bounds leave out outputs
    that the next layer does not read. `unread` says by layer which of its outputs nothing reads,
    shape (out_features,): their weights are zero, and bounds are not about them. `skipped` lists
    the weights that were left as they are though layers like them are compressed.
    """

    model: nn.Module
    layers: tuple[LayerReport, ...]
    goal: GoalReport | None = None
    order: str = "parallel"
    drops_unread: bool = False
    unread: Mapping[str, Tensor] = field(default_factory=dict)
    skipped: tuple[SkippedWeights, ...] = ()


class ConvergenceError(RuntimeError):
    """A solve that did not reach its tolerance. `result` holds how far it came."""

    def __init__(self, message: str, result: SolverResult):
        super().__init__(message)
        self.result = result

    def __reduce__(self):
        # An exception is pickled with the arguments of its base class, which lack the result.
        return type(self), (str(self), self.result)
