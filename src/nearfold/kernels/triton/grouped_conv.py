"""`nearfold::grouped_conv` on a CUDA device: channels are read from their maps, and nothing is joined or padded.

Bytes of ACmix with C channels, in numbers per position: this reads 3 C and writes C. PyTorch joins the maps (6 C)
before it convolves (4 C) and puts the result in order (2 C): 12 against 4, and 6 C more where the border is mirrored or
uneven and has to be padded. The backward reads C and writes 3 C for the maps and reads 4 C for the kernel: 8 against
PyTorch's 10, which also keeps the joined maps until then. Products are 27 H C with H heads (H <= 4; 81 C after a first
step with more). A thread multiplies them one by one: groups are so narrow that of a tensor core's tile three quarters
would be empty, and what fills it, number by number, takes several times the instructions. The weight's gradient, a sum
over positions, has tiles that are filled, and goes there with 16-bit numbers.

Positions of a map lie side by side wherever a kernel reads: maps that are laid out otherwise are copied once. Where
outputs are the grid's positions, as in ACmix, a slot is one shift of them all.

One kernel walks the slots and adds up channels; with TURNED it goes from the inputs to the outputs that read them, so
the gradient at the maps is a sum in one fixed order. That at the weight is a partial sum per span of outputs, added up
by PyTorch.

Shape legend: B batch, G groups, R channels of a group that are read, W that are written, S slots, N positions of a
map. Three grid axes z, y, x; fewer are led by axes of one position.
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

INTERPRETED: bool = triton.knobs.runtime.interpret  # then a bfloat16 tl.dot is wrong, and operands are widened
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
LIMIT = 2**31  # of offsets within a sample, and of programs
FEW = 2  # so many channels have a weight's gradient without tensor cores, which would be seven eighths idle
LEAST = 128  # positions of a program
PROGRAMS = 1024  # a device's fill; the weight's gradient is split over the outputs into about as many


@triton.jit
def _split(at, Z, Y, X):
    """Coordinates of a position; divisions take longer than all else that is done for one, and Z is mostly 1."""
    row = at // X
    z = row * 0
    if Z > 1:
        z = row // Y
    return z, row - z * Y, at - row * X


@triton.jit
def _step(at, k, size, other, step, dilation, before, image, first, TURNED: tl.constexpr, REFLECT: tl.constexpr):
    """On one axis: what ``at`` meets through slot k, and whether it is there.

    An output meets the position it reads. TURNED, a position meets the output that reads it, or its mirror ``image``;
    ``size`` is always the grid's, ``other`` how many outputs there are.
    """
    period = tl.maximum(2 * (size - 1), 1)
    if TURNED:
        p = at
        ok = at >= 0
        if REFLECT:
            p = tl.where(image % 2 == 1, -at, at) + (first + image // 2) * period
            # both ends are their own mirror images
            ok = tl.where(image % 2 == 1, (at > 0) & (at < size - 1), ok)
        t = p + before - k * dilation
        found = t // step
        ok = ok & (t >= 0) & (t - found * step == 0) & (found < other)
    else:
        found = at * step + k * dilation - before
        if REFLECT:
            found = (found % period + period) % period
            found = tl.where(found >= size, period - found, found)
            ok = at >= 0
        else:
            ok = (found >= 0) & (found < size)
    return found, ok


@triton.jit
def _map(m0, m1, m2, m3, which: tl.constexpr):
    m = m0
    if which == 1:
        m = m1
    if which == 2:
        m = m2
    if which == 3:
        m = m3
    return m


@triton.jit
def _channel(m0, m1, m2, m3, c, width, stride, MAPS: tl.constexpr):
    """Where channel c begins; maps of ``width`` channels follow one another."""
    which = c // width
    base = m0 + (c - which * width) * stride
    if MAPS > 1:
        base = tl.where(which == 1, m1 + (c - width) * stride, base)
    if MAPS > 2:
        base = tl.where(which == 2, m2 + (c - 2 * width) * stride, base)
    if MAPS > 3:
        base = tl.where(which == 3, m3 + (c - 3 * width) * stride, base)
    return base


@triton.jit
def _multiplied(x, y, acc, dtype: tl.constexpr, WIDEN: tl.constexpr):
    x, y = x.to(dtype), y.to(dtype)
    if WIDEN:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, acc, input_precision="ieee")


@triton.jit
def _meeting(
    m, z, y, x, kz, ky, kx, Z, Y, X, OZ, OY, OX, tz, ty, tx, dz, dy, dx, bz, by, bx, jz, jy, jx, fz, fy, fx,
    TURNED: tl.constexpr, REFLECT: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """`_step` on three axes: what positions m (z, y, x) meet through a slot, and whether it is there."""
    pz, ok_z = _step(z, kz, Z, OZ, tz, dz, bz, jz, fz, TURNED, REFLECT)
    py, ok_y = _step(y, ky, Y, OY, ty, dy, by, jy, fy, TURNED, REFLECT)
    px, ok_x = _step(x, kx, X, OX, tx, dx, bx, jx, fx, TURNED, REFLECT)
    if SHIFT:
        away = ((kz * dz - bz) * Y + ky * dy - by) * X + kx * dx - bx
        at = m - away if TURNED else m + away
    elif TURNED:
        at = (pz * OY + py) * OX + px
    else:
        at = (pz * Y + py) * X + px
    return at, ok_z & ok_y & ok_x


@triton.jit
def _conv_kernel(
    r0,
    r1,
    r2,
    r3,
    w0,
    w1,
    w2,
    w3,
    factors,  # (G, S, R, W in whole blocks) float32
    N,  # that are written; passed, for a product is no known multiple of 16
    G,
    R,
    W,
    r_width,  # channels of one map
    w_width,
    Z,  # the grid
    Y,
    X,
    OZ,  # the outputs
    OY,
    OX,
    KZ,
    KY,
    KX,
    tz,
    ty,
    tx,
    dz,
    dy,
    dx,
    bz,
    by,
    bx,
    images,  # of all axes
    iy,
    ix,
    fz,
    fy,
    fx,
    r_b,
    r_g,
    r_c,
    w_b,
    w_g,
    w_c,
    READ: tl.constexpr,  # maps
    WRITTEN: tl.constexpr,
    TURNED: tl.constexpr,
    REFLECT: tl.constexpr,
    SHIFT: tl.constexpr,  # outputs are the grid's positions, and a slot is a shift
    BLOCK_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program: BLOCK_M positions of a sample, BLOCK_W channels of a group."""
    blocks = tl.cdiv(W, BLOCK_W)
    tiles = tl.cdiv(N, BLOCK_M)
    block = tl.program_id(0) % blocks
    m = tl.program_id(0) // blocks % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(0) // blocks // tiles
    b, g = (group // G).to(tl.int64), (group % G).to(tl.int64)
    o = tl.arange(0, BLOCK_W)
    if TURNED:
        z, y, x = _split(m, Z, Y, X)
    else:
        z, y, x = _split(m, OZ, OY, OX)
    ok = m < N
    reach = b * r_b + g * r_g
    padded = blocks * BLOCK_W
    factors += g * (KZ * KY * KX) * R * padded + block * BLOCK_W
    acc = tl.zeros((BLOCK_W, BLOCK_M), tl.float32)
    for kz in range(KZ):
        for ky in range(KY):
            for kx in range(KX):
                for image in range(images):
                    jz, jy, jx = _split(image, images, iy, ix)
                    at, there = _meeting(
                        m, z, y, x, kz, ky, kx, Z, Y, X, OZ, OY, OX, tz, ty, tx, dz, dy, dx, bz, by, bx, jz, jy, jx,
                        fz, fy, fx, TURNED, REFLECT, SHIFT,
                    )  # fmt: skip
                    there &= ok
                    # most mirror images lie beyond every window
                    if not (TURNED and REFLECT) or tl.max(there.to(tl.int32), 0) > 0:
                        beside = factors
                        for which in tl.static_range(READ):
                            base = _map(r0, r1, r2, r3, which) + reach
                            for _ in range(r_width):
                                near = tl.load(base + at, mask=there, other=0.0).to(tl.float32)
                                acc += tl.load(beside + o)[:, None] * near[None, :]
                                base += r_c
                                beside += padded
                factors += R * padded
    o += block * BLOCK_W
    base = _channel(w0, w1, w2, w3, o, w_width, w_c, WRITTEN) + (b * w_b + g * w_g)
    tl.store(base[:, None] + m[None, :], acc.to(w0.dtype.element_ty), mask=(o < W)[:, None] & ok[None, :])


@triton.jit
def _weight_kernel(
    grad,
    r0,
    r1,
    r2,
    r3,
    partial,  # (splits, G, S, W, R) float32
    N,  # of the outputs
    tiles,  # of BLOCK_M outputs, in all samples
    span,  # tiles of a split
    G,
    R,
    W,
    r_width,
    Z,
    Y,
    X,
    OZ,
    OY,
    OX,
    KZ,
    KY,
    KX,
    tz,
    ty,
    tx,
    dz,
    dy,
    dx,
    bz,
    by,
    bx,
    g_b,
    g_g,
    g_c,
    r_b,
    r_g,
    r_c,
    READ: tl.constexpr,
    REFLECT: tl.constexpr,
    SHIFT: tl.constexpr,
    DOT: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program: a slot of a group, BLOCK_W by BLOCK_R of its channels, the outputs of a split."""
    slots = KZ * KY * KX
    w_blocks, r_blocks = tl.cdiv(W, BLOCK_W), tl.cdiv(R, BLOCK_R)
    kind = tl.program_id(0) % (G * slots * w_blocks * r_blocks)
    split = tl.program_id(0) // (G * slots * w_blocks * r_blocks)
    c = kind % r_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    o = kind // r_blocks % w_blocks * BLOCK_W + tl.arange(0, BLOCK_W)
    slot = kind // (r_blocks * w_blocks) % slots
    g = (kind // (r_blocks * w_blocks * slots)).to(tl.int64)
    kz, ky, kx = _split(slot, KZ, KY, KX)
    base = _channel(r0, r1, r2, r3, c, r_width, r_c, READ) + g * r_g
    grad += g * g_g
    in_sample = tl.cdiv(N, BLOCK_M)
    into = partial + ((split.to(tl.int64) * G + g) * slots + slot) * W * R
    acc = tl.zeros((BLOCK_W, BLOCK_R), tl.float32) if DOT else tl.zeros((BLOCK_W, BLOCK_R, BLOCK_M), tl.float32)
    for i in range(0, span):
        tile = split * span + i
        b = (tile // in_sample).to(tl.int64)
        m = tile % in_sample * BLOCK_M + tl.arange(0, BLOCK_M)
        ok = m < tl.where(tile < tiles, N, 0)
        z, y, x = _split(m, OZ, OY, OX)
        at, there = _meeting(
            m, z, y, x, kz, ky, kx, Z, Y, X, OZ, OY, OX, tz, ty, tx, dz, dy, dx, bz, by, bx, 0, 0, 0, 0, 0, 0,
            False, REFLECT, SHIFT,
        )  # fmt: skip
        there &= ok
        near = tl.load((base + b * r_b)[:, None] + at[None, :], mask=(c < R)[:, None] & there[None, :], other=0.0)
        upper = tl.load(
            (grad + b * g_b + o * g_c)[:, None] + m[None, :], mask=(o < W)[:, None] & ok[None, :], other=0.0
        )
        if DOT:
            acc = _multiplied(upper, tl.trans(near), acc, grad.dtype.element_ty, WIDEN)
        else:
            acc += upper.to(tl.float32)[:, None, :] * near.to(tl.float32)[None, :, :]
    if not DOT:
        acc = tl.sum(acc, 2)
    tl.store(into + o[:, None] * R + c[None, :], acc, mask=(o < W)[:, None] & (c < R)[None, :])


def refusal(
    maps: Sequence[Tensor], weight: Tensor, stride: list[int], dilation: list[int], before: list[int], out: list[int]
) -> str:
    """Why these operands cannot be computed here; empty where they can."""
    there = [*maps, weight]
    if weight.dtype not in DTYPES or any(m.dtype != weight.dtype for m in maps):
        return f"operands are {', '.join(str(t.dtype) for t in there)}, not float32, bfloat16 or float16 alike"
    if any(not cuda.serves(t, INTERPRETED) or t.device != weight.device for t in there):
        return f"operands are on {', '.join(str(t.device) for t in there)}, not on one CUDA device"
    B, G, _, *grid = maps[0].shape
    window = zip(out, stride, weight.shape[3:], dilation, before, strict=True)
    reach = [(o - 1) * t + s * d + abs(b) for o, t, s, d, b in window]
    inputs, outputs = weight.shape[2], weight.shape[1]
    sample = G * max(inputs * math.prod(grid), outputs * math.prod(out))
    programs = B * G * max(inputs, outputs) * triton.cdiv(max(math.prod(grid), math.prod(out)), LEAST)  # at most
    if 4 * max(*reach, *grid, weight.numel(), sample, *map(_span, maps)) >= LIMIT or programs >= LIMIT:
        return "offsets within a sample, or programs, do not fit 32 bits"
    return ""


def _span(x: Tensor) -> int:
    """How far the numbers of a sample and group lie apart."""
    return sum((n - 1) * s for n, s in zip(x.shape[2:], x.stride()[2:], strict=True))


def _fit(size: int, most: int, least: int = 1) -> int:
    """A power of two that covers size, within the bounds."""
    return max(least, min(most, int(triton.next_power_of_2(size))))


def _three(numbers: Sequence[int], missing: int) -> list[int]:
    return [missing] * (3 - len(numbers)) + list(numbers)


def _positions_last(x: Tensor) -> Tensor:
    """(B, G, c, *grid) as (B, G, c, N), positions side by side: a view, or a copy of what is laid out otherwise."""
    flat = x.flatten(3)
    return flat if flat.stride(3) == 1 or flat.shape[3] == 1 else flat.contiguous()


def _joined(maps: Sequence[Tensor]) -> list[Tensor]:
    """(B, G, c, N): the maps themselves where they are laid out alike, as those of one projection are; else one map."""
    flat = [_positions_last(m) for m in maps]
    alike = all(m.shape == flat[0].shape and m.stride() == flat[0].stride() for m in flat)
    return flat if alike else [torch.cat(flat, 2)]


def _four(maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (*maps, *[maps[0]] * (4 - len(maps)))


def _geometry(
    grid: Sequence[int], size: Sequence[int], stride: list[int], dilation: list[int], before: list[int], out: list[int]
) -> tuple[int, ...]:
    parts = (grid, out, size, stride, dilation)
    return (*(n for part in parts for n in _three(part, 1)), *_three(before, 0))


def _images(
    grid: Sequence[int], size: Sequence[int], stride: list[int], dilation: list[int], before: list[int], out: list[int]
) -> tuple[int, ...]:
    """How many images the mirrors make of a position (all axes, y, x), and the first period of each axis.

    An axis of n positions repeats every 2 (n - 1); each repetition has a position's image and its mirror image.
    """
    counts, firsts = [], []
    for n, s, t, d, b, o in zip(grid, size, stride, dilation, before, out, strict=True):
        period, last = max(2 * (n - 1), 1), (o - 1) * t + (s - 1) * d - b
        firsts.append(-((b + n - 1) // period))
        counts.append(2 * ((last + n - 1) // period - firsts[-1] + 1))
    return (math.prod(counts), *_three(counts, 1)[1:], *_three(firsts, 0))


def _blocks(written: int, positions: int) -> dict[str, Any]:
    """Tiles of `_conv_kernel` that stay in registers."""
    wide = _fit(written, 16)
    return {"BLOCK_W": wide, "BLOCK_M": _fit(positions, min(512, 4096 // wide), LEAST)}


def _is_shift(
    grid: Sequence[int], size: Sequence[int], stride: list[int], dilation: list[int], before: list[int], out: list[int]
) -> bool:
    """Whether outputs are the grid's positions, and a slot reads all of them at one distance."""
    return list(grid) == list(out) and max(stride) == 1


def _weight_blocks(dtype: torch.dtype, read: int, written: int) -> dict[str, Any]:
    """Tiles of `_weight_kernel`, likewise."""
    if dtype == torch.float32 or min(read, written) <= FEW:
        return {"DOT": False, "BLOCK_W": _fit(written, 4), "BLOCK_R": _fit(read, 16), "BLOCK_M": 128}
    wide, deep = _fit(written, 64, 16), _fit(read, 64, 16)
    return {"DOT": True, "BLOCK_W": wide, "BLOCK_R": deep, "BLOCK_M": 4096 // max(wide, deep)}


def _walk(
    read: Sequence[Tensor],
    written: Sequence[Tensor],
    factors: Tensor,
    geometry: tuple[int, ...],
    images: tuple[int, ...],
    turned: bool,
    reflect: bool,
    shift: bool,
    block: int | None,
) -> None:
    """`_conv_kernel` from maps (B, G, c, N) to others; factors (G, S, R, W)."""
    B, G, _, N = written[0].shape
    R, W = factors.shape[2:]
    switches = _blocks(W, N)
    switches["BLOCK_M"] = block or switches["BLOCK_M"]
    blocks = triton.cdiv(W, switches["BLOCK_W"])
    whole = factors.new_zeros(*factors.shape[:3], blocks * switches["BLOCK_W"], dtype=torch.float32)
    whole[..., :W] = factors
    _conv_kernel[(blocks * triton.cdiv(N, switches["BLOCK_M"]) * B * G,)](
        *(*_four(read), *_four(written), whole, N, G, R, W, read[0].shape[2], written[0].shape[2]),
        *(*geometry, *images, *read[0].stride()[:3], *written[0].stride()[:3]),
        READ=len(read),
        WRITTEN=len(written),
        TURNED=turned,
        REFLECT=reflect,
        SHIFT=shift,
        **switches,
        num_warps=4,
        num_stages=3,
    )


def grouped_conv(
    maps: Sequence[Tensor],
    weight: Tensor,
    stride: list[int],
    dilation: list[int],
    before: list[int],
    out: list[int],
    reflect: bool,
    *,
    block: int | None = None,
) -> Tensor:
    """`nearfold.kernels.grouped_conv.grouped_conv`; ``block`` is the number of positions of a program.

    Raises:
        NotImplementedError: where `refusal` says why.
    """
    if why := refusal(maps, weight, stride, dilation, before, out):
        raise NotImplementedError(why)
    B, G, _, *grid = maps[0].shape
    y = weight.new_empty(B, weight.shape[1], G, *out)
    if y.numel() == 0:
        return y
    factors = weight.flatten(3).permute(0, 3, 2, 1)
    window = (grid, weight.shape[3:], stride, dilation, before, out)
    written, images, shift = y.transpose(1, 2).flatten(3), (1, 1, 1, 0, 0, 0), not reflect and _is_shift(*window)
    with torch.cuda.device_of(weight):
        _walk(_joined(maps), [written], factors, _geometry(*window), images, False, reflect, shift, block)
    return y


def grouped_conv_backward(
    grad: Tensor,
    maps: Sequence[Tensor],
    weight: Tensor,
    stride: list[int],
    dilation: list[int],
    before: list[int],
    reflect: bool,
    *,
    block: int | None = None,
    programs: int = PROGRAMS,
) -> list[Tensor]:
    """Gradients at every map, laid out as torch.empty_like does, and at weight, contiguous.

    ``grad`` (B, O, G, *out) has any strides. Equal inputs have equal results, bit for bit. The sum over outputs that
    makes weight's gradient is split so that about ``programs`` programs share it.

    Raises:
        NotImplementedError: where `refusal` says why.
    """
    out, upper = list(grad.shape[3:]), grad.transpose(1, 2)
    if why := refusal([*maps, upper], weight, stride, dilation, before, out):
        raise NotImplementedError(why)
    d_maps = [torch.empty_like(m) for m in maps]
    B, G, _, *grid = maps[0].shape
    O, I, *size = weight.shape[1:]
    if grad.numel() == 0 or weight.numel() == 0 or maps[0].numel() == 0:
        return [*(d.zero_() for d in d_maps), weight.new_zeros(weight.shape)]
    read, upper = _joined(maps), _positions_last(upper)
    written = [d.flatten(3) for d in d_maps]
    first = written[0].stride()
    in_place = first[3] == 1 and all(
        w.data_ptr() == d.data_ptr() and w.shape == written[0].shape and w.stride() == first
        for w, d in zip(written, d_maps, strict=True)
    )
    if not in_place:
        written = [weight.new_empty(B, G, I, math.prod(grid))]
    window = (grid, size, stride, dilation, before, out)
    geometry, shift = _geometry(*window), not reflect and _is_shift(*window)
    switches = _weight_blocks(weight.dtype, I, O)
    switches["BLOCK_M"] = block or switches["BLOCK_M"]
    tiles = B * triton.cdiv(math.prod(out), switches["BLOCK_M"])
    kinds = G * math.prod(size) * triton.cdiv(O, switches["BLOCK_W"]) * triton.cdiv(I, switches["BLOCK_R"])
    splits, span = _splits(tiles, kinds, programs)
    partial = weight.new_empty(splits, G, math.prod(size), O, I, dtype=torch.float32)
    with torch.cuda.device_of(weight):
        factors = weight.flatten(3).permute(0, 3, 1, 2)
        images = _images(*window) if reflect else (1, 1, 1, 0, 0, 0)
        _walk([upper], written, factors, geometry, images, True, reflect, shift, block)
        _weight_kernel[(kinds * splits,)](
            *(upper, *_four(read), partial, math.prod(out), tiles, span, G, I, O, read[0].shape[2], *geometry),
            *(*upper.stride()[:3], *read[0].stride()[:3]),
            READ=len(read),
            REFLECT=reflect,
            SHIFT=shift,
            WIDEN=INTERPRETED,
            **switches,
            num_warps=4,
            num_stages=3,
        )
    if not in_place:
        for d_map, part in zip(d_maps, written[0].split([m.shape[2] for m in maps], 2), strict=True):
            d_map.copy_(part.unflatten(3, grid))
    d_weight = partial.sum(0).permute(0, 2, 3, 1).reshape(weight.shape).to(weight.dtype)
    return [*d_maps, d_weight.contiguous()]


def _splits(tiles: int, kinds: int, programs: int) -> tuple[int, int]:
    """(splits, tiles of one): as many as fill the device, each of four tiles at least; of sizes alone."""
    splits = max(1, min(triton.cdiv(programs, kinds), triton.cdiv(tiles, 4)))
    span = triton.cdiv(tiles, splits)
    return triton.cdiv(tiles, span), span


def _variant(
    kernel: Any, maps: int, inputs: int, outputs: int, dtype: torch.dtype, turned: bool = False, reflect: bool = False
) -> Callable[[], dict[str, Any]]:
    """What a launch on maps of two axes compiles, 3 by 3 slots, stride and dilation 1."""

    def make() -> dict[str, Any]:
        read, written = (outputs, inputs) if turned else (inputs, outputs)
        of_weight = kernel is _weight_kernel
        blocks = _weight_blocks(dtype, read, written) if of_weight else _blocks(written, 3136)
        ones = ["Z", "OZ", "KZ", "tz", "ty", "tx", "dz", "dy", "dx", "by", "bx"]
        ones += [] if reflect and turned else ["images", "iy", "ix"]
        constexprs = {n: 1 for n in ones if n in kernel.arg_names} | {"REFLECT": reflect, "SHIFT": not reflect} | blocks
        if of_weight:
            constexprs |= {"READ": maps, "WIDEN": False}
        else:
            constexprs |= {"READ": 1 if turned else maps, "WRITTEN": maps if turned else 1, "TURNED": turned}
        signature = {n: "i32:16" if n[-2:] in ("_b", "_g", "_c") else "i32" for n in kernel.arg_names}
        tensors = ("grad", *(f"{a}{i}" for a in "rw" for i in range(4)))
        signature |= dict.fromkeys(tensors, f"*{DTYPES[dtype]}") | dict.fromkeys(("partial", "factors"), "*fp32")
        signature["N"] = "i32:16"
        used = {n: t for n, t in signature.items() if n in kernel.arg_names}
        return {"fn": kernel, "signature": used, "constexprs": constexprs, "num_warps": 4, "num_stages": 3}

    return make


# maps, channels of them all, outputs: four heads at once; after a first step eight and 24 heads; one head
_WIDTHS = ((3, 12, 4), (1, 9, 8), (1, 9, 24), (3, 3, 1))
VARIANTS: list[Callable[[], dict[str, Any]]] = [
    *(
        _variant(_conv_kernel, *widths, dtype, turned)
        for widths in _WIDTHS
        for dtype in (torch.bfloat16, torch.float32)
        for turned in (False, True)
    ),
    *(_variant(_conv_kernel, 3, 12, 4, torch.float16, turned, True) for turned in (False, True)),
    *(_variant(_weight_kernel, *widths, dtype) for widths in _WIDTHS for dtype in (torch.bfloat16, torch.float32)),
]
