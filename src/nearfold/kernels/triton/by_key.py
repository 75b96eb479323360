"""An index of keys turned around, a counting sort with the result of a stable one: the entries that chose each key.

Entries are counted, and dealt out to their keys as they come, by atomic additions of integers. What one key has got is
then put in order, so that the result is the same from run to run: few by counting what is below each, many by walking
over all entries of the problem.

A key that very many have chosen would hold up whoever adds up what belongs to it. Of its entries, whole blocks of LONG
are added up by programs of their own before (`in_blocks`), then its blocks into its first one (`add_up_blocks`); less
than LONG entries and this one row are left to the key's program.

Shape legend: B batch, M queries, H heads, S slots of E entries, R keys; P = B H S problems, T = M E entries of one; of
a program BT entries, BR keys, W entries of a key it sorts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from nearfold.kernels.triton.rows import as_compiled

LIMIT = 2**31  # of numbers that 32 bits hold


@triton.jit
def _entries(index, problem, t, T, R, H, S, E, i_b, i_m, i_e, i_h):  # type: ignore[no-untyped-def]
    """The keys that entries t of a problem chose, -1 where none, and their numbers in a contiguous index."""
    b, h, s = problem // (H * S), problem // S % H, problem % S
    m, entry = (t // E).to(tl.int64), s * E + t % E
    r = tl.load(index + b * i_b + m * i_m + entry * i_e + h * i_h, mask=t < T, other=-1)
    return tl.where((r >= 0) & (r < R), r, -1), ((b * (T // E) + m) * (S * E) + entry) * H + h


@triton.jit
def _deal_kernel(  # type: ignore[no-untyped-def]
    index,  # (B, M, S E, H) int64: a key, or another number
    bounds,  # (P R + 1,) int64: where the entries of every key begin; read where PUT
    dealt,  # (P R,) int32: how many a key has got
    order,  # (P T,) int32 or int64: numbers of entries; written where PUT
    T,
    R,
    H,
    S,
    E,
    i_b,
    i_m,
    i_e,
    i_h,
    PUT: tl.constexpr,
    BT: tl.constexpr,
):
    blocks = tl.cdiv(T, BT)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    t = (tl.program_id(0) % blocks) * BT + tl.arange(0, BT)
    r, number = _entries(index, problem, t, T, R, H, S, E, i_b, i_m, i_e, i_h)
    place = tl.atomic_add(dealt + problem * R + r, 1, mask=r >= 0, sem="relaxed")
    if PUT:
        to = tl.load(bounds + problem * R + r, mask=r >= 0, other=0) + place
        tl.store(order + to, number.to(order.dtype.element_ty), mask=r >= 0)


@triton.jit
def _order_kernel(  # type: ignore[no-untyped-def]
    index,
    bounds,
    order,
    keys,  # P R
    T,
    R,
    H,
    S,
    E,
    i_b,
    i_m,
    i_e,
    i_h,
    BR: tl.constexpr,
    W: tl.constexpr,
    BT: tl.constexpr,
):
    name = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    start = tl.load(bounds + name, mask=name < keys, other=0)
    count = tl.load(bounds + name + 1, mask=name < keys, other=0) - start
    at = tl.arange(0, W)[None, :]
    there = (at < count[:, None]) & (count <= W)[:, None]
    found = tl.load(order + start[:, None] + at, mask=there, other=0)
    place = tl.zeros([BR, W], tl.int32)  # so many are below
    for c in range(0, tl.minimum(tl.max(count, 0), W), 16):
        other = c + tl.arange(0, 16)[None, :]
        known = (other < count[:, None]) & (count <= W)[:, None]
        below = tl.load(order + start[:, None] + other, mask=known, other=0)
        below = (below[:, None, :] < found[:, :, None]) & known[:, None, :]
        place += tl.sum(below.to(tl.int32), 2)
    tl.debug_barrier()  # all have read before anyone writes
    tl.store(order + start[:, None] + place, found, mask=there)
    if tl.max(count, 0) > W:
        for i in range(0, BR):
            one = tl.program_id(0).to(tl.int64) * BR + i
            to = tl.load(bounds + one, mask=one < keys, other=0)
            if tl.load(bounds + one + 1, mask=one < keys, other=0) - to > W:
                for t0 in range(0, T, BT):
                    t = t0 + tl.arange(0, BT)
                    r, number = _entries(index, one // R, t, T, R, H, S, E, i_b, i_m, i_e, i_h)
                    mine = (r == one % R).to(tl.int32)
                    at_end = to + tl.cumsum(mine, 0) - 1
                    tl.store(order + at_end, number.to(order.dtype.element_ty), mask=mine > 0)
                    to += tl.sum(mine, 0)


@triton.jit
def of_block(bounds, firsts, owner, block, there, LONG: tl.constexpr):  # type: ignore[no-untyped-def]
    """The key that a block belongs to, where its entries begin, and whether there is such a block."""
    name = tl.load(owner + block, mask=there, other=0)
    first = tl.load(firsts + name, mask=there, other=0)
    begin = tl.load(bounds + name, mask=there, other=0) + (block - first) * LONG
    return name, begin, there & (block < tl.load(firsts + name + 1, mask=there, other=0))


def in_blocks(bounds: Tensor, long: int, entries: int) -> tuple[Tensor, Tensor]:
    """The entries of every key, from the first, in whole blocks of ``long``: less than one of them is left over.

    Args:
        bounds: (keys + 1,) int64, of `by_key`.
        long: entries of a block.
        entries: how many there are at most, of all keys.

    Returns:
        firsts (keys + 1,) int64: the number of every key's first block; owner (entries // long,) int64: the key that a
        block belongs to, and any where there are fewer blocks. No host synchronisation.
    """
    firsts = torch.zeros_like(bounds)
    torch.cumsum(bounds.diff().div_(long, rounding_mode="floor"), 0, out=firsts[1:])
    blocks = torch.arange(entries // long, device=bounds.device)
    return firsts, torch.searchsorted(firsts[1:], blocks, right=True).clamp_(max=len(bounds) - 2)


@triton.jit
def _blocks_kernel(  # type: ignore[no-untyped-def]
    partial,  # (blocks, width) float32: what every block adds up to; of every key's first one, what all of them do
    firsts,
    owner,
    width,
    BB: tl.constexpr,
    BC: tl.constexpr,
):
    tiles = tl.cdiv(width, BC)
    block = (tl.program_id(0) // tiles).to(tl.int64)
    name = tl.load(owner + block)
    stop = tl.load(firsts + name + 1)
    if (tl.load(firsts + name) != block) | (stop < block + 2):
        return
    c = tl.program_id(0) % tiles * BC + tl.arange(0, BC)
    total = tl.zeros([BC], tl.float32)
    for b0 in range(block, stop, BB):
        b = b0 + tl.arange(0, BB)
        at = partial + b[:, None] * width + c[None, :]
        total += tl.sum(tl.load(at, mask=(b < stop)[:, None] & (c < width)[None, :], other=0.0), 0)
    tl.debug_barrier()  # all have read before anyone writes
    tl.store(partial + block * width + c, total, mask=c < width)


def add_up_blocks(partial: Tensor, firsts: Tensor, owner: Tensor) -> None:
    """Of ``partial`` (blocks, width) float32, to every key's first block the key's others are added."""
    blocks, width = partial.shape
    with torch.cuda.device_of(partial):
        _blocks_kernel[(blocks * triton.cdiv(width, 64),)](partial, firsts, owner, width, BB=32, BC=64, num_warps=4)


def by_key(
    index: Tensor, keys: int, slots: int = 1, *, width: int | None = None, block: int = 1024
) -> tuple[Tensor, Tensor]:
    """The index turned around: (order, bounds), where order[bounds[q] : bounds[q + 1]] are the entries that chose q.

    Keys are numbered (b, h, s, r), s being one of ``slots`` blocks of entries; entries by their offset in a contiguous
    index, ascending within a key. Nothing is meant behind the last bound. No host synchronisation.

    Args:
        index: (B, M, S E, H) int64, any strides: a key from 0 to R - 1; other numbers choose none.
        keys: R.
        slots: S.
        width: how many entries of a key are sorted at once, a power of two; by default three times the mean or more.
        block: entries of a program, likewise.

    Returns:
        order (B M S E H,) int32, or int64 where that is too few bits, and bounds (B H S R + 1,) int64.
    """
    B, M, SE, H = index.shape
    E, problems = SE // slots, B * H * slots
    T, names = M * E, problems * keys
    kind = torch.int32 if index.numel() < LIMIT else torch.long
    dealt = torch.zeros(2, names, dtype=torch.int32, device=index.device)
    bounds = torch.zeros(names + 1, dtype=torch.long, device=index.device)
    order = torch.empty(index.numel(), dtype=kind, device=index.device)
    if index.numel() == 0 or names == 0:
        return order, bounds
    width = width or max(16, min(128, int(triton.next_power_of_2(triton.cdiv(3 * T, keys)))))
    sizes = (T, keys, H, slots, E, *index.stride())
    grid, rows = (triton.cdiv(T, block) * problems,), max(1, 256 // width)
    with torch.cuda.device_of(index):
        _deal_kernel[grid](index, bounds, dealt[0], order, *sizes, PUT=False, BT=block, num_warps=4)
        torch.cumsum(dealt[0], 0, out=bounds[1:])
        _deal_kernel[grid](index, bounds, dealt[1], order, *sizes, PUT=True, BT=block, num_warps=4)
        _order_kernel[(triton.cdiv(names, rows),)](
            index, bounds, order, names, *sizes, BR=rows, W=width, BT=block, num_warps=4
        )
    return order, bounds


def _deal_variant(put: bool) -> dict:
    pointers = {"index": "*i64", "bounds": "*i64", "dealt": "*i32", "order": "*i32"}
    return as_compiled(_deal_kernel, {"PUT": put, "BT": 1024}, pointers, (), 4)


def _order_variant(width: int) -> dict:
    pointers = {"index": "*i64", "bounds": "*i64", "order": "*i32"}
    return as_compiled(_order_kernel, {"BR": 256 // width, "W": width, "BT": 1024}, pointers, (), 4)


def _blocks_variant() -> dict:
    pointers = {"partial": "*fp32", "firsts": "*i64", "owner": "*i64", "width": "i32:16"}
    return as_compiled(_blocks_kernel, {"BB": 32, "BC": 64}, pointers, (), 4)


# what is launched on a large device, to be built without one
VARIANTS: list[Callable[[], dict]] = [
    partial(_deal_variant, False),
    partial(_deal_variant, True),
    partial(_order_variant, 32),
    partial(_order_variant, 128),
    _blocks_variant,
]
