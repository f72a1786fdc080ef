"""Low-rank layers that see only some of their inputs: the fewest weights within a bound."""

import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ddlr.constraints import OutputSet
from ddlr.input_elimination import order_of_elimination, regress_with_factor
from ddlr.inputs import CentredInputs
from ddlr.problem import WarmStart, check_problem, check_warm_start
from ddlr.quadratic import ridged_gram
from ddlr.rank_search import RADIUS_SLACK, lowest_rank, lowest_truncation
from ddlr.reduced_rank import RIDGE, check_ridge
from ddlr.result import ConvergenceError, SolverResult, SolverStatus
from ddlr.sizes import fewest_stored

_KEPT_PER_STAGE = 0.85
# Beyond this many times the fewest weights so far, a further stage does not come back below them.
_HOPELESS_GROWTH = 1.3


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

    with weights(r, n) = r (n + out_features - r), what a layer of rank r on n inputs is stored with
    (`ddlr.PivotedLinear`), and D as in `ddlr.lowest_rank`. An input that is hardly needed beside
    the others, as a pixel beside its neighbours, costs one weight per term of the rank; without it
    the layer may be smaller even at a somewhat higher rank.

    Inputs are left out in stages, see `select_inputs`. `ddlr.lowest_rank` then lowers the rank on
    the inputs of the stage with the fewest weights. Nothing proves that fewer weights would not do,
    and in rare cases the lowest rank on all inputs needs a few less. A stage costs a regression and
    about two of the matrix products X Wt; the search for the lowest rank is made once.

    What the other inputs make up for is learnt from the samples. With few samples per input the
    error on other samples is well above the radius. More samples help, and cost no labels; so does
    more ridge, at the price of a larger layer.

    Parameters and errors are those of `ddlr.lowest_rank`. Without a `warm_start` the search begins
    at the regression of the targets.

    Returns
    -------
    SolverResult
        `objective` is the number of weights; columns of `weight` are zero for inputs that are left
        out. The `warm_start` itself where nothing smaller is within the radius. `lower_bound` and
        `relative_gap` are nan, the status is "fitted".

    References
    ----------
    Hassibi and Stork (1993), optimal brain surgeon, for the order in which inputs go.
    """
    started = time.perf_counter()
    ridge = check_ridge(ridge)
    inputs = CentredInputs.of(inputs)
    outputs = _checked(inputs, targets, radius, activation, warm_start, max_iterations)
    stages = [stage for stage, _ in _stages(inputs, outputs, warm_start, ridge)]
    stages[0] = dataclasses.replace(stages[0], start=warm_start)  # as `ddlr.lowest_rank` begins
    # Within the radius in closed form, so the first will do; the others are for rounding.
    for stage in sorted(stages, key=lambda each: each.size):
        try:
            solved = lowest_rank(
                inputs if stage is stages[0] else CentredInputs(inputs.inputs[:, stage.kept]),
                targets,
                radius,
                activation=activation,
                ridge=ridge,
                max_iterations=max_iterations,
                warm_start=stage.start,
            )
            break
        except ConvergenceError:
            if stage is stages[0]:  # on all inputs
                raise
    size = _stored(int(solved.objective), solved.weight)
    layer = _on_all_inputs(inputs, outputs, warm_start, stage.kept, solved, size)
    return SolverResult(
        weight=layer.weight,
        bias=layer.bias,
        status=SolverStatus.FITTED,
        iterations=solved.iterations,
        objective=float(layer.size),
        lower_bound=math.nan,
        relative_gap=math.nan,
        violation=layer.violation,
        dual=solved.dual,
        seconds=time.perf_counter() - started,
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

    over the activation-aware singular value decompositions on some of the inputs, one per stage.
    Each stage keeps 85 % of the inputs of the one before it. The others go one by one. The first to
    go is the input that matters least to the low-rank outputs once the inputs that are left have
    made up for it, by ||W_j||^2 / ((X^T X)^-1)_jj for input j (as in the optimal brain surgeon).
    The original outputs are regressed on the inputs of a stage, and truncated to the lowest rank
    within the radius. The answer is the truncation of the stage with the fewest weights.

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
    ridge = check_ridge(ridge)
    inputs = CentredInputs.of(inputs)
    outputs = _checked(inputs, targets, radius, activation, warm_start)
    stages = _stages(inputs, outputs, warm_start, ridge)
    stage, truncated = min(stages, key=lambda each: each[0].size)
    size = _stored(stage.rank, truncated.weight)
    layer = _on_all_inputs(inputs, outputs, warm_start, stage.kept, truncated, size)
    result = SolverResult(
        weight=layer.weight,
        bias=layer.bias,
        status=SolverStatus.CLOSED_FORM,
        iterations=0,
        objective=float(layer.size),
        lower_bound=math.nan,
        relative_gap=math.nan,
        violation=layer.violation,
        dual=targets.new_empty(0),
        seconds=time.perf_counter() - started,
    )
    if result.violation > RADIUS_SLACK:
        raise ConvergenceError(
            f"no truncation is within the radius of {radius:g}: on {len(stage.kept)} inputs the "
            f"error is {1 + result.violation:.4g} times that",
            dataclasses.replace(result, status=SolverStatus.ITERATION_LIMIT),
        )
    return result


def _checked(
    inputs: CentredInputs,
    targets: Tensor,
    radius: float,
    activation: str,
    warm_start: WarmStart | SolverResult | None,
    max_iterations: int = 1,
) -> OutputSet:
    """The bound on the outputs, after a check of all that makes the problem."""
    check_problem(inputs.inputs, targets, tolerance=1.0, max_iterations=max_iterations)
    outputs = OutputSet(targets, radius, activation, "hinge")
    if warm_start is not None:
        check_warm_start(warm_start, inputs.inputs, targets)
    return outputs


def _stored(rank: int, weight: Tensor) -> int:
    """The number of weights that a layer of a rank stores, on the inputs that have weights."""
    used = int((weight != 0).any(dim=0).sum())
    return fewest_stored(rank, used, len(weight))


@dataclass(frozen=True)
class _Layer:
    """A weight and bias for all inputs, with the violation and the number of weights stored."""

    weight: Tensor
    bias: Tensor
    violation: float
    size: int


def _on_all_inputs(
    inputs: CentredInputs,
    outputs: OutputSet,
    warm_start: WarmStart | SolverResult | None,
    kept: Tensor,
    solved: WarmStart | SolverResult,
    size: int,
) -> _Layer:
    """A weight on some inputs as one for all; the start where that is within the radius instead.

    The start takes its place if the weight is not smaller, or not within the radius.
    """
    plain = inputs.inputs
    weight, bias = plain.new_zeros(outputs.targets.shape[1], plain.shape[1]), solved.bias
    weight[:, kept] = solved.weight
    violation = outputs.violation(torch.addmm(bias, plain, weight.T))
    if warm_start is not None and (size >= weight.numel() or violation > RADIUS_SLACK):
        unchanged = outputs.violation(torch.addmm(warm_start.bias, plain, warm_start.weight.T))
        if unchanged <= RADIUS_SLACK:
            return _Layer(warm_start.weight, warm_start.bias, unchanged, weight.numel())
    return _Layer(weight, bias, violation, size)


@dataclass(frozen=True)
class _Stage:
    """The inputs that are left, by index, the original outputs regressed on them, and their size.

    `rank` is that of the closed form, and `size` its number of weights: infinite where no rank is
    within the radius.
    """

    kept: Tensor
    start: WarmStart | SolverResult | None
    rank: int
    size: float


def _stages(
    inputs: CentredInputs,
    outputs: OutputSet,
    warm_start: WarmStart | SolverResult | None,
    ridge: float,
) -> Iterator[tuple[_Stage, WarmStart]]:
    """All inputs, then fewer and fewer, while the radius is reached and the size can come back.

    Yields each stage with its closed form, on its inputs.
    """
    start = warm_start or _least_squares(inputs, outputs.targets)
    gram, _ = ridged_gram(inputs, ridge)
    kept = torch.arange(len(gram), device=gram.device)
    fewest = math.inf
    if not gram.any():  # inputs that do not vary: a bias says it all
        stage = _Stage(kept, WarmStart(start.weight, start.bias), rank=0, size=0.0)
        yield stage, WarmStart(torch.zeros_like(start.weight), outputs.best_constant_output())
        return
    while len(kept):
        regressed, factor = regress_with_factor(inputs, gram[:, kept], kept, start)
        truncated, rank, within = truncate_on_inputs(inputs, outputs, kept, regressed, factor)
        size = fewest_stored(rank, len(kept), len(regressed.weight)) if within else math.inf
        if size == math.inf and fewest < math.inf:
            return
        yield _Stage(kept, regressed, rank, size), truncated
        fewest = min(fewest, size)
        if size > _HOPELESS_GROWTH * fewest or size == math.inf:
            return
        kept = kept[_eliminate_inputs(truncated.weight.double(), torch.cholesky_inverse(factor))]


def _eliminate_inputs(weight: Tensor, inverse: Tensor) -> Tensor:
    """The inputs that stay for the next stage, by index; the others make up for those that go.

    Inputs go one by one, the one that matters least first. The second of a pair of copies matters
    as soon as the first is gone.

    Parameters
    ----------
    weight : Tensor, shape (out_features, in_features)
    inverse : Tensor, shape (in_features, in_features)
        The inverse of the inputs' Gram matrix.
    """
    importance = weight.square().sum(dim=0) / inverse.diagonal()
    leaving = len(importance) - int(_KEPT_PER_STAGE * len(importance))
    # No other input is near enough to being the least one.
    near = importance.topk(min(3 * leaving, len(importance)), largest=False).indices
    order = order_of_elimination(weight[:, near], inverse[near][:, near], leaving)
    stays = torch.ones_like(importance, dtype=torch.bool)
    stays[near[order]] = False
    return stays.nonzero()[:, 0]


def truncate_on_inputs(
    inputs: CentredInputs, outputs: OutputSet, kept: Tensor, start: WarmStart, factor: Tensor
) -> tuple[WarmStart, int, bool]:
    """The lowest truncation within the radius in the metric of the inputs, its rank, and True.

    Where none is within the radius: the truncation of full rank, and False.

    Parameters
    ----------
    inputs : CentredInputs
        All of them.
    outputs : OutputSet
    kept : Tensor, shape (inputs kept,)
        Indices.
    start : WarmStart
        What is truncated, of the inputs kept.
    factor : Tensor, shape (inputs kept, inputs kept)
        The Cholesky factor of their Gram matrix.
    """
    weight = start.weight
    left, _, _ = torch.linalg.svd(weight @ factor.to(weight), full_matrices=False)
    mean = start.bias + weight @ inputs.mean[kept]
    scores = inputs.centred[:, kept] @ (weight.T @ left)
    rank = lowest_truncation(outputs, mean, scores, left.T)
    truncated = left[:, :rank] @ (left[:, :rank].T @ weight)
    produced = torch.addmm(mean, scores[:, :rank], left[:, :rank].T)
    within = outputs.violation(produced) <= RADIUS_SLACK
    return WarmStart(truncated, mean - truncated @ inputs.mean[kept]), rank, within


def _least_squares(inputs: CentredInputs, targets: Tensor) -> WarmStart:
    """The weight and bias whose outputs come closest to the targets."""
    values, vectors = inputs.eigen
    weight = ((targets.T @ inputs.centred) @ vectors / values) @ vectors.T
    return WarmStart(weight, targets.mean(dim=0) - weight @ inputs.mean)
