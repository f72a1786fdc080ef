"""Net-Trim, reimplemented: sparse fully connected layers by convex programs, with certificates."""

from nettrim.prune import prune
from nettrim.sparse import solve_sparse

__all__ = ["prune", "solve_sparse"]
