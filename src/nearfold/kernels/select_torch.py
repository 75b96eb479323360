"""`nearfold::select` in plain PyTorch: any device, any metric.

It never holds all M x R scores: the GEMM writes a block of a few MiB, which stays in cache, and topk reads it there.
The backward needs only the k chosen keys of a row.

Shape legend: P problems (batch x heads), M queries, R keys, e embedded features, k slots.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from nearfold.kernels.names import DOT_LIKE, INVALID, LOST, NORMED
from nearfold.kernels.search import Search

BLOCK_BYTES = 8 << 20  # of scores held at once
TILE_BYTES = 1 << 20  # of chosen keys held at once
MARGIN = 8  # candidates beyond k that exact distances rank


def bits(score: Tensor) -> Tensor:
    """Float32 -> int64, in the same order; the two zeros are one."""
    bits = (score + 0.0).view(torch.int32).long()
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def ranked(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of the last axis, ties by the lowest index. NaN must be gone."""
    best, index, tied = _classes(score, k) if _worth_classes(score.shape[-1], k) else _plain(score, k)
    if tied.any():
        # topk leaves the order of equal values open: rows with any are ranked again, exactly
        rows = score[tied]
        found = _exactly(rows, k)
        index[tied], best[tied] = found, rows.gather(-1, found)
    return best, index


def _exactly(score: Tensor, k: int) -> Tensor:
    """Indices of the k largest, ties by the lowest index: the index rides in the low bits of the key."""
    R = score.shape[-1]
    if score.dtype != torch.float32:
        return score.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    key = (bits(score) << 31) | (R - 1 - torch.arange(R, device=score.device))
    return R - 1 - (key.topk(k, -1).values & 0x7FFFFFFF)


def _plain(score: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """topk, and which rows hold equal values among the k and the one after."""
    best, index = score.topk(min(k + 1, score.shape[-1]), -1)
    tied = (best[..., 1:] == best[..., :-1]).any(-1)
    return best[..., :k], index[..., :k], tied


def _worth_classes(R: int, k: int) -> bool:
    return R >= 128 and _class_count(R, k) * 4 <= R


def _class_count(R: int, k: int) -> int:
    """Near sqrt(k R): then the two searches are of about one length."""
    count = 32
    while count * count < k * R:
        count *= 2
    return count


def _classes(score: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `_plain`, in two short searches: the k largest lie in the k column classes with the largest maxima.

    Column j is in class j mod G: the maxima are element-wise ones of contiguous pieces. Exact: k + 1 classes are
    kept, and a class left out has no larger maximum than any of theirs. If one equalled the k-th best, so would
    the (k + 1)-th best, and the row is reported as tied.
    """
    *lead, R = score.shape
    G = _class_count(R, k)
    whole = R // G * G
    parts = score[..., :whole].unflatten(-1, (R // G, G))
    column = parts.amax(-2).topk(k + 1, -1, sorted=False).indices
    within = parts.gather(-1, column[..., None, :].expand(*lead, R // G, k + 1)).flatten(-2)
    rest = score[..., whole:]
    best, place = (torch.cat([within, rest], -1) if whole < R else within).topk(k + 1, -1)
    tied = (best[..., 1:] == best[..., :-1]).any(-1)
    best, place = best[..., :k], place[..., :k]
    found = place // (k + 1) * G + column.gather(-1, place % (k + 1))
    if whole < R:
        found = torch.where(place < within.shape[-1], found, place - within.shape[-1] + whole)
    return best, found, tied


def _own_column(query_index: Tensor, key_index: Tensor) -> Tensor:
    """Column (M,) of every query's own position among the ascending keys; -1 where it is not one of them."""
    column = torch.searchsorted(key_index, query_index).clamp(max=len(key_index) - 1)
    return torch.where(key_index[column] == query_index, column, INVALID)


def forbidden(query_index: Tensor, key_index: Tensor, grid: list[int], rule: list[int]) -> Tensor | None:
    """Which keys (m, R) these queries may not choose, by ``rule`` = [causal, reach, dilation]; None: any is allowed."""
    causal, reach, dilation = rule
    bad = key_index[None, :] > query_index[:, None] if causal else None
    if reach < 0 and dilation == 1:
        return bad
    q, k = query_index.int(), key_index.int()
    for n in reversed(grid):
        apart = (q % n)[:, None] - (k % n)[None, :]
        q, k = q // n, k // n
        far = apart % dilation != 0
        if reach >= 0:
            far = far | (apart.abs() > reach)
        bad = far if bad is None else bad | far
    return bad


def _mask(
    score: Tensor, own: tuple[Tensor, Tensor] | None, again: float, forbidden: Tensor | None, clean: bool
) -> Tensor:
    if forbidden is not None:
        score.masked_fill_(forbidden, float("-inf"))
    if own is not None:
        score[:, own[0], own[1]] = again
    if not clean:
        score.masked_fill_(score.isnan(), float("-inf"))
    return score


def _score(metric: str, q: Tensor, k: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, out: Tensor) -> Tensor:
    """A block of scores (p, m, R), in ``out`` where it can: dot, minus squared euclidean or chebyshev distance."""
    if metric in DOT_LIKE:
        dot = torch.bmm(q, k.transpose(1, 2), out=out)
        return dot.clamp_(-1, 1) if metric == "cosine" else dot
    if metric == "chebyshev":
        apart = torch.cdist(q, k, p=float("inf"))  # drops a NaN that is not the last feature
        return -apart.masked_fill_(k.isnan().any(-1)[:, None], float("nan"))
    assert q_norm is not None and k_norm is not None
    torch.add(q_norm[:, :, None], k_norm[:, None, :], out=out)
    return out.baddbmm_(q, k.transpose(1, 2), beta=-1, alpha=2)


def select(query: Tensor, key: Tensor, search: Search) -> tuple[Tensor, Tensor]:
    """`nearfold.kernels.select.select` on (P, M, e) and (P, R, e)."""
    k, metric, squared, query_index, key_index, grid, rule, own, again = search
    P, M, _ = query.shape
    R = key.shape[1]
    kept = min(k, R)
    score = query.new_full((P, M, k), float("-inf"))
    index = torch.full((P, M, k), INVALID, dtype=torch.long, device=query.device)
    if score.numel() == 0 or R == 0:
        return score, index
    column = _own_column(query_index, key_index) if own else None
    # distances rank by their squares: a root rounds different ones to one value, and not alike on every machine
    rooted = metric in NORMED and not squared
    rank_again = -again * again if rooted and again < 0 else again
    # an overflow here only costs the careful path
    clean = bool((query.sum() + (0 if key is query else key.sum())).isfinite())
    q, near = query, key
    q_norm = k_norm = None
    if metric in NORMED:
        if metric == "euclidean" and clean:  # distances do not change, and fewer digits cancel
            centre = key.mean(1, keepdim=True)
            q, near = query - centre, key - centre
        q_norm, k_norm = q.square().sum(-1), near.square().sum(-1)
    row_bytes = R * query.element_size()
    if rule[1] >= 0 or rule[2] > 1:  # the mask takes a few integers for every score
        row_bytes *= 4
    m = max(1, min(M, BLOCK_BYTES // row_bytes))
    p = max(1, BLOCK_BYTES // (row_bytes * M)) if m == M else 1
    # one buffer for all blocks: memory that is fresh every time costs more to map than to fill
    buffer = query.new_empty(min(p, P) * m * R)
    for m0 in range(0, M, m):
        ms = slice(m0, min(m0 + m, M))
        banned = forbidden(query_index[ms], key_index, grid, rule)
        own_column = None if column is None else column[ms]
        own_at = None
        if own_column is not None:
            here = (own_column != INVALID).nonzero()[:, 0]
            own_at = here, own_column[here]
        for p0 in range(0, P, p):
            ps = slice(p0, min(p0 + p, P))
            shape = (ps.stop - p0, ms.stop - m0, R)
            out = buffer[: math.prod(shape)].view(shape)
            norms = (None, None) if q_norm is None or k_norm is None else (q_norm[ps, ms], k_norm[ps])
            block = _score(metric, q[ps, ms], near[ps], norms[0], norms[1], out)
            block = _mask(block, own_at, rank_again, banned, clean)
            if metric == "euclidean":
                slack = _slack(query.dtype, query.shape[2], *norms)
                found_score, found = _refined(
                    block, kept, slack, query[ps, ms], key[ps], own_column, rank_again, banned
                )
            else:
                found_score, found = ranked(block, kept)
            score[ps, ms, :kept], index[ps, ms, :kept] = found_score, found
    index.masked_fill_(score == float("-inf"), INVALID)
    if rooted:
        roots = -(-score).clamp(min=0).sqrt()
        score = roots if column is None else roots.masked_fill((index == column[:, None]) & (index >= 0), again)
    if not clean:
        lost = query.isnan().any(-1, keepdim=True)
        score.masked_fill_(lost, float("nan"))
        index.masked_fill_(lost, LOST)
    return score, index


def _slack(dtype: torch.dtype, e: int, q_norm: Tensor | None, k_norm: Tensor | None) -> Tensor:
    """How much rounding can move a squared distance that a GEMM made of norms and products: (p, m)."""
    assert q_norm is not None and k_norm is not None
    return (8 + e**0.5) * torch.finfo(dtype).eps * (q_norm + k_norm.amax(1, keepdim=True))


def _distance_rank(q: Tensor, rows: Tensor) -> Tensor:
    """Minus the squared distances (n, s) of queries (n, e) and keys (n, s, e), from differences, as the oracle."""
    return -(q[:, None] - rows).square().sum(-1)


def _refined(
    block: Tensor,
    k: int,
    slack: Tensor,
    query: Tensor,
    key: Tensor,
    column: Tensor | None,
    again: float,
    forbidden: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The k nearest of a block by exact distances, ties by the lowest index.

    The GEMM's distances choose k and a few more, the exact ones rank them. A row in which more keys than that are
    as near as the k-th, up to rounding, is searched again by exact distances to all keys.
    """
    p, m, R = block.shape
    more = min(R, k + MARGIN)
    rough, found = ranked(block, more)
    exact = torch.empty_like(rough)
    flat = exact.view(p * m, more)
    for part, _, q, rows in _chosen(query, key, found):
        flat[part] = _distance_rank(q, rows)
    exact.masked_fill_(rough == float("-inf"), float("-inf"))
    if column is not None:
        exact.masked_fill_(found == column[:, None], again)
    order = found.argsort(-1)
    order = order.gather(-1, exact.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices)
    exact, found = exact.gather(-1, order)[..., :k].contiguous(), found.gather(-1, order)[..., :k].contiguous()
    if more < R:
        last = rough[..., -1]
        unsure = ((last >= rough[..., k - 1] - 2 * slack) & (last > float("-inf"))).nonzero()
        for at in unsure.split(max(1, BLOCK_BYTES // (R * query.shape[2] * query.element_size()))):
            i, j = at.unbind(1)
            row = _distance_rank(query[i, j], key[i])
            if forbidden is not None:
                row.masked_fill_(forbidden[j], float("-inf"))
            if column is not None:
                row.masked_fill_(torch.arange(R, device=row.device) == column[j, None], again)
            row.masked_fill_(row.isnan(), float("-inf"))
            exact[i, j], found[i, j] = ranked(row, k)
    return exact, found


def _chosen(query: Tensor, key: Tensor, index: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Blocks of queries over all problems: (block, flat rows of key, queries (n, e), chosen keys (n, k, e))."""
    P, M, k = index.shape
    R, e = key.shape[1:]
    table, queries = key.reshape(P * R, e), query.reshape(P * M, e)
    flat = index.clamp(min=0).add_(torch.arange(P, device=key.device)[:, None, None] * R).reshape(P * M, k)
    size = max(1, TILE_BYTES // (k * e * query.element_size()))
    for start in range(0, P * M, size):
        block = slice(start, min(start + size, P * M))
        at = flat[block].reshape(-1)
        yield block, at, queries[block], table.index_select(0, at).view(-1, k, e)


def select_backward(
    grad: Tensor, query: Tensor, key: Tensor, index: Tensor, metric: str, squared: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `select`'s scores at query and key; ``grad`` is zero where the score was a constant."""
    P, M, k = index.shape
    d_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    d_key = torch.zeros_like(key, memory_format=torch.contiguous_format)
    flat_query, flat_key = d_query.view(P * M, query.shape[2]), d_key.view(P * key.shape[1], key.shape[2])
    flat_grad = grad.masked_fill(index < 0, 0).reshape(P * M, k)
    for block, at, q, rows in _chosen(query, key, index):
        g = flat_grad[block]
        if metric in DOT_LIKE:
            flat_query[block] = torch.bmm(g[:, None], rows)[:, 0]
            d_rows = g[..., None] * q[:, None]
        else:
            d_apart = _metric_grad(g, q[:, None] - rows, metric, squared)
            flat_query[block], d_rows = d_apart.sum(1), -d_apart
        flat_key.index_add_(0, at, d_rows.view(-1, key.shape[2]))
    return d_query, d_key


def _metric_grad(g: Tensor, apart: Tensor, metric: str, squared: bool) -> Tensor:
    """Gradient of -|apart| (zero at zero distance), -|apart|^2 or -max|apart|."""
    if metric == "chebyshev":
        largest = apart.abs().amax(-1, keepdim=True)
        hit = (apart.abs() == largest) & (largest > 0)
        return -g[..., None] * apart.sign() * hit / hit.sum(-1, keepdim=True).clamp(min=1)
    if squared:
        return -2 * g[..., None] * apart
    length = apart.square().sum(-1, keepdim=True).sqrt()
    return -g[..., None] * torch.where(length > 0, apart / length, 0)
