"""ReLU-aware reduced-rank regression: the best weight of a rank, and the lowest rank itself."""

import dataclasses
import math
import time

import torch
from torch import Tensor

from ddlr.admm import CentredInputs, WarmStart, check_problem, check_warm_start
from ddlr.arguments import as_number
from ddlr.constraints import OutputSet, row_blocks
from ddlr.result import ConvergenceError, SolverResult, SolverStatus

# Of the mean eigenvalue of the Gram matrix, unless another is asked for.
RIDGE = 1e-2
_ITERATIONS_A_CHECK = 10
_ITERATIONS_A_LOOK = 5
_ROWS_AT_ONCE = 512
_FIRST_GUESS = 0.85  # of the closed form's rank
WITHIN = 1e-3  # above the radius, relative to it


@torch.no_grad()
def refit_low_rank(
    inputs: Tensor | CentredInputs,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    rank: int,
    activation: str = "relu",
    ridge: float = RIDGE,
    tolerance: float = 3e-3,
    max_iterations: int = 200,
) -> tuple[Tensor, Tensor]:
    """Move a weight of given rank to a smaller output error, at the same rank.

        minimise ||D||_F^2 + ridge * ||W - W0||_F^2   over rank(W) <= r and b

    D is the deviation of A = X Wt + 1 bt from the targets in the sense of the hinge set: A - Y
    where Y > 0, max(A, 0) elsewhere. It undoes the shrinkage of a nuclear-norm solution W0. Since
    the ridge is on the way from W0, ||D||_F can never end above that of W0.

    The loss is majorised at the outputs A by ||X Wt + 1 bt - T||_F^2, T = A - D, which is
    reduced-rank regression; of that each iteration takes one sweep of alternating least squares in
    the whitened inputs, on targets T that are extrapolated (Nesterov, begun anew when the loss
    rises). W stays factored: r (4 in_features + 6 out_features) flops a sample and iteration.

    Parameters
    ----------
    inputs : Tensor, shape (samples, in_features), or CentredInputs of one
    targets : Tensor, shape (samples, out_features)
        Output of the original layer, after its activation.
    weight, bias : Tensor, shapes (out_features, in_features) and (out_features,)
        Where to start; a weight of higher rank is truncated, and the promise on ||D||_F is then of
        the truncated one.
    rank : int
    activation : {"relu", "none"}
    ridge : float
        Relative to the mean eigenvalue of the centred inputs' Gram matrix: how strongly the weight
        is held in directions that the samples hardly show. In those that they do not show at all,
        as where there are fewer samples than inputs, the weight is 0, and costs no rank. With few
        samples for each input more of it serves other samples better, at a larger error on these.
    tolerance : float
        The loop ends when ten iterations lower the loss by less than this share of it.

    Returns
    -------
    weight, bias : Tensor

    Raises
    ------
    ValueError
        If the ridge is not positive.

    References
    ----------
    Izenman (1975) for reduced-rank regression; Nesterov (1983), O'Donoghue and Candes (2015) for
    the extrapolation and its restart.
    """
    ridge = check_ridge(ridge)
    white = _Whitened(inputs, ridge)
    left, right = _truncate(white.enter(weight), rank)
    outputs = OutputSet(targets, 0.0, activation, "hinge")
    fit = _Fit(white, outputs, left @ right.T, left, right, bias + weight @ white.mean)
    fit.descend(tolerance, max_iterations)
    return fit.answer()


@torch.no_grad()
def lowest_rank(
    inputs: Tensor | CentredInputs,
    targets: Tensor,
    radius: float,
    *,
    activation: str = "relu",
    ridge: float = RIDGE,
    max_iterations: int = 50,
    warm_start: WarmStart | SolverResult | None = None,
) -> SolverResult:
    """Find the lowest rank of a layer whose outputs stay within the radius of the targets.

        minimise rank(W)   subject to ||D||_F <= radius,   over W and b

    D is the deviation of A = X Wt + 1 bt from the targets as in the hinge set: A - Y where Y > 0,
    max(A, 0) elsewhere, so that ||relu(A) - Y||_F <= radius.

    Without an activation this is reduced-rank regression: one truncated singular value
    decomposition gives the answer, and the rank is proven to be the lowest. With ReLU each rank
    that is tried is fitted as in `refit_low_rank`, towards the smallest error found at that rank;
    the returned rank is within the radius, and the next lower one was not, which proves nothing:
    the problem is not convex. The search begins at the rank of the closed form for the
    pre-activations (the activation-aware SVD), which is within the radius by itself and so bounds
    the answer; fits begin at the truncation of the best one so far.

    Parameters
    ----------
    inputs : Tensor, shape (samples, in_features), or CentredInputs of one
        The number of samples may be below that of features; dead and dependent inputs are
        recognised by eigenvalues below rounding.
    targets : Tensor, shape (samples, out_features)
        Output of the original layer, after its activation.
    radius : float
        Bound on the Frobenius norm of the deviation, in the units of the targets.
    activation : {"relu", "none"}
    ridge : float
        Of the fits, see `refit_low_rank`; with more of it the rank is somewhat higher, and the
        error on other samples lower.
    max_iterations : int
        Of the fit of one rank.
    warm_start : WarmStart or SolverResult, optional
        Weight and bias of the original layer. With ReLU the fits begin from their outputs, and stay
        near the weight in directions that the data hardly show; without it they begin from the
        targets, and nothing holds them there.

    Returns
    -------
    SolverResult
        `objective` is the rank. Without an activation `lower_bound` is the same; with ReLU it and
        `relative_gap` are nan, and the status is "fitted".

    Raises
    ------
    ValueError
        If an argument makes no problem; names the argument and value.
    ConvergenceError
        If not even full rank is within the radius; carries the best fit.

    References
    ----------
    Izenman (1975); see `refit_low_rank`.
    """
    started = time.perf_counter()
    ridge = check_ridge(ridge)
    exact = activation == "none"
    white = _Whitened(inputs, 0.0 if exact or warm_start is None else ridge)
    plain = white.geometry.inputs
    check_problem(plain, targets, tolerance=1.0, max_iterations=max_iterations)
    outputs = OutputSet(targets, radius, activation, "hinge")
    if warm_start is not None:
        check_warm_start(warm_start, plain, targets)
    search = _Search(white, outputs, warm_start, max_iterations)
    fit = search.closed_form if exact else search.lowest()
    (weight, bias), rank = fit.answer(), fit.rank
    result = SolverResult(
        weight=weight,
        bias=bias,
        status=SolverStatus.CONVERGED if exact else SolverStatus.FITTED,
        iterations=search.iterations,
        objective=float(rank),
        lower_bound=float(rank) if exact else math.nan,
        relative_gap=0.0 if exact else math.nan,
        violation=outputs.violation(torch.addmm(bias, plain, weight.T)),
        dual=weight.new_empty(0),
        seconds=time.perf_counter() - started,
    )
    if result.violation > WITHIN:
        raise ConvergenceError(
            f"no rank is within the radius of {radius:g}: at rank {rank} the error is "
            f"{1 + result.violation:.4g} times that",
            dataclasses.replace(result, status=SolverStatus.ITERATION_LIMIT),
        )
    return result


def check_ridge(ridge: float) -> float:
    return as_number(ridge, "ridge", positive=True)


class _Whitened:
    """Inputs in coordinates in which their Gram matrix and the ridge add up to the identity.

    What lies in directions in which the inputs do not vary is left out.
    """

    def __init__(self, inputs: Tensor | CentredInputs, ridge: float):
        self.geometry = inputs if isinstance(inputs, CentredInputs) else CentredInputs(inputs)
        self.mean = self.geometry.mean
        values, vectors = self.geometry.eigen
        samples, features = self.geometry.inputs.shape
        self.ridge = ridge * values.sum() / features
        scale = (values + self.ridge).sqrt()
        # Below this the projections of the inputs are rounding errors of the larger ones.
        largest = scale.amax() if len(scale) else 0.0
        varies = scale > samples**0.5 * torch.finfo(scale.dtype).eps * largest
        self.scale, self.vectors = scale[varies], vectors[:, varies]
        self.inputs = self.geometry.principal.centred[:, varies] / self.scale
        # Of a weight, that which the ridge holds where it was.
        self.held = self.ridge / self.scale.square()

    def enter(self, weight: Tensor) -> Tensor:
        return (weight @ self.vectors) * self.scale

    def leave(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ ((right.T / self.scale) @ self.vectors.T)


class _Fit:
    """The weight L Rt of one rank in whitened inputs, R with orthonormal columns, and its loss.

    Of its outputs only what reproduces the targets nearest to them is kept: the majoriser's
    targets. The ridge enters as if samples had been added, whose targets are `anchor`. Scores are
    stored rank first: the thin products are up to 1.7 times as fast.
    """

    def __init__(
        self,
        white: _Whitened,
        outputs: OutputSet,
        origin: Tensor,
        left: Tensor,
        right: Tensor,
        bias: Tensor,
    ):
        self.white, self.outputs = white, outputs
        self.origin, self.anchor = origin, origin * white.held
        self.left, self.right, self.bias = left, right, bias
        self.nearest, self.before, self.spare, self.aim = (
            torch.empty_like(outputs.targets) for _ in range(4)
        )
        scores = right.T @ white.inputs.T
        self.square, self.loss = self._evaluate(bias, scores, left, right, self.nearest)
        self.momentum, self.iterations = 1.0, 0

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    def truncated(self, rank: int) -> "_Fit":
        """A fit of lower rank that begins at the best approximation of this one."""
        basis, core = torch.linalg.qr(self.left)
        left, right = _truncate(core, rank)
        return _Fit(
            self.white, self.outputs, self.origin, basis @ left, self.right @ right, self.bias
        )

    def descend(self, tolerance: float, max_iterations: int) -> None:
        """Go on until ten iterations lower the loss by less than a share of it."""
        previous = self.loss
        while self.iterations < max_iterations:
            self.step()
            if self.iterations % _ITERATIONS_A_CHECK == 0:
                if previous - self.loss <= tolerance * self.loss:
                    return
                previous = self.loss

    def reach(self, radius: float, max_iterations: int) -> float:
        """Go on until the outputs are within the radius, or are not going to be.

        Returns the ||D||_F that is to be expected in the end: as many iterations again as were
        made would bring so much less, at the rate of the last few, which falls.
        """
        expected = previous = self.square
        while self.iterations < max_iterations:
            self.step()
            if self.iterations % _ITERATIONS_A_LOOK == 0:
                gained = (previous - self.square) * self.iterations / _ITERATIONS_A_LOOK
                expected = max(self.square - gained, 0.0)
                if self.square <= radius**2 or expected > radius**2:
                    break
                previous = self.square
        return expected**0.5

    def step(self) -> None:
        """One extrapolated step; where that does not lower the loss, one without extrapolation."""
        self.iterations += 1
        momentum = (1 + (1 + 4 * self.momentum**2) ** 0.5) / 2
        ahead = (self.momentum - 1) / momentum
        if ahead and not self._try(torch.lerp(self.before, self.nearest, 1 + ahead, out=self.aim)):
            ahead, momentum = 0.0, 1.0
        if not ahead:
            self._try(self.nearest)
        self.momentum = momentum

    def _try(self, aim: Tensor) -> bool:
        """Alternating least squares on the majoriser of some targets: first R, then L and the bias.

        The weight is taken if it lowers the loss.
        """
        white = self.white
        right = ((self.left.T @ aim.T) @ white.inputs).T + self.anchor.T @ self.left
        right = torch.linalg.qr(right).Q
        scores = right.T @ white.inputs.T
        left = (scores @ aim).T + self.anchor @ right
        bias = aim.mean(dim=0)
        square, loss = self._evaluate(bias, scores, left, right, self.spare)
        if not loss < self.loss:
            return False
        self.before, self.nearest, self.spare = self.nearest, self.spare, self.before
        self.left, self.right, self.bias = left, right, bias
        self.square, self.loss = square, loss
        return True

    def _evaluate(
        self, bias: Tensor, scores: Tensor, left: Tensor, right: Tensor, nearest: Tensor
    ) -> tuple[float, float]:
        """Return a weight's ||D||_F^2, and it with the ridge; write what reproduces the targets."""
        square = bias.new_zeros(())
        for rows in self._blocks():
            produced = torch.addmm(bias, scores[:, rows].T, left.T)
            self.outputs.nearest(produced, rows, out=nearest[rows])
            square += produced.sub_(nearest[rows]).square_().sum()
        moved = ((left @ right.T - self.origin).square_() * self.white.held).sum()
        return square.item(), (square + moved).item()

    def _blocks(self) -> list[slice]:
        # Small enough to stay in the cache from one operation to the next.
        return row_blocks(len(self.nearest), _ROWS_AT_ONCE)

    def answer(self) -> tuple[Tensor, Tensor]:
        weight = self.white.leave(self.left, self.right)
        return weight, self.bias - weight @ self.white.mean


class _Search:
    """The search for the lowest rank, from the regression that the start's outputs lead to.

    That is reduced-rank regression onto what is nearest to these outputs and reproduces the
    targets: one decomposition holds all its ranks. With targets that are the start's own outputs,
    before their activation, it is the activation-aware singular value decomposition.
    """

    def __init__(
        self,
        white: _Whitened,
        outputs: OutputSet,
        start: WarmStart | SolverResult | None,
        max_iterations: int,
    ):
        self.white, self.outputs, self.max_iterations = white, outputs, max_iterations
        self.iterations = 0
        inputs = white.geometry.inputs
        if start is None:
            self.origin = inputs.new_zeros(outputs.targets.shape[1], len(white.scale))
            produced = torch.zeros_like(outputs.targets)
        else:
            self.origin = white.enter(start.weight)
            produced = torch.addmm(start.bias, inputs, start.weight.T)
        aim = outputs.nearest(produced)
        whole = torch.addmm(self.origin, aim.sub(produced).T, white.inputs)
        bias = aim.mean(dim=0)
        left, self.sizes, right = torch.linalg.svd(whole, full_matrices=False)
        scores = (white.inputs @ right.T) * self.sizes
        rank = lowest_truncation(outputs, bias, scores, left.T)
        del scores, produced, aim
        self.closed_form = _Fit(
            white, outputs, self.origin, left[:, :rank] * self.sizes[:rank], right[:rank].T, bias
        )

    def lowest(self) -> _Fit:
        """The fit of the lowest rank found to be within the radius."""
        best, radius = self.closed_form, self.outputs.radius
        constant = self.outputs.best_constant_output().expand_as(self.outputs.targets)
        if not self.outputs.violation(constant):
            factors = best.left[:, :0], best.right[:, :0], constant[0]
            return _Fit(self.white, self.outputs, self.origin, *factors)
        if best.square > radius**2:  # not even full rank is within it, so far
            best.reach(radius, self.max_iterations)
        missed, rank = 0, int(_FIRST_GUESS * best.rank)
        while missed < best.rank - 1:
            rank = min(max(rank, missed + 1), best.rank - 1)
            fit = best.truncated(rank)
            expected = fit.reach(radius, self.max_iterations)
            self.iterations += fit.iterations
            if fit.square <= radius**2:
                best = fit
            else:
                missed = rank
            rank += self._ranks_to(radius, rank, expected)
        return best

    def _ranks_to(self, radius: float, rank: int, error: float) -> int:
        """How many ranks more, or less, would bring an error at a rank to the radius.

        If each lowered it by the share by which it lowers that of the regression.
        """
        left = self.sizes[rank:].double().square().sum()
        share = (self.sizes[rank].double().square() / left).item()
        if not (radius and error and share > 0):
            return 0
        return round(2 * math.log(error / radius) / share)


def _truncate(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors L, R of the best approximation of a rank, R with orthonormal columns."""
    left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
    return left[:, :rank] * sizes[:rank], right[:rank].T


def lowest_truncation(
    outputs: OutputSet, offset: Tensor, scores: Tensor, directions: Tensor
) -> int:
    """The lowest r for which ``1 offset + scores[:, :r] @ directions[:r]`` is within the radius.

    The deviation need not fall with every further term, so all ranks count, from 0 upwards. But its
    norm is the distance to a convex set, which changes by no more than the outputs move; so ranks
    that cannot be within the radius are stepped over unseen.

    Parameters
    ----------
    outputs : OutputSet
        With the hinge constraint.
    offset : Tensor, shape (out_features,)
    scores : Tensor, shape (samples, terms)
    directions : Tensor, shape (terms, out_features)
        Of orthonormal rows.

    Returns
    -------
    int
        All terms, where no fewer are within the radius.
    """
    terms = len(directions)
    # With orthonormal directions the squared movements of separate terms add up.
    moved = scores.new_zeros(terms + 1, dtype=torch.float64)
    moved[1:] = scores.square().sum(dim=0, dtype=torch.float64).cumsum(dim=0)
    produced = offset.expand_as(outputs.targets).clone()
    rank = 0
    while rank < terms:
        excess = torch.linalg.vector_norm(outputs.deviation(produced)).item() - outputs.radius
        if excess <= 0:
            break
        reached = int(torch.searchsorted(moved, moved[rank] + excess**2))
        following = min(max(reached, rank + 1), terms)
        produced.addmm_(scores[:, rank:following], directions[rank:following])
        rank = following
    return rank
