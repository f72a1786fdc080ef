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
    def inactive(self) -> Tensor | None:
        """Entries off Omega, or None where there are none by definition."""
        return self.targets <= 0 if self.activation == "relu" else None

    @cached_property
    def _lower(self) -> Tensor:
        # On Omega the deviation-free interval is the point [Y, Y], off it (where Y = 0) (-inf, Y].
        if self.inactive is None:
            return self.targets
        return self.targets.masked_fill(self.inactive, -math.inf)

    def nearest_exact(self, outputs: Tensor) -> Tensor:
        """The nearest output without deviation: ``outputs - deviation(outputs)``."""
        return torch.clamp(outputs, self._lower, self.targets)

    def deviation(self, outputs: Tensor) -> Tensor:
        """D: what in `outputs` departs from the targets, shape (samples, out_features)."""
        return outputs - self.nearest_exact(outputs)

    def project(self, outputs: Tensor) -> Tensor:
        """Euclidean projection: shrink the deviation radially, clearing it first where forbidden.

        For `net_trim` the deviation off Omega is cleared and the rest shrunk to the radius.
        """
        exact = self.nearest_exact(outputs)
        deviation = outputs - exact
        if self.constraint == "net_trim" and self.inactive is not None:
            deviation.masked_fill_(self.inactive, 0)
        size = torch.linalg.vector_norm(deviation)
        # The minimum covers an output inside the ball, also one without any deviation (0 / 0).
        shrink = torch.clamp(self.radius / size, max=1).nan_to_num_(nan=1.0)
        return exact.addcmul_(deviation, shrink)

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
        if self.constraint == "net_trim" and self.inactive is not None:
            mean = mean.masked_fill(self.inactive.any(dim=0), 0)
        return mean


def relative_violation(deviation_norm: float, radius: float, targets_norm: float) -> float:
    """How far a deviation exceeds the radius, relative to it (to the targets for radius 0)."""
    scale = radius or targets_norm or 1.0
    return max(0.0, (deviation_norm - radius) / scale)
