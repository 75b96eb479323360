"""Operators that read windows: convolutions, pooling, interpolation, padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nearfold.recognise.field import channels
from nearfold.recognise.operators.call import Call, Unfollowed
from nearfold.recognise.place import Place, least, number, renumbered, settled, stage, varies, window


def _reads(out: int, size: int, stride: int, dilation: int, before: int) -> Tensor:
    first = torch.arange(out, device="cpu") * stride - before
    return first[:, None] + torch.arange(size, device="cpu") * dilation


def _listed(value: Any, count: int) -> list[int]:
    value = [value] if isinstance(value, int) else list(value)
    return value * count if len(value) == 1 else value


def _windowed(place: Place, t: Tensor, out: Tensor, reads: Sequence[Tensor], stride: Sequence[int]) -> Place:
    count = len(reads)
    for a, read in enumerate(reads):
        dim = t.dim() - count + a
        place = window(place, t.shape[dim], dim, read, a if len(place.grid) == count else None, stride[a])
    return place


def convolution(call: Call) -> Place:
    """A window over the input, all channels of a group at once."""
    call.only("input")
    t, place, weight, out = call.tensor("input"), call.main("input"), call.tensor("weight"), call.made[0]
    if call.given["transposed"]:
        raise Unfollowed
    count = t.dim() - 2
    size = list(weight.shape[2:])
    stride, dilation, padding = (_listed(call.given[n], count) for n in ("stride", "dilation", "padding"))
    call.mixes = any(n > 1 for n in (*size, *stride)) or any(padding) or varies(place.position, (1,))
    place = channels(place, 1, t.shape, call.given["groups"], out.shape)
    reads = [_reads(out.shape[2 + a], size[a], stride[a], dilation[a], padding[a]) for a in range(count)]
    found = _windowed(place, t, out, reads, stride)
    found = found if call.solid(weight) else replace(found, exact=False)
    if call.mixes:
        return renumbered(found, out.shape, 1)
    return replace(found, channel=number(out.shape, (1,)))


def pooled(count: int) -> Callable[[Call], Place | list[Place]]:
    """Pooling over windows of this many axes."""

    def rule(call: Call) -> Place:
        t, place, out = call.tensor("self"), call.main("self"), call.made[0]
        size = _listed(call.given["kernel_size"], count)
        stride = _listed(call.given.get("stride") or size, count)
        padding, dilation = (_listed(call.given.get(n, d), count) for n, d in (("padding", 0), ("dilation", 1)))
        dims = range(t.dim() - count, t.dim())
        reads = [_reads(out.shape[d], size[a], stride[a], dilation[a], padding[a]) for a, d in enumerate(dims)]
        return _resized(call, t, place, out, reads, stride)

    return rule


def _resized(call: Call, t: Tensor, place: Place, out: Tensor, reads: Sequence[Tensor], stride: Sequence[int]) -> Place:
    """Windows over the last axes, every channel alone; positions are numbered anew where they were mixed."""
    dims = range(t.dim() - len(reads), t.dim())
    moved = [d for a, d in enumerate(dims) if reads[a].shape[1] > 1 or out.shape[d] != t.shape[d]]
    call.mixes = varies(place.position, moved)
    found = _windowed(place, t, out, reads, stride)
    if call.mixes:
        there = [d for d in range(t.dim()) if varies(place.position, (d,))]
        return replace(found, position=number(out.shape, there) + stage(), channel=least(place.channel, moved))
    return replace(found, channel=place.channel if not varies(place.channel, moved) else number(out.shape, moved))


def adaptive(count: int) -> Callable[[Call], Place | list[Place]]:
    """Pooling into a given number of bins."""

    def rule(call: Call) -> Place:
        t, place, out = call.tensor("self"), call.main("self"), call.made[0]
        reads, strides = [], []
        for d in range(t.dim() - count, t.dim()):
            n, m = t.shape[d], out.shape[d]
            spans = [(i * n // m, -(-(i + 1) * n // m)) for i in range(m)]
            longest = max(b - a for a, b in spans)
            reads.append(torch.tensor([[min(a + j, b - 1) for j in range(longest)] for a, b in spans]))
            strides.append(max(n // m, 1))
        whole = all(out.shape[d] == 1 for d in range(t.dim() - count, t.dim()))
        found = _resized(call, t, place, out, reads, strides)
        return settled(found) if whole else found

    return rule


def upsampled(taps: int, count: int) -> Callable[[Call], Place | list[Place]]:
    """Interpolation, by 1, 2 or 4 entries per axis."""

    def rule(call: Call) -> Place:
        t, place, out = call.tensor("self"), call.main("self"), call.made[0]
        reads, strides, exact = [], [], True
        for a, d in enumerate(range(t.dim() - count, t.dim())):
            n, m = t.shape[d], out.shape[d]
            names = ("scales_d", "scales_h", "scales_w")[3 - count :] if count > 1 else ("scales",)
            scale = call.given.get(names[a])
            exact &= scale is None or math.isclose(n * scale, m)
            at = torch.arange(m, dtype=torch.float64, device="cpu")
            if taps == 1:
                reads.append((at * n / m).floor().long()[:, None].clamp(0, n - 1))
            else:
                ends = call.given.get("align_corners") and m > 1
                at = at * (n - 1) / (m - 1) if ends else (at + 0.5) * n / m - 0.5
                at = at.clamp(min=0) if taps == 2 else at
                low = (at + 1e-9).floor().long()
                between = ((at - low) > 1e-9).long()[:, None]
                span = torch.arange(taps, device="cpu") - (taps // 2 - 1)
                reads.append((low[:, None] + span * between).clamp(0, n - 1))
            strides.append(max(n // m, 1))
        found = _resized(call, t, place, out, reads, strides)
        return found if exact else replace(found, exact=False)

    return rule


def padded(call: Call) -> Place:
    """More entries at the ends of axes, which depend on what the mode reads."""
    t, place, out = call.tensor("self"), call.main("self"), call.made[0]
    pads = list(call.given.get("pad") or call.given["padding"])
    found = place
    for i in range(len(pads) // 2):
        dim, before = t.dim() - 1 - i, pads[2 * i]
        if pads[2 * i] == pads[2 * i + 1] == 0:
            continue
        n, m = t.shape[dim], out.shape[dim]
        own = dim - (t.dim() - len(place.grid))
        found = window(found, n, dim, _reads(m, 1, 1, 1, before), own if own >= 0 else None)
        at = torch.arange(m, device="cpu") - before
        there = ((at >= 0) & (at < n)).view([-1 if d == dim else 1 for d in range(t.dim())])

        def laid(label: Tensor, dim: int = dim, n: int = n, at: Tensor = at, there: Tensor = there) -> Tensor:
            if label.shape[dim] == 1 and n > 1:
                return label
            return torch.where(there, label.index_select(dim, at.clamp(0, n - 1)), torch.zeros((), dtype=torch.long))

        position = laid(found.position)
        found = replace(found, position=position, channel=laid(found.channel))
    return found
