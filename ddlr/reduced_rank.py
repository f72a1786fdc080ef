"""ReLU-aware reduced-rank regression: the best weight of one given rank."""

import torch
from torch import Tensor

from ddlr.arguments import as_number
from ddlr.constraints import OutputSet
from ddlr.inputs import CentredInputs, row_blocks

# Relative to the mean eigenvalue of the Gram matrix, unless another is asked for.
RIDGE = 1e-2
_DESCENT_CHECK_INTERVAL = 10
_RADIUS_CHECK_INTERVAL = 5


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

    D is the deviation of A = X Wt + 1 bt from the targets as in the hinge set: A - Y where Y > 0,
    max(A, 0) elsewhere. This undoes the shrinkage of a nuclear-norm solution W0. Since the ridge is
    0 at W0, ||D||_F never ends above that of W0.

    The loss is majorised at the outputs A by ||X Wt + 1 bt - T||_F^2, T = A - D, which is
    reduced-rank regression. Each iteration takes one sweep of alternating least squares on it in
    the whitened inputs, with targets T that are extrapolated (Nesterov, begun anew when the loss
    rises). W stays factored: r (4 in_features + 6 out_features) flops per sample and iteration.
    Without an activation one truncated singular value decomposition is the answer.

    Parameters
    ----------
    inputs : Tensor, shape (samples, in_features), or CentredInputs
    targets : Tensor, shape (samples, out_features)
        Output of the original layer, after its activation.
    weight, bias : Tensor, shapes (out_features, in_features) and (out_features,)
        W0 and its bias, where the fit starts. A weight of higher rank is truncated first, and the
        promise on ||D||_F is then relative to the truncated one.
    rank : int
    activation : {"relu", "none"}
    ridge : float
        Relative to the mean eigenvalue of the centred inputs' Gram matrix: how strongly the weight
        is held in directions that the samples hardly show. In directions that they do not show at
        all, as with fewer samples than inputs, the weight is 0, and costs no rank. With few samples
        per input, a larger ridge serves other samples better, at a larger error on these.
    tolerance : float
        The loop ends when ten iterations lower the loss by less than this share of it.
    max_iterations : int

    Returns
    -------
    weight, bias : Tensor

    Raises
    ------
    ValueError
        If the ridge is not positive, or the activation or a target is refused by `OutputSet`.

    References
    ----------
    Izenman (1975) for reduced-rank regression; Nesterov (1983), O'Donoghue and Candes (2015) for
    the extrapolation and its restart.
    """
    ridge = check_ridge(ridge)
    white = WhitenedInputs(inputs, ridge)
    left, right = _truncate(white.whiten(weight), rank)
    outputs = OutputSet(targets, 0.0, activation, "hinge")
    if activation == "none":
        return _best_of_rank(white, targets, left @ right.T, rank)
    fit = RankFit(white, outputs, left @ right.T, left, right, bias + weight @ white.mean)
    fit.descend(tolerance, max_iterations)
    return fit.answer()


def _best_of_rank(
    white: "WhitenedInputs", targets: Tensor, origin: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """The weight and bias of `refit_low_rank` without an activation, from the whitened W0."""
    regressed = torch.addmm(origin * white.ridge_by_direction, targets.T, white.inputs)
    weight = white.unwhiten(*_truncate(regressed, rank))
    return weight, targets.mean(dim=0) - weight @ white.mean


def check_ridge(ridge: float) -> float:
    """The ridge as a number; a ValueError if it is not positive."""
    return as_number(ridge, "ridge", positive=True)


class WhitenedInputs:
    """Inputs in coordinates in which their Gram matrix and the ridge add up to the identity.

    Directions in which the inputs do not vary are left out.

    Parameters
    ----------
    inputs : Tensor, shape (samples, in_features), or CentredInputs
    ridge : float
        Relative to the mean eigenvalue of the centred inputs' Gram matrix.

    Attributes
    ----------
    inputs : Tensor, shape (samples, directions)
        Centred and whitened.
    original : CentredInputs
        Before whitening.
    mean : Tensor, shape (in_features,)
    ridge : Tensor
        In the original coordinates, absolute.
    scale : Tensor, shape (directions,)
    ridge_by_direction : Tensor, shape (directions,)
        The ridge in the whitened coordinates.
    """

    def __init__(self, inputs: Tensor | CentredInputs, ridge: float):
        self.original = CentredInputs.of(inputs)
        self.mean = self.original.mean
        values, vectors = self.original.eigen
        samples, features = self.original.inputs.shape
        self.ridge = ridge * values.sum() / features
        scale = (values + self.ridge).sqrt()
        # Below this the projections of the inputs are rounding errors of the larger ones.
        largest = scale.amax() if len(scale) else 0.0
        varies = scale > samples**0.5 * torch.finfo(scale.dtype).eps * largest
        self.scale, self._vectors = scale[varies], vectors[:, varies]
        self.inputs = self.original.principal.centred[:, varies] / self.scale
        self.ridge_by_direction = self.ridge / self.scale.square()

    def whiten(self, weight: Tensor) -> Tensor:
        """A weight (out_features, in_features) as one (out_features, directions)."""
        return (weight @ self._vectors) * self.scale

    def unwhiten(self, left: Tensor, right: Tensor) -> Tensor:
        """The weight (out_features, in_features) whose whitened form is ``left @ right.T``."""
        return left @ ((right.T / self.scale) @ self._vectors.T)


class MajorisedFit:
    """A weight of some structure on its way to a smaller loss, by targets of the hinge set.

        minimise ||D||_F^2 + ridge * ||W - W0||_F^2   over W of the structure, and b

    A subclass sets `square` and `loss` of where it begins, and `nearest`.

    Attributes
    ----------
    square : float
        ||D||_F^2.
    loss : float
        ``square`` and the ridge's part.
    nearest : Tensor, shape (samples, out_features)
        The majoriser's targets: the outputs nearest to the weight's that reproduce the targets.
    iterations : int
    """

    square: float
    loss: float

    def __init__(self, outputs: OutputSet):
        self.outputs = outputs
        self.nearest, self._nearest_before, self._spare, self._extrapolated = (
            torch.empty_like(outputs.targets) for _ in range(4)
        )
        self._momentum, self.iterations = 1.0, 0

    def descend(self, tolerance: float, max_iterations: int) -> None:
        """Go on until ten iterations lower the loss by less than a share `tolerance` of it."""
        previous = self.loss
        while self.iterations < max_iterations:
            self.step()
            if self.iterations % _DESCENT_CHECK_INTERVAL == 0:
                if previous - self.loss <= tolerance * self.loss:
                    return
                previous = self.loss

    def reach(self, radius: float, max_iterations: int) -> float:
        """Go on until the outputs are within the radius, or are not going to be.

        Returns the ||D||_F to be expected in the end: as many iterations again as were made would
        bring so much less, at the rate of the last few, which falls.
        """
        expected = previous = self.square
        while self.iterations < max_iterations:
            self.step()
            if self.iterations % _RADIUS_CHECK_INTERVAL == 0:
                gained = (previous - self.square) * self.iterations / _RADIUS_CHECK_INTERVAL
                expected = max(self.square - gained, 0.0)
                if self.square <= radius**2 or expected > radius**2:
                    break
                previous = self.square
        return expected**0.5

    def begin_anew(self) -> None:
        """Forget where the targets are moving to, as where the structure has changed."""
        self._momentum = 1.0

    def step(self) -> None:
        """Make one extrapolated step; where that does not lower the loss, one without."""
        self.iterations += 1
        momentum = (1 + (1 + 4 * self._momentum**2) ** 0.5) / 2
        ahead = (self._momentum - 1) / momentum
        if ahead:
            torch.lerp(self._nearest_before, self.nearest, 1 + ahead, out=self._extrapolated)
            if not self._sweep(self._extrapolated):
                ahead, momentum = 0.0, 1.0
        if not ahead and not self._sweep(self.nearest):
            momentum = 1.0  # there may be no earlier targets to extrapolate from
        self._momentum = momentum

    def _sweep(self, targets: Tensor) -> bool:
        """Least squares on given targets; a weight of a lower loss is taken, and True returned."""
        raise NotImplementedError

    def _is_lower(self, square: float, loss: float) -> bool:
        """Note the measures of a weight, whose `nearest` is in `_spare`, if its loss is lower."""
        if not loss < self.loss:
            return False
        self._nearest_before, self.nearest, self._spare = (
            self.nearest,
            self._spare,
            self._nearest_before,
        )
        self.square, self.loss = square, loss
        return True


class RankFit(MajorisedFit):
    """A weight ``left @ right.T`` of one rank in whitened inputs, on its way to a smaller loss.

        minimise ||D||_F^2 + ridge * ||W - origin||_F^2   over rank(W) <= r and b

    The outputs themselves are not kept, only the outputs nearest to them that reproduce the
    targets, which are the majoriser's targets. The ridge enters as if samples had been added, with
    targets of their own. Scores are stored rank first: the thin products are up to 1.7 times as
    fast.

    Parameters
    ----------
    white : WhitenedInputs
    outputs : OutputSet
        With the hinge constraint.
    origin : Tensor, shape (out_features, directions)
        The whitened weight from which the ridge counts.
    left, right : Tensor, shapes (out_features, rank) and (directions, rank)
        Where the fit begins; `right` has orthonormal columns, and keeps them.
    bias : Tensor, shape (out_features,)
        For centred inputs.
    """

    def __init__(
        self,
        white: WhitenedInputs,
        outputs: OutputSet,
        origin: Tensor,
        left: Tensor,
        right: Tensor,
        bias: Tensor,
    ):
        super().__init__(outputs)
        self.white, self.origin = white, origin
        self._ridge_targets = origin * white.ridge_by_direction
        self.left, self.right, self.bias = left, right, bias
        scores = right.T @ white.inputs.T
        self.square, self.loss = self._evaluate(bias, scores, left, right, self.nearest)

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    def truncated(self, rank: int) -> "RankFit":
        """A fit of lower rank that begins at the best approximation of this one."""
        basis, core = torch.linalg.qr(self.left)
        left, right = _truncate(core, rank)
        return RankFit(
            self.white, self.outputs, self.origin, basis @ left, self.right @ right, self.bias
        )

    def answer(self) -> tuple[Tensor, Tensor]:
        """The weight and bias for the original inputs."""
        weight = self.white.unwhiten(self.left, self.right)
        return weight, self.bias - weight @ self.white.mean

    def _sweep(self, targets: Tensor) -> bool:
        """Alternating least squares on given targets: first R, then L and the bias.

        The weight is taken, and True returned, if it lowers the loss.
        """
        white = self.white
        right = ((self.left.T @ targets.T) @ white.inputs).T + self._ridge_targets.T @ self.left
        right = torch.linalg.qr(right).Q
        scores = right.T @ white.inputs.T
        left = (scores @ targets).T + self._ridge_targets @ right
        bias = targets.mean(dim=0)
        square, loss = self._evaluate(bias, scores, left, right, self._spare)
        if not self._is_lower(square, loss):
            return False
        self.left, self.right, self.bias = left, right, bias
        return True

    def _evaluate(
        self, bias: Tensor, scores: Tensor, left: Tensor, right: Tensor, nearest: Tensor
    ) -> tuple[float, float]:
        """The ||D||_F^2 of a weight, and the loss; writes the majoriser's targets to `nearest`."""
        square = bias.new_zeros(())
        for rows in row_blocks(len(nearest)):
            produced = torch.addmm(bias, scores[:, rows].T, left.T)
            self.outputs.nearest(produced, rows, out=nearest[rows])
            square += produced.sub_(nearest[rows]).square_().sum()
        moved = (left @ right.T - self.origin).square_() * self.white.ridge_by_direction
        return square.item(), (square + moved.sum()).item()


def _truncate(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors L, R of the best approximation of a rank, R with orthonormal columns."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return left[:, :rank] * values[:rank], right[:rank].T
