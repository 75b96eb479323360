"""`nearfold::local_attention` on a CUDA device: windows read in place, nothing of the size of slots by positions.

A program owns BM outputs of one problem and walks over the window's slots. Forward, the softmax is kept as it goes: the
largest score so far, the sum of exponentials and the weighted sum of values, scaled down whenever the largest grows.

The backward has two kernels. By outputs: one walk finds the softmax and its inner product with the gradient, in float32
whatever the inputs' type, a second one adds up the gradient at the queries. By positions of the keys: a program walks
over the outputs whose windows read its positions, and adds up the gradients at keys and values. Where the border is
mirrored, that is done on the padded grid, whose strips are then added to what they mirror. Every sum is taken in one
order: equal inputs have equal results, bit for bit.

Features of a position lie side by side wherever a kernel reads: operands that are laid out otherwise, as maps of a
convolution are, are copied once. A slot is then read in a few wide pieces; feature by feature it took five times the
instructions.

Shape legend: B batch, H heads, P problems (B x H), e embedded features, d value features, S slots, M outputs, N
positions of the keys' grid, `*out` and `*grid` the same by axes; of a program BM outputs or positions, BE and BD
features. Grids of one or two axes get leading axes of size 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nearfold.kernels.local_attention_torch import Window

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_FEATURES = 256  # of a row, held at once
MOST_AXES = 3
FEWEST = 8  # BM

DOT, DISTANCE, SQUARE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def refusal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    size: list[int],
    stride: list[int],
    dilation: list[int],
    before: list[int],
    reflect: bool,
    metric: str,
) -> str:
    """Why `local_attention` and its backward cannot run on these arguments; empty where they can."""
    if metric not in ("dot", "euclidean"):
        return f"metric {metric} is neither dot nor euclidean"
    if query.dtype not in DTYPES or not query.dtype == key.dtype == value.dtype:
        return f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}, not one of {DTYPES}"
    if not 1 <= query.dim() - 3 <= MOST_AXES:
        return f"a grid of {query.dim() - 3} axes"
    if 0 in (query.numel(), key.numel(), value.numel()):
        return "nothing to compute"
    if max(query.shape[2], value.shape[2]) > MOST_FEATURES:
        return f"{query.shape[2]} and {value.shape[2]} features, more than {MOST_FEATURES}"
    padded = _padded(Window(size, stride, dilation, before, reflect), key, query)
    most = max(math.prod(query.shape[3:]), math.prod(key.shape[3:]), math.prod(padded))
    period = 2 * max(key.shape[3:]) if reflect else 0
    problems = query.shape[0] * query.shape[1]
    programs = problems * triton.cdiv(most, FEWEST)
    if max(most, period, programs) >= 2**31:
        return "positions or programs do not fit 32 bits"
    return ""


def _padded(window: Window, key: Tensor, query: Tensor) -> list[int]:
    """Sizes of the grid with all that the outputs read around it."""
    grid = key.shape[3:]
    after = window.after(grid, query.shape[3:])
    return [b + n + max(a, 0) for b, n, a in zip(window.before, grid, after, strict=True)]


@triton.jit
def _rows(base, at, there, feature, count, stride, LONG: tl.constexpr):  # type: ignore[no-untyped-def]
    """Features (BM, BE or BD) of positions ``at`` (BM,) as float32; zero where ``there`` (BM,) is false."""
    if LONG:
        at = at.to(tl.int64)
    where = (at * stride)[:, None] + feature[None, :]
    return tl.load(base + where, mask=there[:, None] & (feature < count)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _put(base, at, there, feature, count, f_stride, stride, what, LONG: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write features (BM, BE or BD) of positions ``at`` (BM,), which may lie side by side where features do not."""
    if LONG:
        at, feature = at.to(tl.int64), feature.to(tl.int64)
    where = (at * stride)[:, None] + (feature * f_stride)[None, :]
    tl.store(base + where, what.to(base.dtype.element_ty), mask=there[:, None] & (feature < count)[None, :])


@triton.jit
def _mirrored(i, n, MIRROR: tl.constexpr):  # type: ignore[no-untyped-def]
    """Coordinates (BM,) brought into 0..n-1: with MIRROR = 1 at most one reflection is due, with 2 any number."""
    if MIRROR == 1:  # not n - 1 - |n - 1 - |i||: with n = 1, ptxas takes -|i| for less than zero, and drops the loads
        i = tl.abs(i)
        i = tl.where(i >= n, 2 * n - 2 - i, i)
    if MIRROR == 2:
        period = tl.maximum(2 * n - 2, 1)
        i = tl.abs(i) % period
        i = tl.where(i >= n, period - i, i)
    return i


@triton.jit
def _read(o, k, stride, dilation, before, n, there, MIRROR: tl.constexpr):  # type: ignore[no-untyped-def]
    """Coordinates (BM,) that slot k of outputs (BM,) reads on an axis, and whether they are on the grid."""
    i = o * stride + k * dilation - before
    if MIRROR > 0:
        i = _mirrored(i, n, MIRROR)
    else:
        there &= (i >= 0) & (i < n)
    return i, there


@triton.jit
def _reader(j, u, size, stride, dilation, out, STRIDED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The u-th output (BM,) that may read padded coordinates (BM,) on an axis, and whether it does."""
    if STRIDED:
        o = j // stride - u
        rest = j - o * stride
        good = (o >= 0) & (o < out) & (rest <= (size - 1) * dilation) & (rest % dilation == 0)
    else:
        o = j - u * dilation
        good = (o >= 0) & (o < out)
    return o, good


@triton.jit
def _scores(q, near, METRIC: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scores (BM,) without their scale."""
    if METRIC == DOT:
        score = tl.sum(q * near, 1)
    else:
        apart = q - near
        square = tl.sum(apart * apart, 1)
        score = -square if METRIC == SQUARE else -tl.sqrt_rn(square)
    return score


@triton.jit
def _of_difference(d_score, score, METRIC: tl.constexpr):  # type: ignore[no-untyped-def]
    """What the difference of query and key is multiplied by in the gradient; zero at distance zero."""
    return -2.0 * d_score if METRIC == SQUARE else tl.where(score < 0, d_score / score, 0.0)


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    y,  # (P, d, M)
    stats,  # (P, 2, M)
    H,
    e,  # features that are written; then those that are read, with the zeros after them
    d,
    e_read,
    d_read,
    m0,  # sizes of out, of the grid, of the window; then the window's strides, dilations and padding
    m1,
    m2,
    n0,
    n1,
    n2,
    s0,
    s1,
    s2,
    t0,
    t1,
    t2,
    d0,
    d1,
    d2,
    b0,
    b1,
    b2,
    q_b,  # strides in memory: batch, head, position
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    scale,
    METRIC: tl.constexpr,
    MIRROR: tl.constexpr,
    LONG: tl.constexpr,
    BM: tl.constexpr,
    BE: tl.constexpr,
    BD: tl.constexpr,
):
    M = m0 * m1 * m2
    blocks = tl.cdiv(M, BM)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    m = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    there = m < M
    o2, o1, o0 = m % m2, m // m2 % m1, m // m2 // m1
    b, h = problem // H, problem % H
    key += b * k_b + h * k_h
    value += b * v_b + h * v_h
    f_e, f_d = tl.arange(0, BE), tl.arange(0, BD)
    q = _rows(query + b * q_b + h * q_h, m, there, f_e, e_read, q_n, LONG)

    most = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    for u0 in range(0, s0):
        i0, in0 = _read(o0, u0, t0, d0, b0, n0, there, MIRROR)
        for u1 in range(0, s1):
            i1, in1 = _read(o1, u1, t1, d1, b1, n1, in0, MIRROR)
            for u2 in range(0, s2):
                i2, inside = _read(o2, u2, t2, d2, b2, n2, in1, MIRROR)
                at = (i0 * n1 + i1) * n2 + i2
                near = _rows(key, at, inside, f_e, e_read, k_n, LONG)
                score = tl.where(inside, _scores(q, near, METRIC) * scale, float("-inf"))
                larger = tl.where(score > most, score, most)  # which a NaN never becomes: it goes into the sum
                base = tl.where(larger == float("-inf"), 0.0, larger)
                keep = tl.exp(most - base)
                weight = tl.exp(score - base)
                most = larger
                total = total * keep + weight
                near = _rows(value, at, inside, f_d, d_read, v_n, LONG)
                acc = acc * keep[:, None] + near * weight[:, None]

    most = tl.where(most == float("-inf"), 0.0, most)
    inverse = tl.where(total == 0, 0.0, 1.0 / total)
    acc = acc * inverse[:, None]
    y += problem * d * M
    stats += problem * 2 * M
    if LONG:
        m = m.to(tl.int64)
    _put(y, m, there, f_d, d, M, 1, acc, LONG)
    most = tl.where(total == total, most, float("nan"))
    tl.store(stats + m, most.to(stats.dtype.element_ty), mask=there)
    tl.store(stats + M + m, inverse.to(stats.dtype.element_ty), mask=there)


@triton.jit
def _query_kernel(  # type: ignore[no-untyped-def]
    grad,
    query,
    key,
    value,
    d_query,
    rows,  # (P, 3, M) float32: the largest score, one over the sum of exponentials, weights times their gradients
    H,
    e,  # features that are written; then those that are read, with the zeros after them
    d,
    e_read,
    d_read,
    m0,  # sizes of out, of the grid, of the window; then the window's strides, dilations and padding
    m1,
    m2,
    n0,
    n1,
    n2,
    s0,
    s1,
    s2,
    t0,
    t1,
    t2,
    d0,
    d1,
    d2,
    b0,
    b1,
    b2,
    g_b,  # strides in memory: batch, head, position
    g_h,
    g_n,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    w_b,
    w_h,
    w_f,
    w_n,
    scale,
    METRIC: tl.constexpr,
    MIRROR: tl.constexpr,
    LONG: tl.constexpr,
    BM: tl.constexpr,
    BE: tl.constexpr,
    BD: tl.constexpr,
):
    M = m0 * m1 * m2
    blocks = tl.cdiv(M, BM)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    m = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    there = m < M
    o2, o1, o0 = m % m2, m // m2 % m1, m // m2 // m1
    b, h = problem // H, problem % H
    key += b * k_b + h * k_h
    value += b * v_b + h * v_h
    f_e, f_d = tl.arange(0, BE), tl.arange(0, BD)
    q = _rows(query + b * q_b + h * q_h, m, there, f_e, e_read, q_n, LONG)
    g = _rows(grad + b * g_b + h * g_h, m, there, f_d, d_read, g_n, LONG)

    most = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    delta = tl.zeros([BM], tl.float32)
    for u0 in range(0, s0):
        i0, in0 = _read(o0, u0, t0, d0, b0, n0, there, MIRROR)
        for u1 in range(0, s1):
            i1, in1 = _read(o1, u1, t1, d1, b1, n1, in0, MIRROR)
            for u2 in range(0, s2):
                i2, inside = _read(o2, u2, t2, d2, b2, n2, in1, MIRROR)
                at = (i0 * n1 + i1) * n2 + i2
                near = _rows(key, at, inside, f_e, e_read, k_n, LONG)
                score = tl.where(inside, _scores(q, near, METRIC) * scale, float("-inf"))
                larger = tl.where(score > most, score, most)
                base = tl.where(larger == float("-inf"), 0.0, larger)
                keep = tl.exp(most - base)
                weight = tl.exp(score - base)
                most = larger
                total = total * keep + weight
                near = _rows(value, at, inside, f_d, d_read, v_n, LONG)
                delta = delta * keep + weight * tl.where(inside, tl.sum(g * near, 1), 0.0)
    most = tl.where(most == float("-inf"), 0.0, most)
    inverse = tl.where(total == 0, 0.0, 1.0 / total)
    delta = delta * inverse
    rows += problem * 3 * M
    if LONG:
        m = m.to(tl.int64)
    tl.store(rows + m, most, mask=there)
    tl.store(rows + M + m, inverse, mask=there)
    tl.store(rows + M + M + m, delta, mask=there)

    acc = tl.zeros_like(q)
    for u0 in range(0, s0):
        i0, in0 = _read(o0, u0, t0, d0, b0, n0, there, MIRROR)
        for u1 in range(0, s1):
            i1, in1 = _read(o1, u1, t1, d1, b1, n1, in0, MIRROR)
            for u2 in range(0, s2):
                i2, inside = _read(o2, u2, t2, d2, b2, n2, in1, MIRROR)
                at = (i0 * n1 + i1) * n2 + i2
                near = _rows(value, at, inside, f_d, d_read, v_n, LONG)
                d_weight = tl.sum(g * near, 1)
                near = _rows(key, at, inside, f_e, e_read, k_n, LONG)
                score = _scores(q, near, METRIC)
                alpha = tl.exp(score * scale - most) * inverse
                d_score = tl.where(inside, (d_weight - delta) * alpha * scale, 0.0)
                if METRIC == DOT:
                    acc += near * d_score[:, None]
                else:
                    factor = _of_difference(d_score, score, METRIC)
                    acc += (q - near) * factor[:, None]
    d_query += b * w_b + h * w_h
    _put(d_query, m, there, f_e, e, w_f, w_n, acc, LONG)


@triton.jit
def _key_kernel(  # type: ignore[no-untyped-def]
    grad,
    query,
    key,
    value,
    rows,  # (P, 3, M) float32, of `_query_kernel`
    d_key,  # on the grid, or with MIRROR > 0 on the padded one
    d_value,
    H,
    e,  # features that are written; then those that are read, with the zeros after them
    d,
    e_read,
    d_read,
    m0,  # sizes of out, of the grid, of the grid that d_key and d_value are on
    m1,
    m2,
    n0,
    n1,
    n2,
    l0,
    l1,
    l2,
    s0,  # the window's sizes, strides, dilations and padding
    s1,
    s2,
    t0,
    t1,
    t2,
    d0,
    d1,
    d2,
    b0,
    b1,
    b2,
    c0,  # how many outputs may read a position, per axis
    c1,
    c2,
    g_b,  # strides in memory: batch, head, position
    g_h,
    g_n,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    w_b,
    w_h,
    w_f,
    w_n,
    x_b,
    x_h,
    x_f,
    x_n,
    scale,
    METRIC: tl.constexpr,
    MIRROR: tl.constexpr,
    STRIDED: tl.constexpr,
    LONG: tl.constexpr,
    BM: tl.constexpr,
    BE: tl.constexpr,
    BD: tl.constexpr,
):
    L = l0 * l1 * l2
    M = m0 * m1 * m2
    blocks = tl.cdiv(L, BM)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    there = at < L
    j2, j1, j0 = at % l2, at // l2 % l1, at // l2 // l1
    b, h = problem // H, problem % H
    grad += b * g_b + h * g_h
    query += b * q_b + h * q_h
    rows += problem * 3 * M
    d_key += b * w_b + h * w_h
    d_value += b * x_b + h * x_h
    f_e, f_d = tl.arange(0, BE), tl.arange(0, BD)
    i0, i1, i2 = j0, j1, j2  # on the grid
    p0, p1, p2 = j0, j1, j2  # on the padded grid
    if MIRROR > 0:
        i0, i1, i2 = _mirrored(j0 - b0, n0, MIRROR), _mirrored(j1 - b1, n1, MIRROR), _mirrored(j2 - b2, n2, MIRROR)
    else:
        p0, p1, p2 = j0 + b0, j1 + b1, j2 + b2
    near = (i0 * n1 + i1) * n2 + i2
    k = _rows(key + b * k_b + h * k_h, near, there, f_e, e_read, k_n, LONG)
    v = _rows(value + b * v_b + h * v_h, near, there, f_d, d_read, v_n, LONG)

    of_key, of_value = tl.zeros_like(k), tl.zeros_like(v)
    for u0 in range(0, c0):
        o0, in0 = _reader(p0, u0, s0, t0, d0, m0, STRIDED)
        in0 &= there
        for u1 in range(0, c1):
            o1, in1 = _reader(p1, u1, s1, t1, d1, m1, STRIDED)
            in1 &= in0
            for u2 in range(0, c2):
                o2, good = _reader(p2, u2, s2, t2, d2, m2, STRIDED)
                good &= in1
                m = (o0 * m1 + o1) * m2 + o2
                if LONG:
                    m = m.to(tl.int64)
                most = tl.load(rows + m, mask=good, other=0.0)
                inverse = tl.load(rows + M + m, mask=good, other=0.0)
                delta = tl.load(rows + M + M + m, mask=good, other=0.0)
                q = _rows(query, m, good, f_e, e_read, q_n, LONG)
                g = _rows(grad, m, good, f_d, d_read, g_n, LONG)
                score = _scores(q, k, METRIC)
                alpha = tl.where(good, tl.exp(score * scale - most) * inverse, 0.0)
                d_score = tl.where(good, (tl.sum(g * v, 1) - delta) * alpha * scale, 0.0)
                of_value += g * alpha[:, None]
                if METRIC == DOT:
                    of_key += q * d_score[:, None]
                else:  # a key that is NaN stays where it is read
                    apart = tl.where(good[:, None], q - k, 0.0)
                    of_key -= apart * _of_difference(d_score, score, METRIC)[:, None]
    _put(d_key, at, there, f_e, e, w_f, w_n, of_key, LONG)
    _put(d_value, at, there, f_d, d, x_f, x_n, of_value, LONG)


def _three(numbers: list[int] | tuple[int, ...], fill: int) -> list[int]:
    """One number per axis, with leading axes as a kernel wants them."""
    return [fill] * (3 - len(numbers)) + list(numbers)


def _geometry(window: Window) -> list[int]:
    """Sizes, strides, dilations and padding of all axes."""
    return [
        *_three(window.size, 1),
        *_three(window.stride, 1),
        *_three(window.dilation, 1),
        *_three(window.before, 0),
    ]


def _metric(metric: str, squared: bool) -> int:
    return int(DOT.value if metric == "dot" else SQUARE.value if squared else DISTANCE.value)


def _mirror(window: Window, key: Tensor, query: Tensor) -> int:
    """Whether positions are mirrored, and more than once."""
    grid = key.shape[3:]
    after = window.after(grid, query.shape[3:])
    once = all(max(b, a) < n for b, a, n in zip(window.before, after, grid, strict=True))
    return 0 if not window.reflect else 1 if once else 2


def _long(*tensors: Tensor) -> bool:
    """Whether offsets within a problem need 64 bits."""
    return any(
        sum((n - 1) * abs(s) for n, s in zip(t.shape[2:], t.stride()[2:], strict=True)) >= 2**31
        or math.prod(t.shape[2:]) >= 2**31
        for t in tensors
    )


def _read_from(x: Tensor) -> Tensor:
    """(B, H, c, *grid) as (B, H, N, c), features side by side: a view, or a copy of what is laid out otherwise.

    Triton reads wide pieces where all strides and the features are known to be multiples of 16. The copy has zeros
    up to the next one, if features are not so few that zeros would be most of it.
    """
    rows = x.flatten(3).mT
    c = rows.shape[3]
    if c >= 8 and c % 16:
        padded = rows.new_zeros(*rows.shape[:3], c + -c % 16)
        padded[..., :c] = rows
        return padded
    aligned = c < 8 or not any(n % 16 for n in rows.stride()[:3])
    return rows if aligned and rows.stride(3) == 1 else rows.contiguous()


def _write_to(x: Tensor) -> Tensor:
    """(B, H, c, *grid) as (B, H, c, N), which `_written` takes back: a view, or another tensor."""
    return x.flatten(3)


def _written(flat: Tensor, x: Tensor) -> None:
    if flat.data_ptr() != x.data_ptr():
        x.copy_(flat.view(x.shape))


def _features(n: int) -> int:
    return max(2, int(triton.next_power_of_2(n)))


def _block(BE: int, BD: int, numbers: int) -> tuple[int, int]:
    """(BM, warps): so many numbers of a tile in a thread's registers, at most one position per thread."""
    width = max(BE, BD)
    BM = max(FEWEST, min(128, 128 * numbers // width))
    return BM, 4 if BM * width <= 128 * numbers else 8


FORWARD_NUMBERS, QUERY_NUMBERS, KEY_NUMBERS = 16, 8, 8


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    size: list[int],
    stride: list[int],
    dilation: list[int],
    before: list[int],
    reflect: bool,
    metric: str,
    squared: bool,
    scale: float,
    *,
    block: int | None = None,
) -> tuple[Tensor, Tensor]:
    """y (B, H, d, *out) and stats (B, H, 2, *out), as `nearfold.kernels.local_attention.local_attention` defines them.

    Args:
        query: (B, H, e, *out), float32, bfloat16 or float16, any strides, as all operands.
        key: (B, H, e, *grid), same dtype.
        value: (B, H, d, *grid), same dtype.
        size: slots per axis.
        stride: per axis.
        dilation: per axis.
        before: padding before the first position, per axis.
        reflect: whether positions outside the grid are mirrored ones.
        metric: "dot" or "euclidean".
        squared: with euclidean, minus the squared distance.
        scale: of the scores.
        block: outputs of a program, a power of two; by default what suits the device.

    Raises:
        NotImplementedError: where `refusal` says why.
    """
    if why := refusal(query, key, value, size, stride, dilation, before, reflect, metric):
        raise NotImplementedError(why)
    window = Window(size, stride, dilation, before, reflect)
    B, H, e, *out = query.shape
    d, M = value.shape[2], math.prod(out)
    y, stats = value.new_empty(B, H, d, *out), value.new_empty(B, H, 2, *out)
    BE, BD = _features(e), _features(d)
    BM, warps = _block(BE, BD, FORWARD_NUMBERS)
    BM = block or BM
    operands = [_read_from(t) for t in (query, key, value)]
    with torch.cuda.device_of(query):
        _forward_kernel[(triton.cdiv(M, BM) * B * H,)](
            *(*operands, y, stats, H, e, d, operands[1].shape[3], operands[2].shape[3]),
            *(*_three(out, 1), *_three(key.shape[3:], 1), *_geometry(window)),
            *(*(n for t in operands for n in t.stride()[:3]), float(scale)),
            METRIC=_metric(metric, squared),
            MIRROR=_mirror(window, key, query),
            LONG=_long(*operands, y),
            BM=BM,
            BE=BE,
            BD=BD,
            num_warps=warps,
        )
    return y, stats


def local_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stats: Tensor,
    size: list[int],
    stride: list[int],
    dilation: list[int],
    before: list[int],
    reflect: bool,
    metric: str,
    squared: bool,
    scale: float,
    *,
    block: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at query, key and value, laid out as torch.empty_like does.

    ``grad`` (B, H, d, *out) has the gradient at `local_attention`'s first result, any strides, and ``block`` is the
    number of outputs or positions of a program. ``stats`` is not read: its dtype may be too short, and the scores are
    needed anyway. The other arguments are those of `local_attention`.

    Raises:
        NotImplementedError: where `refusal` says why.
    """
    if why := refusal(query, key, value, size, stride, dilation, before, reflect, metric):
        raise NotImplementedError(why)
    window = Window(size, stride, dilation, before, reflect)
    B, H, e, *out = query.shape
    d, M, grid = value.shape[2], math.prod(out), list(key.shape[3:])
    d_query, d_key, d_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    rows = query.new_empty(B, H, 3, M, dtype=torch.float32)
    to_query, to_key, to_value, landing = _write_to(d_query), _write_to(d_key), _write_to(d_value), grid
    mirror, padded = _mirror(window, key, query), None
    if reflect:
        landing = _padded(window, key, query)
        padded = query.new_empty(B, H, e + d, *landing, dtype=torch.float32)
        to_key, to_value = padded.flatten(3).split([e, d], 2)
    strided = max(stride) > 1
    readers = [
        (s - 1) * g // t + 1 if strided else s for s, g, t in zip(size, dilation, stride, strict=True)
    ]  # that may read one position
    operands = [_read_from(t) for t in (grad, query, key, value)]
    switches: dict[str, Any] = {
        "METRIC": _metric(metric, squared),
        "MIRROR": mirror,
        "LONG": _long(*operands, to_query, to_key, to_value, rows),
        "BE": _features(e),
        "BD": _features(d),
    }
    read = operands[2].shape[3], operands[3].shape[3]
    geometry, flat = _geometry(window), [n for t in operands for n in t.stride()[:3]]
    with torch.cuda.device_of(query):
        BM, warps = _block(switches["BE"], switches["BD"], QUERY_NUMBERS)
        BM = block or BM
        _query_kernel[(triton.cdiv(M, BM) * B * H,)](
            *(*operands, to_query, rows, H, e, d, *read),
            *(*_three(out, 1), *_three(grid, 1), *geometry),
            *(*flat, *to_query.stride(), float(scale)),
            **switches,
            BM=BM,
            num_warps=warps,
        )
        BM, warps = _block(switches["BE"], switches["BD"], KEY_NUMBERS)
        BM = block or BM
        _key_kernel[(triton.cdiv(math.prod(landing), BM) * B * H,)](
            *(*operands, rows, to_key, to_value, H, e, d, *read),
            *(*_three(out, 1), *_three(grid, 1), *_three(landing, 1), *geometry, *_three(readers, 1)),
            *(*flat, *to_key.stride(), *to_value.stride(), float(scale)),
            **switches,
            STRIDED=strided,
            BM=BM,
            num_warps=warps,
        )
    _written(to_query, d_query)
    if padded is not None:
        of_key, of_value = _folded(padded, grid, before).split([e, d], 2)
        d_key.copy_(of_key), d_value.copy_(of_value)
    else:
        _written(to_key, d_key)
        _written(to_value, d_value)
    return d_query, d_key, d_value


def _folded(padded: Tensor, grid: list[int], before: list[int]) -> Tensor:
    """(B, H, c, *padded) added up over mirrored copies, to (B, H, c, *grid): a part of the same memory.

    Sheets of max(n - 1, 1) positions lie side by side, every other one reversed. PyTorch adds strip by strip: only the
    border is read twice, where one kernel for all positions would ask each of them for its copies.
    """
    for axis, (n, b) in enumerate(zip(grid, before, strict=True), 3):
        inside, end, length = padded.narrow(axis, b, n), padded.shape[axis] - b, max(n - 1, 1)
        for sheet in range(-b // length, (end - 1) // length + 1):
            first, last = max(sheet * length, -b), min((sheet + 1) * length, end)
            if sheet == 1:
                first = max(first, n)  # what it begins with is inside
            if sheet == 0 or first >= last:
                continue
            strip, at = padded.narrow(axis, b + first, last - first), first - sheet * length
            if sheet % 2:
                strip, at = strip.flip(axis), n - at - (last - first)
            inside.narrow(axis, at, last - first).add_(strip)
        padded = inside
    return padded


def _variant(kernel: Any, dtype: str, constexprs: dict[str, Any], numbers: int) -> Callable[[], dict[str, Any]]:
    """What a launch on two axes would compile, a convolution's maps being copied, gradients laid out as they are."""

    def make() -> dict[str, Any]:
        ones = [f"{name}0" for name in "mnlstdcz"]  # a leading axis that is missing
        ones += ["w_n", "x_n"]  # positions lie side by side
        signature = {n: "i32:16" if n.endswith(("_b", "_h", "_f", "_n")) else "i32" for n in kernel.arg_names}
        signature |= {name: f"*{dtype}" for name in ("grad", "query", "key", "value", "y", "stats")}
        signature |= {name: f"*{dtype}" for name in ("d_query", "d_key", "d_value")}
        signature |= {"rows": "*fp32", "e_read": "i32:16", "d_read": "i32:16", "scale": "fp32"}
        if constexprs.get("MIRROR"):
            signature |= {"d_key": "*fp32", "d_value": "*fp32"}
        chosen = {n: v for n, v in (dict.fromkeys(ones, 1) | constexprs).items() if n in kernel.arg_names}
        chosen["BM"], warps = _block(constexprs["BE"], constexprs["BD"], numbers)
        return {"fn": kernel, "signature": signature, "constexprs": chosen, "num_warps": warps, "num_stages": 3}

    return make


def _variants() -> list[Callable[[], dict[str, Any]]]:
    found = []
    for dtype in ("fp32", "bf16"):
        for width in (8, 32, 64, 128, MOST_FEATURES):
            for metric, mirror in ((0, 0), (0, 1), (1, 2), (2, 1)):
                shape = {"METRIC": metric, "MIRROR": mirror, "LONG": False, "BE": width, "BD": width}
                found.append(_variant(_forward_kernel, dtype, shape, FORWARD_NUMBERS))
                found.append(_variant(_query_kernel, dtype, shape, QUERY_NUMBERS))
                found.append(_variant(_key_kernel, dtype, shape | {"STRIDED": metric == 1}, KEY_NUMBERS))
    return found


VARIANTS: list[Callable[[], dict[str, Any]]] = _variants()
