"""Net-Trim, reimplemented: sparse fully connected layers by a convex program, or by search."""

from nettrim.low_rank_plus_sparse import solve_low_rank_plus_sparse
from nettrim.nonzeros import fewest_nonzeros, refit_nonzeros
from nettrim.pruning import prune
from nettrim.smallest import smallest_layer
from nettrim.sparse import refit_sparse, solve_sparse

__all__ = [
    "fewest_nonzeros",
    "prune",
    "refit_nonzeros",
    "refit_sparse",
    "smallest_layer",
    "solve_low_rank_plus_sparse",
    "solve_sparse",
]
