"""The two convex output sets: outputs from which a layer's targets are reproduced within a radius.

Omega is {Y > 0} for a layer followed by ReLU, and everything for one that is not. The deviation of
outputs A from targets Y is D = A - Y on Omega and max(A, 0) off it. The sets are

    hinge      ||D||_F <= radius
    nettrim    ||D||_F <= radius and D = 0 off Omega

Both imply ||relu(A) - Y||_F <= radius; `nettrim` is the smaller set (Aghasi et al. 2020, eq. 6).
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

ACTIVATIONS = ("relu", "none")
CONSTRAINTS = ("nettrim", "hinge")
ALL_ROWS = slice(None)


@dataclass(frozen=True)
class OutputSet:
    """One of the two convex sets of outputs from which a layer's targets are reproduced.

    Attributes
    ----------
    targets : Tensor, shape (samples, out_features)
        Output of the original layer, after its activation.
    radius : float
        Frobenius bound on the deviation, in units of `targets`.
    activation : {"relu", "none"}
    constraint : {"nettrim", "hinge"}

    Raises
    ------
    ValueError
        If an option is unknown, the radius negative or not finite, or a target of ReLU negative.
    """

    targets: Tensor
    radius: float
    activation: str
    constraint: str

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}; choose one of {ACTIVATIONS}")
        if self.constraint not in CONSTRAINTS:
            raise ValueError(f"constraint is {self.constraint!r}; choose one of {CONSTRAINTS}")
        if not (math.isfinite(self.radius) and self.radius >= 0):
            raise ValueError(f"radius is {self.radius}; it must be a number that is not negative")
        if self.activation == "relu" and (self.targets < 0).any():
            raise ValueError("targets of a ReLU layer must not be negative")

    def deviation(self, outputs: Tensor) -> Tensor:
        """The deviation D of `outputs` from the targets, shape (samples, out_features)."""
        on, off = self._split_deviation(outputs, ALL_ROWS)
        return on if off is None else on.add_(off)

    def project(self, outputs: Tensor) -> Tensor:
        """The Euclidean projection of `outputs` on the set."""
        shrink_factor = self.shrink_factor(self.bounded_square(outputs))
        return outputs - self.displacement(outputs, shrink_factor)

    @cached_property
    def _floor(self) -> Tensor:
        """The lowest outputs that reproduce the targets; the highest are the targets."""
        if self.activation == "none":
            return self.targets
        return self.targets.masked_fill(self.targets == 0, -math.inf)

    def nearest(self, outputs: Tensor, rows: slice = ALL_ROWS, out: Tensor | None = None) -> Tensor:
        """The outputs nearest to `outputs`, of the samples `rows`, that reproduce the targets.

        These are the outputs minus their deviation, in one pass.
        """
        return torch.clamp(outputs, self._floor[rows], self.targets[rows], out=out)

    def bounded_square(self, outputs: Tensor, rows: slice = ALL_ROWS) -> Tensor:
        """The squared norm of that part of the deviation which the radius bounds.

        `outputs` are those of the samples `rows`; `shrink_factor` takes the sum over all rows.
        """
        on, off = self._split_deviation(outputs, rows)
        if off is not None and self.constraint == "hinge":
            on.add_(off)
        return on.square_().sum()

    def shrink_factor(self, square: Tensor) -> Tensor:
        """The factor, from 0 to 1, by which projection shrinks the deviation that is bounded.

        `square` is the `bounded_square` of all samples.
        """
        # The minimum covers an output inside the ball, also one without any deviation (0 / 0).
        return torch.clamp(self.radius / square.sqrt(), max=1).nan_to_num_(nan=1.0)

    def displacement(
        self, outputs: Tensor, shrink_factor: Tensor, rows: slice = ALL_ROWS
    ) -> Tensor:
        """`outputs` minus their projection, for the samples `rows`.

        The projection shrinks the deviation radially; for `nettrim` it clears it off Omega and
        shrinks it on Omega.
        """
        on, off = self._split_deviation(outputs, rows)
        if off is None:
            return on.mul_(1 - shrink_factor)
        if self.constraint == "hinge":
            return on.add_(off).mul_(1 - shrink_factor)
        return on.mul_(1 - shrink_factor).add_(off)

    def _split_deviation(self, outputs: Tensor, rows: slice) -> tuple[Tensor, Tensor | None]:
        """D on Omega, and D off it (None where Omega is everything)."""
        targets = self.targets[rows]
        difference = outputs - targets
        if self.activation == "none":
            return difference, None
        # The sign of a target is 1 on Omega and 0 off it; multiplying is faster than masking.
        on = difference * targets.sign()
        return on, difference.sub_(on).clamp_(min=0)

    def violation(self, outputs: Tensor) -> float:
        """The excess max(0, ||D||_F / radius - 1); for radius 0, ||D||_F / ||targets||_F."""
        return relative_violation(
            torch.linalg.vector_norm(self.deviation(outputs)).item(),
            self.radius,
            torch.linalg.vector_norm(self.targets).item(),
        )

    def best_constant_output(self) -> Tensor:
        """The bias with the smallest deviation when every weight is zero, shape (out_features,).

        For `nettrim` an output that is off on some sample may not be positive, so its bias is 0.
        """
        mean = self.targets.mean(dim=0)
        if self.constraint == "nettrim" and self.activation == "relu":
            mean = mean * (self.targets > 0).all(dim=0)
        return mean


def relative_violation(deviation_norm: float, radius: float, targets_norm: float) -> float:
    """The excess of a deviation over the radius, relative to it (to the targets for radius 0)."""
    scale = radius or targets_norm or 1.0
    return max(0.0, (deviation_norm - radius) / scale)
