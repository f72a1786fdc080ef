"""The inputs of a layer as the solvers use them: centred, as they are, or in principal coordinates.

Samples are worked on in blocks of rows, so that no further copy of them is held as a whole.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from ddlr.eigen import symmetric_eigen

# Samples that stay in the processor's cache from one operation on them to the next.
BLOCK_ROWS = 512


def row_blocks(samples: int, block_rows: int = BLOCK_ROWS) -> list[slice]:
    """Slices of at most `block_rows` samples that together cover all of them."""
    return [slice(start, start + block_rows) for start in range(0, samples, block_rows)]


@dataclass(frozen=True)
class CentredInputs:
    """The inputs of a layer, their mean, and the eigenvectors of their centred Gram matrix.

    Solvers take it in the place of plain inputs: several solves of one layer then share the
    eigendecomposition. Centring takes the free bias out of the linear algebra: at the
    least-squares solution the bias is the mean of the residual. Each property is computed when it
    is first asked for, and kept. Xc below stands for `centred`.

    Attributes
    ----------
    inputs : Tensor, shape (samples, in_features)
    mean : Tensor, shape (in_features,)
    centred : Tensor, shape (samples, in_features)
    eigen : tuple of Tensor, shapes (rank,) and (in_features, rank)
    principal : PrincipalInputs
        The same inputs in the coordinates of the eigenvectors.
    free_bias : bool
        Whether problems on these inputs have a bias beside the weight.
    """

    inputs: Tensor
    free_bias: ClassVar[bool] = True

    @classmethod
    def of(cls, inputs: "Tensor | CentredInputs") -> "CentredInputs":
        """The centred inputs of a tensor; what is `CentredInputs` already stays as it is."""
        return inputs if isinstance(inputs, CentredInputs) else cls(inputs)

    @classmethod
    def with_eigen(cls, inputs: Tensor, eigen: tuple[Tensor, Tensor]) -> "CentredInputs":
        """Inputs whose property `eigen` is known from before."""
        made = cls(inputs)
        vars(made)["eigen"] = eigen
        return made

    @cached_property
    def mean(self) -> Tensor:
        return self.inputs.mean(dim=0)

    @cached_property
    def centred(self) -> Tensor:
        return self.inputs - self.mean

    def _exact_mean(self) -> Tensor:
        return self.inputs.mean(dim=0, dtype=torch.float64)

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of Xc^T Xc above rounding, ascending, and eigenvectors as columns.

        Decomposed in float64 on the smaller side of Xc.
        """
        samples, features = self.inputs.shape
        tall = samples >= features
        mean = self._exact_mean()
        # In blocks, so that the inputs are never held as a whole in float64.
        if tall:
            gram = mean.new_zeros(features, features)
            for rows in row_blocks(samples):
                block = self.inputs[rows].double() - mean
                gram.addmm_(block.T, block)
        else:
            gram = mean.new_zeros(samples, samples)
            for columns in row_blocks(features):
                block = self.inputs[:, columns].double() - mean[columns]
                gram.addmm_(block, block.T)
        values, vectors = symmetric_eigen(gram)
        rounding = max(samples, features) * torch.finfo(values.dtype).eps * values[-1]
        above = values > rounding
        values, vectors = values[above], vectors[:, above]
        if not tall:
            vectors = vectors / values.sqrt()
            blocks = (
                (self.inputs[:, columns].double() - mean[columns]).T @ vectors
                for columns in row_blocks(features)
            )
            vectors = torch.cat([block.to(self.inputs.dtype) for block in blocks])
        return values.to(self.inputs.dtype), vectors.to(self.inputs.dtype)

    @cached_property
    def principal(self) -> "PrincipalInputs":
        return PrincipalInputs(self)

    def to_coordinates(self, weight: Tensor) -> Tensor:
        """A weight for the inputs, in the coordinates of `centred`."""
        return weight

    def from_coordinates(self, weight: Tensor) -> Tensor:
        """A weight in the coordinates of `centred`, as one for the inputs."""
        return weight

    def solve_ridge(self, weight: Tensor, cross: Tensor, penalty: float) -> Tensor:
        """Solve a ridge regression on the centred inputs.

            minimise ||W - weight||_F^2 + penalty * ||Xc Wt - R||_F^2   over W

        Parameters
        ----------
        weight : Tensor, shape (out_features, in_features)
        cross : Tensor, shape (out_features, in_features)
            Rt Xc, all that is needed of the right side R.
        penalty : float
        """
        # Both forms divide by 1 + penalty * eigenvalue rather than subtract what is close to equal,
        # which float32 would not survive at large penalties.
        values, vectors = self.eigen
        gain = penalty * values
        if len(values) == vectors.shape[0]:
            right_side = weight + penalty * cross
            return ((right_side @ vectors) / (1 + gain)) @ vectors.T
        residual = cross @ vectors - (weight @ vectors) * values
        return weight + (residual * (penalty / (1 + gain))) @ vectors.T


class UncentredInputs(CentredInputs):
    """Inputs as they are, for problems without a free bias."""

    free_bias: ClassVar[bool] = False

    @cached_property
    def mean(self) -> Tensor:
        return torch.zeros_like(self.inputs[0])

    @cached_property
    def centred(self) -> Tensor:
        return self.inputs

    def _exact_mean(self) -> Tensor:
        return self.mean.double()


class PrincipalInputs:
    """Centred inputs in their principal coordinates, for norms that a rotation leaves alone.

    There the ridge regression is a division, and the dimensions in which the data do not vary are
    gone: no more columns are left than samples, or than the rank of the data. A weight of least
    nuclear norm has nothing in the dimensions that are gone.

    Attributes
    ----------
    mean : Tensor, shape (rank,)
    centred : Tensor, shape (samples, rank)
    eigen : tuple of Tensor
        As in `CentredInputs`.
    """

    def __init__(self, original: CentredInputs):
        self.eigen = self._values, self._vectors = original.eigen
        inputs = original.inputs
        self.mean = original.mean @ self._vectors
        self.centred = inputs.new_empty(len(inputs), len(self._values))
        for rows in row_blocks(len(inputs)):
            torch.mm(inputs[rows] - original.mean, self._vectors, out=self.centred[rows])

    def to_coordinates(self, weight: Tensor) -> Tensor:
        """A weight for the original inputs, in the coordinates of `centred`."""
        return weight @ self._vectors

    def from_coordinates(self, weight: Tensor) -> Tensor:
        """A weight in the coordinates of `centred`, as one for the original inputs."""
        return weight @ self._vectors.T

    def solve_ridge(self, weight: Tensor, cross: Tensor, penalty: float) -> Tensor:
        """Solve a ridge regression, as `CentredInputs.solve_ridge`."""
        return torch.add(weight, cross, alpha=penalty) / (1 + penalty * self._values)
