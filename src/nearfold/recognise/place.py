"""Where every entry of a tensor comes from: its channel and position, and what it depends on in the model's input.

All of these are integer tensors of the tensor's own shape, in which an axis along which nothing changes has length 1.
A view rearranges them as it rearranges the tensor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SHIFT = 1 << 32  # a position is stage * SHIFT + number; 0: of no position in particular
ALL = 1 << 48  # beyond every position: depends on the whole axis
KINDS = ("extent", "?", "any")  # how far it looks: as far as low and high say; not known; wherever the data says
_stages = itertools.count(1)


@dataclass(frozen=True)
class Place:
    """Of every entry of a tensor.

    Attributes:
        channel: which one it is.
        position: which one it is. Numbers are comparable within one stage, from one layer to the next.
        low: first position it depends on, for each axis of the model's input; a window reaches over the border, as
            if the input had none. An entry that depends on nothing has low > high.
        high: the last one.
        jump: distance in the input of two neighbours, for where a map has one position only.
        grid: of the model's input.
        kind: one of `KINDS`.
        exact: False where it may depend on less: something is masked.
        masked: what was added may be a mask, which shows in a softmax.
        wild: it is not known which axis is which.
    """

    channel: Tensor
    position: Tensor
    low: tuple[Tensor, ...]
    high: tuple[Tensor, ...]
    jump: tuple[int, ...]
    grid: tuple[int, ...]
    kind: str = "extent"
    exact: bool = True
    masked: bool = False
    wild: bool = False

    @property
    def everywhere(self) -> bool:
        """Whether every entry depends on the whole input."""
        whole = all(bool((t <= -ALL).all()) for t in self.low) and all(bool((t >= ALL).all()) for t in self.high)
        return whole and self.kind == "extent" and self.exact

    def each(self, change: Callable[[Tensor], Tensor]) -> Place:
        """The same change to all of its tensors."""
        low, high = (tuple(map(change, ts)) for ts in (self.low, self.high))
        return replace(self, channel=change(self.channel), position=change(self.position), low=low, high=high)

    def bounds(self, least: Callable[[Tensor], Tensor], most: Callable[[Tensor], Tensor]) -> Place:
        """One change to what is low, another to what is high."""
        return replace(self, low=tuple(map(least, self.low)), high=tuple(map(most, self.high)))


def compress(t: Tensor) -> Tensor:
    """Length 1 for axes along which nothing changes.

    >>> compress(torch.arange(3).expand(2, 3)).shape
    torch.Size([1, 3])
    """
    for axis, n in enumerate(t.shape):
        if n > 1:
            first = t.narrow(axis, 0, 1)
            if t.stride(axis) == 0 or bool((t == first).all()):
                t = first
    return t


def number(shape: Sequence[int], axes: Iterable[int]) -> Tensor:
    """Numbers along some axes, in raster order.

    >>> number((1, 8, 2, 2), (2, 3)).tolist()
    [[[[0, 1], [2, 3]]]]
    """
    kept = {axis % len(shape) for axis in axes}
    sizes = [n if axis in kept else 1 for axis, n in enumerate(shape)]
    return torch.arange(math.prod(sizes), device="cpu").view(sizes)


def stage() -> int:
    """What the positions of a new stage are counted from."""
    return next(_stages) * SHIFT


def begin(shape: Sequence[int], axis: int | None) -> Place:
    """The model's own input: (B, C) and the grid with channels along ``axis``, or (B) and the grid."""
    axes = [a for a in range(1, len(shape)) if a != axis]
    low = tuple(number(shape, (a,)) for a in axes)
    channel = number(shape, () if axis is None else (axis,))
    grid = tuple(shape[a] for a in axes)
    return Place(channel, number(shape, axes) + stage(), low, low, (1,) * len(axes), grid)


def renumbered(place: Place, shape: Sequence[int], axis: int) -> Place:
    """Behind a layer: channels along one axis, positions along all others."""
    axis %= len(shape)
    others = [a for a in range(len(shape)) if a != axis]
    return replace(
        place, channel=number(shape, (axis,)), position=number(shape, others) + stage(), masked=False, wild=False
    )


def unknown(place: Place, shape: Sequence[int], axis: int | None = None) -> Place:
    """Behind something unknown: every entry may be a position of its own, unless the channels' axis is known."""
    lost = torch.zeros([1] * len(shape), dtype=torch.long, device="cpu")
    found = place.each(lambda t: lost)
    found = replace(found, kind="?", exact=False)
    if axis is not None and shape:
        return renumbered(found, shape, axis)
    entries = number(shape, range(len(shape)))
    return replace(found, position=entries + stage(), channel=entries, wild=True)


def varies(t: Tensor, axes: Iterable[int]) -> bool:
    """Whether something changes along one of these axes."""
    return any(t.shape[axis] > 1 for axis in axes) if t.dim() else False


def least(t: Tensor, axes: Sequence[int]) -> Tensor:
    """The smallest along axes, which stay."""
    return t.amin(list(axes), keepdim=True) if varies(t, axes) else t


def most(t: Tensor, axes: Sequence[int]) -> Tensor:
    """The largest along axes, which stay."""
    return t.amax(list(axes), keepdim=True) if varies(t, axes) else t


def over(place: Place, axes: Sequence[int]) -> Place:
    """What depends on all entries along these axes; channel and position of the first."""
    place = place.bounds(lambda t: least(t, axes), lambda t: most(t, axes))
    return replace(place, channel=least(place.channel, axes), position=least(place.position, axes))


def settled(place: Place, always: bool = False) -> Place:
    """Behind a mean: an axis of the input on which every entry sees the same, which ends at the border.

    Args:
        place: of the mean.
        always: also along an axis on which entries differ, by what all of them see.
    """
    low, high, jump = list(place.low), list(place.high), list(place.jump)
    for a, n in enumerate(place.grid):
        if always:
            low[a], high[a] = low[a].amin().view([1] * low[a].dim()), high[a].amax().view([1] * high[a].dim())
        alike = always or all(
            low[a].shape[d] == high[a].shape[d] == 1 or n > 1 for d, n in enumerate(place.channel.shape)
        )
        if alike:  # but for channels
            some = low[a] <= high[a]
            whole = (low[a] <= 0) & (high[a] >= n - 1)
            ends = (
                torch.where(some, low[a].clamp(0, n - 1), low[a]),
                torch.where(some, high[a].clamp(0, n - 1), high[a]),
            )
            low[a] = torch.where(whole, torch.full_like(ends[0], -ALL), ends[0])
            high[a] = torch.where(whole, torch.full_like(ends[1], ALL), ends[1])
            jump[a] = 0
    return replace(place, low=tuple(low), high=tuple(high), jump=tuple(jump))


def join(places: Sequence[Place], dims: int) -> Place:
    """Of a tensor of ``dims`` axes made of several, entry by entry: all that one of them depends on."""
    places = [p.each(lambda t: t[(None,) * (dims - t.dim())]) for p in places]
    if len(places) == 1:
        return places[0]
    low, high = places[0].low, places[0].high
    if len({len(p.grid) for p in places}) > 1:
        raise AssertionError("places of two inputs")
    for p in places[1:]:
        low = tuple(torch.minimum(a, b) for a, b in zip(low, p.low, strict=True))
        high = tuple(torch.maximum(a, b) for a, b in zip(high, p.high, strict=True))
    position, channel = places[0].position, places[0].channel
    for p in places[1:]:
        position = torch.where(position == 0, p.position, position)
        channel = channel + torch.zeros_like(p.channel) if varies(channel, range(dims)) else p.channel
    jump = tuple(max(some, key=abs) for some in zip(*(p.jump for p in places), strict=True))
    kind = max((p.kind for p in places), key=KINDS.index)
    found = Place(
        compress(channel), compress(position), tuple(map(compress, low)), tuple(map(compress, high)), jump,
        places[0].grid, kind, all(p.exact for p in places), any(p.masked for p in places), any(p.wild for p in places),
    )  # fmt: skip
    if any(p.everywhere for p in places):
        found = replace(found, kind="extent", exact=True)
    return found


def apart(a: Tensor, b: Tensor) -> bool:
    """Whether two positions of one stage meet in one entry."""
    return bool(((a != b) & (a != 0) & (b != 0) & (a // SHIFT == b // SHIFT)).any())


def same(a: Place, b: Place) -> bool:
    """Whether two places say the same."""
    mine, other = ((p.channel, p.position, *p.low, *p.high) for p in (a, b))
    equal = all(x is y or (x.shape == y.shape and torch.equal(x, y)) for x, y in zip(mine, other, strict=True))
    return equal and (a.kind, a.exact, a.masked) == (b.kind, b.exact, b.masked)


def gathered(position: Tensor, axis: int) -> bool:
    """Whether several positions of one stage lie along the channels' axis."""
    if position.shape[axis] == 1:
        return False
    stages = position // SHIFT
    for one in stages.unique().tolist():
        mine = stages == one
        first = torch.where(mine, position, torch.full_like(position, 1 << 62)).amin(axis, keepdim=True)
        if one and bool((mine & (position != first)).any()):
            return True
    return False


def orderly(position: Tensor, axes: Sequence[int]) -> bool:
    """Whether positions of one stage lie side by side in raster order: not strided, flipped, rolled or transposed."""
    stages = position // SHIFT
    if bool((stages != stages.flatten()[0]).any()) or not stages.flatten()[0]:
        return True  # rows of several stages: each was checked where they met
    last = True
    for axis in reversed(list(axes)):
        if position.shape[axis] == 1:
            continue
        step = position.diff(dim=axis)
        if bool((step != step.flatten()[0]).any()) or (last and int(step.flatten()[0]) != 1):
            return False
        if int(step.flatten()[0]) < 1:
            return False
        last = False
    return True


def window(place: Place, length: int, dim: int, reads: Tensor, own: int | None, stride: int = 1) -> Place:
    """Along one axis of a tensor, outputs that read several entries.

    Args:
        place: of the input.
        length: of the axis.
        dim: the axis.
        reads: entries that every output reads (o, s), also over the border.
        own: axis of the model's input that lies along it, for a map that has one position left.
        stride: distance of two outputs.
    """
    lows, highs, jumps = [], [], list(place.jump)
    view = [-1 if d == dim else 1 for d in range(place.position.dim())]
    first, last = reads.amin(1).view(view), reads.amax(1).view(view)
    for a, (low, high) in enumerate(zip(place.low, place.high, strict=True)):
        step = _step(low, high, length, dim)
        if step is None and low.shape[dim] == high.shape[dim] == 1:
            if a == own and length == 1 and bool((low > -ALL).all()) and bool((high < ALL).all()):
                step = place.jump[a]
            else:
                lows.append(low)
                highs.append(high)
                continue
        if step is not None:
            low, high = low.narrow(dim, 0, 1), high.narrow(dim, 0, 1)
            lows.append(compress(low + torch.minimum(step * first, step * last)))
            highs.append(compress(high + torch.maximum(step * first, step * last)))
            jumps[a] = step * (int(reads[1, 0] - reads[0, 0]) if len(reads) > 1 else stride)
            continue
        there = ((reads >= 0) & (reads < length)).flatten()
        at = reads.clamp(0, length - 1).flatten()
        for bound, pick, none in ((low, torch.amin, ALL), (high, torch.amax, -ALL)):
            wide = bound.expand([length if d == dim else n for d, n in enumerate(bound.shape)])
            read = wide.index_select(dim, at)
            keep = there.view([-1 if d == dim else 1 for d in range(bound.dim())])
            read = torch.where(keep, read, torch.full_like(read, none)).unflatten(dim, tuple(reads.shape))
            (lows if none > 0 else highs).append(compress(pick(read, dim + 1)))
        jumps[a] = place.jump[a] * stride
    return replace(place, low=tuple(lows), high=tuple(highs), jump=tuple(jumps))


def _step(low: Tensor, high: Tensor, length: int, dim: int) -> int | None:
    """The distance of neighbours along an axis, where all have the same; None too where nothing changes."""
    if low.shape[dim] == high.shape[dim] == 1:
        return None
    sizes = [[length if d == dim else n for d, n in enumerate(t.shape)] for t in (low, high)]
    steps = [t.expand(size).diff(dim=dim) for t, size in zip((low, high), sizes, strict=True)]
    one = int(steps[0].flatten()[0])
    return one if all(bool((s == one).all()) for s in steps) else None


def text(place: Place, axis: int) -> str:
    """The receptive field of a layer with its channels along ``axis``, as it is printed.

    >>> text(begin((1, 3, 8, 8), 1), 1)
    '1'
    """
    if place.kind == "any":
        return "any"
    if place.kind != "extent":
        return "?"
    bound, sizes, whole = not place.exact, [], True
    for low, high, n in zip(place.low, place.high, place.grid, strict=True):
        channels = (axis % low.dim(),) if low.dim() else ()
        extent = most(high, channels) - least(low, channels) + 1
        extent = extent[extent > 0]
        if not extent.numel():
            return "?"
        every = bool((extent >= ALL).all())
        whole &= every
        bound |= int(extent.min()) != int(extent.max()) and not every
        sizes.append((int(extent.max()), n))
    if bound:
        if any(size >= n for size, n in sizes):
            return "?"
        return "<=" + _sizes([size for size, _ in sizes])
    return "all" if whole else _sizes([n if size >= ALL else size for size, n in sizes])


def _sizes(sizes: list[int]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else "x".join(map(str, sizes))
