"""The chosen slots in the order of the keys they chose: a counting sort, with the result of a stable one.

Slots are counted, and dealt out to their keys as they come, by atomic additions of integers. What one key has got is
then put in order, so that the result is the same from run to run: few by a sort in registers, many by walking over all
slots of the problem.

Shape legend: P problems, T slots of a problem, R keys; of a program BT slots, BR keys, W slots of a key it sorts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from nearfold.kernels.triton.rows import as_compiled

MOST_SLOTS = 2**31 - 1  # of a problem: they are counted in 32 bits
LAST = tl.constexpr(2**31 - 1)


@triton.jit
def _deal_kernel(  # type: ignore[no-untyped-def]
    index,  # (P, T) int64: a key, or negative
    bounds,  # (P R + 1,) int64: where the slots of every key begin; read where PUT
    dealt,  # (P R,) int32: how many a key has got
    order,  # (P T,) int32: slots of their problem; written where PUT
    T,
    R,
    PUT: tl.constexpr,
    BT: tl.constexpr,
):
    blocks = tl.cdiv(T, BT)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    t = (tl.program_id(0) % blocks) * BT + tl.arange(0, BT)
    r = tl.load(index + problem * T + t, mask=t < T, other=-1)
    there = r >= 0
    place = tl.atomic_add(dealt + problem * R + r, 1, mask=there, sem="relaxed")
    if PUT:
        tl.store(order + tl.load(bounds + problem * R + r, mask=there, other=0) + place, t, mask=there)


@triton.jit
def _order_kernel(  # type: ignore[no-untyped-def]
    index,
    bounds,
    order,
    T,
    R,
    keys,  # P R
    BR: tl.constexpr,
    W: tl.constexpr,
    BT: tl.constexpr,
):
    name = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    start = tl.load(bounds + name, mask=name < keys, other=0)
    number = tl.load(bounds + name + 1, mask=name < keys, other=0) - start
    at = tl.arange(0, W)[None, :]
    there = (at < number[:, None]) & (number <= W)[:, None]
    sorted_slots = tl.sort(tl.load(order + start[:, None] + at, mask=there, other=LAST), 1)
    tl.store(order + start[:, None] + at, sorted_slots, mask=there)
    if tl.max(number, 0) > W:
        for i in range(0, BR):
            one = tl.program_id(0).to(tl.int64) * BR + i
            to = tl.load(bounds + one, mask=one < keys, other=0)
            if tl.load(bounds + one + 1, mask=one < keys, other=0) - to > W:
                problem = one // R
                for t0 in range(0, T, BT):
                    t = t0 + tl.arange(0, BT)
                    r = tl.load(index + problem * T + t, mask=t < T, other=-1)
                    mine = (r == one % R).to(tl.int32)
                    tl.store(order + to + tl.cumsum(mine, 0) - 1, t, mask=mine > 0)
                    to += tl.sum(mine, 0)


def by_key(index: Tensor, keys: int, *, width: int | None = None, block: int = 1024) -> tuple[Tensor, Tensor]:
    """The slots of every key one after another, ascending, and where those of every key begin.

    Args:
        index: (P, T) int64 contiguous: a key from 0 to R - 1, or negative where the slot chose none.
        keys: R.
        width: how many slots of a key are sorted at once, a power of two; by default four times the mean or more.
        block: slots of a program, likewise.

    Returns:
        order (P T,) int32, slots of their problem, with nothing meant behind the last bound, and bounds (P R + 1,)
        int64. No host synchronisation.
    """
    problems, T = index.shape
    names = problems * keys
    dealt = torch.zeros(2, names, dtype=torch.int32, device=index.device)
    bounds = torch.zeros(names + 1, dtype=torch.long, device=index.device)
    order = torch.empty(problems * T, dtype=torch.int32, device=index.device)
    if order.numel() == 0 or names == 0:
        return order, bounds
    width = width or max(32, min(512, triton.next_power_of_2(triton.cdiv(4 * T, keys))))
    grid, rows = (triton.cdiv(T, block) * problems,), 1024 // min(width, 512)
    with torch.cuda.device_of(index):
        _deal_kernel[grid](index, bounds, dealt[0], order, T, keys, PUT=False, BT=block, num_warps=4)
        torch.cumsum(dealt[0], 0, out=bounds[1:])
        _deal_kernel[grid](index, bounds, dealt[1], order, T, keys, PUT=True, BT=block, num_warps=4)
        _order_kernel[(triton.cdiv(names, rows),)](
            index, bounds, order, T, keys, names, BR=rows, W=width, BT=block, num_warps=4
        )
    return order, bounds


def _deal_variant(put: bool) -> dict:
    pointers = {"index": "*i64", "bounds": "*i64", "dealt": "*i32", "order": "*i32"}
    return as_compiled(_deal_kernel, {"PUT": put, "BT": 1024}, pointers, (), 4)


def _order_variant(width: int) -> dict:
    pointers = {"index": "*i64", "bounds": "*i64", "order": "*i32"}
    return as_compiled(_order_kernel, {"BR": 1024 // width, "W": width, "BT": 1024}, pointers, (), 4)


# what is launched on a large device, to be built without one
VARIANTS: list[Callable[[], dict]] = [
    partial(_deal_variant, False),
    partial(_deal_variant, True),
    partial(_order_variant, 32),
    partial(_order_variant, 64),
    partial(_order_variant, 512),
]
