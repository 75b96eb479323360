"""Gradients of the chosen scores at query and key.

The gradient at the keys is a scatter. By default the slots are put in the order of their keys (`by_key`), and one
program adds up what belongs to one key: equal inputs have equal results, bit for bit. Keys that very many queries have
chosen would hold up the others; of these, whole blocks of slots are added up by programs of their own before, and then
the blocks of each.

Shape legend: B batch, H heads, P problems (B x H), M queries, R keys, e embedded features, k slots; of a program BM
queries, BE features, BT slots at once and LONG slots in all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from nearfold.kernels.names import DOT_LIKE
from nearfold.kernels.triton.by_key import add_up_blocks, by_key, in_blocks, of_block
from nearfold.kernels.triton.rows import DENSE, MOST_FEATURES, as_compiled, features, load_rows
from nearfold.kernels.triton.threshold import refusal_of_rows


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
        q = load_rows(query, m, m_there, feature, q_stride_m, q_stride_e, e, True)
        total = tl.zeros([BM, BE], tl.float32)
        for j in range(0, k):
            r = tl.load(index + slots + j, mask=m_there, other=-1)
            g = tl.load(grad + slots + j, mask=m_there & (r >= 0), other=0.0)
            near = load_rows(key, r, r >= 0, feature, k_stride_r, k_stride_e, e, True)
            if ROOTED:
                square = tl.zeros([BM], tl.float32)
                for e1 in range(0, e, BE):
                    among = e1 + tl.arange(0, BE)
                    apart = load_rows(query, m, r >= 0, among, q_stride_m, q_stride_e, e, True)
                    apart -= load_rows(key, r, r >= 0, among, k_stride_r, k_stride_e, e, True)
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
def _slots_added_up(start, stop, rest, APART: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr):  # type: ignore[no-untyped-def]
    """What the slots from start to stop, all of one key, add to its gradient: (BE,)."""
    share, order, query, first, here, feature, e, k, q_stride_m, q_stride_e = rest
    total = tl.zeros([BT, BE], tl.float32)
    for t0 in range(start, stop, BT):
        t = t0 + tl.arange(0, BT)
        there = t < stop
        at = tl.load(order + t, mask=there, other=0)
        g = tl.load(share + at, mask=there, other=0.0)
        q = load_rows(query, at // k - first, there, feature, q_stride_m, q_stride_e, e, True)
        if APART:
            q = tl.where(there[:, None], here[None, :] - q, 0.0)
        total += g[:, None] * q
    return tl.sum(total, 0)


@triton.jit
def _key_kernel(  # type: ignore[no-untyped-def]
    share,  # (P, M, k) float32
    order,  # (P M k,) int32 or int64: the slots, those of one key after another
    bounds,  # (P R + 1,) int64: where the slots of every key begin
    firsts,  # (P R + 1,) int64: the number of every key's first block of LONG slots
    owner,  # (blocks,) int64: the key that a block belongs to; read where BLOCKS
    partial,  # (blocks, e) float32: what blocks add up to; written where BLOCKS, else the first of a key is read
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
    BLOCKS: tl.constexpr,  # a program has a block of slots, if there are so many; else a key
    LONG: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    name, first, last = block, block, block
    if BLOCKS:
        name, start, there = of_block(bounds, firsts, owner, block, block >= 0, LONG)
        if not there:
            return
        stop = start + LONG
    else:
        first = tl.load(firsts + name)
        last = tl.load(firsts + name + 1)
        start = tl.load(bounds + name) + (last - first) * LONG
        stop = tl.load(bounds + name + 1)
    problem = name // R
    r = name % R
    query += problem // H * q_stride_b + problem % H * q_stride_h
    key += problem // H * k_stride_b + problem % H * k_stride_h + r * k_stride_r
    d_key += problem // H * d_stride_b + problem % H * d_stride_h + r * d_stride_r
    for e0 in range(0, e, BE):
        feature = e0 + tl.arange(0, BE).to(tl.int64)
        here = tl.zeros([BE], tl.float32)
        if APART:
            here = tl.load(key + feature * k_stride_e, mask=feature < e, other=0.0).to(tl.float32)
        rest = (share, order, query, problem * M, here, feature, e, k, q_stride_m, q_stride_e)
        d = _slots_added_up(start, stop, rest, APART, BT, BE)
        if BLOCKS:
            tl.store(partial + block * e + feature, d, mask=feature < e)
        else:
            if first < last:
                d += tl.load(partial + first * e + feature, mask=feature < e, other=0.0)
            tl.store(d_key + feature * d_stride_e, (d * SCALE).to(d_key.dtype.element_ty), mask=feature < e)


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
    long: int = 128,
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
        long: so many slots of one key are a block that is added up by itself.

    Raises:
        NotImplementedError: where `refusal` says why.
    """
    B, H, M, e = query.shape
    R, k = key.shape[2], index.shape[3]
    if why := refusal_of_rows(query, key, k, metric):
        raise NotImplementedError(why)
    d_query, d_key = torch.empty_like(query), torch.empty_like(key)
    if query.numel() == 0 or key.numel() == 0 or k == 0:
        return d_query.zero_(), d_key.zero_()
    apart = metric not in DOT_LIKE
    rooted = apart and not squared
    grad, index = grad.float().contiguous(), index.contiguous()
    share = torch.empty_like(grad) if rooted else grad
    total = grad if deterministic else torch.zeros(B, H, R, e, dtype=torch.float32, device=key.device)
    BE = features(e, MOST_FEATURES)
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
            order, bounds = by_key(index.view(B * H, M, k, 1), R)
            firsts, owner = in_blocks(bounds, long, order.numel())
            blocks = len(owner)
            parts = torch.empty(blocks, e, dtype=torch.float32, device=key.device)
            for of_blocks, programs in ((True, blocks), (False, B * H * R)):
                if programs:
                    _key_kernel[(programs,)](
                        share,
                        order,
                        bounds,
                        firsts,
                        owner,
                        parts,
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
                        BLOCKS=of_blocks,
                        LONG=long,
                        BT=8,
                        BE=BE,
                        num_warps=1,
                    )
                if of_blocks and programs:
                    add_up_blocks(parts, firsts, owner)
        else:
            d_key.copy_(total)
    return d_query, d_key


def _query_variant(dtype: str, e: int, metric: str, scatter: bool) -> dict:
    apart = metric not in DOT_LIKE
    constexprs = {"APART": apart, "ROOTED": apart, "SCATTER": scatter, "BM": 16, "BE": features(e, MOST_FEATURES)}
    constexprs |= DENSE | {"d_stride_e": 1}
    pointers = dict.fromkeys(("query", "key", "d_query"), f"*{dtype}") | {"index": "*i64"}
    pointers |= dict.fromkeys(("grad", "d_key", "share"), "*fp32")
    return as_compiled(_query_kernel, constexprs, pointers, (), 4)


def _key_variant(dtype: str, e: int, metric: str, blocks: bool) -> dict:
    constexprs = {"APART": metric not in DOT_LIKE, "SCALE": 1.0, "BT": 8, "BE": features(e, MOST_FEATURES)}
    constexprs |= {"BLOCKS": blocks, "LONG": 128}
    constexprs |= DENSE | {"d_stride_e": 1}
    pointers = dict.fromkeys(("query", "key", "d_key"), f"*{dtype}") | dict.fromkeys(("share", "partial"), "*fp32")
    pointers |= {"order": "*i32", **dict.fromkeys(("bounds", "firsts", "owner"), "*i64")}
    return as_compiled(_key_kernel, constexprs, pointers, (), 1)


# what is launched on a large device, to be built without one
VARIANTS: list[Callable[[], dict]] = [
    partial(_query_variant, "bf16", 64, "dot", False),
    partial(_query_variant, "fp32", 64, "euclidean", True),
    *(partial(_key_variant, "bf16", 64, "dot", blocks) for blocks in (False, True)),
    *(partial(_key_variant, "fp32", 64, "euclidean", blocks) for blocks in (False, True)),
]
