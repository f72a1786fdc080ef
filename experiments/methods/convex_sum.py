"""The paper's program for both structures at once, as a method: low rank plus sparse, convex."""

from torch import Tensor, nn

from ddlr.method import Method
from ddlr.reduced_rank import RIDGE
from ddlr.sizes import layer_size
from experiments.methods.sparse_low_rank import refit_sum
from nettrim.low_rank_plus_sparse import solve_low_rank_plus_sparse
from nettrim.sums import PARTS, store_sum


def store_smaller_sum(weight: Tensor, bias: Tensor, **parts: Tensor) -> nn.Module | None:
    """As `store_sum`, but None where both parts together store no less than the weight."""
    layer = store_sum(weight, bias, **parts)
    if layer is None or layer_size(layer).parameters >= weight.numel():
        return None
    return layer


# Minimises ||L||_* + t sum |S|; the refit keeps the rank and the support that this finds.
LOW_RANK_PLUS_SPARSE = Method(
    name="low_rank_plus_sparse",
    solver=solve_low_rank_plus_sparse,
    options={
        "constraint": "nettrim",
        "sparsity_weight": None,
        "tolerance": 1e-2,
        "max_iterations": 5000,
    },
    # On compressed inputs the set `nettrim` may be empty; `hinge` always holds the original weight.
    on_compressed_inputs={"constraint": "hinge"},
    refit=refit_sum,
    refit_options={"ridge": RIDGE},
    store=store_smaller_sum,
    parts=PARTS,
)
