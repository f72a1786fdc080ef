"""Net-Trim, reimplemented: sparse fully connected layers by convex programs, with certificates."""

from nettrim.pruning import prune
from nettrim.sparse import refit_sparse, solve_sparse

__all__ = ["prune", "refit_sparse", "solve_sparse"]
