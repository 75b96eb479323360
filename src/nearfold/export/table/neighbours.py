"""Searches in core ATen: every score of a query and a key, then topk.

All M x R scores are held, which `nearfold::select` never does: an exporter's runtime has no operator that does not.

Shape legend: B batch, H heads (I of an indexer), M queries, R keys, e embedded features, k slots, c candidates.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.kernels.names import DOT_LIKE, INVALID, LOST, NORMED
from nearfold.kernels.select import wide
from nearfold.kernels.select_torch import MARGIN, bits, forbidden
from nearfold.lower.geometry import surely

NEVER = float("-inf")


def first(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of the last axis, best first, and where: what ONNX's TopK gives, the lowest place among equals."""
    value, at = score.topk(k, -1)
    return value, at


def keyed(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same where topk takes any place among equals: score and place make one integer."""
    if score.dtype != torch.float32:
        value, at = score.sort(stable=True, dim=-1, descending=True)
        return value[..., :k], at[..., :k]
    last = score.shape[-1] - 1
    place = torch.arange(score.shape[-1], device=score.device)
    at = last - (((bits(score) << 31) | (last - place)).topk(k, -1).values & 0x7FFFFFFF)
    return score.gather(-1, at), at


Best = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def _padded(score: Tensor, k: int) -> Tensor:
    """Scores of at least k places; those beyond what there is are -inf."""
    return score if surely(score.shape[-1] >= k) else F.pad(score, (0, k), value=NEVER)


def _scores(query: Tensor, key: Tensor, metric: str) -> Tensor:
    """(B, H, M, R): dot products, or minus squared euclidean or chebyshev distances."""
    if metric in DOT_LIKE:
        dot = query @ key.mT
        return dot.clamp(-1, 1) if metric == "cosine" else dot
    if metric == "chebyshev":
        return -(query[..., :, None, :] - key[..., None, :, :]).abs().amax(-1)
    if metric == "euclidean":  # distances do not change, and fewer digits cancel; whole numbers stay whole
        centre = torch.where(key.isfinite(), key, 0).mean(2, keepdim=True).round()
        query, key = query - centre, key - centre
    q, k = query.square().sum(-1), key.square().sum(-1)
    return 2 * (query @ key.mT) - (q[..., :, None] + k[..., None, :])


def _exactly(query: Tensor, key: Tensor, value: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Minus squared distances of candidates (B, H, M, c), and their places, the lowest place first."""
    at = torch.where(value == NEVER, key.shape[2], at)
    at = -(-at).topk(at.shape[-1], -1).values
    there = at < key.shape[2]
    rows = torch.where(there, at, 0).flatten(2)[..., None].expand(-1, -1, -1, key.shape[3])
    near = key.gather(2, rows).unflatten(2, at.shape[2:])
    apart = (query[..., None, :] - near).square().sum(-1)
    return torch.where(there, -apart, NEVER), torch.where(there, at, 0)


def select(
    query: Tensor,
    key: Tensor,
    k: int,
    metric: str,
    squared: bool,
    query_index: Tensor,
    key_index: Tensor,
    grid: list[int],
    rule: list[int],
    own: bool,
    again: float,
    recall: float = 1.0,
    *,
    best: Best = keyed,
) -> tuple[Tensor, Tensor]:
    """`nearfold::select`, exact at any ``recall``."""
    query, key = wide(query), wide(key)
    rooted = metric in NORMED and not squared
    mine = key_index == query_index[:, None]
    rank_again = -again * again if rooted and again < 0 else again
    score = _scores(query, key, metric)
    bad = forbidden(query_index, key_index, grid, rule)
    if bad is not None:
        score = score.masked_fill(bad, NEVER)
    if own:
        score = score.masked_fill(mine, rank_again)
    score = score.masked_fill(score.isnan(), NEVER)
    if metric == "euclidean":
        value, at = _exactly(query, key, *first(_padded(score, k + MARGIN), k + MARGIN))
        if own:
            value = value.masked_fill((key_index[at] == query_index[:, None]) & (value > NEVER), rank_again)
        value = value.masked_fill(value.isnan(), NEVER)
        value, order = best(value, k)
        at = at.gather(-1, order)
    else:
        value, at = best(_padded(score, k), k)
    none = value == NEVER
    if rooted:
        root = -(-value).clamp(min=0).sqrt()
        at_own = key_index[torch.where(none, 0, at)] == query_index[:, None]
        value = root.masked_fill(at_own & ~none, again) if own else root
    lost = query.isnan().any(-1, keepdim=True)
    at = torch.where(none, INVALID, at).masked_fill(lost, LOST)
    return value.masked_fill(lost, float("nan")), at


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
    *,
    best: Best = keyed,
) -> Tensor:
    """`nearfold::choose`."""
    query, share, key = wide(query), wide(share), wide(key)
    each_BMIR = (query @ key.mT[:, None]).relu()
    score = (share[:, :, None] @ each_BMIR)[:, :, 0]
    bad = forbidden(query_index, key_index, grid, rule)
    if bad is not None:
        score = score.masked_fill(bad, NEVER)
    if own:
        score = score.masked_fill(key_index == query_index[:, None], NEVER)
    value, at = best(_padded(score.masked_fill(score.isnan(), NEVER), k), k)
    none = value == NEVER
    found = torch.where(none, INVALID, key_index[torch.where(none, 0, at)])
    return found.masked_fill(query.isnan().any(-1).any(-1)[..., None], LOST)
