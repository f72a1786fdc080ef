"""A sparse layer, stored and run as a matrix in CSR (compressed sparse rows)."""

import warnings

import torch
from torch import Tensor, nn

from ddlr.index_sets import index_dtype
from ddlr.stored_form import StoredForm

# The product of MKL takes these, and converts others in each call.
_RUN_DTYPE = torch.int32
_HALF = (torch.float16, torch.bfloat16)

# The first such tensor of a process warns that the layout is new; later ones do not.
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
    torch.zeros(1, 1).to_sparse_csr()


class SparseLinear(StoredForm, nn.Module):
    """A linear layer that stores the nonzeros of its weight, and multiplies by these alone.

    The state dict has the nonzeros row by row, as `values`, with the column of each, and where each
    row ends; both of these in the smallest integers that fit.

    Parameters
    ----------
    in_features, out_features, nonzeros : int
    bias : bool
        Values and bias are 0, until `from_weight` or `load_state_dict` say otherwise.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nonzeros: int,
        bias: bool = True,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features, self.nonzeros = in_features, out_features, nonzeros
        values = torch.zeros(nonzeros, dtype=dtype, device=device)
        self.values = nn.Parameter(values)
        self.bias = nn.Parameter(values.new_zeros(out_features)) if bias else None
        # As many as fit into each row in turn.
        places = torch.arange(nonzeros, device=device)
        ends = torch.arange(1, out_features + 1, device=device) * in_features
        self._hold(places % max(in_features, 1), ends.clamp(max=nonzeros))

    @classmethod
    @torch.no_grad()
    def from_weight(cls, weight: Tensor, bias: Tensor | None) -> "SparseLinear":
        """The layer of a weight of shape (out_features, in_features), of its nonzeros."""
        rows, columns = weight.nonzero(as_tuple=True)
        layer = cls(
            weight.shape[1],
            weight.shape[0],
            len(rows),
            bias=bias is not None,
            dtype=weight.dtype,
            device=weight.device,
        )
        layer.values.copy_(weight[rows, columns])
        layer._hold(columns, rows.bincount(minlength=len(weight)).cumsum(0))
        if bias is not None:
            layer.bias.copy_(bias)
        return layer

    def forward(self, inputs: Tensor) -> Tensor:
        if torch.compiler.is_exporting():  # for whom a sparse product is no operation
            return nn.functional.linear(inputs, self.weight, self.bias)
        return self._product(inputs)

    @torch.compiler.disable
    def _product(self, inputs: Tensor) -> Tensor:
        batch = inputs.reshape(-1, self.in_features).T
        values, half = self.values, self.values.dtype in _HALF and self.values.device.type == "cpu"
        if half:  # for which there is no sparse product on a CPU
            values, batch = values.float(), batch.float()
        # The sparse matrix times a vector is 2 to 5 times as fast as times a matrix of one column.
        # `nn.functional.linear` would take the batch as rows, and a way several times slower.
        alone = batch.shape[1] == 1
        outputs = self._csr(values) @ (batch[:, 0] if alone else batch)
        outputs = outputs[None] if alone else outputs.T
        if half:
            outputs = outputs.to(self.values.dtype)
        outputs = outputs.reshape(*inputs.shape[:-1], self.out_features)
        return outputs if self.bias is None else outputs + self.bias

    @property
    def weight(self) -> Tensor:
        """The weight with its zeros, shape (out_features, in_features)."""
        counts = self._starts.diff()
        rows = torch.repeat_interleave(counts, output_size=self.nonzeros)
        weight = self.values.new_zeros(self.out_features, self.in_features)
        return weight.index_put((rows, self._columns), self.values)

    def _csr(self, values: Tensor) -> Tensor:
        """The weight, sharing the memory of its values; it takes 4 microseconds to make."""
        shape = (self.out_features, self.in_features)
        return torch.sparse_csr_tensor(
            self._starts, self._columns, values, shape, check_invariants=False
        )

    def _hold(self, columns: Tensor, ends: Tensor) -> None:
        starts = torch.cat([ends.new_zeros(1), ends])
        self.register_buffer("columns", columns.to(index_dtype(max(self.in_features - 1, 0))))
        self.register_buffer("starts", starts.to(index_dtype(self.nonzeros)))
        self._arrange()

    def _arrange(self) -> None:
        """Put the indices into the form that products take; that is in memory alone."""
        for name in ("columns", "starts"):
            wide = getattr(self, name).to(_RUN_DTYPE if self.nonzeros < 2**31 else torch.int64)
            self.register_buffer(f"_{name}", wide, persistent=False)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, surplus, errors):
        known = len(errors)
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing, surplus, errors
        )
        if len(errors) > known:
            return
        wrong = self._wrong_indices()  # a product would read memory that is not its own
        if wrong:
            errors.append(f"{prefix}{wrong}")
        else:
            self._arrange()

    def _wrong_indices(self) -> str:
        columns, starts = self.columns.long(), self.starts.long()
        if bool((columns >= self.in_features).any() or (columns < 0).any()):
            return f"columns must be below in_features, {self.in_features}; one is not"
        if not (
            starts[0] == 0 and starts[-1] == self.nonzeros and bool((starts.diff() >= 0).all())
        ):
            return f"starts must rise from 0 to the number of nonzeros, {self.nonzeros}"
        return ""

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"nonzeros={self.nonzeros}, bias={self.bias is not None}"
        )
