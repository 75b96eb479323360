"""`nearfold::choose`: the k best keys by a sum over heads of w * relu(q . k), an indexer's scores.

One operator, in PyTorch on every device: blocks of the scores are held, never all. It returns positions, which have no
gradient.

Shape legend: B batch, M queries, R keys, I heads, e features of one, k slots.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nearfold.kernels.names import INVALID, LOST, require_tensors
from nearfold.kernels.operator import operator
from nearfold.kernels.select import wide
from nearfold.kernels.select_torch import BLOCK_BYTES, forbidden, ranked


def index_scores(query: Tensor, share: Tensor, key: Tensor) -> Tensor:
    """Scores (B, m, R) of queries (B, m, I, e), their heads' weights (B, m, I) and keys (B, R, e)."""
    B, m, heads, _ = query.shape
    each = (query.flatten(1, 2) @ key.mT).relu().view(B, m, heads, -1)
    return (share[:, :, None] @ each)[:, :, 0]


def _require(query: Tensor, share: Tensor, key: Tensor, query_index: Tensor, key_index: Tensor, k: int) -> None:
    """ValueError where the operands do not fit one another."""
    require_tensors(query=query, share=share, key=key, query_index=query_index, key_index=key_index)
    fits = query.dim() == 4 and key.dim() == 3 and share.shape == query.shape[:3]
    if not fits or key.shape[::2] != query.shape[::3] or not query.dtype == share.dtype == key.dtype:
        raise ValueError(
            "query must be (B, M, I, e), share (B, M, I) and key (B, R, e) of one dtype, got "
            f"{tuple(query.shape)} {query.dtype}, {tuple(share.shape)} {share.dtype} and {tuple(key.shape)} {key.dtype}"
        )
    for name, index, n in (("query_index", query_index, query.shape[1]), ("key_index", key_index, key.shape[1])):
        if index.shape != (n,) or index.dtype != torch.long:
            raise ValueError(f"{name} must be ({n},) int64, got {tuple(index.shape)} {index.dtype}")
    if k < 0:
        raise ValueError(f"k must not be negative, got {k}")


@operator("nearfold::choose")
def choose(
    query: Tensor,
    share: Tensor,
    key: Tensor,
    k: int,
    query_index: Tensor,
    key_index: Tensor,
    grid: list[int],
    rule: list[int],
    own: bool,
) -> Tensor:
    """Positions (B, M, k) of the k best keys, best first, ties by the lowest; -1 where there are fewer, -2 for NaN.

    Args:
        query: (B, M, I, e); a query with a NaN in it chooses nothing.
        share: (B, M, I), what each head counts.
        key: (B, R, e); one with a NaN in it is never chosen.
        k: how many.
        query_index: (M,) int64, position of every query on the grid.
        key_index: (R,) int64, ascending, position of every key.
        grid: its sizes.
        rule: [causal, reach, dilation], as of `select`.
        own: whether the query's own position is left out.
    """
    _require(query, share, key, query_index, key_index, k)
    query, share, key = wide(query), wide(share), wide(key)
    B, M, heads, _ = query.shape
    R = key.shape[1]
    kept = min(k, R)
    found = torch.full((B, M, k), INVALID, dtype=torch.long, device=key.device)
    step = max(1, BLOCK_BYTES // max(B * heads * R * key.element_size(), 1))
    with torch.autocast(key.device.type, enabled=False):
        for start in range(0, M if kept and B else 0, step):
            rows = slice(start, min(start + step, M))
            score = index_scores(query[:, rows], share[:, rows], key)
            bad = forbidden(query_index[rows], key_index, grid, rule)
            if own:
                mine = key_index == query_index[rows, None]
                bad = mine if bad is None else bad | mine
            if bad is not None:
                score.masked_fill_(bad, float("-inf"))
            score.masked_fill_(score.isnan(), float("-inf"))
            value, at = ranked(score, kept)
            found[:, rows, :kept] = key_index[at].masked_fill(value == float("-inf"), INVALID)
    return found.masked_fill_(query.isnan().any(-1).any(-1)[..., None], LOST)


@choose.register_fake
def _(
    query: Tensor,
    share: Tensor,
    key: Tensor,
    k: int,
    query_index: Tensor,
    key_index: Tensor,
    grid: list[int],
    rule: list[int],
    own: bool,
) -> Tensor:
    return query.new_empty((*query.shape[:2], k), dtype=torch.long)


@register_flop_formula(torch.ops.nearfold.choose)
def _flops(query_shape, share_shape, key_shape, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    B, M, heads, e = query_shape
    return int(2 * B * M * heads * key_shape[1] * (e + 1))
