"""`nearfold::aggregate` on a CUDA device: gather, scale and multiply in one kernel; nothing of (B, C, N, k) is held.

Three forms: without a kernel, and with one input channel to a group (depthwise), rows are scaled and added; any other
kernel is an implicit GEMM, whose left operand is gathered tile by tile.

The backward scatters into d_value. By default it turns the index around instead (`by_key`): every row of value
adds up its readers in one fixed order, so that equal inputs have equal bits. For a dense kernel it adds up a slot's
gradients first and multiplies by that slot's kernel afterwards, hence also there nothing grows with M * S * C, but for
one row in LONG: a row of value that very many read would hold up the others, and of its readers whole blocks of LONG
are added up by programs of their own before (`by_key.in_blocks`).

Shape legend: B batch, N positions, C value channels, H heads, d = C / H, M outputs, S slots, E entries of a slot,
O output channels, G groups, c = C / G and o = O / G, L = gcd(c, d): channels that share a group and a head, r outputs
of the whole batch, B * M of them. Indices beyond N read nothing.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, disable-error-code="possibly-undefined"
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nearfold.kernels import cuda
from nearfold.kernels.aggregate_torch import out_channels
from nearfold.kernels.triton.by_key import add_up_blocks, by_key, in_blocks, of_block

INTERPRETED: bool = triton.knobs.runtime.interpret  # then a bfloat16 tl.dot is wrong, and operands are widened
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
MOST_PROGRAMS = 512  # a device's fill; a weight's gradient is split over the outputs into at most as many
LIMIT = 2**31  # of 32-bit offsets: within rows and weights; the sort's keys take 64 bits beyond


@triton.jit
def _gather(value, at, ok, N, vn, channel, ok_channel, vc):
    """Rows ``at`` of value; zeros where there is none."""
    there = (ok & (at >= 0) & (at < N))[:, None] & ok_channel[None, :]
    return tl.load(value[:, None] + at.to(tl.int64)[:, None] * vn + channel[None, :] * vc, mask=there, other=0.0)


@triton.jit
def _row_of(cell, N, H):
    """Where row n of sample b is, b N + n, given the number of (b, h, n): N H may not fit 32 bits."""
    return cell // N // H * N + cell % N


@triton.jit
def _lost(index, ok, SE, H, i_s, i_h, BLOCK_M: tl.constexpr):
    """Which outputs belong to a query that was NaN, under any head."""
    found = tl.zeros((BLOCK_M,), dtype=tl.int32)
    for i in range(SE * H):
        at = tl.load(index + (i // H) * i_s + (i % H) * i_h, mask=ok, other=0)
        found = tl.where(at == -2, 1, found)
    return found > 0


@triton.jit
def _scale_kernel(
    value,
    index,
    alpha,
    weight,
    out,
    rows,
    M,
    N,
    H,
    SE,
    O,
    width,  # of a head, O // H: passed, for then it is known to be a multiple of 16, and rows are read in wide pieces
    mult,  # outputs of one input channel
    vb,
    vn,
    vc,
    i_b,
    i_m,
    i_s,
    i_h,
    E: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """No kernel, or one input channel to a group: weight (S, O). One program: BLOCK_M outputs, channels of a head."""
    blocks = tl.cdiv(width, BLOCK_C)
    tile = tl.program_id(0) % (H * blocks)
    head = tile // blocks
    r = (tl.program_id(0) // (H * blocks)).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ok = r < rows
    o = (tile % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok_o = o < width
    o += head * width
    channel = o // mult
    b, m = r // M, r % M
    value += b * vb
    index += b * i_b + m * i_m
    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for entry in range(SE):
        at = tl.load(index + entry * i_s + head * i_h, mask=ok, other=-1)
        read = _gather(value, at, ok, N, vn, channel, ok_o, vc).to(tl.float32)
        if HAS_ALPHA:
            read *= tl.load(alpha + (r * SE + entry) * H + head, mask=ok, other=0.0).to(tl.float32)[:, None]
        if HAS_WEIGHT:
            read *= tl.load(weight + (entry // E) * O + o, mask=ok_o, other=0.0).to(tl.float32)[None, :]
        acc += read
    if not HAS_ALPHA:
        acc = tl.where(_lost(index, ok, SE, H, i_s, i_h, BLOCK_M)[:, None], float("nan"), acc)
    tl.store(out + (r * O)[:, None] + o[None, :], acc.to(out.dtype.element_ty), mask=ok[:, None] & ok_o[None, :])


@triton.jit
def _blended(
    value, index, alpha, r, ok, s, head, channel, ok_channel, N, H, SE, vn, vc, i_s, i_h,
    E: tl.constexpr, HAS_ALPHA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What slot s reads: its entries, times alpha, added up; one entry alone stays as it is, on its way to a dot."""
    if E == 1 and not HAS_ALPHA:
        at = tl.load(index + s * i_s + head * i_h, mask=ok, other=-1)
        read = _gather(value, at, ok, N, vn, channel, ok_channel, vc)
    else:
        read = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
        for e in tl.static_range(E):
            entry = s * E + e
            at = tl.load(index + entry * i_s + head * i_h, mask=ok, other=-1)
            near = _gather(value, at, ok, N, vn, channel, ok_channel, vc).to(tl.float32)
            if HAS_ALPHA:
                near *= tl.load(alpha + (r * SE + entry) * H + head, mask=ok, other=0.0).to(tl.float32)[:, None]
            read += near
    return read


@triton.jit
def _dot(x, y, acc, dtype: tl.constexpr, WIDEN: tl.constexpr):
    x, y = x.to(dtype), y.to(dtype)
    if WIDEN:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, acc, input_precision="ieee")


@triton.jit
def _dense_kernel(
    value,
    index,
    alpha,
    weight,
    out,
    rows,
    M,
    N,
    H,
    S,
    G,
    c,
    o,
    d,
    L,
    vb,
    vn,
    vc,
    i_b,
    i_m,
    i_s,
    i_h,
    E: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Implicit GEMM; weight is (G, S, c, o). One program: BLOCK_M outputs, BLOCK_O channels of a group."""
    blocks = tl.cdiv(o, BLOCK_O)
    tile = tl.program_id(0) % (G * blocks)
    g = tile // blocks
    r = (tl.program_id(0) // (G * blocks)).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ok = r < rows
    oo = (tile % blocks) * BLOCK_O + tl.arange(0, BLOCK_O)
    ok_o = oo < o
    b, m = r // M, r % M
    value += b * vb
    index += b * i_b + m * i_m
    parts = tl.cdiv(L, BLOCK_C)
    steps = c // L * parts
    acc = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.float32)
    for step in range(S * steps):  # one loop, not three: it is pipelined as a whole
        s = step // steps
        first = step % steps // parts * L
        k = step % parts * BLOCK_C + tl.arange(0, BLOCK_C)
        ok_k = k < L
        k += first
        head = (g * c + first) // d
        read = _blended(
            value, index, alpha, r, ok, s, head, g * c + k, ok_k, N, H, S * E, vn, vc, i_s, i_h,
            E, HAS_ALPHA, BLOCK_M, BLOCK_C,
        )  # fmt: skip
        w = tl.load(
            weight + (((g * S + s) * c + k) * o)[:, None] + oo[None, :], mask=ok_k[:, None] & ok_o[None, :], other=0.0
        )
        acc = _dot(read, w, acc, weight.dtype.element_ty, WIDEN)
    if not HAS_ALPHA:
        acc = tl.where(_lost(index, ok, S * E, H, i_s, i_h, BLOCK_M)[:, None], float("nan"), acc)
    tl.store(
        out + (r * (G * o))[:, None] + (g * o + oo)[None, :],
        acc.to(out.dtype.element_ty),
        mask=ok[:, None] & ok_o[None, :],
    )


@triton.jit
def _scale_entries_kernel(
    grad,
    value,
    index,
    alpha,
    weight,
    d_alpha,
    d_value,
    rows,
    M,
    N,
    H,
    SE,
    C,
    d,
    mult,
    vb,
    vn,
    vc,
    i_b,
    i_m,
    i_s,
    i_h,
    E: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ATOMIC: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """d_alpha and, if ATOMIC, d_value (B, N, C) in float32; without a dense kernel. One program: BLOCK_M, one head.

    KEEP: grad's tile is the gradient at every entry, and read once.
    """
    O = C * mult
    head = tl.program_id(0) % H
    r = (tl.program_id(0) // H).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ok = r < rows
    b, m = r // M, r % M
    value += b * vb
    index += b * i_b + m * i_m
    grad += r * O
    d_value += b * N * C
    if KEEP:
        k = tl.arange(0, BLOCK_C)
        kept = tl.load(grad[:, None] + (head * d + k)[None, :], mask=ok[:, None] & (k < d)[None, :], other=0.0)
        kept = kept.to(tl.float32)
    for entry in range(SE):
        at = tl.load(index + entry * i_s + head * i_h, mask=ok, other=-1)
        there = ok & (at >= 0) & (at < N)
        if HAS_ALPHA:
            a = tl.load(alpha + (r * SE + entry) * H + head, mask=ok, other=0.0).to(tl.float32)
        found = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for start in range(0, BLOCK_C if KEEP else d, BLOCK_C):
            channel = start + tl.arange(0, BLOCK_C)
            ok_c = channel < d
            channel += head * d
            if KEEP:
                d_read = kept
            else:
                d_read = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
                for j in range(mult):
                    o = channel * mult + j
                    part = tl.load(grad[:, None] + o[None, :], mask=ok[:, None] & ok_c[None, :], other=0.0)
                    part = part.to(tl.float32)
                    if HAS_WEIGHT:
                        part *= tl.load(weight + (entry // E) * O + o, mask=ok_c, other=0.0).to(tl.float32)[None, :]
                    d_read += part
            if HAS_ALPHA:
                found += tl.sum(_gather(value, at, ok, N, vn, channel, ok_c, vc).to(tl.float32) * d_read, 1)
                d_read *= a[:, None]
            if ATOMIC:
                tl.atomic_add(
                    d_value[:, None] + at.to(tl.int64)[:, None] * C + channel[None, :],
                    d_read,
                    mask=there[:, None] & ok_c[None, :],
                    sem="relaxed",
                )
        if HAS_ALPHA:
            tl.store(d_alpha + (r * SE + entry) * H + head, found.to(d_alpha.dtype.element_ty), mask=ok)


@triton.jit
def _dense_entries_kernel(
    grad,
    value,
    index,
    alpha,
    weight,
    d_alpha,
    d_value,
    rows,
    M,
    N,
    H,
    S,
    G,
    c,
    o,
    d,
    L,
    vb,
    vn,
    vc,
    i_b,
    i_m,
    i_s,
    i_h,
    E: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    ATOMIC: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """d_alpha and, if ATOMIC, d_value in float32; dense kernel. One program: BLOCK_M outputs, a slot, a head."""
    tile = tl.program_id(0) % (H * S)
    head, s = tile // S, tile % S
    r = (tl.program_id(0) // (H * S)).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ok = r < rows
    b, m = r // M, r % M
    value += b * vb
    index += b * i_b + m * i_m
    grad += r * (G * o)
    d_value += b * N * (G * c)
    parts = tl.cdiv(L, BLOCK_C)
    entries = tl.arange(0, BLOCK_E)
    found = tl.zeros((BLOCK_M, BLOCK_E), dtype=tl.float32)
    for step in range(d // L * parts):
        k = step % parts * BLOCK_C + tl.arange(0, BLOCK_C)
        ok_k = k < L
        channel = head * d + step // parts * L + k
        g = (head * d + step // parts * L) // c
        d_read = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
        for start in range(0, o, BLOCK_O):
            oo = start + tl.arange(0, BLOCK_O)
            ok_o = oo < o
            near = tl.load(grad[:, None] + (g * o + oo)[None, :], mask=ok[:, None] & ok_o[None, :], other=0.0)
            w = tl.load(
                weight + (((g * S + s) * c + channel - g * c) * o)[None, :] + oo[:, None],
                mask=ok_k[None, :] & ok_o[:, None],
                other=0.0,
            )
            d_read = _dot(near, w, d_read, weight.dtype.element_ty, WIDEN)
        for e in tl.static_range(E):
            entry = s * E + e
            at = tl.load(index + entry * i_s + head * i_h, mask=ok, other=-1)
            d_near = d_read
            if HAS_ALPHA:
                near_value = _gather(value, at, ok, N, vn, channel, ok_k, vc).to(tl.float32)
                dots = tl.sum(near_value * d_read, 1)
                found = tl.where((entries == e)[None, :], found + dots[:, None], found)
                a = tl.load(alpha + (r * (S * E) + entry) * H + head, mask=ok, other=0.0)
                d_near = d_read * a.to(tl.float32)[:, None]
            if ATOMIC:
                there = ok & (at >= 0) & (at < N)
                tl.atomic_add(
                    d_value[:, None] + at.to(tl.int64)[:, None] * (G * c) + channel[None, :],
                    d_near,
                    mask=there[:, None] & ok_k[None, :],
                    sem="relaxed",
                )
    if HAS_ALPHA:
        tl.store(
            d_alpha + ((r[:, None] * S + s) * E + entries[None, :]) * H + head,
            found.to(d_alpha.dtype.element_ty),
            mask=ok[:, None] & (entries < E)[None, :],
        )


@triton.jit
def _scale_rows_kernel(
    grad,
    alpha,
    weight,
    order,
    start,
    firsts,  # (B H N + 1,) int64: the number of every row's first block
    owner,  # (blocks,) int64: the row that a block belongs to; read where BLOCKS
    partial,  # (blocks, d) float32: what whole blocks add up to; written where BLOCKS, else the first of a row is read
    d_value,
    cells,  # B * H * N, or blocks where BLOCKS
    N,
    H,
    SE,
    d,
    mult,
    E: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCKS: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """d_value without a dense kernel. One program: BLOCK_N rows (b, h, n), BLOCK_J readers of each at a time.

    Where BLOCKS: BLOCK_N blocks instead, of LONG readers of a row each; a row has less than LONG left over.
    """
    O = H * d * mult
    blocks = tl.cdiv(d, BLOCK_C)
    at = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = at < cells
    k = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    ok_k = k < d
    if BLOCKS:
        q, begin, ok = of_block(start, firsts, owner, at, ok, LONG)
        count = tl.where(ok, LONG, 0)
    else:
        q = at
        begin = tl.load(start + q, mask=ok, other=0)
        every = tl.load(start + q + 1, mask=ok, other=0) - begin
        count = (every & (LONG - 1)).to(tl.int32)
        begin += every & -LONG
    head = q // N % H
    channel = (head * d)[:, None] + k[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    for first in range(0, tl.max(count), BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        there = j[None, :] < count[:, None]
        p = tl.load(order + begin[:, None] + j[None, :], mask=there, other=0)
        entry = p // H % SE
        r = (p // (SE * H)).to(tl.int64)
        mask = there[:, :, None] & ok_k[None, None, :]
        d_read = tl.zeros((BLOCK_N, BLOCK_J, BLOCK_C), dtype=tl.float32)
        for i in range(mult):
            o = (channel * mult + i)[:, None, :]
            part = tl.load(grad + (r * O)[:, :, None] + o, mask=mask, other=0.0).to(tl.float32)
            if HAS_WEIGHT:
                part *= tl.load(weight + (entry // E * O)[:, :, None] + o, mask=mask, other=0.0).to(tl.float32)
            d_read += part
        if HAS_ALPHA:
            d_read *= tl.load(alpha + p, mask=there, other=0.0).to(tl.float32)[:, :, None]
        acc += tl.sum(d_read, 1)
    if BLOCKS:
        tl.store(partial + (at * d)[:, None] + k[None, :], acc, mask=ok[:, None] & ok_k[None, :])
    else:
        if tl.max(every) >= LONG:
            block = tl.load(firsts + q, mask=ok, other=0)
            its = partial + (block * d)[:, None] + k[None, :]
            acc += tl.load(its, mask=(every >= LONG)[:, None] & ok_k[None, :], other=0.0)
        into = d_value + (_row_of(q, N, H) * (H * d))[:, None] + channel
        tl.store(into, acc.to(d_value.dtype.element_ty), mask=ok[:, None] & ok_k[None, :])


@triton.jit
def _dense_blocks_kernel(
    grad,
    alpha,
    order,
    start,
    firsts,
    owner,
    partial,  # (blocks, d / L, o) float32
    N,
    H,
    S,
    G,
    c,
    o,
    d,
    L,
    E: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """One program: a block of LONG readers of a row through one slot, BLOCK_O channels of a group."""
    tiles = tl.cdiv(o, BLOCK_O)
    block = (tl.program_id(0) // tiles // (d // L)).to(tl.int64)
    piece = tl.program_id(0) // tiles % (d // L)
    q, begin, there = of_block(start, firsts, owner, block, block >= 0, LONG)
    if not there:
        return
    g = (q // N // S % H * d + piece * L) // c
    oo = tl.program_id(0) % tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    ok_o = oo < o
    p = tl.load(order + begin + tl.arange(0, LONG))
    r = (p // (S * E * H)).to(tl.int64)
    part = tl.load(grad + (r * (G * o))[:, None] + (g * o + oo)[None, :], mask=ok_o[None, :], other=0.0).to(tl.float32)
    if HAS_ALPHA:
        part *= tl.load(alpha + p).to(tl.float32)[:, None]
    tl.store(partial + (block * (d // L) + piece) * o + oo, tl.sum(part, 0), mask=ok_o)


@triton.jit
def _dense_rows_kernel(
    grad,
    alpha,
    weight,
    order,
    start,
    firsts,
    partial,  # (blocks, d / L, o) float32: what blocks of readers add up to, of a row's first one all of them
    d_value,
    N,
    H,
    S,
    G,
    c,
    o,
    d,
    L,
    E: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    WIDEN: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """d_value, dense kernel: per slot the readers' alpha * grad added up, times that slot's kernel.

    One program: BLOCK_N rows, BLOCK_C channels that share a group and a head. The rows go side by side through what
    their whole blocks have left over.
    """
    parts = tl.cdiv(L, BLOCK_C)
    tiles = d // L * parts
    blocks = tl.cdiv(N, BLOCK_N)
    step = tl.program_id(0) % tiles
    cell = tl.program_id(0) // tiles // blocks  # b, h
    n = tl.program_id(0) // tiles % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = n < N
    head = cell % H
    k = step % parts * BLOCK_C + tl.arange(0, BLOCK_C)
    ok_k = k < L
    channel = head * d + step // parts * L + k
    g = (head * d + step // parts * L) // c
    readers = tl.zeros((BLOCK_N,), dtype=tl.int32)
    acc = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    for s in range(S):
        q = (cell.to(tl.int64) * S + s) * N + n
        begin = tl.load(start + q, mask=ok, other=0)
        every = tl.load(start + q + 1, mask=ok, other=0) - begin
        count = (every & (LONG - 1)).to(tl.int32)
        begin += every & -LONG
        readers += every.to(tl.int32)
        for first_o in range(0, o, BLOCK_O):
            oo = first_o + tl.arange(0, BLOCK_O)
            ok_o = oo < o
            sums = tl.zeros((BLOCK_N, BLOCK_O), dtype=tl.float32)
            for first in range(0, tl.max(count), BLOCK_J):
                j = first + tl.arange(0, BLOCK_J)
                there = j[None, :] < count[:, None]
                p = tl.load(order + begin[:, None] + j[None, :], mask=there, other=0)
                r = (p // (S * E * H)).to(tl.int64)
                part = tl.load(
                    grad + (r * (G * o))[:, :, None] + (g * o + oo)[None, None, :],
                    mask=there[:, :, None] & ok_o[None, None, :],
                    other=0.0,
                ).to(tl.float32)
                if HAS_ALPHA:
                    part *= tl.load(alpha + p, mask=there, other=0.0).to(tl.float32)[:, :, None]
                sums += tl.sum(part, 1)
            if tl.max(every) >= LONG:
                block = tl.load(firsts + q, mask=ok, other=0)
                its = partial + ((block * (d // L) + step // parts) * o)[:, None] + oo[None, :]
                sums += tl.load(its, mask=(every >= LONG)[:, None] & ok_o[None, :], other=0.0)
            w = tl.load(
                weight + (((g * S + s) * c + channel - g * c) * o)[None, :] + oo[:, None],
                mask=ok_k[None, :] & ok_o[:, None],
                other=0.0,
            )
            acc = _dot(sums, w, acc, weight.dtype.element_ty, WIDEN)
    acc = tl.where((readers > 0)[:, None], acc, 0.0)  # zero times an infinite weight is not what nobody reads
    into = d_value + (((cell // H).to(tl.int64) * N + n) * (G * c))[:, None] + channel[None, :]
    tl.store(into, acc.to(d_value.dtype.element_ty), mask=ok[:, None] & ok_k[None, :])


@triton.jit
def _scale_weight_kernel(
    grad,
    value,
    index,
    alpha,
    partial,
    rows,
    span,  # outputs of one split
    M,
    N,
    H,
    S,
    O,
    width,
    mult,
    vb,
    vn,
    vc,
    i_b,
    i_m,
    i_s,
    i_h,
    E: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partial (splits, S, O): d_weight of one input channel to a group, summed over a split's outputs."""
    blocks = tl.cdiv(width, BLOCK_C)
    tile = tl.program_id(0) % (S * H * blocks)
    split = (tl.program_id(0) // (S * H * blocks)).to(tl.int64)
    s = tile // (H * blocks)
    head = tile // blocks % H
    o = (tile % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok_o = o < width
    o += head * width
    acc = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for first in range(0, span, BLOCK_M):
        r = split * span + first + tl.arange(0, BLOCK_M)
        ok = r < rows
        b, m = r // M, r % M
        read = _blended(
            value + b * vb, index + b * i_b + m * i_m, alpha, r, ok, s, head, o // mult, ok_o, N, H, S * E,
            vn, vc, i_s, i_h, E, HAS_ALPHA, BLOCK_M, BLOCK_C,
        )  # fmt: skip
        near = tl.load(grad + (r * O)[:, None] + o[None, :], mask=ok[:, None] & ok_o[None, :], other=0.0)
        acc += tl.sum(read.to(tl.float32) * near.to(tl.float32), 0)
    tl.store(partial + (split * S + s) * O + o, acc, mask=ok_o)


@triton.jit
def _dense_weight_kernel(
    grad,
    value,
    index,
    alpha,
    partial,
    rows,
    span,
    M,
    N,
    H,
    S,
    G,
    c,
    o,
    d,
    L,
    vb,
    vn,
    vc,
    i_b,
    i_m,
    i_s,
    i_h,
    E: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """partial (splits, G, S, c, o): d_weight, summed over a split's outputs. One program: a (BLOCK_C, BLOCK_O) tile."""
    blocks = tl.cdiv(o, BLOCK_O)
    parts = tl.cdiv(L, BLOCK_C)
    steps = c // L * parts
    tile = tl.program_id(0) % (G * S * steps * blocks)
    split = (tl.program_id(0) // (G * S * steps * blocks)).to(tl.int64)
    g = tile // (S * steps * blocks)
    s = tile // (steps * blocks) % S
    step = tile // blocks % steps
    oo = tile % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    ok_o = oo < o
    first_k = step // parts * L
    k = step % parts * BLOCK_C + tl.arange(0, BLOCK_C)
    ok_k = k < L
    k += first_k
    head = (g * c + first_k) // d
    acc = tl.zeros((BLOCK_C, BLOCK_O), dtype=tl.float32)
    for first in range(0, span, BLOCK_M):
        r = split * span + first + tl.arange(0, BLOCK_M)
        ok = r < rows
        b, m = r // M, r % M
        read = _blended(
            value + b * vb, index + b * i_b + m * i_m, alpha, r, ok, s, head, g * c + k, ok_k, N, H, S * E,
            vn, vc, i_s, i_h, E, HAS_ALPHA, BLOCK_M, BLOCK_C,
        )  # fmt: skip
        near = tl.load(
            grad + (r * (G * o))[:, None] + (g * o + oo)[None, :], mask=ok[:, None] & ok_o[None, :], other=0.0
        )
        acc = _dot(tl.trans(read), near, acc, grad.dtype.element_ty, WIDEN)
    into = partial + (((split * G + g) * S + s) * c + k)[:, None] * o + oo[None, :]
    tl.store(into, acc, mask=ok_k[:, None] & ok_o[None, :])


def refusal(
    value: Tensor, index: Tensor, alpha: Tensor | None, weight: Tensor | None, groups: int, entries: int = 1
) -> str:
    """Why these operands cannot be computed here; empty where they can."""
    there = [t for t in (value, alpha, weight) if t is not None]
    if value.dtype not in DTYPES:
        return f"{value.dtype} is not float32, bfloat16 or float16"
    if any(t.dtype != value.dtype for t in there):
        return f"operands differ in their dtypes: {', '.join(str(t.dtype) for t in there)}"
    if any(t.device != value.device for t in (*there, index)):
        return f"operands are on different devices: {', '.join(str(t.device) for t in (*there, index))}"
    if not cuda.serves(value, INTERPRETED):
        return f"value is on {value.device}, not on a CUDA device"
    if weight is not None and weight.numel() >= LIMIT:
        return f"a weight of {weight.numel()} numbers has offsets beyond 32 bits"
    if entries > 32:
        return f"entries={entries}: a slot's entries are unrolled, at most 32 of them"
    return ""


def _fit(size: int, most: int, least: int = 1) -> int:
    """A power of two that covers size, within the bounds."""
    return max(least, min(most, triton.next_power_of_2(size)))


def _dense_sizes(value: Tensor, index: Tensor, O: int, groups: int) -> tuple[int, int, int, int]:
    """(c, o, d, L)."""
    C, H = value.shape[2], index.shape[3]
    return C // groups, O // groups, C // H, math.gcd(C // groups, C // H)


def _is_dense(value: Tensor, weight: Tensor | None, groups: int) -> bool:
    return weight is not None and groups < value.shape[2]


def _reachable(value: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Copies where an offset within a row would not fit 32 bits; offsets of rows have 64."""
    if value.shape[2] * value.stride(2) >= LIMIT:
        value = value.contiguous()
    if index.shape[2] * index.stride(2) + index.shape[3] * index.stride(3) >= LIMIT:
        index = index.contiguous()
    return value, index


def _slots_first(weight: Tensor | None, groups: int, dense: bool) -> Tensor | None:
    """(O, c, S) as the kernels read it: (G, S, c, o) if dense, else (S, O)."""
    if weight is None:
        return None
    if not dense:
        return weight[:, 0].t().contiguous()
    return weight.unflatten(0, (groups, -1)).permute(0, 3, 2, 1).contiguous()


def _tuned(
    value: Tensor, dense: bool, entries: int, atomic: bool, block_m: int | None, block_c: int | None, warps: int | None
) -> tuple[int, int, int]:
    """(block_m, block_c, warps) that spill no register: a dot of float32 has no tensor cores and takes more of them."""
    wide = dense and value.dtype == torch.float32
    block_m = block_m or (64 if dense and not wide else 32) // (2 if atomic else 1)
    return (
        max(16, block_m) if dense else block_m,
        block_c or (128 if not dense else 32 if wide else 64),
        warps or (8 if wide or (dense and entries > 1) else 4),
    )


def aggregate(
    value: Tensor,
    index: Tensor,
    alpha: Tensor | None,
    weight: Tensor | None,
    groups: int,
    entries: int = 1,
    *,
    block_m: int | None = None,
    block_c: int | None = None,
    block_o: int = 128,
    num_warps: int | None = None,
    num_stages: int = 3,
) -> Tensor:
    """`nearfold.kernels.aggregate.aggregate`, in blocks of outputs, input and (with a dense kernel) output channels."""
    B, N, C = value.shape
    _, M, SE, H = index.shape
    O = out_channels(value, weight)
    out = value.new_empty(B, M, O)
    if out.numel() == 0:
        return out
    value, index = _reachable(value, index)
    dense = _is_dense(value, weight, groups)
    kernel = _slots_first(weight, groups, dense)
    operands = (value, index, value if alpha is None else alpha.contiguous(), value if kernel is None else kernel, out)
    flags: dict[str, Any] = {"E": entries, "HAS_ALPHA": alpha is not None}
    block_m, block_c, warps = _tuned(value, dense, entries, False, block_m, block_c, num_warps)
    options = {"num_warps": warps, "num_stages": num_stages}
    strides = (*value.stride(), *index.stride())
    with torch.cuda.device_of(value):
        if not dense:
            tile = _fit(O // H, block_c)
            programs = triton.cdiv(B * M, block_m) * H * triton.cdiv(O // H, tile)
            sizes = (B * M, M, N, H, SE, O, O // H, O // C)
            flags |= {"HAS_WEIGHT": weight is not None, "BLOCK_M": block_m, "BLOCK_C": tile}
            _launch(_scale_kernel, programs, (*operands, *sizes, *strides), flags, options)
            return out
        c, o, d, L = _dense_sizes(value, index, O, groups)
        block_c, block_o = _fit(L, block_c, 16), _fit(o, block_o, 16)
        programs = triton.cdiv(B * M, block_m) * groups * triton.cdiv(o, block_o)
        flags |= {"WIDEN": INTERPRETED, "BLOCK_M": block_m, "BLOCK_C": block_c, "BLOCK_O": block_o}
        dense_sizes = (B * M, M, N, H, SE // entries, groups, c, o, d, L)
        _launch(_dense_kernel, programs, (*operands, *dense_sizes, *strides), flags, options)
    return out


def _readers(index: Tensor, N: int, slots: int) -> tuple[Tensor, Tensor]:
    """`by_key`; of the right kind and nothing else where launches are only recorded."""
    if _recorded is None:
        return by_key(index, N, slots)
    kind = torch.int32 if index.numel() < LIMIT else torch.long
    rows = index.shape[0] * index.shape[3] * slots * N
    return index.new_empty(index.numel(), dtype=kind), index.new_empty(rows + 1)


def _add_up(partial: Tensor, firsts: Tensor, owner: Tensor) -> None:
    """`add_up_blocks`, but where launches are only recorded: it is a kernel of `by_key`."""
    if _recorded is None:
        add_up_blocks(partial, firsts, owner)


def _splits(rows: int, tiles: int, block: int, programs: int) -> tuple[int, int]:
    """(splits, outputs of one): as many as fill the device, each of four blocks at least; of sizes alone."""
    splits = max(1, min(triton.cdiv(programs, tiles), triton.cdiv(rows, 4 * block)))
    span = triton.cdiv(triton.cdiv(rows, splits), block) * block
    return triton.cdiv(rows, span), span


def aggregate_backward(
    grad: Tensor,
    value: Tensor,
    index: Tensor,
    alpha: Tensor | None,
    weight: Tensor | None,
    groups: int,
    entries: int = 1,
    *,
    deterministic: bool = True,
    block_m: int | None = None,
    block_c: int | None = None,
    block_o: int = 64,
    block_n: int | None = None,
    block_j: int | None = None,
    long: int = 64,
    programs: int = MOST_PROGRAMS,
    num_warps: int | None = None,
    num_stages: int = 3,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at value, alpha and weight (empty tensors for those that are None).

    Not ``deterministic``, d_value is scattered with float32 atomics instead, into a float32 buffer of value's size.
    ``block_n`` rows of value add up ``block_j`` of their readers at a time; so many of one row as ``long`` (a power of
    two) are a block that is added up by itself, that one row with many readers hold up no others. What a row's readers
    add up to is rounded to value's dtype before it meets the kernel, so in float16 it may overflow. d_weight is split
    over the outputs so that about ``programs`` programs share it.
    """
    B, N, C = value.shape
    _, M, SE, H = index.shape
    O, S = out_channels(value, weight), SE // entries
    d_alpha = value.new_empty(0 if alpha is None else alpha.shape)
    if grad.numel() == 0 or value.numel() == 0:
        d_weight = value.new_empty(0) if weight is None else weight.new_zeros(weight.shape)
        return torch.zeros_like(value, memory_format=torch.contiguous_format), d_alpha.zero_(), d_weight
    value, index = _reachable(value, index)
    dense = _is_dense(value, weight, groups)
    kernel = _slots_first(weight, groups, dense)
    c, o, d, L = _dense_sizes(value, index, O, groups)
    mult = 1 if dense else O // C
    block_m, block_c, warps = _tuned(value, dense, entries, not deterministic, block_m, block_c, num_warps)
    options = {"num_warps": warps, "num_stages": num_stages}
    if dense:
        block_c, block_o = _fit(L, block_c, 16), _fit(o, block_o, 16)
        block_n, block_j = max(16, block_n or 64), block_j or 1
    else:
        block_n, block_j = block_n or 4, block_j or 16
    grad, a = grad.contiguous(), value if alpha is None else alpha.contiguous()
    w = value if kernel is None else kernel
    rows, strides = B * M, (*value.stride(), *index.stride())
    row_blocks = triton.cdiv(rows, block_m)
    flags: dict[str, Any] = {"E": entries, "HAS_ALPHA": alpha is not None}
    dense_sizes = (H, S, groups, c, o, d, L)
    with torch.cuda.device_of(value):
        scattered = value.new_zeros(B, N, C, dtype=torch.float32) if not deterministic else None
        if alpha is not None or scattered is not None:
            into = (d_alpha, d_alpha if scattered is None else scattered)
            more = {"ATOMIC": scattered is not None, "BLOCK_M": block_m}
            if dense:
                more |= {"WIDEN": INTERPRETED, "BLOCK_C": block_c, "BLOCK_O": block_o}
                more |= {"BLOCK_E": triton.next_power_of_2(entries)}
                operands = (grad, value, index, a, w, *into, rows, M, N, *dense_sizes, *strides)
                _launch(_dense_entries_kernel, row_blocks * H * S, operands, flags | more, options)
            else:
                more |= {"HAS_WEIGHT": weight is not None, "KEEP": weight is None and d <= block_c}
                more |= {"BLOCK_C": _fit(d, block_c)}
                operands = (grad, value, index, a, w, *into, rows, M, N, H, SE, C, d, mult, *strides)
                _launch(_scale_entries_kernel, row_blocks * H, operands, flags | more, options)
        if scattered is not None:
            d_value = scattered.to(value.dtype)
        else:
            d_value = value.new_empty(B, N, C)
            order, start = _readers(index, N, S if dense else 1)
            firsts, owner = in_blocks(start, long, order.numel())
            blocks = len(owner)
            more = {"LONG": long, "BLOCK_N": block_n, "BLOCK_J": block_j}
            if dense:
                partial = value.new_empty(blocks, d // L, o, dtype=torch.float32)
                if blocks:
                    tiles = blocks * (d // L) * triton.cdiv(o, block_o)
                    operands = (grad, a, order, start, firsts, owner, partial, N, *dense_sizes)
                    _launch(_dense_blocks_kernel, tiles, operands, flags | {"LONG": long, "BLOCK_O": block_o}, options)
                    _add_up(partial.view(blocks, -1), firsts, owner)
                tiles = B * H * triton.cdiv(N, block_n) * (d // L) * triton.cdiv(L, block_c)
                more |= {"WIDEN": INTERPRETED, "BLOCK_C": block_c, "BLOCK_O": block_o}
                eight = options | {"num_warps": num_warps or 8}
                operands = (grad, a, w, order, start, firsts, partial, d_value, N, *dense_sizes)
                _launch(_dense_rows_kernel, tiles, operands, flags | more, eight)
            else:
                tile = _fit(d, block_c)
                partial = value.new_empty(blocks, d, dtype=torch.float32)
                more |= {"HAS_WEIGHT": weight is not None, "BLOCK_C": tile}
                for of_blocks, cells in ((True, blocks), (False, B * H * N)):
                    if cells:
                        tiles = triton.cdiv(cells, block_n) * triton.cdiv(d, tile)
                        operands = (grad, a, w, order, start, firsts, owner, partial, d_value, cells, N, H, SE, d, mult)
                        more["BLOCKS"] = of_blocks
                        eight = options | ({"num_warps": num_warps or 8} if of_blocks else {})  # four would spill
                        _launch(_scale_rows_kernel, tiles, operands, flags | more, eight)
                    if of_blocks and cells:
                        _add_up(partial, firsts, owner)
        if weight is None:
            return d_value, d_alpha, value.new_empty(0)
        if dense:
            tiles = groups * S * (c // L) * triton.cdiv(L, block_c) * triton.cdiv(o, block_o)
            splits, span = _splits(rows, tiles, block_m, programs)
            partial = value.new_empty(splits, groups, S, c, o, dtype=torch.float32)
            operands = (grad, value, index, a, partial, rows, span, M, N, *dense_sizes, *strides)
            more = {"WIDEN": INTERPRETED, "BLOCK_M": block_m, "BLOCK_C": block_c, "BLOCK_O": block_o}
            _launch(_dense_weight_kernel, tiles * splits, operands, flags | more, options)
            d_weight = partial.sum(0).permute(0, 3, 2, 1).reshape(weight.shape)
        else:
            tile = _fit(O // H, block_c)
            tiles = S * H * triton.cdiv(O // H, tile)
            splits, span = _splits(rows, tiles, block_m, programs)
            partial = value.new_empty(splits, S, O, dtype=torch.float32)
            operands = (grad, value, index, a, partial, rows, span, M, N, H, S, O, O // H, mult, *strides)
            more = {"BLOCK_M": block_m, "BLOCK_C": tile}
            _launch(_scale_weight_kernel, tiles * splits, operands, flags | more, options)
            d_weight = partial.sum(0).t().reshape(weight.shape)
    return d_value, d_alpha, d_weight.to(weight.dtype).contiguous()


# What would be launched on a device, for compiling it without one: recorded on the meta device.
# Name: shapes of value and index, kernel (O, groups) or None, entries, alpha, dtype.
_CASES: dict[str, tuple[Any, ...]] = {
    "attention": ((4, 4096, 1024), (4, 4096, 9, 16), None, 1, True, torch.bfloat16),
    "depthwise": ((64, 196, 384), (64, 196, 9, 1), (384, 384), 1, True, torch.bfloat16),
    "convolution": ((128, 3136, 64), (128, 3136, 9, 1), (64, 1), 1, False, torch.bfloat16),
    "wide": ((256, 256, 256), (256, 256, 9, 1), (256, 1), 1, False, torch.bfloat16),
    "single": ((128, 3136, 64), (128, 3136, 9, 1), (64, 1), 1, True, torch.float32),
    "fractional": ((32, 784, 256), (32, 784, 36, 4), (256, 4), 4, True, torch.float16),
}
_recorded: list[tuple[Any, ...]] | None = None


def _launch(kernel: Any, programs: int, operands: tuple[Any, ...], flags: dict[str, Any], options: Any) -> None:
    if _recorded is not None:
        _recorded.append((kernel, operands, flags, options))
        return
    kernel[(programs,)](*operands, **flags, **options)


def _record(case: str, deterministic: bool) -> list[tuple[Any, ...]]:
    """The launches of a case, forward and backward."""
    global _recorded
    shape, index_shape, kernel, entries, has_alpha, dtype = _CASES[case]
    value = torch.empty(shape, dtype=dtype, device="meta")
    index = torch.empty(index_shape, dtype=torch.long, device="meta")
    alpha = torch.empty(index_shape, dtype=dtype, device="meta") if has_alpha else None
    O, groups = kernel or (shape[2], 1)
    slots = index_shape[2] // entries
    weight = torch.empty(O, shape[2] // groups, slots, dtype=dtype, device="meta") if kernel else None
    _recorded = []
    try:
        out = aggregate(value, index, alpha, weight, groups, entries)
        aggregate_backward(out, value, index, alpha, weight, groups, entries, deterministic=deterministic)
        return _recorded
    finally:
        _recorded = None


def _described(kernel: Any, operands: tuple[Any, ...], flags: dict[str, Any], options: dict[str, Any]) -> Any:
    """As Triton's launch would specialise it: ones are constants, and multiples of 16 are known to be some."""
    signature, constants, attrs = {}, dict(flags), {}
    names = {torch.int64: "*i64", torch.int32: "*i32", **{dtype: f"*{name}" for dtype, name in DTYPES.items()}}
    for position, (name, operand) in enumerate(zip(kernel.arg_names, operands, strict=False)):
        if isinstance(operand, Tensor):
            signature[name] = names[operand.dtype]
        elif operand == 1:
            signature[name], constants[name] = "constexpr", 1
            continue
        else:
            signature[name] = "i32" if operand < 2**31 else "i64"
        if isinstance(operand, Tensor) or operand % 16 == 0:
            attrs[(position,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(flags, "constexpr")
    return {"fn": kernel, "signature": signature, "constexprs": constants, "attrs": attrs, **options}


def _variant(case: str, kernel: Any, deterministic: bool = True, **flags: bool) -> Callable[[], dict[str, Any]]:
    def described() -> dict[str, Any]:
        found = [launch for launch in _record(case, deterministic) if launch[0] is kernel]
        return next(_described(*launch) for launch in found if flags.items() <= launch[2].items())

    name = kernel.__name__.strip("_").removesuffix("_kernel")
    described.__name__ = "_".join(
        (case, name, *(() if deterministic else ("atomic",)), *(f for f in flags if flags[f]))
    )
    return described


VARIANTS = [
    *(
        _variant(case, kernel)
        for case in ("attention", "depthwise")
        for kernel in (_scale_kernel, _scale_entries_kernel)
    ),
    *(
        _variant(case, _scale_rows_kernel, BLOCKS=blocks)
        for case in ("attention", "depthwise")
        for blocks in (False, True)
    ),
    _variant("depthwise", _scale_weight_kernel),
    *(
        _variant(case, kernel)
        for case in ("convolution", "wide", "single", "fractional")
        for kernel in (_dense_kernel, _dense_blocks_kernel, _dense_rows_kernel, _dense_weight_kernel)
    ),
    *(_variant(case, _dense_entries_kernel) for case in ("single", "fractional")),
    *(_variant(case, _dense_entries_kernel, False) for case in ("convolution", "single", "fractional")),
    *(_variant(case, _scale_entries_kernel, False) for case in ("attention", "depthwise")),
]
