"""Names the kernels share, and what they ask of every tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nearfold._numbers import shown

INVALID = -1  # a slot that reads nothing
LOST = -2  # a slot of a query that was NaN
DOT_LIKE = ("dot", "cosine")
LOW = (torch.bfloat16, torch.float16)  # computed in float32
NORMED = ("euclidean", "gram")


def require_tensors(**given: Any) -> None:
    """ValueError naming the first argument that is no tensor."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a torch.Tensor, got {shown(value)}; torch.as_tensor makes one of numbers")
