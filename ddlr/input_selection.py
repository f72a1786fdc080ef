"""Low-rank layers that see only some of their inputs: the fewest weights within a bound."""

import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ddlr.admm import CentredInputs, WarmStart, check_problem, check_warm_start
from ddlr.constraints import OutputSet
from ddlr.layers import fewest_stored
from ddlr.reduced_rank import RIDGE, WITHIN, check_ridge, lowest_rank, lowest_truncation
from ddlr.result import ConvergenceError, SolverResult, SolverStatus

_KEPT_A_STAGE = 0.85
# Beyond this many times the fewest weights so far, a further stage does not come back below them.
_HOPELESS = 1.3


@torch.no_grad()
def fewest_weights(
    inputs: Tensor | CentredInputs,
    targets: Tensor,
    radius: float,
    *,
    activation: str = "relu",
    ridge: float = RIDGE,
    max_iterations: int = 50,
    warm_start: WarmStart | SolverResult | None = None,
) -> SolverResult:
    """Find the layer of low rank, on some of its inputs, that stores the fewest weights.

        minimise  weights(rank(W), inputs used by W)   subject to ||D||_F <= radius,   over W and b

    with weights(r, n) the smaller of r (n + out_features) and n * out_features, and D as in
    `ddlr.lowest_rank`. An input that is hardly needed beside the others, as a pixel beside its
    neighbours, costs a weight in each term of the rank; without it the rank may be a little higher
    and the layer smaller all the same.

    Inputs are left out in stages, see `select_inputs`. On those of the stage with the fewest
    weights `ddlr.lowest_rank` then lowers the rank. Nothing proves that none are fewer, and in rare
    cases the lowest rank on all inputs needs a few less. A stage costs a regression and about two
    of the matrix products X Wt; the search for the lowest rank is made once.

    What the other inputs make up for is learnt from the samples. With few samples for each input
    the error on further ones is well above the radius; more samples help, and cost no labels, and
    so does more ridge, at the price of a larger layer.

    Parameters and errors are those of `ddlr.lowest_rank`. Without a `warm_start` the outputs to
    begin with are the regression of the targets.

    Returns
    -------
    SolverResult
        `objective` is the number of weights; columns of `weight` are zero for inputs that are left
        out. `lower_bound` and `relative_gap` are nan, the status is "fitted".

    References
    ----------
    Hassibi and Stork (1993), optimal brain surgeon, for the order in which inputs go.
    """
    started = time.perf_counter()
    ridge = check_ridge(ridge)
    geometry, outputs = _problem(
        inputs, targets, radius, activation, ridge, warm_start, max_iterations
    )
    stages = [stage for stage, _ in _stages(geometry, outputs, warm_start, ridge)]
    stages[0] = dataclasses.replace(stages[0], start=warm_start)  # as `ddlr.lowest_rank` begins
    # Within the radius in closed form, so the first will do; the others are for rounding.
    for stage in sorted(stages, key=lambda each: each.size):
        try:
            solved, size = _solve_stage(
                *(stage, geometry, targets, radius),
                activation=activation,
                ridge=ridge,
                max_iterations=max_iterations,
            )
            break
        except ConvergenceError:
            if stage is stages[0]:  # on all inputs
                raise
    return _on_all_inputs(
        *(geometry, outputs, warm_start, stage.kept, solved, size),
        status=SolverStatus.FITTED,
        iterations=solved.iterations,
        dual=solved.dual,
        started=started,
    )


@torch.no_grad()
def select_inputs(
    inputs: Tensor | CentredInputs,
    targets: Tensor,
    radius: float,
    *,
    activation: str = "relu",
    ridge: float = RIDGE,
    warm_start: WarmStart | SolverResult | None = None,
) -> SolverResult:
    """Find the layer of `fewest_weights` in closed form, without its search for the lowest rank.

        minimise  weights(rank(W), inputs used by W)   subject to ||D||_F <= radius

    over the activation-aware singular value decompositions on some of the inputs, one for each
    stage. Each stage keeps 85 % of the inputs of the one before it. The others go one by one: that
    input first which matters least to the low-rank outputs once the inputs that are left have made
    up for it, by ||W_j||^2 / ((X^T X)^-1)_jj for input j (as in the optimal brain surgeon). On the
    inputs of a stage the original outputs are regressed, and truncated to the lowest rank within
    the radius. The answer is the truncation of the stage with the fewest weights.

    Parameters are those of `fewest_weights`.

    Returns
    -------
    SolverResult
        `objective` is the number of weights; columns of `weight` are zero for inputs that are left
        out. The `warm_start` itself where nothing smaller is within the radius. `lower_bound` and
        `relative_gap` are nan, the status is "closed_form".

    Raises
    ------
    ValueError
        If an argument makes no problem; names the argument and value.
    ConvergenceError
        If neither a stage nor the `warm_start` is within the radius; carries the truncation.

    References
    ----------
    Hassibi and Stork (1993), optimal brain surgeon, for the order in which inputs go.
    """
    started = time.perf_counter()
    geometry, outputs = _problem(inputs, targets, radius, activation, ridge, warm_start)
    stage, truncated = min(
        _stages(geometry, outputs, warm_start, ridge), key=lambda each: each[0].size
    )
    used = int((truncated.weight != 0).any(dim=0).sum())
    size = fewest_stored(stage.rank, used, targets.shape[1])
    result = _on_all_inputs(
        *(geometry, outputs, warm_start, stage.kept, truncated, size),
        status=SolverStatus.CLOSED_FORM,
        iterations=0,
        dual=targets.new_empty(0),
        started=started,
    )
    if result.violation > WITHIN:
        raise ConvergenceError(
            f"no truncation is within the radius of {radius:g}: on {len(stage.kept)} inputs the "
            f"error is {1 + result.violation:.4g} times that",
            dataclasses.replace(result, status=SolverStatus.ITERATION_LIMIT),
        )
    return result


def _problem(
    inputs: Tensor | CentredInputs,
    targets: Tensor,
    radius: float,
    activation: str,
    ridge: float,
    warm_start: WarmStart | SolverResult | None,
    max_iterations: int = 1,
) -> tuple[CentredInputs, OutputSet]:
    """The inputs and the bound on the outputs, after a check of all that makes the problem."""
    check_ridge(ridge)
    geometry = inputs if isinstance(inputs, CentredInputs) else CentredInputs(inputs)
    check_problem(geometry.inputs, targets, tolerance=1.0, max_iterations=max_iterations)
    outputs = OutputSet(targets, radius, activation, "hinge")
    if warm_start is not None:
        check_warm_start(warm_start, geometry.inputs, targets)
    return geometry, outputs


def _on_all_inputs(
    geometry: CentredInputs,
    outputs: OutputSet,
    warm_start: WarmStart | SolverResult | None,
    kept: Tensor,
    solved: WarmStart | SolverResult,
    size: int,
    *,
    started: float,
    **about,
) -> SolverResult:
    """The result for a weight on some inputs; that of the start where nothing smaller was found."""
    plain = geometry.inputs
    weight, bias = plain.new_zeros(outputs.targets.shape[1], plain.shape[1]), solved.bias
    weight[:, kept] = solved.weight
    violation = outputs.violation(torch.addmm(bias, plain, weight.T))
    if warm_start is not None and (size >= weight.numel() or violation > WITHIN):
        unchanged = outputs.violation(torch.addmm(warm_start.bias, plain, warm_start.weight.T))
        if unchanged <= WITHIN:
            weight, bias, violation = warm_start.weight, warm_start.bias, unchanged
            size = weight.numel()
    return SolverResult(
        weight=weight,
        bias=bias,
        violation=violation,
        objective=float(size),
        lower_bound=math.nan,
        relative_gap=math.nan,
        seconds=time.perf_counter() - started,
        **about,
    )


@dataclass(frozen=True)
class _Stage:
    """Inputs that are left, the original outputs regressed on them, and the closed form's size.

    That is infinite where no rank is within the radius.
    """

    kept: Tensor
    start: WarmStart | SolverResult | None
    rank: int
    size: float


def _solve_stage(
    stage: _Stage,
    geometry: CentredInputs,
    targets: Tensor,
    radius: float,
    **options,
) -> tuple[SolverResult, int]:
    """The lowest rank on the inputs of a stage, and its weights."""
    if len(stage.kept) < geometry.inputs.shape[1]:
        geometry = CentredInputs(geometry.inputs[:, stage.kept])
    solved = lowest_rank(geometry, targets, radius, warm_start=stage.start, **options)
    used = int((solved.weight != 0).any(dim=0).sum())
    return solved, fewest_stored(int(solved.objective), used, targets.shape[1])


def _stages(
    geometry: CentredInputs,
    outputs: OutputSet,
    warm_start: WarmStart | SolverResult | None,
    ridge: float,
) -> Iterator[tuple[_Stage, WarmStart]]:
    """All inputs, then fewer and fewer, while the radius is reached and the size not hopeless.

    Each stage with its closed form, on its inputs.
    """
    start = warm_start or _regression(geometry, outputs.targets)
    gram = _gram(geometry, ridge)
    kept = torch.arange(len(gram), device=gram.device)
    fewest = math.inf
    if not gram.any():  # inputs that do not vary: a bias says it all
        stage = _Stage(kept, WarmStart(start.weight, start.bias), rank=0, size=0.0)
        yield stage, WarmStart(torch.zeros_like(start.weight), outputs.best_constant_output())
        return
    while len(kept):
        here, factor = _regressed(geometry, gram, kept, start)
        truncated, rank, within = _closed_form(geometry, outputs, kept, here, factor)
        size = fewest_stored(rank, len(kept), len(here.weight)) if within else math.inf
        if size == math.inf and fewest < math.inf:
            return
        yield _Stage(kept, here, rank, size), truncated
        fewest = min(fewest, size)
        if size > _HOPELESS * fewest or size == math.inf:
            return
        kept = kept[_that_matter(truncated.weight.double(), torch.cholesky_inverse(factor))]


def _that_matter(weight: Tensor, inverse: Tensor) -> Tensor:
    """The inputs of the next stage: one by one those that matter least go, others make up for them.

    Of a pair of copies the second matters as soon as the first is gone.
    """
    matters = weight.square().sum(dim=0) / inverse.diagonal()
    leaving = len(matters) - int(_KEPT_A_STAGE * len(matters))
    # No other input is near enough to being the least one.
    near = matters.topk(min(3 * leaving, len(matters)), largest=False).indices
    weight, inverse = weight[:, near], inverse[near][:, near]
    stays = torch.ones_like(matters, dtype=torch.bool)
    for _ in range(leaving):
        matters = weight.square().sum(dim=0) / inverse.diagonal()
        least = matters.masked_fill(~stays[near], math.inf).argmin()
        stays[near[least]] = False
        row = inverse[least] / inverse[least, least]
        weight = weight - torch.outer(weight[:, least], row)
        inverse = inverse - torch.outer(inverse[:, least], row)
    return stays.nonzero()[:, 0]


def regress_onto(
    geometry: CentredInputs, kept: Tensor, start: WarmStart, ridge: float
) -> WarmStart:
    """The weight on some of the inputs, by index, that comes closest to the outputs of a start."""
    return _regressed(geometry, _gram(geometry, ridge), kept, start)[0]


def _gram(geometry: CentredInputs, ridge: float) -> Tensor:
    """The Gram matrix of the centred inputs in float64, with the ridge."""
    values, vectors = (each.double() for each in geometry.eigen)
    gram = (vectors * values) @ vectors.T
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    return gram


def _regressed(
    geometry: CentredInputs, gram: Tensor, kept: Tensor, start: WarmStart | SolverResult
) -> tuple[WarmStart, Tensor]:
    """The regression of `regress_onto`, and the Cholesky factor of its inputs' Gram matrix."""
    factor = torch.linalg.cholesky(gram[kept][:, kept])
    weight = start.weight.double()
    regressed = torch.cholesky_solve((weight @ gram[:, kept]).T, factor).T
    mean = geometry.mean.double()
    moved = weight @ mean - regressed @ mean[kept]
    return WarmStart(regressed.to(start.weight), start.bias + moved.to(start.bias)), factor


def _closed_form(
    geometry: CentredInputs, outputs: OutputSet, kept: Tensor, start: WarmStart, factor: Tensor
) -> tuple[WarmStart, int, bool]:
    """The lowest truncation within the radius in the metric of the inputs, and its rank.

    Or that of full rank, and False, where none is within the radius.
    """
    weight = start.weight
    left, _, _ = torch.linalg.svd(weight @ factor.to(weight), full_matrices=False)
    mean = start.bias + weight @ geometry.mean[kept]
    scores = geometry.centred[:, kept] @ (weight.T @ left)
    rank = lowest_truncation(outputs, mean, scores, left.T)
    truncated = left[:, :rank] @ (left[:, :rank].T @ weight)
    produced = torch.addmm(mean, scores[:, :rank], left[:, :rank].T)
    within = outputs.violation(produced) <= WITHIN
    return WarmStart(truncated, mean - truncated @ geometry.mean[kept]), rank, within


def _regression(geometry: CentredInputs, targets: Tensor) -> WarmStart:
    """The weight and bias whose outputs come closest to the targets, by least squares."""
    values, vectors = geometry.eigen
    weight = ((targets.T @ geometry.centred) @ vectors / values) @ vectors.T
    return WarmStart(weight, targets.mean(dim=0) - weight @ geometry.mean)
