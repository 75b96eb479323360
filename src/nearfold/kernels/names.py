"""Names the kernels share."""

import torch

INVALID = -1  # a slot that reads nothing
LOST = -2  # a slot of a query that was NaN
DOT_LIKE = ("dot", "cosine")
LOW = (torch.bfloat16, torch.float16)  # computed in float32
NORMED = ("euclidean", "gram")
