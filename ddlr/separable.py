"""Convolutions whose kernel is a sum of few products of a column and a row.

    W[o, c, i, j] = sum over s of across[s, o, j] * down[s, c, i]

is one convolution of height x 1 to `terms` channels and one of 1 x width behind it (Jaderberg et
al. 2014, arXiv 1405.3866). As a matrix (channels * height, out_features * width) the kernel has the
rank `terms`.
"""

import dataclasses
import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ddlr.constraints import OutputSet
from ddlr.inputs import CentredInputs, row_blocks
from ddlr.layers import columns_by_rows, numerical_rank
from ddlr.problem import WarmStart
from ddlr.reduced_rank import RIDGE, MajorisedFit, check_ridge
from ddlr.result import SolverResult, SolverStatus
from ddlr.sizes import fewest_stored, separable_stored

_GRADIENT_STEPS = 5  # of conjugate gradients on the columns, in each sweep


@dataclass(frozen=True)
class Kernel:
    """The kernel of an `nn.Conv2d`.

    Attributes
    ----------
    shape : (int, int, int)
        Channels, height and width.
    live_channels : int
        Channels that are not zero in all patches.
    """

    shape: tuple[int, int, int]
    live_channels: int

    @property
    def live_shape(self) -> tuple[int, int, int]:
        return (self.live_channels, *self.shape[1:])

    def terms_of(self, weight: Tensor) -> int | None:
        """The terms of a weight, or None where it is not smaller for being stored by them.

        The weight has the shape (out_features, in_features), on all channels or the live ones.
        """
        _, height, width = self.shape
        rows = (weight != 0).any(dim=1)
        by_channel = weight[rows].unflatten(1, (-1, height * width))
        block = by_channel[:, (by_channel != 0).any(dim=2).any(dim=0)]
        shape = (block.shape[1], height, width)
        if not block.numel():
            return None
        terms = numerical_rank(columns_by_rows(block.flatten(1), shape))
        others = fewest_stored(numerical_rank(weight), math.prod(shape), len(block))
        return terms if separable_stored(terms, len(block), shape) < others else None


@torch.no_grad()
def smaller_separable(
    solved: SolverResult,
    inputs: Tensor | CentredInputs,
    targets: Tensor,
    radius: float,
    *,
    kernel: Kernel,
    activation: str,
    warm_start: WarmStart | SolverResult,
    ridge: float = RIDGE,
    max_iterations: int = 50,
) -> SolverResult | None:
    """Find the fewest terms within the radius, where that stores fewer weights than a solved layer.

        minimise terms(W)   subject to ||D||_F <= radius,   over W and b

    D is the deviation from the targets as in `ddlr.lowest_rank`. Numbers of terms are tried by
    bisection; the fit of each begins at the truncation of the best one so far. The returned weight
    is within the radius. A fit of fewer terms was not, which is no proof that there is none.

    Parameters
    ----------
    solved : SolverResult
        The layer of lowest rank, on the same problem.
    inputs : Tensor, shape (samples, in_features), or CentredInputs
        Patches; of the live channels of the kernel.
    targets : Tensor, shape (samples, out_features)
    kernel : Kernel
    warm_start : WarmStart or SolverResult
        Weight and bias of the original layer, where the fits begin, and to which the ridge holds.
    radius, activation, ridge, max_iterations
        As for `ddlr.lowest_rank`.

    Returns
    -------
    SolverResult or None
        `objective` is the number of terms, without a bound. None where no fewer weights are found.
    """
    started = time.perf_counter()
    shape = kernel.live_shape
    rows, columns = solved.weight.shape
    others = fewest_stored(numerical_rank(solved.weight), columns, rows)
    most = min(
        (others - 1) // separable_stored(1, rows, shape), shape[0] * shape[1], rows * shape[2]
    )
    if most < 1:
        return None
    outputs = OutputSet(targets, radius, activation, "hinge")
    moments = PatchMoments(CentredInputs.of(inputs), shape, warm_start.weight, check_ridge(ridge))
    bias = warm_start.bias + warm_start.weight @ moments.inputs.mean
    best = SeparableFit(moments, outputs, warm_start.weight, most, bias)
    best.reach(radius, max_iterations)
    missed, iterations = 0, best.iterations
    if best.square > radius**2:
        return None
    while best.terms - missed > 1:
        fit = SeparableFit(moments, outputs, best.weight, (best.terms + missed) // 2, best.bias)
        fit.reach(radius, max_iterations)
        iterations += fit.iterations
        if fit.square <= radius**2:
            best = fit
        else:
            missed = fit.terms
    weight, bias = best.answer()
    produced = torch.addmm(bias, moments.inputs.inputs, weight.T)
    return dataclasses.replace(
        solved,
        weight=weight,
        bias=bias,
        status=SolverStatus.FITTED,
        iterations=solved.iterations + iterations,
        objective=float(best.terms),
        lower_bound=math.nan,
        relative_gap=math.nan,
        shortfall=math.nan,
        violation=outputs.violation(produced),
        seconds=solved.seconds + time.perf_counter() - started,
    )


@torch.no_grad()
def refit_separable(
    inputs: Tensor | CentredInputs,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    kernel: Kernel,
    terms: int,
    activation: str,
    ridge: float = RIDGE,
    tolerance: float = 3e-3,
    max_iterations: int = 200,
) -> tuple[Tensor, Tensor]:
    """Move a weight of some terms to a smaller output error, with as many; see `refit_low_rank`."""
    inputs = CentredInputs.of(inputs)
    outputs = OutputSet(targets, 0.0, activation, "hinge")
    moments = PatchMoments(inputs, kernel.live_shape, weight, check_ridge(ridge))
    fit = SeparableFit(moments, outputs, weight, terms, bias + weight @ inputs.mean)
    fit.descend(tolerance, max_iterations)
    return fit.answer()


class PatchMoments:
    """What all fits on the same patches share: their Gram matrix, with the ridge.

    Held in float64: with the ridge, its least eigenvalue may be below the rounding of float32.

    Parameters
    ----------
    inputs : CentredInputs
    shape : (int, int, int)
        Channels, height and width.
    origin : Tensor, shape (out_features, in_features)
        The weight from which the ridge counts.
    ridge : float
        Relative to the mean eigenvalue of the Gram matrix.

    Attributes
    ----------
    places, width : int
        channels * height, the entries of a column, and the entries of a row.
    gram : Tensor, shape (in_features, in_features)
    columns_root : Tensor, shape (places, places)
        The Cholesky factor of the Gram matrix's mean over places of the row: what the columns see.
    """

    def __init__(
        self, inputs: CentredInputs, shape: tuple[int, int, int], origin: Tensor, ridge: float
    ):
        self.inputs, self.shape, self.origin = inputs, shape, origin.double()
        self.places, self.width = shape[0] * shape[1], shape[2]
        features = self.places * self.width
        gram = self.origin.new_zeros(features, features)
        for rows in row_blocks(len(inputs.inputs)):
            block = inputs.centred[rows].double()
            gram.addmm_(block.T, block)
        self.ridge = (ridge * gram.trace() / features).item()
        gram.diagonal().add_(self.ridge)
        self.gram = gram
        by_place = gram.view(self.places, self.width, self.places, self.width)
        self.columns_root = torch.linalg.cholesky(by_place.diagonal(dim1=1, dim2=3).mean(dim=-1))

    def across(self, down: Tensor, cross: Tensor) -> Tensor:
        """The rows of least loss behind given columns.

        Parameters
        ----------
        down : Tensor, shape (places, terms)
        cross : Tensor, shape (out_features, in_features)
            Targets times centred inputs, and the ridge's part.

        Returns
        -------
        Tensor, shape (terms, out_features, width)
        """
        terms = down.shape[1]
        seen = torch.einsum("dpj,ps->dsj", self.gram.unflatten(1, (self.places, -1)), down)
        system = torch.einsum("pr,pisj->risj", down, seen.unflatten(0, (self.places, -1)))
        system = system.reshape(terms * self.width, terms * self.width)
        right_side = torch.einsum("opj,ps->osj", cross.unflatten(1, (self.places, -1)), down)
        root = torch.linalg.cholesky(system)
        solution = torch.cholesky_solve(right_side.flatten(1).T, root)
        return solution.unflatten(0, (terms, self.width)).transpose(1, 2)

    def down(self, down: Tensor, across: Tensor, cross: Tensor) -> Tensor:
        """Columns of a lower loss before given rows, which are orthonormal, by a few steps.

        Shapes are those of `across`. The loss is quadratic in the columns; the steps are those of
        conjugate gradients, preconditioned by the mean that is exact for rows of white noise.
        """

        def seen(columns: Tensor) -> Tensor:
            return self._by_columns(_weight(columns, across) @ self.gram, across)

        rest = self._by_columns(cross, across) - seen(down)
        direction, slope = torch.zeros_like(down), 0.0
        for _ in range(_GRADIENT_STEPS):
            scaled = torch.cholesky_solve(rest, self.columns_root)
            before, slope = slope, (rest * scaled).sum()
            if not slope > 0:
                break
            direction = scaled + (slope / before if before else 0.0) * direction
            image = seen(direction)
            step = slope / (direction * image).sum()
            down, rest = down + step * direction, rest - step * image
        return down

    def _by_columns(self, matrix: Tensor, across: Tensor) -> Tensor:
        """A matrix (out_features, in_features) as the columns see it through the rows."""
        return torch.einsum("opj,soj->ps", matrix.unflatten(1, (self.places, -1)), across)


class SeparableFit(MajorisedFit):
    """A weight of some terms on its way to a smaller loss, by alternating least squares.

    Each sweep takes a few steps of conjugate gradients on the columns, and solves for the rows.

    Parameters
    ----------
    moments : PatchMoments
    outputs : OutputSet
        With the hinge constraint.
    weight : Tensor, shape (out_features, in_features)
        Where the fit begins, after truncation to so many terms.
    terms : int
    bias : Tensor, shape (out_features,)
        For centred inputs.
    """

    def __init__(
        self,
        moments: PatchMoments,
        outputs: OutputSet,
        weight: Tensor,
        terms: int,
        bias: Tensor,
    ):
        super().__init__(outputs)
        self.moments, self.terms = moments, terms
        matrix = columns_by_rows(weight.double(), moments.shape)
        left, values, right = torch.linalg.svd(moments.columns_root.T @ matrix, full_matrices=False)
        self._down = torch.linalg.solve_triangular(
            moments.columns_root.T, left[:, :terms] * values[:terms], upper=True
        )
        self._across = right[:terms].unflatten(1, (-1, moments.width))
        self.bias = bias
        self.weight = _weight(self._down, self._across).to(weight.dtype)
        self.square, self.loss = self._evaluate(self.weight, self.bias, self.nearest)

    def answer(self) -> tuple[Tensor, Tensor]:
        """The weight and bias for the inputs as they are."""
        return self.weight, self.bias - self.weight @ self.moments.inputs.mean

    def _sweep(self, targets: Tensor) -> bool:
        moments = self.moments
        cross = (targets.T @ moments.inputs.centred).double() + moments.ridge * moments.origin
        basis, core = torch.linalg.qr(self._across.flatten(1).T)
        across = basis.T.unflatten(1, (-1, moments.width))
        down = moments.down(self._down @ core.T, across, cross)
        down = torch.linalg.qr(down).Q
        across = moments.across(down, cross)
        weight, bias = _weight(down, across).to(self.weight.dtype), targets.mean(dim=0)
        if not self._is_lower(*self._evaluate(weight, bias, self._spare)):
            return False
        self._down, self._across, self.weight, self.bias = down, across, weight, bias
        return True

    def _evaluate(self, weight: Tensor, bias: Tensor, nearest: Tensor) -> tuple[float, float]:
        """The ||D||_F^2 of a weight, and the loss; writes the majoriser's targets to `nearest`."""
        square = bias.new_zeros((), dtype=torch.float64)
        for rows in row_blocks(len(nearest)):
            produced = torch.addmm(bias, self.moments.inputs.centred[rows], weight.T)
            self.outputs.nearest(produced, rows, out=nearest[rows])
            square += produced.sub_(nearest[rows]).square_().sum()
        moved = (weight - self.moments.origin).square_().sum()
        return square.item(), (square + self.moments.ridge * moved).item()


def _weight(down: Tensor, across: Tensor) -> Tensor:
    """The weight (out_features, in_features) of columns (places, terms) and rows."""
    return torch.einsum("ps,soj->opj", down, across).flatten(1)
