"""What is added to a score for the offset between query and key alone: a learned table, or ALiBi.

Shape legend: H heads, M outputs, S slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nearfold.grammar import Basic
from nearfold.lower.meaning import meaning


def slopes(heads: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """ALiBi's factors (H,): 2^(-8 h / H), h = 1 .. H (arXiv 2108.12409; for any H, not powers of two only)."""
    return 2.0 ** (-8.0 * torch.arange(1, heads + 1, device=device, dtype=dtype) / heads)


def alibi(op: Basic, far_MS: Tensor) -> Tensor:
    """ALiBi's bias (H, M, S) at these distances."""
    return -slopes(op.weight.heads, far_MS.device, far_MS.dtype)[:, None, None] * far_MS


def has_bias(op: Basic) -> bool:
    """Whether scores get a bias."""
    return op.path.similarity.bias != "none"


def score_bias(
    op: Basic, params: dict[str, Tensor], grid: tuple[int, ...], query_M: Tensor, like: Tensor
) -> Tensor | None:
    """What is added to the scores (H, M, S), or None. ``query_M``: for path `all`, the positions that are queries."""
    return meaning(op.path).bias(op, params, grid, query_M, like) if has_bias(op) else None
