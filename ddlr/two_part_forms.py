"""Layers of two parts: sparse plus low rank, and the product of two sparse matrices."""

import torch
from torch import Tensor, nn

from ddlr.stored_form import StoredForm, store_linear


class SparsePlusLowRank(StoredForm, nn.Module):
    """A linear layer whose weight is a sparse matrix plus one of low rank, W = S + L R.

    Parameters
    ----------
    sparse : nn.Module
        The layer of S, without a bias: an `nn.Linear` with zeros, or a form of it.
    low_rank : nn.Module
        The layer of L R, with the bias of the whole: a `LowRankLinear`, or a form of it.

    Raises
    ------
    ValueError
        If the two have other numbers of inputs or outputs.
    """

    def __init__(self, sparse: nn.Module, low_rank: nn.Module):
        super().__init__()
        shapes = [(part.out_features, part.in_features) for part in (sparse, low_rank)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"sparse has shape {shapes[0]} and low_rank has shape {shapes[1]}")
        self.out_features, self.in_features = shapes[0]
        self.sparse, self.low_rank = sparse, low_rank

    def forward(self, inputs: Tensor) -> Tensor:
        return self.sparse(inputs) + self.low_rank(inputs)

    @property
    def parts(self) -> tuple[nn.Module, nn.Module]:
        return self.sparse, self.low_rank

    @property
    def weight(self) -> Tensor:
        """The sum of the parts, shape (out_features, in_features)."""
        return self.sparse.weight + self.low_rank.weight

    @property
    def bias(self) -> Tensor | None:
        return self.low_rank.bias


class SparseFactors(StoredForm, nn.Module):
    """A linear layer whose weight is the product of two sparse matrices, W = A B.

    Parameters
    ----------
    first : nn.Module
        The layer of B, of shape (inner, in_features), without a bias: an `nn.Linear` with zeros, or
        a form of it.
    last : nn.Module
        The layer of A, of shape (out_features, inner), with the bias of the whole.

    Raises
    ------
    ValueError
        If the first has another number of outputs than the last has inputs.
    """

    def __init__(self, first: nn.Module, last: nn.Module):
        super().__init__()
        if first.out_features != last.in_features:
            raise ValueError(
                f"first has {first.out_features} outputs and last has {last.in_features} inputs"
            )
        self.in_features, self.out_features = first.in_features, last.out_features
        self.first, self.last = first, last

    @classmethod
    @torch.no_grad()
    def from_factors(cls, left: Tensor, right: Tensor, bias: Tensor | None) -> "SparseFactors":
        """The layer of weight ``left @ right``, without what does not count in the product.

        Parameters
        ----------
        left, right : Tensor, shapes (out_features, inner) and (inner, in_features)
        bias : Tensor of shape (out_features,), or None
        """
        used = (left != 0).any(dim=0) & (right != 0).any(dim=1)
        return cls(store_linear(right[used], None), store_linear(left[:, used], bias))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.first(inputs))

    @torch.no_grad()
    def clear_unused(self) -> None:
        """Set to zero, in place, what does not count in the product. Parts are `nn.Linear`."""
        given = (self.first.weight != 0).any(dim=1)
        read = (self.last.weight != 0).any(dim=0)
        self.first.weight[~read] = 0
        self.last.weight[:, ~given] = 0

    @property
    def parts(self) -> tuple[nn.Module, nn.Module]:
        return self.first, self.last

    @property
    def weight(self) -> Tensor:
        """The product of the parts, shape (out_features, in_features)."""
        return self.last.weight @ self.first.weight

    @property
    def bias(self) -> Tensor | None:
        return self.last.bias


# Forms that are made of two layers, each in a form of its own.
TWO_PART_FORMS = (SparsePlusLowRank, SparseFactors)
