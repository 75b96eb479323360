"""The k best keys of every query by a running threshold, without ever writing the M x R scores; it serves any search.

A program owns BM queries and walks over the keys in tiles of BN, in ascending order. It keeps the k best of every query
in registers, unsorted, and their lowest score as a bar. Only while some score of a tile is above its row's bar is one
inserted, the best first: after the first tiles that is rare, k ln(R / k) times per query in all.

Shape legend: B batch, H heads, P problems (B x H), M queries, R keys, e embedded features, k slots; of a program BM
queries, BN keys, BE features, KP slots (a power of two, at least k).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nearfold.kernels import names
from nearfold.kernels.names import DOT_LIKE
from nearfold.kernels.search import Search
from nearfold.kernels.triton.rows import DENSE, DTYPES, MOST_FEATURES, NAMED, as_compiled, features, load_rows, upcast

METRICS = ("dot", "cosine", "euclidean")
MOST_SLOTS = 128  # the kept scores and indices live in registers
MOST_ROWS = 2**31 - 2 * MOST_SLOTS  # of queries, keys and positions: they are counted in 32 bits
MOST_AXES = 4

INVALID = tl.constexpr(names.INVALID)
LOST = tl.constexpr(names.LOST)
LAST = tl.constexpr(2**31 - 1)  # above every index


def refusal(query: Tensor, key: Tensor, search: Search) -> str:
    """Why `select` cannot run on these arguments; empty where it can."""
    if why := refusal_of_rows(query, key, search.k, search.metric):
        return why
    if math.prod(search.grid) >= MOST_ROWS:
        return f"{math.prod(search.grid)} positions do not fit 32 bits"
    if axes_looked_at(search.grid, search.rule) and len(long_axes(search.grid)) > MOST_AXES:
        return f"a grid of more than {MOST_AXES} axes with a reach or a dilation"
    return ""


def refusal_of_rows(query: Tensor, key: Tensor, k: int, metric: str) -> str:
    """Why `select_backward` cannot run on these arguments; empty where it can."""
    if metric not in METRICS:
        return f"metric {metric} is not among {', '.join(METRICS)}"
    if query.dtype not in DTYPES or key.dtype != query.dtype:
        return f"query and key are {query.dtype} and {key.dtype}, not float32, bfloat16 or float16 alike"
    if k > MOST_SLOTS:
        return f"k = {k} is more than {MOST_SLOTS}"
    rows = max(math.prod(query.shape[:3]), math.prod(key.shape[:3]))
    return f"{rows} rows do not fit 32 bits" if rows >= MOST_ROWS else ""


def long_axes(grid: list[int]) -> list[int]:
    """The axes that have more than one position."""
    return [n for n in grid if n > 1] or [1]


def axes_looked_at(grid: list[int], rule: list[int]) -> int:
    """How many axes the kernel must look at; on a sequence without dilation a range of keys says it all."""
    _, reach, dilation = rule
    axes = len(long_axes(grid))
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
def in_order(kept, kept_index):  # type: ignore[no-untyped-def]
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
def _lost(  # type: ignore[no-untyped-def]
    q, query, m, m_there, q_stride_m, q_stride_e, e, UPCAST: tl.constexpr, CHUNKED: tl.constexpr, BE: tl.constexpr
):
    """Which queries (BM,) have a NaN; ``q`` holds their first features."""
    lost = tl.max((q != q).to(tl.int32), 1)
    if CHUNKED:
        for e0 in range(BE, e, BE):
            more = load_rows(query, m, m_there, e0 + tl.arange(0, BE), q_stride_m, q_stride_e, e, UPCAST)
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
        q_at = query + m.to(tl.int64) * q_stride_m
        k_at = key + column.to(tl.int64) * k_stride_r
        for _ in range(0, e):
            q_f = tl.load(q_at, mask=m_there, other=0.0)
            k_f = tl.load(k_at, mask=r_there, other=0.0)
            q_at += q_stride_e  # as a product the offset would have 32 bits
            k_at += k_stride_e
            apart = q_f.to(tl.float32)[:, None] - k_f.to(tl.float32)[None, :]
            score -= apart * apart
    else:
        feature = tl.arange(0, BE)
        near = load_rows(key, column, r_there, feature, k_stride_r, k_stride_e, e, UPCAST)
        score = tl.dot(q, tl.trans(near), input_precision="ieee")
        if CHUNKED:
            for e0 in range(BE, e, BE):
                more = load_rows(query, m, m_there, e0 + feature, q_stride_m, q_stride_e, e, UPCAST)
                near = load_rows(key, column, r_there, e0 + feature, k_stride_r, k_stride_e, e, UPCAST)
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
    only,  # (P, M) int32: the queries that are asked for, and (P,) how many they are
    only_count,
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
    ONLY: tl.constexpr,
):
    blocks = tl.cdiv(M, BM)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    m = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    m_there = m < M
    if ONLY:
        count = tl.load(only_count + problem)
        if (tl.program_id(0) % blocks) * BM >= count:
            return
        m_there = m < count
        m = tl.load(only + problem * M + m, mask=m_there, other=0)
    query += problem // H * q_stride_b + problem % H * q_stride_h
    key += problem // H * k_stride_b + problem % H * k_stride_h
    q = load_rows(query, m, m_there, tl.arange(0, BE), q_stride_m, q_stride_e, e, UPCAST)
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
    kept, kept_index = in_order(kept, kept_index)
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


def confines(rule: list[int]) -> bool:
    """Whether a range of keys says a part of the rule."""
    return bool(rule[0]) or rule[1] >= 0


def _spans(query_index: Tensor, key_index: Tensor, grid: list[int], rule: list[int]) -> tuple[Tensor, Tensor]:
    """Of every query the range (M,), (M,) of the ascending keys outside which the rule allows none; int32."""
    causal, reach, _ = rule
    first = torch.zeros_like(query_index)
    last = torch.full_like(query_index, len(key_index))
    if causal:
        last = torch.searchsorted(key_index, query_index, right=True)
    if reach >= 0:
        rows, *others = long_axes(grid)
        plane = math.prod(others)
        row, reach = query_index // plane, min(reach, rows)
        first = torch.searchsorted(key_index, (row - reach) * plane)
        last = torch.minimum(last, torch.searchsorted(key_index, (row + reach + 1) * plane))
    return first.int(), last.int()


def _own_column(query_index: Tensor, key_index: Tensor) -> Tensor:
    """(M,) int32: the key at every query's own position; -1 where there is none."""
    column = torch.searchsorted(key_index, query_index).clamp(max=len(key_index) - 1)
    return torch.where(key_index[column] == query_index, column, names.INVALID).int()


def _dot_features(query: Tensor) -> int:
    """Where no tensor core multiplies, both factors are held in registers."""
    return features(query.shape[3], MOST_FEATURES if query.dtype != torch.float32 else MOST_FEATURES // 4)


def slots_held(k: int) -> int:
    """A power of two, at least k."""
    return max(2, int(triton.next_power_of_2(k)))


def _tile(k: int, metric: str, dtype: torch.dtype) -> tuple[int, int, int]:
    """(BM, BN, warps); more warps where the slots, or scores that no tensor core makes, need the registers."""
    return 64, 64, 4 if k <= 32 and metric in DOT_LIKE and dtype != torch.float32 else 8


def _flags(query: Tensor, search: Search) -> dict[str, bool | int | str]:
    """What the kernels of the search are compiled for."""
    _, metric, squared, _, _, grid, rule, own, _ = search
    BE = _dot_features(query)
    return {
        "METRIC": metric,
        "ROOTED": metric == "euclidean" and not squared,
        "SPAN": confines(rule),
        "AXES": axes_looked_at(grid, rule),
        "OWN": own,
        "UPCAST": upcast(query),
        "CHUNKED": query.shape[3] > BE,
        "BE": BE,
    }


class Limits(NamedTuple):
    """What confines every query, each (M,) int32; where the search has no such limit, any tensor of int64.

    Attributes:
        first: the first key the rule allows.
        last: the key behind the last.
        own: the key at the query's own position, or -1.
    """

    first: Tensor
    last: Tensor
    own: Tensor


def limits_of(search: Search) -> Limits:
    """What the search's rule and positions say of every query."""
    query_index, key_index, rule = search.query_index, search.key_index, search.rule
    first, last = query_index, query_index
    if confines(rule):
        first, last = _spans(query_index, key_index, search.grid, rule)
    return Limits(first, last, _own_column(query_index, key_index) if search.own else query_index)


def select(
    query: Tensor, key: Tensor, search: Search, *, block_m: int | None = None, block_n: int | None = None
) -> tuple[Tensor, Tensor]:
    """Scores (B, H, M, k) float32 and indices (B, H, M, k) int64, as `nearfold.kernels.select.select` defines them.

    Args:
        query: (B, H, M, e), float32, bfloat16 or float16, any strides.
        key: (B, H, R, e), same dtype.
        search: what is asked for; its metric is dot, cosine or euclidean.
        block_m: queries of a program, a power of two, at least 16; by default what suits the device.
        block_n: keys of a tile, likewise.

    Raises:
        NotImplementedError: where `refusal` says why.
    """
    if why := refusal(query, key, search):
        raise NotImplementedError(why)
    slots = (*query.shape[:3], search.k)
    score = torch.empty(slots, dtype=torch.float32, device=query.device)
    index = torch.empty(slots, dtype=torch.long, device=query.device)
    if key.shape[2] == 0:
        return score.fill_(float("-inf")), index.fill_(names.INVALID)
    if score.numel():
        fill(query, key, search, limits_of(search), score, index, block_m=block_m, block_n=block_n)
    return score, index


def fill(
    query: Tensor,
    key: Tensor,
    search: Search,
    limits: Limits,
    score: Tensor,
    index: Tensor,
    only: tuple[Tensor, Tensor] | None = None,
    *,
    block_m: int | None = None,
    block_n: int | None = None,
) -> None:
    """Writes what `select` returns; with ``only``, for those queries alone.

    Args:
        query: as of `select`, at least one.
        key: as of `select`, at least one.
        search: as of `select`.
        limits: of that search.
        score: (B, H, M, k) float32, contiguous.
        index: (B, H, M, k) int64, contiguous.
        only: of every problem some queries (P, M) int32, and how many they are (P,) int32.
        block_m: as of `select`.
        block_n: as of `select`.
    """
    k, metric, _, query_index, key_index, grid, rule, _, again = search
    B, H, M, e = query.shape
    flags = _flags(query, search)
    if metric == "euclidean":  # reads one feature of many rows at a time: they should lie next to one another
        query, key = (x if x.stride(2) == 1 else x.mT.contiguous().mT for x in (query, key))
    BM, BN, warps = _tile(k, metric, query.dtype)
    BM, BN = block_m or BM, block_n or BN
    with torch.cuda.device_of(query):
        _select_kernel[(triton.cdiv(M, BM) * B * H,)](
            query,
            key,
            query_index.contiguous(),
            key_index.contiguous(),
            *limits,
            score,
            index,
            *(only or (limits.own, limits.own)),
            H,
            M,
            key.shape[2],
            e,
            k,
            *query.stride(),
            *key.stride(),
            *[*reversed(long_axes(grid)), 1, 1, 1, 1][:MOST_AXES],
            rule[1] if rule[1] >= 0 else max(grid),
            rule[2],
            -again * again if flags["ROOTED"] and again < 0 else again,  # distances are ranked by their squares
            again,
            **flags,
            BM=BM,
            BN=BN,
            KP=slots_held(k),
            ONLY=only is not None,
            num_warps=warps,
        )


def _plain(k: int, metric: str, grid: list[int], rule: list[int], own: bool) -> Search:
    """A search of which nothing but the kind is read."""
    nowhere = torch.empty(0, dtype=torch.long)
    return Search(k, metric, False, nowhere, nowhere, grid, rule, own, 0.0)


def _select_variant(
    dtype: str,
    e: int,
    k: int,
    metric: str = "dot",
    grid: tuple[int, ...] = (4096,),
    rule: tuple[int, ...] = (0, -1, 1),
    only: bool = False,
) -> dict:
    ruled = rule != (0, -1, 1)
    query = torch.empty(0, 0, 0, e, dtype=NAMED[dtype])
    strides = DENSE if metric != "euclidean" else {"q_stride_m": 1, "k_stride_r": 1}
    constexprs = _flags(query, _plain(k, metric, list(grid), list(rule), ruled)) | strides
    BM, BN, warps = _tile(k, metric, query.dtype)
    constexprs |= {"BM": BM, "BN": BN, "KP": slots_held(k), "ONLY": only}
    return as_compiled(_select_kernel, constexprs, _pointers(dtype), ("rank_again", "again"), warps)


def _pointers(dtype: str) -> dict[str, str]:
    pointers = {"query": f"*{dtype}", "key": f"*{dtype}", "score_out": "*fp32"}
    pointers |= dict.fromkeys(("q_position", "k_position", "index_out"), "*i64")
    return pointers | dict.fromkeys(("q_first", "q_last", "q_own", "only", "only_count"), "*i32")


# what is launched on a large device, to be built without one
VARIANTS: list[Callable[[], dict]] = [
    partial(_select_variant, "bf16", 64, 9),
    partial(_select_variant, "bf16", 64, 9, only=True),
    partial(_select_variant, "bf16", 64, 36),
    partial(_select_variant, "fp16", 64, 9),
    partial(_select_variant, "fp32", 64, 9),
    partial(_select_variant, "bf16", 256, 9),
    partial(_select_variant, "bf16", 64, 128),
    partial(_select_variant, "bf16", 64, 9, "cosine", (64, 64), (0, 3, 1)),
    partial(_select_variant, "bf16", 64, 9, "euclidean"),
    partial(_select_variant, "fp32", 64, 9, "euclidean", (64, 64), (1, -1, 1)),
]
