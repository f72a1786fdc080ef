"""ReLU-aware reduced-rank regression: the best weight of a given rank, by error instead of norm."""

import torch
from torch import Tensor

from ddlr.admm import CentredInputs
from ddlr.constraints import OutputSet, row_blocks

# Of the mean eigenvalue of the Gram matrix: holds back directions that the data hardly show.
RIDGE = 1e-2
_ITERATIONS_A_CHECK = 10
_ROWS_AT_ONCE = 512


@torch.no_grad()
def refit_low_rank(
    inputs: Tensor | CentredInputs,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    rank: int,
    activation: str = "relu",
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
    the whitened inputs, from outputs that are extrapolated (Nesterov, begun anew when the loss
    rises). W stays factored: 4 r (in_features + out_features) flops a sample and iteration.

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
    tolerance : float
        The loop ends when ten iterations lower the loss by less than this share of it.

    Returns
    -------
    weight, bias : Tensor

    References
    ----------
    Izenman (1975) for reduced-rank regression; Nesterov (1983), O'Donoghue and Candes (2015) for
    the extrapolation and its restart.
    """
    geometry = inputs if isinstance(inputs, CentredInputs) else CentredInputs(inputs)
    fit = _Fit(geometry, OutputSet(targets, 0.0, activation, "hinge"), weight, bias, rank)
    previous = fit.loss
    for iteration in range(1, max_iterations + 1):
        fit.step()
        if iteration % _ITERATIONS_A_CHECK == 0:
            if previous - fit.loss <= tolerance * fit.loss:
                break
            previous = fit.loss
    return fit.answer()


class _Fit:
    """The state of the loop: factors, outputs and loss, and the outputs of the step before.

    In whitened inputs Q = Xc V (values + ridge)^-1/2 the weight is L Rt, R with orthonormal
    columns; the ridge then enters as if samples had been added, and `anchor` is their targets.
    """

    def __init__(
        self, geometry: CentredInputs, outputs: OutputSet, weight: Tensor, bias: Tensor, rank: int
    ):
        self.geometry, self.outputs = geometry, outputs
        values, self.vectors = geometry.eigen
        ridge = RIDGE * values.sum() / geometry.inputs.shape[1]
        self.scale = (values + ridge).sqrt()
        self.white = geometry.principal.centred / self.scale
        start = weight @ self.vectors
        left, size, right = torch.linalg.svd(start * self.scale, full_matrices=False)
        self.left, self.right = left[:, :rank] * size[:rank], right[:rank].T
        self.share = ridge / self.scale.square()
        self.anchor = self.left @ self.right.T * self.share
        self.ridge, self.origin = ridge, (self.left @ self.right.T) / self.scale
        self.bias = bias + weight @ geometry.mean
        self.projected = self.white @ self.right
        self.fitted = torch.addmm(self.bias, self.projected, self.left.T)
        self.before = self.fitted
        self.momentum = 1.0
        self.loss = self._loss(self.fitted, self.left, self.right)

    def step(self) -> None:
        """One extrapolated step; where that does not lower the loss, one without extrapolation."""
        momentum = (1 + (1 + 4 * self.momentum**2) ** 0.5) / 2
        ahead = (self.momentum - 1) / momentum
        if ahead == 0 or not self._try(torch.lerp(self.before, self.fitted, 1 + ahead)):
            momentum = 1.0
            self._try(self.fitted)
        self.momentum = momentum

    def _try(self, outputs: Tensor) -> bool:
        """A sweep of alternating least squares on the majoriser at `outputs`, if it lowers it."""
        targets = outputs - self.outputs.deviation(outputs)
        bias = targets.mean(dim=0)
        left = targets.T @ self.projected + self.anchor @ self.right
        right = self.white.T @ (targets @ left) + self.anchor.T @ left
        right = torch.linalg.qr(right).Q
        projected = self.white @ right
        left = targets.T @ projected + self.anchor @ right
        fitted = torch.addmm(bias, projected, left.T)
        loss = self._loss(fitted, left, right)
        if not loss < self.loss:
            return False
        self.before, self.fitted, self.projected = self.fitted, fitted, projected
        self.left, self.right, self.bias, self.loss = left, right, bias, loss
        return True

    def _loss(self, fitted: Tensor, left: Tensor, right: Tensor) -> float:
        square = sum(
            self.outputs.bounded_square(fitted[rows], rows)
            for rows in row_blocks(len(fitted), _ROWS_AT_ONCE)
        )
        moved = (left @ right.T) / self.scale - self.origin
        return (square + self.ridge * moved.square().sum()).item()

    def answer(self) -> tuple[Tensor, Tensor]:
        weight = self.left @ ((self.right.T / self.scale) @ self.vectors.T)
        return weight, self.bias - weight @ self.geometry.mean
