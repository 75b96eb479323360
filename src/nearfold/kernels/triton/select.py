"""`nearfold::select` on a CUDA device: the k best keys of every query, without ever writing the M x R scores.

A program owns BM queries and walks over the keys in tiles of BN, in ascending order. It keeps the k best of every query
in registers, unsorted, and their lowest score as a bar. Only while some score of a tile is above its row's bar is one
inserted, the best first: after the first tiles that is rare, k ln(R / k) times per query in all. `select_binned` keeps
the best of every class of keys instead, which takes the same few instructions for all scores, and leaves to the search
above only the queries for which that may have missed one.

The gradient at the keys is a scatter. By default the chosen indices are sorted, and one program adds up what belongs to
one key: equal inputs have equal results, bit for bit.

Shape legend: B batch, H heads, P problems (B x H), M queries, R keys, e embedded features, k slots; of a program BM
queries, BN keys, BE features, KP slots (a power of two, at least k), BT entries of the sorted indices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nearfold.kernels import names
from nearfold.kernels.names import DOT_LIKE

METRICS = ("dot", "cosine", "euclidean")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_SLOTS = 128  # the kept scores and indices live in registers
MOST_AXES = 4
MOST_FEATURES = 128  # held of a row at once
MOST_BINNED = 16  # slots, and fewest keys, for which a search in classes of keys seldom has to be repeated
FEWEST_BINNED = 1024
CLASSES = 128
MOST_TILES = 2**16  # two of their numbers share 32 bits

INVALID = tl.constexpr(names.INVALID)
LOST = tl.constexpr(names.LOST)
LAST = tl.constexpr(2**31 - 1)  # above every index


def refusal(query: Tensor, key: Tensor, k: int, metric: str, rule: list[int], grid: list[int]) -> str:
    """Why `select` and `select_backward` cannot run on these arguments; empty where they can."""
    if metric not in METRICS:
        return f"metric {metric} is not among {', '.join(METRICS)}"
    if query.dtype not in DTYPES or key.dtype != query.dtype:
        return f"query and key are {query.dtype} and {key.dtype}, not float32, bfloat16 or float16 alike"
    if k > MOST_SLOTS:
        return f"k = {k} is more than {MOST_SLOTS}"
    rows = max(math.prod(grid), math.prod(query.shape[:3]), math.prod(key.shape[:3]))
    if rows >= 2**31 - 2 * MOST_SLOTS:
        return f"{rows} rows or positions do not fit 32 bits"
    if _axes(grid, rule) and len(_long(grid)) > MOST_AXES:
        return f"a grid of more than {MOST_AXES} axes with a reach or a dilation"
    return ""


def _long(grid: list[int]) -> list[int]:
    """The axes that have more than one position."""
    return [n for n in grid if n > 1] or [1]


def _axes(grid: list[int], rule: list[int]) -> int:
    """How many axes the kernel must look at; on a sequence without dilation a range of keys says it all."""
    _, reach, dilation = rule
    axes = len(_long(grid))
    return axes if dilation > 1 or (reach >= 0 and axes > 1) else 0


@triton.jit
def _near_on_axis(q_at, k_at, n, reach, dilation):  # type: ignore[no-untyped-def]
    """Whether (BM, BN) coordinates on an axis of n positions are within reach, at a multiple of dilation."""
    q, k = q_at % n, k_at % n
    near = tl.abs(q[:, None] - k[None, :]) <= reach
    return near & ((q % dilation)[:, None] == (k % dilation)[None, :])


@triton.jit
def _allowed(q_at, k_at, n0, n1, n2, n3, reach, dilation, AXES: tl.constexpr):  # type: ignore[no-untyped-def]
    """`_near_on_axis` of all axes; n0 is the last of the grid."""
    good = _near_on_axis(q_at, k_at, n0, reach, dilation)
    if AXES > 1:
        q_at, k_at = q_at // n0, k_at // n0
        good &= _near_on_axis(q_at, k_at, n1, reach, dilation)
    if AXES > 2:
        q_at, k_at = q_at // n1, k_at // n1
        good &= _near_on_axis(q_at, k_at, n2, reach, dilation)
    if AXES > 3:
        q_at, k_at = q_at // n2, k_at // n2
        good &= _near_on_axis(q_at, k_at, n3, reach, dilation)
    return good


@triton.jit
def _insert(score, column, kept, kept_index, bar):  # type: ignore[no-untyped-def]
    """The k best (BM, KP) after a tile of scores (BM, BN) at ``column`` (BN,), where -inf means none.

    Equal scores never replace one another, and the lowest column goes first: ties fall to the lowest index. The
    indices of a row's slots are all different, free slots included: the highest one names the slot to give up.
    """
    best = tl.max(score, 1)
    while tl.max((best > bar).to(tl.int32), 0) > 0:
        at = tl.min(tl.where(score == best[:, None], column[None, :], LAST), 1)
        worst = tl.max(tl.where(kept == bar[:, None], kept_index, -1), 1)
        put = (kept_index == worst[:, None]) & (best > bar)[:, None]
        kept = tl.where(put, best[:, None], kept)
        kept_index = tl.where(put, at[:, None], kept_index)
        bar = tl.min(kept, 1)
        score = tl.where(column[None, :] == at[:, None], float("-inf"), score)
        best = tl.max(score, 1)
    return kept, kept_index, bar


@triton.jit
def _sorted(kept, kept_index):  # type: ignore[no-untyped-def]
    """(BM, KP) scores descending, equal ones by ascending index."""
    kept = tl.where(kept == 0, 0.0, kept)  # the two zeros are one
    bits = kept.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # as integers they compare as the numbers do
    packed = (order.to(tl.int64) << 32) | (-kept_index + LAST).to(tl.int64)
    packed = tl.sort(packed, 1, descending=True)
    order = (packed >> 32).to(tl.int32)
    bits = tl.where(order < 0, order ^ 0x7FFFFFFF, order)
    return bits.to(tl.float32, bitcast=True), -(packed & 0x7FFFFFFF).to(tl.int32) + LAST


@triton.jit
def _rows(base, row, there, feature, row_stride, feature_stride, e, UPCAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows (BM, BE) of a matrix, zero where ``there`` (BM,) is false and beyond its e features."""
    at = base + row.to(tl.int64)[:, None] * row_stride + feature.to(tl.int64)[None, :] * feature_stride
    found = tl.load(at, mask=there[:, None] & (feature < e)[None, :], other=0.0)
    return found.to(tl.float32) if UPCAST else found


@triton.jit
def _lost(  # type: ignore[no-untyped-def]
    q, query, m, m_there, q_stride_m, q_stride_e, e, UPCAST: tl.constexpr, CHUNKED: tl.constexpr, BE: tl.constexpr
):
    """Which queries (BM,) have a NaN; ``q`` holds their first features."""
    lost = tl.max((q != q).to(tl.int32), 1)
    if CHUNKED:
        for e0 in range(BE, e, BE):
            more = _rows(query, m, m_there, e0 + tl.arange(0, BE), q_stride_m, q_stride_e, e, UPCAST)
            lost = tl.maximum(lost, tl.max((more != more).to(tl.int32), 1))
    return lost > 0


@triton.jit
def _limits(  # type: ignore[no-untyped-def]
    m, m_there, q_first, q_last, q_position, q_own, R, SPAN: tl.constexpr, AXES: tl.constexpr, OWN: tl.constexpr
):
    """What confines each query (BM,): first and last key, coordinate, own key; unused ones are of no account."""
    first = tl.zeros_like(m)
    last = tl.zeros_like(m) + R
    at = tl.zeros_like(m)
    own = tl.zeros_like(m) - 1
    if SPAN:
        first = tl.load(q_first + m, mask=m_there, other=LAST)
        last = tl.load(q_last + m, mask=m_there, other=0)
    if AXES > 0:
        at = tl.load(q_position + m, mask=m_there, other=0).to(tl.int32)
    if OWN:
        own = tl.load(q_own + m, mask=m_there, other=-1)
    return first, last, at, own


@triton.jit
def _tile_scores(  # type: ignore[no-untyped-def]
    q,  # (BM, BE): the first features
    query,
    key,
    k_position,
    m,
    m_there,
    column,  # (BN,), of which neighbours in the tile need not be neighbours among the keys
    r0,  # the lowest of them
    first,
    last,
    at,
    own,
    R,
    e,
    q_stride_m,
    q_stride_e,
    k_stride_r,
    k_stride_e,
    n0,
    n1,
    n2,
    n3,
    reach,
    dilation,
    rank_again,
    METRIC: tl.constexpr,
    SPAN: tl.constexpr,
    AXES: tl.constexpr,
    OWN: tl.constexpr,
    UPCAST: tl.constexpr,
    CHUNKED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BE: tl.constexpr,
):
    """Scores (BM, BN) of queries and keys; -inf where there is none, the rule forbids it, or it is NaN."""
    r_there = column < R
    if METRIC == "euclidean":
        # from differences: norms and products would round away which key is nearer
        score = tl.zeros([BM, BN], tl.float32)
        for f in range(0, e):
            q_f = tl.load(query + m.to(tl.int64) * q_stride_m + f * q_stride_e, mask=m_there, other=0.0)
            k_f = tl.load(key + column.to(tl.int64) * k_stride_r + f * k_stride_e, mask=r_there, other=0.0)
            apart = q_f.to(tl.float32)[:, None] - k_f.to(tl.float32)[None, :]
            score -= apart * apart
    else:
        feature = tl.arange(0, BE)
        near = _rows(key, column, r_there, feature, k_stride_r, k_stride_e, e, UPCAST)
        score = tl.dot(q, tl.trans(near), input_precision="ieee")
        if CHUNKED:
            for e0 in range(BE, e, BE):
                more = _rows(query, m, m_there, e0 + feature, q_stride_m, q_stride_e, e, UPCAST)
                near = _rows(key, column, r_there, e0 + feature, k_stride_r, k_stride_e, e, UPCAST)
                score = tl.dot(more, tl.trans(near), score, input_precision="ieee")
        if METRIC == "cosine":  # a NaN stays one
            score = tl.where(score > 1.0, 1.0, score)
            score = tl.where(score < -1.0, -1.0, score)
    if OWN:  # noqa: SIM102 (decided when this is compiled, unlike the inner one)
        if (r0 <= tl.max(own, 0)) & (tl.min(tl.where(own >= 0, own, LAST), 0) < r0 + BN):
            score = tl.where(column[None, :] == own[:, None], rank_again, score)
    good = score == score
    if SPAN:
        good &= (column[None, :] >= first[:, None]) & (column[None, :] < last[:, None])
    else:
        good &= r_there[None, :]
    if AXES > 0:
        k_at = tl.load(k_position + column, mask=r_there, other=0).to(tl.int32)
        good &= _allowed(at, k_at, n0, n1, n2, n3, reach, dilation, AXES)
    return tl.where(good, score, float("-inf"))


@triton.jit
def _select_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    q_position,  # (M,) and (R,) int64: on the grid
    k_position,
    q_first,  # (M,) int32: only keys from this one, and before that one, are allowed by the rule
    q_last,
    q_own,  # (M,) int32: the key at the query's own position, or -1
    score_out,  # (P, M, k)
    index_out,
    unsure,  # (P, M) int32: the queries that are left to the exact search, and (P,) how many they are
    unsure_count,
    H,
    M,
    R,
    e,
    k,
    q_stride_b,
    q_stride_h,
    q_stride_m,
    q_stride_e,
    k_stride_b,
    k_stride_h,
    k_stride_r,
    k_stride_e,
    n0,  # sizes of the grid's axes, the last one first
    n1,
    n2,
    n3,
    reach,
    dilation,
    rank_again,  # the own position's score, as the search ranks it and as it is returned
    again,
    METRIC: tl.constexpr,
    ROOTED: tl.constexpr,
    SPAN: tl.constexpr,
    AXES: tl.constexpr,
    OWN: tl.constexpr,
    UPCAST: tl.constexpr,
    CHUNKED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BE: tl.constexpr,
    KP: tl.constexpr,
    ONLY_UNSURE: tl.constexpr,
):
    blocks = tl.cdiv(M, BM)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    m = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    m_there = m < M
    if ONLY_UNSURE:
        count = tl.load(unsure_count + problem)
        if (tl.program_id(0) % blocks) * BM >= count:
            return
        m_there = m < count
        m = tl.load(unsure + problem * M + m, mask=m_there, other=0)
    query += problem // H * q_stride_b + problem % H * q_stride_h
    key += problem // H * k_stride_b + problem % H * k_stride_h
    q = _rows(query, m, m_there, tl.arange(0, BE), q_stride_m, q_stride_e, e, UPCAST)
    lost = _lost(q, query, m, m_there, q_stride_m, q_stride_e, e, UPCAST, CHUNKED, BE)
    first, last, at, own = _limits(m, m_there, q_first, q_last, q_position, q_own, R, SPAN, AXES, OWN)

    slot = tl.arange(0, KP)[None, :]
    kept = tl.where((slot < k) & m_there[:, None], float("-inf"), float("inf"))  # nothing is above a missing slot
    kept_index = tl.zeros([BM, KP], tl.int32) - slot + LAST
    bar = tl.min(kept, 1)
    start = 0
    stop = R
    if SPAN:
        start = tl.min(first, 0) // BN * BN
        stop = tl.max(last, 0)
    for r0 in range(start, stop, BN):
        column = r0 + tl.arange(0, BN)
        score = _tile_scores(
            q,
            query,
            key,
            k_position,
            m,
            m_there,
            column,
            r0,
            first,
            last,
            at,
            own,
            R,
            e,
            q_stride_m,
            q_stride_e,
            k_stride_r,
            k_stride_e,
            n0,
            n1,
            n2,
            n3,
            reach,
            dilation,
            rank_again,
            METRIC,
            SPAN,
            AXES,
            OWN,
            UPCAST,
            CHUNKED,
            BM,
            BN,
            BE,
        )
        kept, kept_index, bar = _insert(score, column, kept, kept_index, bar)

    kept = tl.where(slot < k, kept, float("-inf"))
    kept_index = tl.where(slot < k, kept_index, LAST)
    kept, kept_index = _sorted(kept, kept_index)
    kept_index = tl.where(kept == float("-inf"), INVALID, kept_index)
    if ROOTED:
        kept = -tl.sqrt_rn(tl.maximum(-kept, 0.0))
        if OWN:
            kept = tl.where((kept_index == own[:, None]) & (kept_index >= 0), again, kept)
    kept = tl.where(lost[:, None], float("nan"), kept)
    kept_index = tl.where(lost[:, None], LOST, kept_index)
    to = (problem * M + m)[:, None] * k + slot
    good = m_there[:, None] & (slot < k)
    tl.store(score_out + to, kept, mask=good)
    tl.store(index_out + to, kept_index.to(tl.int64), mask=good)


@triton.jit
def _class_column(tile, lane, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The key of class ``lane`` in a tile: every tile is turned, so that neighbours on a map seldom share a class."""
    return tile * BN + (lane + tile * 45) % BN


@triton.jit
def _binned_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    q_position,  # (M,) and (R,) int64: on the grid
    k_position,
    q_first,  # (M,) int32: only keys from this one, and before that one, are allowed by the rule
    q_last,
    q_own,  # (M,) int32: the key at the query's own position, or -1
    score_out,  # (P, M, k)
    index_out,
    unsure,  # (P, M) int32: the queries that are left to the exact search, and (P,) how many they are
    unsure_count,
    H,
    M,
    R,
    e,
    k,
    q_stride_b,
    q_stride_h,
    q_stride_m,
    q_stride_e,
    k_stride_b,
    k_stride_h,
    k_stride_r,
    k_stride_e,
    n0,  # sizes of the grid's axes, the last one first
    n1,
    n2,
    n3,
    reach,
    dilation,
    rank_again,  # the own position's score, as the search ranks it and as it is returned
    again,
    METRIC: tl.constexpr,
    ROOTED: tl.constexpr,
    SPAN: tl.constexpr,
    AXES: tl.constexpr,
    OWN: tl.constexpr,
    UPCAST: tl.constexpr,
    CHUNKED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BE: tl.constexpr,
    STAGES: tl.constexpr,
):
    blocks = tl.cdiv(M, BM)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    m = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    m_there = m < M
    query += problem // H * q_stride_b + problem % H * q_stride_h
    key += problem // H * k_stride_b + problem % H * k_stride_h
    q = _rows(query, m, m_there, tl.arange(0, BE), q_stride_m, q_stride_e, e, UPCAST)
    lost = _lost(q, query, m, m_there, q_stride_m, q_stride_e, e, UPCAST, CHUNKED, BE)
    first, last, at, own = _limits(m, m_there, q_first, q_last, q_position, q_own, R, SPAN, AXES, OWN)

    lane = tl.arange(0, BN)
    # of every class the three best scores, and the tiles of two of them
    best = tl.full([BM, BN], float("-inf"), tl.float32)
    second = best
    third = best
    tiles = tl.zeros([BM, BN], tl.int32)  # of the best in the low half, of the second in the high one
    start = 0
    stop = tl.cdiv(R, BN)
    if SPAN:
        start = tl.min(first, 0) // BN
        stop = tl.cdiv(tl.max(last, 0), BN)
    for tile in tl.range(start, stop, num_stages=STAGES):
        score = _tile_scores(
            q,
            query,
            key,
            k_position,
            m,
            m_there,
            _class_column(tile, lane, BN),
            tile * BN,
            first,
            last,
            at,
            own,
            R,
            e,
            q_stride_m,
            q_stride_e,
            k_stride_r,
            k_stride_e,
            n0,
            n1,
            n2,
            n3,
            reach,
            dilation,
            rank_again,
            METRIC,
            SPAN,
            AXES,
            OWN,
            UPCAST,
            CHUNKED,
            BM,
            BN,
            BE,
        )
        over_best = score > best  # an equal one of a later tile goes below
        over_second = score > second
        third = tl.where(over_second, second, tl.maximum(third, score))
        second = tl.where(over_best, best, tl.where(over_second, score, second))
        pushed = tl.where(over_best, (tiles << 16) | tile, (tiles & 0xFFFF) | (tile << 16))
        tiles = tl.where(over_second, pushed, tiles)
        best = tl.where(over_best, score, best)

    column = _class_column(tiles & 0xFFFF, lane[None, :], BN)
    second_column = _class_column((tiles >> 16) & 0xFFFF, lane[None, :], BN)
    out = (problem * M + m) * k
    worst = tl.full([BM], float("inf"), tl.float32)
    for j in range(0, k):
        worst = tl.max(best, 1)
        chosen = tl.min(tl.where(best == worst[:, None], column, LAST), 1)
        taken = column == chosen[:, None]
        best = tl.where(taken, second, best)
        column = tl.where(taken, second_column, column)
        second = tl.where(taken, float("-inf"), second)
        chosen = tl.where(worst == float("-inf"), INVALID, chosen)
        tl.store(score_out + out + j, tl.where(lost, float("nan"), worst), mask=m_there)
        tl.store(index_out + out + j, tl.where(lost, LOST, chosen).to(tl.int64), mask=m_there)
    left_out = tl.max(third, 1)
    open_rows = m_there & (left_out >= worst) & (left_out > float("-inf")) & ~lost
    number = tl.sum(open_rows.to(tl.int32), 0)
    if number > 0:
        place = tl.atomic_add(unsure_count + problem, number) + tl.cumsum(open_rows.to(tl.int32), 0) - 1
        tl.store(unsure + problem * M + place, m, mask=open_rows)


def _spans(query_index: Tensor, key_index: Tensor, grid: list[int], rule: list[int]) -> tuple[Tensor, Tensor]:
    """Of every query the range (M,), (M,) of the ascending keys outside which the rule allows none; int32."""
    causal, reach, _ = rule
    first = torch.zeros_like(query_index)
    last = torch.full_like(query_index, len(key_index))
    if causal:
        last = torch.searchsorted(key_index, query_index, right=True)
    if reach >= 0:
        rows, *others = _long(grid)
        plane = math.prod(others)
        row, reach = query_index // plane, min(reach, rows)
        first = torch.searchsorted(key_index, (row - reach) * plane)
        last = torch.minimum(last, torch.searchsorted(key_index, (row + reach + 1) * plane))
    return first.int(), last.int()


def _own_column(query_index: Tensor, key_index: Tensor) -> Tensor:
    """(M,) int32: the key at every query's own position; -1 where there is none."""
    column = torch.searchsorted(key_index, query_index).clamp(max=len(key_index) - 1)
    return torch.where(key_index[column] == query_index, column, names.INVALID).int()


def _interpreted() -> bool:
    return not isinstance(_select_kernel, triton.JITFunction)


def _upcast(x: Tensor) -> bool:
    """The interpreter's products of bfloat16 are wrong."""
    return _interpreted() and x.dtype != torch.float32


def _features(e: int, most: int) -> int:
    """Of a row at once; a product wants 16 at least."""
    return max(16, min(most, triton.next_power_of_2(e)))


def _dot_features(query: Tensor) -> int:
    """Where no tensor core multiplies, both factors are held in registers."""
    return _features(query.shape[3], MOST_FEATURES if query.dtype != torch.float32 else MOST_FEATURES // 4)


def _slots(k: int) -> int:
    return max(2, int(triton.next_power_of_2(k)))


def _tile(k: int, metric: str, dtype: torch.dtype) -> tuple[int, int, int]:
    """(BM, BN, warps); more warps where the slots, or scores that no tensor core makes, need the registers."""
    return 64, 64, 4 if k <= 32 and metric in DOT_LIKE and dtype != torch.float32 else 8


def _flags(
    query: Tensor, metric: str, squared: bool, grid: list[int], rule: list[int], own: bool
) -> dict[str, bool | int | str]:
    """What the kernels of the search are compiled for."""
    BE = _dot_features(query)
    return {
        "METRIC": metric,
        "ROOTED": metric == "euclidean" and not squared,
        "SPAN": bool(rule[0]) or rule[1] >= 0,
        "AXES": _axes(grid, rule),
        "OWN": own,
        "UPCAST": _upcast(query),
        "CHUNKED": query.shape[3] > BE,
        "BE": BE,
    }


def _search(
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
    bins: tuple[int, int] | None,
    blocks: tuple[int | None, int | None],
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and indices, and of every problem (P,) how many queries ``bins`` (BM, classes) were not enough for."""
    if why := refusal(query, key, k, metric, rule, grid):
        raise NotImplementedError(why)
    B, H, M, e = query.shape
    R = key.shape[2]
    score = torch.full((B, H, M, k), float("-inf"), dtype=torch.float32, device=query.device)
    index = torch.full((B, H, M, k), names.INVALID, dtype=torch.long, device=query.device)
    unsure_count = torch.zeros(B * H, dtype=torch.int32, device=query.device)
    if score.numel() == 0 or R == 0:
        return score, index, unsure_count
    flags = _flags(query, metric, squared, grid, rule, own)
    if metric == "euclidean":  # reads one feature of many rows at a time: they should lie next to one another
        query, key = query.mT.contiguous().mT, key.mT.contiguous().mT
    first, last = _spans(query_index, key_index, grid, rule) if flags["SPAN"] else (query_index, query_index)
    unsure = torch.empty(B * H, M, dtype=torch.int32, device=query.device) if bins else unsure_count
    arguments = (
        query,
        key,
        query_index.contiguous(),
        key_index.contiguous(),
        first,
        last,
        _own_column(query_index, key_index) if own else query_index,
        score,
        index,
        unsure,
        unsure_count,
        H,
        M,
        R,
        e,
        k,
        *query.stride(),
        *key.stride(),
        *[*reversed(_long(grid)), 1, 1, 1, 1][:MOST_AXES],
        rule[1] if rule[1] >= 0 else max(grid),
        rule[2],
        -again * again if flags["ROOTED"] and again < 0 else again,  # distances are ranked by their squares
        again,
    )
    with torch.cuda.device_of(query):
        if bins:
            BM, BN = bins
            _binned_kernel[(triton.cdiv(M, BM) * B * H,)](*arguments, **flags, BM=BM, BN=BN, STAGES=2, num_warps=8)
        BM, BN, warps = _tile(k, metric, query.dtype)
        BM, BN = blocks[0] or BM, blocks[1] or BN
        _select_kernel[(triton.cdiv(M, BM) * B * H,)](
            *arguments, **flags, BM=BM, BN=BN, KP=_slots(k), ONLY_UNSURE=bins is not None, num_warps=warps
        )
    return score, index, unsure_count


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
    *,
    block_m: int | None = None,
    block_n: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores (B, H, M, k) float32 and indices (B, H, M, k) int64, as `nearfold.kernels.select.select` defines them.

    Args:
        query: (B, H, M, e), float32, bfloat16 or float16, any strides.
        key: (B, H, R, e), same dtype.
        k: how many, at least 1.
        metric: "dot", "cosine" or "euclidean".
        squared: with euclidean, minus the squared distance.
        query_index: (M,) int64, position of every query on the grid.
        key_index: (R,) int64, ascending, position of every key.
        grid: the grid's sizes.
        rule: [causal, reach, dilation].
        own: whether the query's own position gets the score ``again``.
        again: that score.
        block_m: queries of a program, a power of two, at least 16; by default what suits the device.
        block_n: keys of a tile, likewise.

    Raises:
        NotImplementedError: where `refusal` says why.
    """
    arguments = (query, key, k, metric, squared, query_index, key_index, grid, rule, own, again)
    return _search(*arguments, None, (block_m, block_n))[:2]


def refusal_binned(query: Tensor, key: Tensor, k: int, metric: str) -> str:
    """Why `select_binned` is no use for a search that `refusal` allows; empty where it is."""
    R = key.shape[2]
    if metric not in DOT_LIKE or query.dtype == torch.float32:
        return f"the scores of {metric} in {query.dtype} take longer than finding the best of them"
    if k > MOST_BINNED or not FEWEST_BINNED <= R <= MOST_TILES * CLASSES:
        return f"k = {k} of {R} keys, not up to {MOST_BINNED} of {FEWEST_BINNED} to {MOST_TILES * CLASSES}"
    return ""


def select_binned(
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
    *,
    block_m: int = 64,
    classes: int = CLASSES,
    exact_block_m: int | None = None,
    exact_block_n: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `select`, for "dot" and "cosine"; faster where few queries have three of their k best in one class of keys.

    The keys are dealt out to classes. Of every class the two best are kept, and the third's score: maxima element by
    element, nothing that depends on the data. Where no class's third is as good as the k-th best of all kept, those k
    are the k best, and only the other queries are searched as `select` does.

    Args:
        query: (B, H, M, e), any strides.
        key: (B, H, R, e).
        k: how many.
        metric: "dot" or "cosine".
        squared: as of `select`, like all that follow.
        query_index: (M,) int64.
        key_index: (R,) int64.
        grid: sizes.
        rule: [causal, reach, dilation].
        own: whether ``again`` counts.
        again: the own position's score.
        block_m: queries of a program.
        classes: into how many the keys are dealt, a power of two.
        exact_block_m: queries of a program that searches again.
        exact_block_n: its keys of a tile.

    Returns:
        scores, indices, and of every problem (B x H,) int32 how many queries were searched again.
    """
    if metric not in DOT_LIKE:
        raise NotImplementedError(refusal_binned(query, key, k, metric))
    if key.shape[2] > MOST_TILES * classes:
        raise NotImplementedError(f"{key.shape[2]} keys are more than {MOST_TILES} tiles of {classes}")
    arguments = (query, key, k, metric, squared, query_index, key_index, grid, rule, own, again)
    return _search(*arguments, (block_m, classes), (exact_block_m, exact_block_n))


@triton.jit
def _query_kernel(  # type: ignore[no-untyped-def]
    grad,  # (P, M, k) float32 and int64
    index,
    query,
    key,
    d_query,
    d_key,  # (P, R, e) float32; written where SCATTER
    share,  # (P, M, k) float32: what a slot's row, or difference of rows, is multiplied by; written where ROOTED
    H,
    M,
    R,
    e,
    k,
    q_stride_b,
    q_stride_h,
    q_stride_m,
    q_stride_e,
    k_stride_b,
    k_stride_h,
    k_stride_r,
    k_stride_e,
    d_stride_b,
    d_stride_h,
    d_stride_m,
    d_stride_e,
    APART: tl.constexpr,
    ROOTED: tl.constexpr,
    SCATTER: tl.constexpr,
    BM: tl.constexpr,
    BE: tl.constexpr,
):
    blocks = tl.cdiv(M, BM)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    m = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    m_there = m < M
    query += problem // H * q_stride_b + problem % H * q_stride_h
    key += problem // H * k_stride_b + problem % H * k_stride_h
    d_query += problem // H * d_stride_b + problem % H * d_stride_h
    slots = (problem * M + m) * k
    for e0 in range(0, e, BE):
        feature = e0 + tl.arange(0, BE)
        q = _rows(query, m, m_there, feature, q_stride_m, q_stride_e, e, True)
        total = tl.zeros([BM, BE], tl.float32)
        for j in range(0, k):
            r = tl.load(index + slots + j, mask=m_there, other=-1)
            g = tl.load(grad + slots + j, mask=m_there & (r >= 0), other=0.0)
            near = _rows(key, r, r >= 0, feature, k_stride_r, k_stride_e, e, True)
            if ROOTED:
                square = tl.zeros([BM], tl.float32)
                for e1 in range(0, e, BE):
                    among = e1 + tl.arange(0, BE)
                    apart = _rows(query, m, r >= 0, among, q_stride_m, q_stride_e, e, True)
                    apart -= _rows(key, r, r >= 0, among, k_stride_r, k_stride_e, e, True)
                    square += tl.sum(apart * apart, 1)
                g = -g / tl.sqrt_rn(tl.where(square > 0, square, 1.0))  # times a difference of zero, where it is zero
                if e0 == 0:
                    tl.store(share + slots + j, g, mask=m_there)
            if APART:
                if not ROOTED:
                    g = -2.0 * g
                part = tl.where((r >= 0)[:, None], g[:, None] * (q - near), 0.0)
                back = -part
            else:
                part = tl.where((r >= 0)[:, None], g[:, None] * near, 0.0)
                back = g[:, None] * q
            total += part
            if SCATTER:
                at = d_key + (problem * R + r)[:, None] * e + feature[None, :]
                tl.atomic_add(at, back, mask=(r >= 0)[:, None] & (feature < e)[None, :], sem="relaxed")
        at = d_query + m.to(tl.int64)[:, None] * d_stride_m + feature.to(tl.int64)[None, :] * d_stride_e
        tl.store(at, total.to(d_query.dtype.element_ty), mask=m_there[:, None] & (feature < e)[None, :])


@triton.jit
def _key_kernel(  # type: ignore[no-untyped-def]
    share,  # (P, M, k) float32
    order,  # (P M k,) int64: the slots, those of one key after another
    bounds,  # (P R + 1,) int64: where the slots of every key begin
    query,
    key,
    d_key,
    H,
    M,
    R,
    e,
    k,
    q_stride_b,
    q_stride_h,
    q_stride_m,
    q_stride_e,
    k_stride_b,
    k_stride_h,
    k_stride_r,
    k_stride_e,
    d_stride_b,
    d_stride_h,
    d_stride_r,
    d_stride_e,
    APART: tl.constexpr,
    SCALE: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
):
    problem = (tl.program_id(0) // R).to(tl.int64)
    r = (tl.program_id(0) % R).to(tl.int64)
    query += problem // H * q_stride_b + problem % H * q_stride_h
    key += problem // H * k_stride_b + problem % H * k_stride_h + r * k_stride_r
    d_key += problem // H * d_stride_b + problem % H * d_stride_h + r * d_stride_r
    start = tl.load(bounds + tl.program_id(0))
    stop = tl.load(bounds + tl.program_id(0) + 1)
    for e0 in range(0, e, BE):
        feature = e0 + tl.arange(0, BE).to(tl.int64)
        total = tl.zeros([BT, BE], tl.float32)
        here = tl.zeros([BE], tl.float32)
        if APART:
            here = tl.load(key + feature * k_stride_e, mask=feature < e, other=0.0).to(tl.float32)
        for t0 in range(start, stop, BT):
            t = t0 + tl.arange(0, BT)
            there = t < stop
            at = tl.load(order + t, mask=there, other=0)
            g = tl.load(share + at, mask=there, other=0.0) * SCALE
            q = _rows(query, at // k - problem * M, there, feature, q_stride_m, q_stride_e, e, True)
            if APART:
                q = tl.where(there[:, None], here[None, :] - q, 0.0)
            total += g[:, None] * q
        d = tl.sum(total, 0)
        tl.store(d_key + feature * d_stride_e, d.to(d_key.dtype.element_ty), mask=feature < e)


def _by_key(index: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """The slots (P M k,) in the order of their keys, and where those of every key begin (P R + 1,)."""
    problems = index.shape[0] * index.shape[1]
    flat = index.reshape(problems, -1)
    first = torch.arange(problems, device=index.device)[:, None] * keys
    name = torch.where(flat >= 0, flat + first, problems * keys).flatten()
    if problems * keys < 2**31:
        name = name.int()  # sorts in half the time
    name, order = name.sort(stable=True)
    bounds = torch.searchsorted(name, torch.arange(problems * keys + 1, dtype=name.dtype, device=name.device))
    return order, bounds


def select_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    index: Tensor,
    metric: str,
    squared: bool,
    *,
    deterministic: bool = True,
    block_m: int = 16,
) -> tuple[Tensor, Tensor]:
    """Gradients of `select`'s scores at query and key, in their dtype; ``grad`` is zero where the score was a constant.

    Args:
        grad: (B, H, M, k), any floating dtype.
        query: (B, H, M, e), float32, bfloat16 or float16, any strides.
        key: (B, H, R, e), same dtype.
        index: (B, H, M, k) int64, what `select` returned.
        metric: "dot", "cosine" or "euclidean".
        squared: as given to `select`.
        deterministic: whether equal inputs must have equal results, bit for bit; otherwise the gradients at a key are
            added up in whatever order they come, which needs no sort.
        block_m: queries of a program, a power of two.

    Raises:
        NotImplementedError: where `refusal` says why.
    """
    B, H, M, e = query.shape
    R, k = key.shape[2], index.shape[3]
    if why := refusal(query, key, k, metric, [0, -1, 1], [R]):
        raise NotImplementedError(why)
    d_query, d_key = torch.empty_like(query), torch.empty_like(key)
    if query.numel() == 0 or key.numel() == 0 or k == 0:
        return d_query.zero_(), d_key.zero_()
    apart = metric not in DOT_LIKE
    rooted = apart and not squared
    grad, index = grad.float().contiguous(), index.contiguous()
    share = torch.empty_like(grad) if rooted else grad
    total = grad if deterministic else torch.zeros(B, H, R, e, dtype=torch.float32, device=key.device)
    BE = _features(e, MOST_FEATURES)
    with torch.cuda.device_of(query):
        _query_kernel[(triton.cdiv(M, block_m) * B * H,)](
            grad,
            index,
            query,
            key,
            d_query,
            total,
            share,
            H,
            M,
            R,
            e,
            k,
            *query.stride(),
            *key.stride(),
            *d_query.stride(),
            APART=apart,
            ROOTED=rooted,
            SCATTER=not deterministic,
            BM=block_m,
            BE=BE,
            num_warps=4,
        )
        if deterministic:
            order, bounds = _by_key(index, R)
            _key_kernel[(B * H * R,)](
                share,
                order,
                bounds,
                query,
                key,
                d_key,
                H,
                M,
                R,
                e,
                k,
                *query.stride(),
                *key.stride(),
                *d_key.stride(),
                APART=apart,
                SCALE=-2.0 if apart and squared else 1.0,
                BT=8,
                BE=BE,
                num_warps=1,
            )
        else:
            d_key.copy_(total)
    return d_query, d_key


_DTYPE = dict(zip(("fp32", "bf16", "fp16"), DTYPES, strict=True))
_STRIDES = {"q_stride_e": 1, "k_stride_e": 1}  # features lie next to one another


def _compiled(
    fn: Any, constexprs: dict[str, Any], pointers: dict[str, str], floats: tuple[str, ...], warps: int
) -> dict:
    """What a compiler needs to build a kernel without a device; sizes are multiples of 16."""
    sized = {a: "i32:16" for a in fn.arg_names if "stride" in a or a in ("M", "R", "e")}
    types = {**sized, **dict.fromkeys(constexprs, "constexpr"), **dict.fromkeys(floats, "fp32"), **pointers}
    signature = {name: types.get(name, "i32") for name in fn.arg_names}
    return {"fn": fn, "signature": signature, "constexprs": constexprs, "num_warps": warps, "num_stages": 3}


def _select_variant(
    dtype: str,
    e: int,
    k: int,
    metric: str = "dot",
    grid: tuple[int, ...] = (4096,),
    rule: tuple[int, ...] = (0, -1, 1),
    unsure: bool = False,
) -> dict:
    ruled = rule != (0, -1, 1)
    query = torch.empty(0, 0, 0, e, dtype=_DTYPE[dtype])
    strides = _STRIDES if metric != "euclidean" else {"q_stride_m": 1, "k_stride_r": 1}
    constexprs = _flags(query, metric, False, list(grid), list(rule), ruled) | strides
    BM, BN, warps = _tile(k, metric, query.dtype)
    constexprs |= {"BM": BM, "BN": BN, "KP": _slots(k), "ONLY_UNSURE": unsure}
    return _compiled(_select_kernel, constexprs, _pointers(dtype), ("rank_again", "again"), warps)


def _binned_variant(dtype: str, e: int, metric: str = "dot") -> dict:
    query = torch.empty(0, 0, 0, e, dtype=_DTYPE[dtype])
    constexprs = _flags(query, metric, False, [4096], [0, -1, 1], False) | _STRIDES
    constexprs |= {"BM": 64, "BN": CLASSES, "STAGES": 2}
    return _compiled(_binned_kernel, constexprs, _pointers(dtype), ("rank_again", "again"), 8)


def _pointers(dtype: str) -> dict[str, str]:
    pointers = {"query": f"*{dtype}", "key": f"*{dtype}", "score_out": "*fp32"}
    pointers |= dict.fromkeys(("q_position", "k_position", "index_out"), "*i64")
    return pointers | dict.fromkeys(("q_first", "q_last", "q_own", "unsure", "unsure_count"), "*i32")


def _query_variant(dtype: str, e: int, metric: str, scatter: bool) -> dict:
    apart = metric not in DOT_LIKE
    constexprs = {"APART": apart, "ROOTED": apart, "SCATTER": scatter, "BM": 16, "BE": _features(e, MOST_FEATURES)}
    constexprs |= _STRIDES | {"d_stride_e": 1}
    pointers = dict.fromkeys(("query", "key", "d_query"), f"*{dtype}") | {"index": "*i64"}
    pointers |= dict.fromkeys(("grad", "d_key", "share"), "*fp32")
    return _compiled(_query_kernel, constexprs, pointers, (), 4)


def _key_variant(dtype: str, e: int, metric: str) -> dict:
    constexprs = {"APART": metric not in DOT_LIKE, "SCALE": 1.0, "BT": 8, "BE": _features(e, MOST_FEATURES)}
    constexprs |= _STRIDES | {"d_stride_e": 1}
    pointers = dict.fromkeys(("query", "key", "d_key"), f"*{dtype}") | {"share": "*fp32"}
    return _compiled(_key_kernel, constexprs, pointers | dict.fromkeys(("order", "bounds"), "*i64"), (), 1)


# what is launched on a large device, to be built without one
VARIANTS: list[Callable[[], dict]] = [
    partial(_select_variant, "bf16", 64, 9),
    partial(_select_variant, "bf16", 64, 9, unsure=True),
    partial(_select_variant, "bf16", 64, 36),
    partial(_select_variant, "fp16", 64, 9),
    partial(_select_variant, "fp32", 64, 9),
    partial(_select_variant, "bf16", 256, 9),
    partial(_select_variant, "bf16", 64, 128),
    partial(_select_variant, "bf16", 64, 9, "cosine", (64, 64), (0, 3, 1)),
    partial(_select_variant, "bf16", 64, 9, "euclidean"),
    partial(_select_variant, "fp32", 64, 9, "euclidean", (64, 64), (1, -1, 1)),
    partial(_binned_variant, "bf16", 64),
    partial(_binned_variant, "bf16", 64, "cosine"),
    partial(_binned_variant, "fp16", 128),
    partial(_query_variant, "bf16", 64, "dot", False),
    partial(_query_variant, "fp32", 64, "euclidean", True),
    partial(_key_variant, "bf16", 64, "dot"),
    partial(_key_variant, "fp32", 64, "euclidean"),
]
