"""Net-Trim, reimplemented: sparse fully connected layers by convex programs, with certificates."""

from nettrim.low_rank_plus_sparse import solve_low_rank_plus_sparse
from nettrim.pruning import prune
from nettrim.sparse import refit_sparse, solve_sparse

__all__ = ["prune", "refit_sparse", "solve_low_rank_plus_sparse", "solve_sparse"]
