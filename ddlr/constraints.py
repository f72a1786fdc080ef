"""The two convex output sets: outputs from which a layer's target is reproduced within a radius.

With Omega = {Y > 0} for a layer followed by ReLU, and everything for one that is not, the
deviation of an output A is D = A - Y on Omega and max(A, 0) off it. Then

    hinge       ||D||_F <= radius
    net_trim    ||D||_F <= radius and D = 0 off Omega

Both imply ||relu(A) - Y||_F <= radius; `net_trim` is the smaller set (Aghasi et al. 2020, eq. 6).
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

ACTIVATIONS = ("relu", "none")
CONSTRAINTS = ("net_trim", "hinge")


@dataclass(frozen=True)
class OutputSet:
    """One of the two sets, for `targets` of shape (samples, out_features)."""

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

    @cached_property
    def active(self) -> Tensor | None:
        """1 on Omega and 0 off it, or None where Omega is everything.

        In the dtype of the targets: multiplying by it is several times faster than masking.
        """
        return (self.targets > 0).to(self.targets.dtype) if self.activation == "relu" else None

    def deviation(self, outputs: Tensor) -> Tensor:
        """D: what in `outputs` departs from the targets, shape (samples, out_features)."""
        on, off = self._split_deviation(outputs)
        return on if off is None else on.add_(off)

    def project(self, outputs: Tensor) -> Tensor:
        """Euclidean projection: shrink the deviation radially, clearing it first where forbidden.

        For `net_trim` the deviation off Omega is cleared and the rest shrunk to the radius.
        """
        on, off = self._split_deviation(outputs)
        if off is None:
            shrunk, projected = on, outputs.clone()
        elif self.constraint == "hinge":
            shrunk, projected = on.add_(off), outputs.clone()
        else:
            shrunk, projected = on, outputs - off
        size = torch.linalg.vector_norm(shrunk)
        # The minimum covers an output inside the ball, also one without any deviation (0 / 0).
        keep = torch.clamp(self.radius / size, max=1).nan_to_num_(nan=1.0)
        return projected.sub_(shrunk.mul_(1 - keep))

    def _split_deviation(self, outputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """D on Omega, and D off it (None where Omega is everything)."""
        difference = outputs - self.targets
        if self.active is None:
            return difference, None
        on = difference * self.active
        return on, difference.sub_(on).clamp_(min=0)

    def violation(self, outputs: Tensor) -> float:
        """max(0, ||D||_F / radius - 1); for radius 0, ||D||_F relative to ||targets||_F."""
        return relative_violation(
            torch.linalg.vector_norm(self.deviation(outputs)).item(),
            self.radius,
            torch.linalg.vector_norm(self.targets).item(),
        )

    def best_constant_output(self) -> Tensor:
        """The bias with the smallest deviation when every weight is zero, shape (out_features,).

        For `net_trim` an output that is off on some sample may not be positive, so its bias is 0.
        """
        mean = self.targets.mean(dim=0)
        if self.constraint == "net_trim" and self.active is not None:
            mean = mean * self.active.amin(dim=0)
        return mean


def relative_violation(deviation_norm: float, radius: float, targets_norm: float) -> float:
    """How far a deviation exceeds the radius, relative to it (to the targets for radius 0)."""
    scale = radius or targets_norm or 1.0
    return max(0.0, (deviation_norm - radius) / scale)
