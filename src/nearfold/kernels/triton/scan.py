"""`nearfold::selective_scan` on a CUDA device, parallel over batch, channels, and chunks of the positions.

A chain of thousands of positions leaves a large device idle where batch times channels is small. So every chunk is
walked at once from a state of zero, one short kernel hands states from chunk to chunk, and the chunks are walked again
from their true states: each position's exponential is computed twice, and nothing of size (B, N, C, S) is written.

The walks go position by position and hold a tile of states (BS, BC). The gradients need every state of a chunk beside
its adjoint: that kernel takes one state number after another and solves both recurrences for a tile (T, BC), as scans.
What several programs add to is written as one part per program and added by PyTorch: equal inputs have equal results.

Shape legend: B batch, N positions, C channels, S states, T positions of a chunk, K chunks; of a program BC channels,
BS states; CB and SB blocks of channels and of states. The arguments B and C of the scan are `inp` and `out` in here,
A transposed is `rate`. A chunk's `back` is what the state at its end receives from later positions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nearfold.kernels import scan_torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_STATES = 32  # of a walk, in registers
WALK_CHANNELS = 32
GRADIENT_CHANNELS = 16
UNALIGNED = ("C", *(f"{name}_stride_{axis}" for name in "gud" for axis in "bn"))
STAGES = tl.constexpr(4)


def refusal(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> str:
    """Why `scan` and `scan_backward` cannot run on these arguments; empty where they can."""
    if u.dtype not in DTYPES or any(x.dtype != u.dtype for x in (delta, A, B, C)):
        found = ", ".join(str(x.dtype) for x in (u, delta, A, B, C))
        return f"the operands are {found}, not float32, bfloat16 or float16 alike"
    batch, positions, channels = u.shape
    blocks = triton.cdiv(channels, GRADIENT_CHANNELS) * triton.cdiv(A.shape[1], MOST_STATES)
    past_the_end = positions + 2 * scan_torch.CHUNK
    if max(past_the_end, batch * scan_torch.chunks_of(positions) * blocks, channels * A.shape[1]) >= 2**31:
        return "positions, states or programs do not fit 32 bits"
    return ""


@triton.jit
def _row(base, feature, stride, there):  # type: ignore[no-untyped-def]
    """Numbers of one position in float32, zero where ``there`` is false."""
    return tl.load(base + feature.to(tl.int64) * stride, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _tile(base, t, t_stride, feature, f_stride, there):  # type: ignore[no-untyped-def]
    """(T, BC) numbers of positions ``t`` in float32, zero where ``there`` (T, BC) is false."""
    at = base + t.to(tl.int64)[:, None] * t_stride + feature.to(tl.int64)[None, :] * f_stride
    return tl.load(at, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    u,
    delta,
    rate,  # (S, C)
    inp,
    out,
    states,  # (B, K, S, C) float32: before every chunk; read with READ
    ends,  # (B, K - 1, S, C) float32: after every chunk from zero, and
    total,  # (B, K - 1, C) float32: its sum of delta; written without READ
    y,  # (SB, B, N, C), written with READ
    batch,
    N,
    C,
    S,
    K,
    u_stride_b,
    u_stride_n,
    u_stride_c,
    d_stride_b,
    d_stride_n,
    d_stride_c,
    i_stride_b,
    i_stride_n,
    i_stride_s,
    o_stride_b,
    o_stride_n,
    o_stride_s,
    READ: tl.constexpr,
    T: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
):
    c_blocks = tl.cdiv(C, BC)
    s_blocks = tl.cdiv(S, BS)
    walked = K if READ else K - 1
    at = tl.program_id(0)
    c = at % c_blocks * BC + tl.arange(0, BC)
    s_block = at // c_blocks % s_blocks
    s = s_block * BS + tl.arange(0, BS)
    chunk = at // (c_blocks * s_blocks) % walked
    b = (at // (c_blocks * s_blocks) // walked).to(tl.int64)
    c_there = c < C
    s_there = s < S
    there = s_there[:, None] & c_there[None, :]
    cell = s[:, None] * C + c[None, :]
    a = tl.load(rate + cell, mask=there, other=0.0).to(tl.float32)
    if READ:
        h = tl.load(states + (b * K + chunk) * S * C + cell, mask=there, other=0.0)
    else:
        h = tl.zeros([BS, BC], tl.float32)
    whole = tl.zeros([BC], tl.float32)
    for i in range(0, tl.minimum(T, N - chunk * T)):
        n = (chunk * T + i).to(tl.int64)
        d = _row(delta + b * d_stride_b + n * d_stride_n, c, d_stride_c, c_there)
        x = d * _row(u + b * u_stride_b + n * u_stride_n, c, u_stride_c, c_there)
        put = _row(inp + b * i_stride_b + n * i_stride_n, s, i_stride_s, s_there)
        h = tl.exp(d[None, :] * a) * h + put[:, None] * x[None, :]
        if READ:
            get = _row(out + b * o_stride_b + n * o_stride_n, s, o_stride_s, s_there)
            # states that are not there are 0 * x, which an infinite x makes NaN
            seen = tl.sum(tl.where(there, get[:, None] * h, 0.0), 0)
            place = ((s_block * batch + b) * N + n) * C + c
            tl.store(y + place, seen.to(y.dtype.element_ty), mask=c_there)
        else:
            whole += d
    if not READ:
        tl.store(ends + (b * (K - 1) + chunk) * S * C + cell, h, mask=there)
        if s_block == 0:
            tl.store(total + (b * (K - 1) + chunk) * C + c, whole, mask=c_there)


@triton.jit
def _back_kernel(  # type: ignore[no-untyped-def]
    grad,
    delta,
    rate,  # (S, C)
    out,
    ends,  # (B, K - 1, S, C) float32: what chunk k + 1 alone gives back to the state before it, and
    total,  # (B, K - 1, C) float32: its sum of delta
    N,
    C,
    S,
    K,
    g_stride_b,
    g_stride_n,
    g_stride_c,
    d_stride_b,
    d_stride_n,
    d_stride_c,
    o_stride_b,
    o_stride_n,
    o_stride_s,
    T: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
):
    c_blocks = tl.cdiv(C, BC)
    s_blocks = tl.cdiv(S, BS)
    at = tl.program_id(0)
    c = at % c_blocks * BC + tl.arange(0, BC)
    s_block = at // c_blocks % s_blocks
    s = s_block * BS + tl.arange(0, BS)
    before = at // (c_blocks * s_blocks) % (K - 1)
    b = (at // (c_blocks * s_blocks) // (K - 1)).to(tl.int64)
    c_there = c < C
    s_there = s < S
    there = s_there[:, None] & c_there[None, :]
    cell = s[:, None] * C + c[None, :]
    a = tl.load(rate + cell, mask=there, other=0.0).to(tl.float32)
    back = tl.zeros([BS, BC], tl.float32)
    whole = tl.zeros([BC], tl.float32)
    first = before * T + T
    last = tl.minimum(first + T, N) - 1
    for i in range(0, last - first + 1):
        n = (last - i).to(tl.int64)
        d = _row(delta + b * d_stride_b + n * d_stride_n, c, d_stride_c, c_there)
        g = _row(grad + b * g_stride_b + n * g_stride_n, c, g_stride_c, c_there)
        get = _row(out + b * o_stride_b + n * o_stride_n, s, o_stride_s, s_there)
        back = tl.exp(d[None, :] * a) * (get[:, None] * g[None, :] + back)
        whole += d
    tl.store(ends + (b * (K - 1) + before) * S * C + cell, back, mask=there)
    if s_block == 0:
        tl.store(total + (b * (K - 1) + before) * C + c, whole, mask=c_there)


@triton.jit
def _carry_kernel(  # type: ignore[no-untyped-def]
    ends,  # (B, K - 1, S, C)
    total,  # (B, K - 1, C)
    rate,  # (S, C)
    carried,  # (B, K, S, C): x of x_{k+1} = exp(rate total_k) x_k + ends_k, from zero
    C,
    S,
    K,
    REVERSE: tl.constexpr,  # from the last chunk to the first
    BLOCK: tl.constexpr,
):
    cells = S * C
    blocks = tl.cdiv(cells, BLOCK)
    cell = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    there = cell < cells
    a = tl.load(rate + cell, mask=there, other=0.0).to(tl.float32)
    c = cell % C
    x = tl.zeros([BLOCK], tl.float32)
    tl.store(carried + (b * K + (K - 1 if REVERSE else 0)) * cells + cell, x, mask=there)
    for i in tl.range(0, K - 1, num_stages=STAGES):
        k = K - 2 - i if REVERSE else i
        d = tl.load(total + (b * (K - 1) + k) * C + c, mask=there, other=0.0)
        end = tl.load(ends + (b * (K - 1) + k) * cells + cell, mask=there, other=0.0)
        x = tl.exp(d * a) * x + end
        tl.store(carried + (b * K + (k if REVERSE else k + 1)) * cells + cell, x, mask=there)


@triton.jit
def _after(decay, end, next_decay, next_end):  # type: ignore[no-untyped-def]
    """Two steps of x -> decay x + end as one."""
    # decays that grow beyond float32 leave a state of zero zero
    return decay * next_decay, tl.where(end == 0, next_end, next_decay * end + next_end)


# were rows of channels known to be aligned, a thread would read several channels of few positions at once, and the
# recurrences would cross threads; so it holds many positions of one channel, and a third of the instructions is saved
@triton.jit(do_not_specialize=UNALIGNED)
def _gradient_kernel(  # type: ignore[no-untyped-def]
    grad,
    u,
    delta,
    rate,  # (S, C)
    inp,
    out,
    states,  # (B, K, S, C) float32: before every chunk
    backs,  # (B, K, S, C) float32
    d_u,  # (B, N, C)
    d_input,  # (B, N, C) float32: of delta * u
    d_decay,  # (B, N, C) float32: of delta through the decay; at the first position there is none
    d_rate,  # (B, K, S, C) float32, to be added over the first two
    d_shared,  # (2, CB, B, S, N) float32: of inp and out, to be added over CB
    batch,
    N,
    C,
    S,
    K,
    g_stride_b,
    g_stride_n,
    g_stride_c,
    u_stride_b,
    u_stride_n,
    u_stride_c,
    d_stride_b,
    d_stride_n,
    d_stride_c,
    i_stride_b,
    i_stride_n,
    i_stride_s,
    o_stride_b,
    o_stride_n,
    o_stride_s,
    T: tl.constexpr,
    BC: tl.constexpr,
):
    c_blocks = tl.cdiv(C, BC)
    c_block = tl.program_id(0) % c_blocks
    c = c_block * BC + tl.arange(0, BC)
    chunk = tl.program_id(0) // c_blocks % K
    b = (tl.program_id(0) // c_blocks // K).to(tl.int64)
    row = tl.arange(0, T)
    t = chunk * T + row
    c_there = c < C
    there = (t < N)[:, None] & c_there[None, :]
    # the decay of a position lies between its state and the one before: the adjoint recurrence is shifted by one
    later = (t + 1 < N)[:, None]
    later_there = later & c_there[None, :]
    # and runs from the last position to the first: its tiles are read in that order, for Triton's own reverse scans
    # are wrong on a device where the order of steps matters
    after = chunk * T + T - row
    after_there = (after < N)[:, None]
    grad += b * g_stride_b
    u += b * u_stride_b
    delta += b * d_stride_b
    inp += b * i_stride_b
    out += b * o_stride_b
    g = _tile(grad, t, g_stride_n, c, g_stride_c, there)
    g_after = _tile(grad, after, g_stride_n, c, g_stride_c, after_there & c_there[None, :])
    d = _tile(delta, t, d_stride_n, c, d_stride_c, there)
    d_later = _tile(delta, t + 1, d_stride_n, c, d_stride_c, later_there)
    d_after = _tile(delta, after, d_stride_n, c, d_stride_c, after_there & c_there[None, :])
    x = d * _tile(u, t, u_stride_n, c, u_stride_c, there)
    d_x = tl.zeros([T, BC], tl.float32)
    through = tl.zeros([T, BC], tl.float32)
    for s in range(0, S):
        a = tl.load(rate + s * C + c, mask=c_there, other=0.0).to(tl.float32)
        cell = ((b * K + chunk) * S + s) * C + c
        start = tl.load(states + cell, mask=c_there, other=0.0)
        stop = tl.load(backs + cell, mask=c_there, other=0.0)
        put = _row(inp, t, i_stride_n, t < N)
        get = _row(out, t, o_stride_n, t < N)
        get_after = _row(out, after, o_stride_n, after < N)
        inp += i_stride_s
        out += o_stride_s

        decay = tl.exp(d * a[None, :])
        new = put[:, None] * x
        new = tl.where((row == 0)[:, None], decay * start[None, :] + new, new)
        _, h = tl.associative_scan((decay, new), 0, _after)
        decay = tl.where(after_there, tl.exp(d_after * a[None, :]), 1.0)
        new = tl.where((row == 0)[:, None], stop[None, :], decay * (get_after[:, None] * g_after))
        _, back = tl.associative_scan((decay, new), 0, _after)
        back = tl.flip(back, 0)

        adjoint = get[:, None] * g + back
        d_x += put[:, None] * adjoint
        exponent = tl.where(later, back * h, 0.0)
        through += exponent * a[None, :]
        tl.store(d_rate + cell, tl.sum(exponent * d_later, 0), mask=c_there)
        of_inp = ((c_block * batch + b) * S + s) * N + t
        of_out = (((c_blocks + c_block) * batch + b) * S + s) * N + t
        tl.store(d_shared + of_inp, tl.sum(adjoint * x, 1), mask=t < N)
        tl.store(d_shared + of_out, tl.sum(h * g, 1), mask=t < N)
    place = (b * N + t)[:, None] * C + c[None, :]
    tl.store(d_u + place, (d_x * d).to(d_u.dtype.element_ty), mask=there)
    tl.store(d_input + place, d_x, mask=there)
    tl.store(d_decay + place + C, through, mask=later_there)
    if chunk == 0:
        tl.store(d_decay + b * N * C + c, tl.zeros([BC], tl.float32), mask=c_there)


def _states(S: int) -> int:
    """BS: of a walk."""
    return min(MOST_STATES, max(4, int(triton.next_power_of_2(S))))


def _carry(ends: Tensor, total: Tensor, rate: Tensor, reverse: bool) -> Tensor:
    B, before, S, C = ends.shape
    carried = ends.new_empty(B, before + 1, S, C)
    block = 64
    _carry_kernel[(triton.cdiv(S * C, block) * B,)](
        ends, total, rate, carried, C, S, before + 1, REVERSE=reverse, BLOCK=block, num_warps=2
    )
    return carried


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    keep: bool = True,
    *,
    chunk: int = scan_torch.CHUNK,
    block_c: int = WALK_CHANNELS,
    block_s: int | None = None,
) -> tuple[Tensor, Tensor]:
    """y (B, N, C) and the states (B, K, S, C) float32, as `nearfold.kernels.scan.selective_scan` defines them.

    Args:
        u: (B, N, C), float32, bfloat16 or float16, any strides.
        delta: (B, N, C), all operands of one dtype.
        A: (C, S).
        B: (B, N, S).
        C: (B, N, S).
        keep: whether the states are returned; otherwise K = 0.
        chunk: positions of a chunk, a power of two.
        block_c: channels of a program, a power of two.
        block_s: states of a program, a power of two; by default what fits the registers.

    Raises:
        NotImplementedError: where `refusal` says why.
    """
    if why := refusal(u, delta, A, B, C):
        raise NotImplementedError(why)
    batch, N, channels = u.shape
    S, K = A.shape[1], triton.cdiv(N, chunk)
    none = u.new_empty((batch, 0, S, channels), dtype=torch.float32)
    if u.numel() == 0:
        return torch.empty_like(u), none.new_zeros(batch, K if keep else 0, S, channels)
    rate = A.t().contiguous()
    BS = block_s or _states(S)
    c_blocks, s_blocks = triton.cdiv(channels, block_c), triton.cdiv(S, BS)
    y_dtype = u.dtype if s_blocks == 1 else torch.float32
    y = u.new_empty((s_blocks, *u.shape), dtype=y_dtype)
    ends = none.new_empty(batch, K - 1, S, channels)
    total = none.new_empty(batch, K - 1, channels)

    def walk(states: Tensor, read: bool) -> None:
        _forward_kernel[(c_blocks * s_blocks * (K if read else K - 1) * batch,)](
            u,
            delta,
            rate,
            B,
            C,
            states,
            ends,
            total,
            y,
            batch,
            N,
            channels,
            S,
            K,
            *u.stride(),
            *delta.stride(),
            *B.stride(),
            *C.stride(),
            READ=read,
            T=chunk,
            BC=block_c,
            BS=BS,
            num_warps=1,
        )

    if K > 1:
        walk(none, False)
    states = _carry(ends, total, rate, False)
    walk(states, True)
    return (y[0] if s_blocks == 1 else y.sum(0).to(u.dtype)), states if keep else none


def scan_backward(
    grad: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    states: Tensor,
    *,
    chunk: int = scan_torch.CHUNK,
    block_c: int | None = None,
    block_s: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients at u, delta, A, B and C, contiguous and in their dtype; equal inputs have equal results, bit for bit.

    Args:
        grad: (B, N, C), in u's dtype, any strides.
        u: as given to `scan`.
        delta: likewise.
        A: likewise.
        B: likewise.
        C: likewise.
        states: (B, K, S, C) float32 that it returned.
        chunk: as given to it.
        block_c: channels of a program, a power of two; by default what suits the device.
        block_s: states of a program, likewise.

    Raises:
        NotImplementedError: where `refusal` says why.
    """
    if why := refusal(u, delta, A, B, C):
        raise NotImplementedError(why)
    if u.numel() == 0:
        of_u, of_delta, of_A, of_B, of_C = (x.new_zeros(x.shape) for x in (u, delta, A, B, C))
        return of_u, of_delta, of_A, of_B, of_C
    batch, N, channels = u.shape
    S, K = A.shape[1], states.shape[1]
    rate, states = A.t().contiguous(), states.contiguous()
    BS = block_s or _states(S)
    ends, total = states.new_empty(batch, K - 1, S, channels), states.new_empty(batch, K - 1, channels)
    if K > 1:
        BC = block_c or WALK_CHANNELS
        _back_kernel[(triton.cdiv(channels, BC) * triton.cdiv(S, BS) * (K - 1) * batch,)](
            grad,
            delta,
            rate,
            C,
            ends,
            total,
            N,
            channels,
            S,
            K,
            *grad.stride(),
            *delta.stride(),
            *C.stride(),
            T=chunk,
            BC=BC,
            BS=BS,
            num_warps=1,
        )
    backs = _carry(ends, total, rate, True)
    BC = block_c or GRADIENT_CHANNELS
    c_blocks = triton.cdiv(channels, BC)
    d_u = u.new_empty(u.shape)
    d_input, d_decay = states.new_empty(u.shape), states.new_empty(u.shape)
    d_rate = torch.empty_like(states)
    d_shared = states.new_empty(2, c_blocks, batch, S, N)
    _gradient_kernel[(c_blocks * K * batch,)](
        grad,
        u,
        delta,
        rate,
        B,
        C,
        states,
        backs,
        d_u,
        d_input,
        d_decay,
        d_rate,
        d_shared,
        batch,
        N,
        channels,
        S,
        K,
        *grad.stride(),
        *u.stride(),
        *delta.stride(),
        *B.stride(),
        *C.stride(),
        T=chunk,
        BC=BC,
        num_warps=1,
    )
    shared = (d_shared[:, 0] if c_blocks == 1 else d_shared.sum(1)).to(u.dtype).mT
    # results of an operator must not share memory
    of_B, of_C = (part.clone(memory_format=torch.contiguous_format) for part in shared.unbind())
    of_A = d_rate.sum((0, 1)).t().to(A.dtype).contiguous()
    of_delta = d_decay.addcmul_(d_input, u).to(u.dtype)
    return d_u, of_delta, of_A, of_B, of_C


def _compiled(fn: Any, constexprs: dict[str, Any], pointers: dict[str, str], warps: int) -> dict:
    """What a compiler needs to build a kernel without a device; arguments not named otherwise are int32."""
    unaligned = UNALIGNED if fn is _gradient_kernel else ()
    beside = [name for name in fn.arg_names if name.endswith(("stride_c", "stride_s"))]
    constexprs = {**constexprs, **dict.fromkeys(beside, 1)}
    types = {**dict.fromkeys(constexprs, "constexpr"), **dict.fromkeys(unaligned, "i32"), **pointers}
    signature = {name: types.get(name, "i32:16" if "stride" in name else "i32") for name in fn.arg_names}
    return {"fn": fn, "signature": signature, "constexprs": constexprs, "num_warps": warps, "num_stages": 3}


def _forward_variant(dtype: str, states: int, read: bool) -> dict:
    pointers = dict.fromkeys(("u", "delta", "rate", "inp", "out", "y"), f"*{dtype}")
    pointers |= dict.fromkeys(("states", "ends", "total"), "*fp32")
    constexprs = {"READ": read, "T": scan_torch.CHUNK, "BC": WALK_CHANNELS, "BS": _states(states)}
    return _compiled(_forward_kernel, constexprs, pointers, 1)


def _back_variant(dtype: str, states: int) -> dict:
    pointers = dict.fromkeys(("grad", "delta", "rate", "out"), f"*{dtype}") | dict.fromkeys(("ends", "total"), "*fp32")
    return _compiled(_back_kernel, {"T": scan_torch.CHUNK, "BC": WALK_CHANNELS, "BS": _states(states)}, pointers, 1)


def _carry_variant(dtype: str, reverse: bool) -> dict:
    pointers = dict.fromkeys(("ends", "total", "carried"), "*fp32") | {"rate": f"*{dtype}"}
    return _compiled(_carry_kernel, {"REVERSE": reverse, "BLOCK": 64}, pointers, 2)


def _gradient_variant(dtype: str) -> dict:
    pointers = dict.fromkeys(("grad", "u", "delta", "rate", "inp", "out", "d_u"), f"*{dtype}")
    pointers |= dict.fromkeys(("states", "backs", "d_input", "d_decay", "d_rate", "d_shared"), "*fp32")
    return _compiled(_gradient_kernel, {"T": scan_torch.CHUNK, "BC": GRADIENT_CHANNELS}, pointers, 1)


# what is launched on a large device, to be built without one
VARIANTS: list[Callable[[], dict]] = [
    *(partial(_forward_variant, dtype, 16, read) for dtype in ("bf16", "fp32") for read in (False, True)),
    partial(_forward_variant, "bf16", 64, True),
    partial(_forward_variant, "fp16", 16, True),
    partial(_back_variant, "bf16", 16),
    partial(_back_variant, "fp32", 64),
    partial(_carry_variant, "bf16", False),
    partial(_carry_variant, "fp32", True),
    *(partial(_gradient_variant, dtype) for dtype in ("bf16", "fp16", "fp32")),
]
