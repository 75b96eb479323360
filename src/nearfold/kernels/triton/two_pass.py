"""The k best keys of every query in two passes over the keys on the tensor cores, for dot products and distances.

The keys are dealt out to classes. The first pass keeps the best score of every class, and the k-th best of those is a
lower bound of the k-th best score of all. The second pass makes the same scores again and notes which keys reach the
bound: not many more than k. Neither pass has a step that depends on the data. A second kernel computes the scores of
the noted keys as they are defined, in float32, and ranks these. Where a class or a query notes more than it has room
for, or its numbers are beyond what the products can hold, the search by threshold does that query.

So the scores of the passes only choose, and may be coarse: float32 rows are rounded to 10 bits. If no coarse score is
off by more than d, what is noted has to come within 2 d of the bound. `_coarse` says how d is bounded.

Shape legend: B batch, H heads, P problems (B x H), M queries, R keys, e embedded features, k slots, C keys that are
noted of a query at most; of a program BM queries, BN keys of a tile (as many classes), BE features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nearfold.kernels.names import LOW
from nearfold.kernels.search import Search
from nearfold.kernels.triton import threshold
from nearfold.kernels.triton.rows import NAMED, as_compiled, features, load_rows, upcast
from nearfold.kernels.triton.threshold import INVALID, LAST

MOST_SLOTS = 40  # more are rarely the best of different classes
FEWEST_KEYS = 256  # of fewer the search by threshold has found the best before the bound is known
MOST_TILES = 3 * 255  # their numbers take 10 bits, of which the two lowest are not both zero
MOST_BYTES = 512  # of a row held at once
HELD = 64  # features of a key that is ranked
RANKED = 32  # queries whose keys are ranked by one program
MOST_OFFSET = 2**31  # of 32-bit offsets

ROUNDING = {torch.float16: 2**-11, torch.float32: 2**-10}  # of a factor, as TF32 in the second case

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
LARGE = tl.constexpr(1e37)  # a product of norms below it is no infinity, nor is what is subtracted from it


def refusal(query: Tensor, key: Tensor, search: Search) -> str:
    """Why two passes are no use for a search that `threshold.refusal` allows; empty where they are."""
    R, BN = key.shape[2], _tile(query.dtype, query.shape[3], search)[1]
    if search.k + search.own > MOST_SLOTS or not FEWEST_KEYS <= R <= MOST_TILES * BN:
        return f"k = {search.k} of {R} keys, not up to {MOST_SLOTS} of {FEWEST_KEYS} to {MOST_TILES * BN}"
    if threshold.axes_looked_at(search.grid, search.rule):
        return "a reach or a dilation on a grid, which leaves few keys in many ranges"
    return ""


@triton.jit
def _turned(lane, tile, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where in a tile the key of class ``lane`` is: neighbours on a map seldom share one."""
    return (lane + tile * 45) & (BN - 1)


@triton.jit
def _coarse_scores(  # type: ignore[no-untyped-def]
    q,  # (BM, BE): the first features
    tile,
    rows,
    CHECKED: tl.constexpr,
    SPAN: tl.constexpr,
    LIFTED: tl.constexpr,
    UPCAST: tl.constexpr,
    BN: tl.constexpr,
    BE: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
):
    """Scores (BM, BN) of a tile's keys; -inf beyond the keys and the rule, if CHECKED."""
    query, key, lift, m, m_there, R, e, q_stride_m, k_stride_r, first, last = rows
    turned = _turned(tl.arange(0, BN), tile, BN)
    key += tile * BN * k_stride_r
    feature = tl.arange(0, BE)
    there = tl.full([BN], True, tl.int1)
    if CHECKED:
        there = tile * BN + turned < R
    score = tl.zeros([q.shape[0], BN], tl.float32)
    for c in tl.static_range(CHUNKS):
        at = key + turned[:, None] * k_stride_r + (c * BE + feature)[None, :]
        if CHECKED or not FULL:
            near = tl.load(at, mask=there[:, None] & (c * BE + feature < e)[None, :], other=0.0)
        else:
            near = tl.load(at)
        if c > 0:
            q = load_rows(query, m, m_there, c * BE + feature, q_stride_m, 1, e, UPCAST)
        if UPCAST:
            near = near.to(tl.float32)
        score = tl.dot(q, tl.trans(near), score, input_precision="tf32")
    if LIFTED:
        score -= tl.load(lift + tile * BN + turned, mask=there, other=0.0)[None, :]
    if CHECKED:
        column = (tile * BN + turned)[None, :]
        good = there[None, :]
        if SPAN:
            good = (column >= first[:, None]) & (column < last[:, None])
        score = tl.where(good, score, float("-inf"))
    return score


@triton.jit
def _note_kernel(  # type: ignore[no-untyped-def]
    query,  # coarse, features next to one another
    key,
    lift,  # (P, R) float32: half the squared norms of coarse keys, which is what a distance adds to a product
    size,  # (P,) float32: the largest norm of a coarse key
    q_first,  # (M,) int32
    q_last,
    noted,  # (P, BN, M) int32: of every class the numbers of up to three tiles; beyond 30 bits there were more
    H,
    M,
    R,
    e,
    rounds,  # of the best classes
    off,  # twice how much a score may be off, of the product of the norms
    q_stride_b,
    q_stride_h,
    q_stride_m,
    k_stride_b,
    k_stride_h,
    k_stride_r,
    SPAN: tl.constexpr,
    RAGGED: tl.constexpr,  # whether the last tile is no whole one
    LIFTED: tl.constexpr,
    CLAMPED: tl.constexpr,  # whether scores end at 1 and -1, so that all beyond are ties
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BE: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    STAGES: tl.constexpr,
):
    blocks = tl.cdiv(M, BM)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    m = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    m_there = m < M
    query += problem // H * q_stride_b + problem % H * q_stride_h
    key += problem // H * k_stride_b + problem % H * k_stride_h
    lift += problem * R
    q = load_rows(query, m, m_there, tl.arange(0, BE), q_stride_m, 1, e, UPCAST)
    square = tl.zeros([BM], tl.float32)
    for e0 in range(0, e, 16):  # a few at a time: all of a row would take the registers of the passes
        part = load_rows(query, m, m_there, e0 + tl.arange(0, 16), q_stride_m, 1, e, True)
        square += tl.sum(part * part, 1)
    norms = tl.sqrt(square) * tl.load(size + problem)

    # tiles from begin to end, of which those from inner to outer need no check
    first = m
    last = m
    begin = 0
    inner = 0
    outer = R // BN
    end = tl.cdiv(R, BN)
    if SPAN:
        first = tl.load(q_first + m, mask=m_there, other=0)
        last = tl.load(q_last + m, mask=m_there, other=0)
        begin = tl.min(tl.where(m_there, first, R), 0) // BN
        end = tl.cdiv(tl.max(last, 0), BN)
        inner = tl.minimum(tl.cdiv(tl.max(first, 0), BN), end)
        outer = tl.maximum(inner, tl.min(tl.where(m_there, last, R), 0) // BN)

    rows = (query, key, lift, m, m_there, R, e, q_stride_m, k_stride_r, first, last)
    best = tl.full([BM, BN], float("-inf"), tl.float32)
    if SPAN:
        for tile in tl.range(begin, inner, num_stages=1):
            best = tl.maximum(best, _coarse_scores(q, tile, rows, True, SPAN, LIFTED, UPCAST, BN, BE, CHUNKS, FULL))
    for tile in tl.range(inner, outer, num_stages=STAGES):
        best = tl.maximum(best, _coarse_scores(q, tile, rows, False, SPAN, LIFTED, UPCAST, BN, BE, CHUNKS, FULL))
    if RAGGED or SPAN:
        for tile in tl.range(outer, end, num_stages=1):
            best = tl.maximum(best, _coarse_scores(q, tile, rows, True, SPAN, LIFTED, UPCAST, BN, BE, CHUNKS, FULL))

    # equal ones go together: what is left is no higher
    bound = tl.full([BM], float("-inf"), tl.float32)
    for _ in range(0, rounds):
        bound = tl.max(best, 1)
        best = tl.where(best == bound[:, None], float("-inf"), best)
    if CLAMPED:
        bound = tl.minimum(bound, 1.0)
    bound -= off * (norms if not LIFTED else norms * 0 + 1)
    if CLAMPED:
        bound = tl.where(bound > -1, bound, LOWEST)
    bound = tl.maximum(bound, LOWEST)

    notes = tl.zeros([BM, BN], tl.int32)
    if SPAN:
        for tile in tl.range(begin, inner, num_stages=1):
            notes = _noted(
                notes, _coarse_scores(q, tile, rows, True, SPAN, LIFTED, UPCAST, BN, BE, CHUNKS, FULL), bound, tile
            )
    for tile in tl.range(inner, outer, num_stages=STAGES):
        notes = _noted(
            notes, _coarse_scores(q, tile, rows, False, SPAN, LIFTED, UPCAST, BN, BE, CHUNKS, FULL), bound, tile
        )
    if RAGGED or SPAN:
        for tile in tl.range(outer, end, num_stages=1):
            notes = _noted(
                notes, _coarse_scores(q, tile, rows, True, SPAN, LIFTED, UPCAST, BN, BE, CHUNKS, FULL), bound, tile
            )

    notes = tl.where((norms < LARGE)[:, None], notes, -1)  # which no NaN is
    to = noted + (problem * BN + tl.arange(0, BN))[None, :] * M + m[:, None]
    tl.store(to, notes, mask=m_there[:, None])


@triton.jit
def _noted(notes, score, bound, tile):  # type: ignore[no-untyped-def]
    """A tile's number is 1, 2, 3, 5, 6, 7, 9 ...: a fourth pushes the first up, whose lowest two bits show there."""
    return tl.where(score >= bound[:, None], notes * 1024 + (tile // 3 * 4 + tile % 3 + 1), notes)


@triton.jit
def _list_kernel(  # type: ignore[no-untyped-def]
    noted,  # (P, BN, M) int32
    listed,  # (P, M, C) int32: class and tile of every key that is noted
    count,  # (P, M) int32: how many they are
    left,  # (P, M) int32: the queries that are left to the threshold, and (P,) how many they are
    left_count,
    M,
    room,
    BM: tl.constexpr,
    BN: tl.constexpr,
    C: tl.constexpr,
):
    blocks = tl.cdiv(M, BM)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    m = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    m_there = m < M
    noted += problem * BN * M + m
    row = problem * M + m
    number = tl.zeros([BM], tl.int32)
    over = tl.zeros([BM], tl.int32)
    for lane in range(0, BN):
        notes = tl.load(noted, mask=m_there, other=0)
        noted += M
        over |= notes >> 30
        for _ in tl.static_range(3):
            of_tile = notes & 1023
            tl.store(listed + row * C + number, (lane << 10) | of_tile, mask=(of_tile != 0) & (number < C))
            number += (of_tile != 0).to(tl.int32)
            notes = notes >> 10
    open_rows = m_there & ((over != 0) | (number > room))
    tl.store(count + row, tl.where(open_rows, 0, number), mask=m_there)
    total = tl.sum(open_rows.to(tl.int32), 0)
    if total > 0:
        at = tl.atomic_add(left_count + problem, total) + tl.cumsum(open_rows.to(tl.int32), 0) - 1
        tl.store(left + problem * M + at, m, mask=open_rows)


@triton.jit
def _rank_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    listed,  # (P, M, C) int32
    listed_count,  # (P, M) int32
    q_own,  # (M,) int32: the key at the query's own position, or -1
    score_out,  # (P, M, k)
    index_out,
    H,
    M,
    e,
    k,
    q_stride_b,
    q_stride_h,
    q_stride_m,
    k_stride_b,
    k_stride_h,
    k_stride_r,
    rank_again,  # the own position's score, as the search ranks it and as it is returned
    again,
    METRIC: tl.constexpr,
    ROOTED: tl.constexpr,
    OWN: tl.constexpr,
    CHUNKED: tl.constexpr,
    FULL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BE: tl.constexpr,
    C: tl.constexpr,
    KP: tl.constexpr,
):
    blocks = tl.cdiv(M, BM)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    m = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    m_there = m < M
    query += problem // H * q_stride_b + problem % H * q_stride_h
    key += problem // H * k_stride_b + problem % H * k_stride_h
    row = problem * M + m
    count = tl.load(listed_count + row, mask=m_there, other=0)
    own = tl.zeros([BM], tl.int32) - 1
    if OWN:
        own = tl.load(q_own + m, mask=m_there, other=-1)
    place = tl.arange(0, C)[None, :]
    scores = tl.full([BM, C], float("-inf"), tl.float32)
    feature = tl.arange(0, BE)
    q = load_rows(query, m, m_there, feature, q_stride_m, 1, e, True)
    for j in range(0, tl.max(count, 0)):
        r = tl.load(listed + row * C + j, mask=j < count, other=-1)
        there = r >= 0
        r = _key_of(r, BN)
        near = _near(key, r, there, feature, k_stride_r, e, FULL)
        score = tl.sum(-(q - near) * (q - near) if METRIC == "euclidean" else q * near, 1)
        if CHUNKED:
            for e0 in range(BE, e, BE):
                more = load_rows(query, m, m_there, e0 + feature, q_stride_m, 1, e, True)
                near = _near(key, r, there, e0 + feature, k_stride_r, e, FULL)
                score += tl.sum(-(more - near) * (more - near) if METRIC == "euclidean" else more * near, 1)
        if METRIC == "cosine":
            score = tl.minimum(tl.maximum(score, -1.0), 1.0)
        score = tl.where(there & (r != own), score, float("-inf"))
        scores = tl.where(place == j, score[:, None], scores)

    there = place < count[:, None]
    index = _key_of(tl.load(listed + row[:, None] * C + place, mask=there, other=0), BN)
    index = tl.where(there, index, LAST)
    if OWN:
        mine = (place == C - 1) & (own >= 0)[:, None]
        scores = tl.where(mine, rank_again, scores)
        index = tl.where(mine, own[:, None], index)
    slot = tl.arange(0, KP)[None, :]
    kept = tl.full([BM, KP], float("-inf"), tl.float32)
    kept_index = tl.full([BM, KP], INVALID, tl.int32)
    for j in range(0, k):
        best = tl.max(scores, 1)
        chosen = tl.min(tl.where(scores == best[:, None], index, LAST), 1)
        scores = tl.where(index == chosen[:, None], float("-inf"), scores)
        put = (slot == j) & (best > float("-inf"))[:, None]
        kept = tl.where(put, best[:, None], kept)
        kept_index = tl.where(put, chosen[:, None], kept_index)
    if ROOTED:
        kept = -tl.sqrt_rn(tl.maximum(-kept, 0.0))
        if OWN:
            kept = tl.where((kept_index == own[:, None]) & (kept_index >= 0), again, kept)
    to = (problem * M + m)[:, None] * k + slot
    good = m_there[:, None] & (slot < k)
    tl.store(score_out + to, kept, mask=good)
    tl.store(index_out + to, kept_index.to(tl.int64), mask=good)


@triton.jit
def _key_of(listed, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The key of a class and the number of a tile, as they are listed."""
    lane, of_tile = listed >> 10, listed & 1023
    tile = (of_tile >> 2) * 3 + (of_tile & 3) - 1
    return tile * BN + _turned(lane, tile, BN)


@triton.jit
def _near(key, r, there, feature, k_stride_r, e, FULL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows (BM, BE) of keys, in float32; zeros where there is none."""
    there = there[:, None]
    if not FULL:
        there = there & (feature < e)[None, :]
    return tl.load(key + (r * k_stride_r)[:, None] + feature[None, :], mask=there, other=0.0).to(tl.float32)


class _Coarse(NamedTuple):
    """What the passes multiply: rows whose products are the scores up to a factor of every query.

    Attributes:
        query: (B, H, M, e), features next to one another.
        key: (B, H, R, e), likewise.
        lift: (B, H, R) float32, subtracted from the products of a key; of distances only.
        size: (B, H) float32, the largest norm of a key.
        off: twice how much a score may be off, of the product of the norms; of distances, of 1.
    """

    query: Tensor
    key: Tensor
    lift: Tensor | None
    size: Tensor
    off: float


def _coarse_dtype(dtype: torch.dtype, metric: str) -> torch.dtype:
    """float16 where no number is above 1; other float32 is cut to as many bits, TF32, where it is multiplied."""
    return torch.float16 if metric == "euclidean" or (metric == "cosine" and dtype not in LOW) else dtype


def _norms(x: Tensor) -> Tensor:
    """Of rows, in float32; 0 of a row with a NaN, which is never chosen."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).nan_to_num(0, float("inf"))


def _coarse(query: Tensor, key: Tensor, metric: str) -> _Coarse:
    """The rows that are multiplied, and how far the scores may be off.

    Products of bfloat16 or float16 are exact in float32. A factor rounded to float16 is off by 2^-11 of itself, one cut
    to TF32 by 2^-10. A sum of e products is off by e 2^-23 of the sum of their sizes, if every step cuts a bit, and the
    ranking by half of that; by Cauchy and Schwarz that sum is at most the product of the norms. Distances are those of
    rows around the keys' mean, over the largest of their norms; there these sums are larger, up to twice, and centring
    is off by a few 2^-24, as float16 is below its smallest normal number.
    """
    e, lift, same = query.shape[-1], None, query is key
    low = _coarse_dtype(query.dtype, metric)
    if metric == "euclidean":
        centre = key.mean(2, keepdim=True, dtype=torch.float32)
        key = key - centre
        query = key if same else query - centre
        scale = torch.maximum(_norms(query).amax(-1), _norms(key).amax(-1))[..., None, None]
        scale = torch.where(scale > 0, scale, 1.0)
        key = key / scale
        query = key if same else query / scale
        lift = key.square().sum(-1) / 2
    rounding = 0.0 if low == query.dtype and low in LOW else 2 * ROUNDING[low]
    key = key.to(low)
    query = key if same else query.to(low)
    off = 2 * (1.02 * rounding + e * (2**-21 if lift is not None else 2**-22))
    return _Coarse(query, key, lift, _norms(key).amax(-1), off)


def _dense(x: Tensor) -> Tensor:
    """The rows, features next to one another, with offsets that fit 32 bits."""
    return x if x.stride(3) == 1 and x.shape[2] * x.stride(2) < MOST_OFFSET else x.contiguous()


def _tile(dtype: torch.dtype, e: int, search: Search) -> tuple[int, int, int, int]:
    """(BM, BN, C, stages): rows of ``dtype`` stay in shared memory, and scores in the registers of 4 warps."""
    few = search.k + search.own <= 16
    wide = features(e, MOST_BYTES) * dtype.itemsize > MOST_BYTES // 2
    return 128 if few and not wide else 64, 64 if few else 128, 32 if few else 64, 2 if wide else 3


def _flags(query: Tensor, search: Search) -> dict[str, bool | int]:
    """What the first kernel is compiled for; ``query`` is coarse."""
    e = query.shape[3]
    BE = features(e, MOST_BYTES // query.dtype.itemsize)
    return {
        "SPAN": threshold.confines(search.rule),
        "LIFTED": search.metric == "euclidean",
        "CLAMPED": search.metric == "cosine",
        "UPCAST": upcast(query),
        "BE": BE,
        "CHUNKS": triton.cdiv(e, BE),
        "FULL": e % BE == 0,
    }


def select(
    query: Tensor,
    key: Tensor,
    search: Search,
    *,
    block_m: int | None = None,
    classes: int | None = None,
    room: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `threshold.select`, and of every problem (B x H,) int32 how many queries were left to that one.

    Args:
        query: (B, H, M, e), float32, bfloat16 or float16, any strides.
        key: (B, H, R, e), same dtype.
        search: what is asked for; its metric is dot, cosine or euclidean, and `refusal` is empty.
        block_m: queries of a program, a power of two, at least 16; by default what suits the device.
        classes: into how many the keys are dealt, likewise.
        room: how many keys are noted of a query at most, a power of two.
    """
    if why := threshold.refusal(query, key, search) or refusal(query, key, search):
        raise NotImplementedError(why)
    k, metric, squared, *_, own, again = search
    B, H, M, e = query.shape
    R, device = key.shape[2], query.device
    score = torch.empty(B, H, M, k, dtype=torch.float32, device=device)
    index = torch.empty(B, H, M, k, dtype=torch.long, device=device)
    left_count = torch.zeros(B * H, dtype=torch.int32, device=device)
    if score.numel() == 0:
        return score, index, left_count
    limits = threshold.limits_of(search)
    same = query is key
    key = _dense(key)
    query = key if same else _dense(query)
    coarse = _coarse(query, key, metric)
    q, x = _dense(coarse.query), _dense(coarse.key)
    BM, BN, C, stages = _tile(q.dtype, e, search)
    BM, BN, C = block_m or BM, classes or BN, room or C
    noted = torch.empty(B * H, BN, M, dtype=torch.int32, device=device)
    listed = torch.empty(B * H, M, C, dtype=torch.int32, device=device)
    count, left = torch.empty(2, B * H, M, dtype=torch.int32, device=device).unbind()
    rooted = metric == "euclidean" and not squared
    with torch.cuda.device_of(query):
        _note_kernel[(triton.cdiv(M, BM) * B * H,)](
            q,
            x,
            coarse.size if coarse.lift is None else coarse.lift,
            coarse.size,
            limits.first,
            limits.last,
            noted,
            H,
            M,
            R,
            e,
            k + own,  # the own position's class may be the best for a score that does not count
            coarse.off,
            *q.stride()[:3],
            *x.stride()[:3],
            **_flags(q, search),
            BM=BM,
            BN=BN,
            RAGGED=R % BN > 0,
            STAGES=stages,
            num_warps=4,
        )
        _list_kernel[(triton.cdiv(M, 128) * B * H,)](
            *(noted, listed, count, left, left_count, M, C - own), BM=128, BN=BN, C=C, num_warps=4
        )
        rows = min(RANKED, BM)
        _rank_kernel[(triton.cdiv(M, rows) * B * H,)](
            query,
            key,
            listed,
            count,
            limits.own,
            score,
            index,
            H,
            M,
            e,
            k,
            *query.stride()[:3],
            *key.stride()[:3],
            -again * again if rooted and again < 0 else again,  # distances are ranked by their squares
            again,
            METRIC=metric,
            ROOTED=rooted,
            OWN=own,
            CHUNKED=e > HELD,
            FULL=e % features(e, HELD) == 0,
            BM=rows,
            BN=BN,
            BE=features(e, HELD),
            C=C,
            KP=threshold.slots_held(k),
            num_warps=4,
        )
    threshold.fill(query, key, search, limits, score, index, (left, left_count))
    return score, index, left_count


def _plain(k: int, metric: str, rule: list[int], own: bool) -> Search:
    """A search of which nothing but the kind is read."""
    nowhere = torch.empty(0, dtype=torch.long)
    return Search(k, metric, False, nowhere, nowhere, [4096], rule, own, 0.0)


def _note_variant(dtype: str, e: int, k: int, metric: str = "dot", causal: bool = False, ragged: bool = False) -> dict:
    search = _plain(k, metric, [int(causal), -1, 1], False)
    low = _coarse_dtype(NAMED[dtype], metric)
    BM, BN, _, stages = _tile(low, e, search)
    constexprs = _flags(torch.empty(0, 0, 0, e, dtype=low), search)
    constexprs |= {"BM": BM, "BN": BN, "RAGGED": ragged, "STAGES": stages}
    pointers = dict.fromkeys(("query", "key"), f"*{dtype if low == NAMED[dtype] else 'fp16'}")
    pointers |= dict.fromkeys(("lift", "size"), "*fp32") | dict.fromkeys(("q_first", "q_last", "noted"), "*i32")
    return as_compiled(_note_kernel, constexprs, pointers, ("off",), 4)


def _rank_variant(dtype: str, e: int, k: int, metric: str = "dot", own: bool = False) -> dict:
    _, BN, C, _ = _tile(NAMED[dtype], e, _plain(k, metric, [0, -1, 1], own))
    constexprs = {"METRIC": metric, "ROOTED": metric == "euclidean", "OWN": own, "BM": RANKED, "BN": BN, "C": C}
    constexprs["KP"] = threshold.slots_held(k)
    constexprs |= {"BE": features(e, HELD), "CHUNKED": e > HELD, "FULL": e % features(e, HELD) == 0}
    pointers = dict.fromkeys(("query", "key"), f"*{dtype}") | {"score_out": "*fp32", "index_out": "*i64"}
    pointers |= dict.fromkeys(("listed", "listed_count", "q_own"), "*i32")
    return as_compiled(_rank_kernel, constexprs, pointers, ("rank_again", "again"), 4)


def _list_variant(BN: int, C: int) -> dict:
    pointers = dict.fromkeys(("noted", "listed", "count", "left", "left_count"), "*i32")
    return as_compiled(_list_kernel, {"BM": 128, "BN": BN, "C": C}, pointers, (), 4)


# what is launched on a large device, to be built without one
VARIANTS: list[Callable[[], dict]] = [
    partial(_note_variant, "bf16", 64, 9),
    partial(_note_variant, "bf16", 64, 9, causal=True),
    partial(_note_variant, "bf16", 64, 9, ragged=True),
    partial(_note_variant, "bf16", 64, 36),
    partial(_note_variant, "fp16", 128, 9),
    partial(_note_variant, "fp16", 256, 9),
    partial(_note_variant, "fp32", 64, 9),
    partial(_note_variant, "fp32", 64, 9, "cosine"),
    partial(_note_variant, "fp32", 64, 9, "euclidean"),
    partial(_list_variant, 64, 32),
    partial(_list_variant, 128, 64),
    partial(_rank_variant, "bf16", 64, 9),
    partial(_rank_variant, "bf16", 64, 36),
    partial(_rank_variant, "fp32", 64, 9, "cosine", True),
    partial(_rank_variant, "fp32", 64, 9, "euclidean"),
]
