"""Windows in core ATen: one gather of all slots, not a slice for each.

Shape legend: P problems (batch x heads), B batch, H heads, e embedded features, d value features, S slots,
`*grid` the map, `*out` the output grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.kernels.local import reflect as mirrored

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def along(axis: int, starts: Tensor, stride: int, out: Sequence[int]) -> Tensor:
    """Where every slot and output of one axis reads: (1.., s, ..1, 1.., o, ..1), slots first."""
    at = starts[:, None] + torch.arange(out[axis], device=starts.device) * stride
    axes = len(out)
    shape = [1] * (2 * axes)
    shape[axis], shape[axes + axis] = at.shape[0], at.shape[1]
    return at.view(shape)


def read(x: Tensor, places: Sequence[Tensor], out: Sequence[int]) -> Tensor:
    """What all slots of a window read of a map (P, c, *grid): (P, c, S, *out)."""
    grid = x.shape[2:]
    at = places[0]
    for place, n in zip(places[1:], grid[1:], strict=True):
        at = at * n + place
    slots = math.prod(at.shape[: len(out)])
    return x.flatten(2).index_select(2, at.flatten()).view(x.shape[0], x.shape[1], slots, *out)


def _starts(offsets: Sequence[int], axes: int, like: Tensor) -> list[Tensor]:
    """The first positions of slots on every axis; they are all combinations of those."""
    made = []
    for axis in range(axes):
        first = sorted(set(offsets[axis::axes]))
        step = first[1] - first[0] if len(first) > 1 else 1
        assert first == list(range(first[0], first[0] + step * len(first), step)), offsets
        made.append(first[0] + torch.arange(len(first), device=like.device) * step)
    return made


def _scored(query: Tensor, near: Tensor, metric: str, squared: bool) -> Tensor:
    """(P, S, *out) of queries (P, e, *out) and keys (P, e, S, *out)."""
    if metric == "dot":
        return (query[:, :, None] * near).sum(1)
    square = (query[:, :, None] - near).square().sum(1)
    return -square if squared else -square.sqrt()


def local_scores(
    query: Tensor, key: Tensor, offsets: list[int], stride: list[int], metric: str, squared: bool
) -> Tensor:
    """`nearfold::local_scores`."""
    out = query.shape[2:]
    starts = _starts(offsets, len(out), key)
    places = [along(a, s, t, out) for a, (s, t) in enumerate(zip(starts, stride, strict=True))]
    return _scored(query, read(key, places, out), metric, squared)


def local_sum(alpha: Tensor, value: Tensor, offsets: list[int], stride: list[int]) -> Tensor:
    """`nearfold::local_sum`."""
    out = alpha.shape[2:]
    starts = _starts(offsets, len(out), value)
    places = [along(a, s, t, out) for a, (s, t) in enumerate(zip(starts, stride, strict=True))]
    return (read(value, places, out) * alpha[:, None]).sum(2)


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
) -> tuple[Tensor, Tensor]:
    """`nearfold::local_attention`."""
    B, H, grid, out = query.shape[0], query.shape[1], key.shape[3:], query.shape[3:]
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))
    places, inside = [], None
    for axis, n in enumerate(grid):
        starts = torch.arange(size[axis], device=key.device) * dilation[axis] - before[axis]
        at = along(axis, starts, stride[axis], out)
        if reflect:
            places.append(mirrored(at, n))
        else:
            there = (at >= 0) & (at < n)
            inside = there if inside is None else inside & there
            places.append(torch.where(there, at, 0))
    score = _scored(q, read(k, places, out), metric, squared) * scale
    if inside is not None:
        score = score.masked_fill(~inside.flatten(0, len(out) - 1), float("-inf"))
    most = score.amax(1, keepdim=True)
    most = most.masked_fill(most == float("-inf"), 0)
    weight = (score - most).exp()
    total = weight.sum(1, keepdim=True)
    inverse = torch.where(total == 0, 0, 1 / total)
    near = read(v, places, out)
    if inside is not None:  # what stands in for a place outside may be NaN, which no weight of zero hides
        near = near.masked_fill(~inside.flatten(0, len(out) - 1), 0)
    y = (near * (weight * inverse)[:, None]).sum(2)
    return y.unflatten(0, (B, H)), torch.cat([most, inverse], 1).unflatten(0, (B, H))


def long_conv(value: Tensor, kernel: Tensor, groups: int) -> Tensor:
    """`nearfold::long_conv`, directly and not by FFT: runtimes multiply faster than they transform, if they do."""
    amounts = [room for n, s in zip(value.shape[2:], kernel.shape[2:], strict=True) for room in (s - n, n - 1)]
    axes = list(range(2, value.dim()))
    return _CONV[len(axes)](F.pad(value, amounts[::-1]), kernel.flip(axes), groups=groups)
