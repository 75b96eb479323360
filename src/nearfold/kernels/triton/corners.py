"""`nearfold::corners` on a CUDA device: every offset is read once, every share and index written once.

A slot of a axes has E = 2^a corners. Bytes of a slot with float32 offsets and a mask, on two axes: 12 read and 48
written (32 of them indices, int64 as the operator says); the backward reads 28 and writes 12. A slot takes some 30
operations, so memory is the bound. PyTorch's formula writes more than forty tensors of the slots' size on its way.

Shape legend: P samples and groups, S slots, M outputs, a axes; fewer than three are led by axes of one position.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, disable-error-code="possibly-undefined"
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nearfold.kernels import cuda
from nearfold.kernels.corners_torch import Frame

INTERPRETED: bool = triton.knobs.runtime.interpret
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
LIMIT = 2**28  # positions, and a slot's corners times outputs, are int32
BLOCK = 512  # outputs of a program
WARPS = 4


@triton.jit
def _place(offset, ok, start, size):
    """On one axis: the lower corner, the upper one's share, and whether the offset is NaN."""
    where = start.to(tl.float32) + tl.load(offset, mask=ok, other=0.0).to(tl.float32)
    low = tl.floor(where)
    lost = where != where
    # far outside there is no corner on the grid, and no integer overflows
    near = tl.minimum(tl.maximum(low, -2.0), size + 1.0)
    return tl.where(lost, -2.0, near).to(tl.int32), where - low, lost


@triton.jit
def _places(
    offset, m, ok, s, OY, OX, KY, KX, Z, Y, X, tz, ty, tx, dz, dy, dx, bz, by, bx, o_a, A: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """`_place` on three axes; an axis that is not there has its one position, unmoved."""
    low_z = tl.zeros((BLOCK_M,), tl.int32)
    low_y = tl.zeros((BLOCK_M,), tl.int32)
    part_z = tl.zeros((BLOCK_M,), tl.float32)
    part_y = tl.zeros((BLOCK_M,), tl.float32)
    lost = m < 0
    if A == 3:  # axes are stepped along: a stride times an axis may not fit 32 bits
        low_z, part_z, found = _place(offset, ok, m // (OY * OX) * tz + s // (KY * KX) * dz - bz, Z)
        lost |= found
        offset += o_a
    if A >= 2:
        low_y, part_y, found = _place(offset, ok, m // OX % OY * ty + s // KX % KY * dy - by, Y)
        lost |= found
        offset += o_a
    low_x, part_x, found = _place(offset, ok, m % OX * tx + s % KX * dx - bx, X)
    return low_z, low_y, low_x, part_z, part_y, part_x, lost | found


@triton.jit
def _corner(low_z, low_y, low_x, e: tl.constexpr, Z, Y, X):
    """Index of corner e, and whether it is on the grid."""
    z, y, x = low_z + e // 4, low_y + e // 2 % 2, low_x + e % 2
    inside = (z >= 0) & (z < Z) & (y >= 0) & (y < Y) & (x >= 0) & (x < X)
    return (z * Y + y) * X + x, inside


@triton.jit
def _toward(part, upper: tl.constexpr):
    """The share of the upper or the lower neighbour on one axis."""
    if upper:
        return part
    else:
        return 1 - part


@triton.jit
def _corners_kernel(
    offset,
    mask,
    share,  # (P, S, E, M)
    index,  # (P, S, E, M)
    S,
    M,
    OY,
    OX,
    KY,
    KX,
    Z,
    Y,
    X,
    tz,
    ty,
    tx,
    dz,
    dy,
    dx,
    bz,
    by,
    bx,
    o_p,
    o_s,
    o_a,
    o_m,
    m_p,
    m_s,
    m_m,
    A: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    blocks = tl.cdiv(M, BLOCK_M)
    m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    ok = m < M
    row = (tl.program_id(0) // blocks).to(tl.int64)
    p, wide_s = row // S, row % S
    s, wide = wide_s.to(tl.int32), m.to(tl.int64)
    offset += p * o_p + wide_s * o_s
    low_z, low_y, low_x, part_z, part_y, part_x, lost = _places(
        offset + wide * o_m, m, ok, s, OY, OX, KY, KX, Z, Y, X, tz, ty, tx, dz, dy, dx, bz, by, bx, o_a, A, BLOCK_M
    )
    whole = tl.full((BLOCK_M,), 1.0, tl.float32)
    if HAS_MASK:
        whole = tl.load(mask + p * m_p + wide_s * m_s + wide * m_m, mask=ok, other=0.0).to(tl.float32)
    into = row * (1 << A) * M + m
    for e in tl.static_range(1 << A):
        at, inside = _corner(low_z, low_y, low_x, e, Z, Y, X)
        part = whole * _toward(part_z, e // 4) * _toward(part_y, e // 2 % 2) * _toward(part_x, e % 2)
        part = tl.where(lost, float("nan"), tl.where(inside, part, 0.0))
        at = tl.where(lost, 0, tl.where(inside, at, -1))
        tl.store(share + into + e * M, part.to(share.dtype.element_ty), mask=ok)
        tl.store(index + into + e * M, at.to(tl.int64), mask=ok)


@triton.jit
def _backward_kernel(
    grad,  # (P, M, S * E)
    offset,
    mask,
    d_offset,  # (P, S, a, M)
    d_mask,  # (P, S, M)
    S,
    M,
    OY,
    OX,
    KY,
    KX,
    Z,
    Y,
    X,
    tz,
    ty,
    tx,
    dz,
    dy,
    dx,
    bz,
    by,
    bx,
    o_p,
    o_s,
    o_a,
    o_m,
    m_p,
    m_s,
    m_m,
    g_p,
    g_m,
    g_e,
    A: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    blocks = tl.cdiv(M, BLOCK_M)
    m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    ok = m < M
    row = (tl.program_id(0) // blocks).to(tl.int64)
    p, wide_s = row // S, row % S
    s, wide = wide_s.to(tl.int32), m.to(tl.int64)
    offset += p * o_p + wide_s * o_s
    low_z, low_y, low_x, part_z, part_y, part_x, lost = _places(
        offset + wide * o_m, m, ok, s, OY, OX, KY, KX, Z, Y, X, tz, ty, tx, dz, dy, dx, bz, by, bx, o_a, A, BLOCK_M
    )
    grad += p * g_p + wide * g_m
    of_mask = tl.zeros((BLOCK_M,), tl.float32)
    of_z = tl.zeros((BLOCK_M,), tl.float32)
    of_y = tl.zeros((BLOCK_M,), tl.float32)
    of_x = tl.zeros((BLOCK_M,), tl.float32)
    for e in tl.static_range(1 << A):
        _, inside = _corner(low_z, low_y, low_x, e, Z, Y, X)
        read = tl.load(grad + ((s << A) + e).to(tl.int64) * g_e, mask=ok & inside & (lost == 0), other=0.0)
        g = read.to(tl.float32)
        z, y, x = _toward(part_z, e // 4), _toward(part_y, e // 2 % 2), _toward(part_x, e % 2)
        # a corner that is not there has no gradient, and its shares may be infinite or NaN
        there = inside & (lost == 0)
        of_mask += tl.where(there, g * z * y * x, 0.0)
        of_z += tl.where(there, g * y * x * (1 if e // 4 else -1), 0.0)
        of_y += tl.where(there, g * z * x * (1 if e // 2 % 2 else -1), 0.0)
        of_x += tl.where(there, g * z * y * (1 if e % 2 else -1), 0.0)
    if HAS_MASK:
        tl.store(d_mask + row * M + m, of_mask.to(d_mask.dtype.element_ty), mask=ok)
        whole = tl.load(mask + p * m_p + wide_s * m_s + wide * m_m, mask=ok, other=0.0).to(tl.float32)
        of_z *= whole
        of_y *= whole
        of_x *= whole
    into = d_offset + row * A * M + m
    if A == 3:
        tl.store(into, of_z.to(d_offset.dtype.element_ty), mask=ok)
    if A >= 2:
        tl.store(into + (A - 2) * M, of_y.to(d_offset.dtype.element_ty), mask=ok)
    tl.store(into + (A - 1) * M, of_x.to(d_offset.dtype.element_ty), mask=ok)


def refusal(offset: Tensor, mask: Tensor | None, frame: Frame) -> str:
    """Why these operands cannot be computed here; empty where they can."""
    there = [t for t in (offset, mask) if t is not None]
    if offset.dtype not in DTYPES or any(t.dtype != offset.dtype for t in there):
        return f"operands are {', '.join(str(t.dtype) for t in there)}, not float32, bfloat16 or float16 alike"
    if any(not cuda.serves(t, INTERPRETED) or t.device != offset.device for t in there):
        return f"operands are on {', '.join(str(t.device) for t in there)}, not on one CUDA device"
    starts = zip(frame.out, frame.stride, frame.size, frame.dilation, frame.before, strict=True)
    furthest = max(max(o * t + s * d, abs(b)) for o, t, s, d, b in starts)
    programs = offset.shape[0] * offset.shape[1] * triton.cdiv(offset.shape[3], BLOCK)
    if max(furthest, math.prod(frame.grid), math.prod(frame.out), programs) >= LIMIT:
        return "positions or programs do not fit 28 bits"
    return ""


def _three(numbers: Sequence[int], missing: int) -> list[int]:
    return [missing] * (3 - len(numbers)) + list(numbers)


def _geometry(frame: Frame) -> tuple[int, ...]:
    size, out = _three(frame.size, 1), _three(frame.out, 1)
    moves = (_three(frame.stride, 1), _three(frame.dilation, 1), _three(frame.before, 0))
    return (*out[1:], *size[1:], *_three(frame.grid, 1), *(n for three in moves for n in three))


def corners(
    offset: Tensor, mask: Tensor | None, frame: Frame, share: Tensor, index: Tensor, *, block: int = BLOCK
) -> None:
    """Write `nearfold.kernels.corners.corners` into share and index (P, S * E, M), contiguous.

    Args:
        offset: (P, S, a, M), any strides.
        mask: (P, S, M), any strides, or None.
        frame: where the window lies.
        share: in offset's dtype; computed in float32 and rounded once.
        index: int64.
        block: outputs of a program, a power of two.

    Raises:
        NotImplementedError: where `refusal` says why.
    """
    if why := refusal(offset, mask, frame):
        raise NotImplementedError(why)
    P, S, axes, M = offset.shape
    if share.numel() == 0:
        return
    with torch.cuda.device_of(offset):
        _corners_kernel[(P * S * triton.cdiv(M, block),)](
            *(offset, offset if mask is None else mask, share, index, S, M, *_geometry(frame)),
            *(*offset.stride(), *((0, 0, 0) if mask is None else mask.stride())),
            A=axes,
            HAS_MASK=mask is not None,
            BLOCK_M=block,
            num_warps=WARPS,
        )


def corners_backward(
    grad: Tensor, offset: Tensor, mask: Tensor | None, frame: Frame, *, block: int = BLOCK
) -> tuple[Tensor, Tensor | None]:
    """Gradients at offset and mask, contiguous, given that at the shares (P, M, S * E), which has any strides.

    The other arguments are those of `corners`. Nothing is added up by several programs.

    Raises:
        NotImplementedError: where `refusal` says why.
    """
    if why := refusal(offset, mask, frame):
        raise NotImplementedError(why)
    P, S, axes, M = offset.shape
    d_offset = offset.new_empty(offset.shape)
    d_mask = None if mask is None else mask.new_empty(mask.shape)
    if offset.numel() == 0:
        return d_offset, d_mask
    with torch.cuda.device_of(offset):
        _backward_kernel[(P * S * triton.cdiv(M, block),)](
            *(grad, offset, offset if mask is None else mask, d_offset, d_offset if d_mask is None else d_mask),
            *(S, M, *_geometry(frame), *offset.stride(), *((0, 0, 0) if mask is None else mask.stride())),
            *grad.stride(),
            A=axes,
            HAS_MASK=mask is not None,
            BLOCK_M=block,
            num_warps=WARPS,
        )
    return d_offset, d_mask


def _variant(kernel: Any, axes: int, dtype: str, masked: bool) -> Callable[[], dict[str, Any]]:
    """What a launch on a map of so many axes compiles, 3 slots an axis, stride and dilation 1."""

    def make() -> dict[str, Any]:
        tensors = ("offset", "mask", "share", "grad", "d_offset", "d_mask")
        signature = {n: "i32:16" if n[-2:] in ("_p", "_s", "_a") else "i32" for n in kernel.arg_names}
        signature |= dict.fromkeys(tensors, f"*{dtype}") | {"index": "*i64", "M": "i32:16"}
        ones = ["tz", "ty", "tx", "dz", "dy", "dx", "o_m", "m_m", *(("Z",) if axes < 3 else ()), "g_m"]
        ones += [n for n, least in (("Y", 2), ("OY", 2), ("KY", 2)) if axes < least]
        constexprs = {n: 1 for n in ones if n in kernel.arg_names}
        constexprs |= {"A": axes, "HAS_MASK": masked, "BLOCK_M": BLOCK}
        used = {n: t for n, t in signature.items() if n in kernel.arg_names}
        return {"fn": kernel, "signature": used, "constexprs": constexprs, "num_warps": WARPS, "num_stages": 3}

    return make


# what is launched on a device, to be built without one
VARIANTS: list[Callable[[], dict[str, Any]]] = [
    _variant(kernel, axes, dtype, masked)
    for kernel in (_corners_kernel, _backward_kernel)
    for axes, dtype, masked in ((1, "fp32", False), (2, "fp32", True), (2, "bf16", True), (3, "fp32", True))
]
