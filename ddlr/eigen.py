"""Eigenvectors of symmetric matrices, also where LAPACK finds none at first."""

import numpy as np
import torch
from torch import Tensor


def symmetric_eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors, as columns, of a symmetric matrix.

    `torch.linalg.eigh` may not converge, or return nan, where many eigenvalues are equal, as the
    zeros of the Gram matrix of a sparse weight without some of its rows are. Such a matrix goes to
    numpy, whose LAPACK is another one, in float64.

    Raises
    ------
    numpy.linalg.LinAlgError
        If neither finds them, as for a matrix that is not finite.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        pass
    else:
        if vectors.isfinite().all():
            return values, vectors
    values, vectors = np.linalg.eigh(matrix.double().cpu().numpy())
    return torch.from_numpy(values).to(matrix), torch.from_numpy(vectors).to(matrix)
