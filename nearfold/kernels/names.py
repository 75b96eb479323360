"""Names the kernels share."""

INVALID = -1  # a slot that reads nothing
LOST = -2  # a slot of a query that was NaN
DOT_LIKE = ("dot", "cosine")
NORMED = ("euclidean", "gram")
