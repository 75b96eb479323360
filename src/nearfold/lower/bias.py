"""What is added to a score for the offset between query and key alone: a learned table, or ALiBi.

Shape legend: H heads, M outputs, S slots, N positions, a grid axes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nearfold.grammar import Basic
from nearfold.grammar.similarity import Place, Scaled
from nearfold.grammar.words import All
from nearfold.lower.parameters import as_tuple, bias_reach
from nearfold.lower.windows import flatten, window_reads


def slopes(heads: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """ALiBi's factors (H,): 2^(-8 h / H), h = 1 .. H (arXiv 2108.12409; for any H, not powers of two only)."""
    return 2.0 ** (-8.0 * torch.arange(1, heads + 1, device=device, dtype=dtype) / heads)


def _alibi(op: Basic, far_MS: Tensor) -> Tensor:
    return -slopes(op.weight.heads, far_MS.device, far_MS.dtype)[:, None, None] * far_MS


def has_bias(op: Basic) -> bool:
    """Whether scores get a bias."""
    return getattr(op.path.similarity, "bias", "none") != "none"


def score_bias(
    op: Basic, params: dict[str, Tensor], grid: tuple[int, ...], query_M: Tensor, like: Tensor
) -> Tensor | None:
    """What is added to the scores (H, M, S), or None. ``query_M``: for path `all`, the positions that are queries."""
    near = op.path.similarity
    if not isinstance(near, Scaled) or near.bias == "none":
        return None
    if isinstance(op.path, All):
        at_aN = Place(grid, like.device, like.dtype).index().T.to(torch.promote_types(like.dtype, torch.float32))
        far_MS = sum((at_N[query_M][:, None] - at_N).square() for at_N in at_aN).sqrt()
        return _alibi(op, far_MS).to(like.dtype)
    at_MSa, valid_MS, home_Ma = window_reads(op, grid, like.device)
    offset_MSa = (home_Ma[:, None] - at_MSa).masked_fill(~valid_MS[..., None], 0)
    if near.bias == "alibi":
        wide = torch.promote_types(like.dtype, torch.float32)
        return _alibi(op, offset_MSa.to(wide).square().sum(-1).sqrt()).to(like.dtype)
    reach = bias_reach(op, len(grid))
    dilations = as_tuple(getattr(op.path, "dilation", 1), len(grid), "dilation")
    # how far the query lies behind the key, in steps of the dilation, as Swin counts; from no tensor of the
    # host, which a CUDA graph could not hold
    behind = [offset_MSa[..., a] // step + n - 1 for a, (step, n) in enumerate(zip(dilations, reach, strict=True))]
    row_MS = flatten(torch.stack(behind, -1), tuple(2 * n - 1 for n in reach))
    return params["relative_bias"].to(like.dtype).flatten(1)[:, row_MS]
