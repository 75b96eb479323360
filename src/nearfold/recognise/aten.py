"""What each operator of PyTorch makes of the places of its inputs, and whether it mixes positions.

A table of rules by name. What torch tags as pointwise is; what is in no table may do anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from nearfold.recognise.field import channels
from nearfold.recognise.place import (
    ALL,
    SHIFT,
    Place,
    apart,
    compress,
    join,
    least,
    number,
    over,
    renumbered,
    settled,
    stage,
    unknown,
    varies,
    window,
)


class Unfollowed(Exception):
    """An operator, or a call of it, that no rule follows."""


@dataclass
class Call:
    """One call of an operator.

    Attributes:
        name: of the operator, without the underscore of what works in place.
        func: the operator.
        given: arguments by name.
        place: looks up the place of a tensor; None where it depends on no input.
        solid: whether a tensor that depends on no input is a weight, so that it masks nothing.
        made: what the call returned.
        before: shapes of its inputs, before it ran.
        mixes: set by a rule where positions are mixed, moved, or may be.
    """

    name: str
    func: Any
    given: dict[str, Any]
    place: Callable[[Tensor], Place | None]
    solid: Callable[[Tensor], bool]
    made: list[Tensor]
    mixes: bool = field(default=False)

    def tensor(self, name: str) -> Tensor:
        t = self.given[name]
        assert isinstance(t, Tensor)
        return t

    def main(self, name: str) -> Place:
        """The place of an argument that must depend on the input."""
        place = self.place(self.tensor(name))
        if place is None:
            raise Unfollowed
        return place

    def only(self, *names: str) -> None:
        """No other tensor may depend on the input."""
        others = [t for name, t in self.given.items() if name not in names for t in _tensors(t)]
        if any(self.place(t) is not None for t in others):
            raise Unfollowed


def follow(call: Call) -> list[Place]:
    """The places of what a call made; sets ``call.mixes``."""
    try:
        rule = RULES.get(call.name)
        if rule is None:
            if torch.Tag.pointwise not in call.func.tags and call.name not in UNTAGGED:
                raise Unfollowed
            rule = _pointwise
        found = rule(call)
        return found if isinstance(found, list) else [found] * len(call.made)
    except (Unfollowed, AssertionError, RuntimeError, IndexError, KeyError, TypeError, ValueError):
        call.mixes = True
        source = next(p for t in _tensors(call.given) if (p := call.place(t)) is not None)
        same = [t.shape == call.made[0].shape and call.place(t) is source for t in _tensors(call.given)]
        if len(call.made) == 1 and any(same) and not source.wild:  # the axes are likely what they were
            low = tuple(torch.zeros_like(t) for t in source.low)
            return [replace(source, low=low, high=low, kind="?", exact=False)]
        return [unknown(source, t.shape) for t in call.made]


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


# --- entry by entry

UNTAGGED = frozenset(("hardswish", "hardsigmoid", "log_sigmoid_forward", "_prelu_kernel", "prelu", "rrelu_with_noise",
                      "softplus", "softshrink", "hardshrink", "threshold", "mish", "polar"))  # fmt: skip
ZEROING = frozenset(("mul", "div", "where", "masked_fill", "minimum", "maximum", "pow", "bitwise_and", "logical_and"))


def _pointwise(call: Call) -> Place:
    given = _tensors(call.given)
    places = [p for t in given if (p := call.place(t)) is not None]
    dims = call.made[0].dim()
    found = join(places, dims)
    full = [p.position[(None,) * (dims - p.position.dim())] for p in places]
    call.mixes = any(apart(full[0], other) for other in full[1:])
    holes = [t for t in given if t.numel() > 1 and call.place(t) is None and not call.solid(t)]
    if holes and call.name in ZEROING and not found.everywhere:
        found = replace(found, exact=False)
    elif holes:
        found = replace(found, masked=True, exact=found.exact and call.name not in ZEROING)
    return found


def _same(call: Call) -> Place:
    return join([p for t in _tensors(call.given) if (p := call.place(t)) is not None], call.made[0].dim())


def _copy(call: Call) -> Place:
    """x.copy_(y): y alone, laid over x."""
    source = call.place(call.tensor("src"))
    if source is None:
        raise Unfollowed
    return source.each(lambda t: t[(None,) * (call.made[0].dim() - t.dim())])


# --- views, and what moves entries


def _moved(place: Place, shape: Sequence[int], change: Callable[[Tensor], Any]) -> list[Place]:
    """The same rearrangement of every tensor of a place."""
    columns = [
        [compress(t) for t in _tensors(change(t.expand(tuple(shape))))]
        for t in (place.channel, place.position, *place.low, *place.high)
    ]
    axes = len(place.low)
    return [
        replace(place, channel=c, position=p, low=tuple(rest[:axes]), high=tuple(rest[axes:]))
        for c, p, *rest in zip(*columns, strict=True)
    ]


def _view(call: Call) -> list[Place]:
    (name, t), *_ = [(n, t) for n, t in call.given.items() if isinstance(t, Tensor)]
    place = call.main(name)
    others = {n: v for n, v in call.given.items() if n != name and n not in ("dtype", "device", "layout", "pin_memory")}
    if any(isinstance(v, torch.dtype) for v in call.given.values()) and call.name == "view":
        raise Unfollowed  # other numbers in the same memory

    def change(label: Tensor) -> Any:
        try:
            return call.func(label, **others)
        except RuntimeError:  # a view of the tensor, but not of a label, in which axes are of length 1
            return call.func(label.contiguous(), **others)

    return _moved(place, t.shape, change)


def _moving(call: Call) -> list[Place]:
    """As a view; what it moves along an axis of positions counts as mixing."""
    (name, _), *_ = [(n, t) for n, t in call.given.items() if isinstance(t, Tensor)]
    position = call.main(name).position
    found = _view(call)
    call.mixes = any(f.position.shape != position.shape or bool((f.position != position).any()) for f in found)
    return found


def _slice(call: Call) -> list[Place]:
    found = _view(call)
    dim = call.given["dim"] % call.tensor("self").dim()
    call.mixes = call.given["step"] > 1 and call.made[0].shape[dim] > 1 and varies(call.main("self").position, (dim,))
    return found


def _indexed(call: Call) -> list[Place]:
    """Picked by indices: those that are known are followed, those that come from the input decide by it."""
    source = "self" if "self" in call.given else next(iter(call.given))
    indices = [t for name, value in call.given.items() if name != source for t in _tensors(value)]
    if any(call.place(t) is not None or t.device.type == "meta" for t in indices):
        return [_picked(call, source)]
    t, place = call.tensor(source), call.main(source)
    others = tree_map(lambda v: v.cpu() if isinstance(v, Tensor) else v, {n: v for n, v in call.given.items()
                                                                         if n != source})  # fmt: skip
    found = _moved(place, t.shape, lambda label: call.func(label, **others))
    call.mixes = call.name != "index" or any(
        index is not None and varies(place.position, _reach(index, axis, place.position))
        for axis, index in enumerate(call.given["indices"])
    )
    if call.name == "index_select":
        call.mixes = varies(place.position, (call.given["dim"],))
    return found


def _picked(call: Call, source: str) -> Place:
    """Picked along one axis by indices that are not known: any of what lies along it."""
    t, place, out = call.tensor(source), call.main(source), call.made[0]
    if call.name == "index" or out.dim() != t.dim():
        raise Unfollowed
    dim = call.given["dim"] % t.dim()
    call.mixes = varies(place.position, (dim,))
    found = over(place, (dim,))
    cut = found.each(lambda label: label[tuple(slice(n) for n in out.shape)])
    position = number(out.shape, [d for d in range(t.dim()) if varies(place.position, (d,))]) + stage()
    channel = cut.channel if not varies(place.channel, (dim,)) else number(out.shape, (dim,))
    exact = place.exact and (not call.mixes or place.everywhere)
    return replace(cut, position=position, channel=channel, exact=exact)


def _reach(index: Tensor, axis: int, position: Tensor) -> tuple[int, ...]:
    if index.dtype in (torch.bool, torch.uint8):
        return tuple(range(position.dim()))
    return (axis,)


def _bound(name: str, axis: int, place: Place) -> Tensor:
    found: Tensor = getattr(place, name)[axis]
    return found


def _joined(call: Call) -> list[Place]:
    """cat and stack; what depends on no input is of no position."""
    tensors, out = call.given["tensors"], call.made[0]
    dim = call.given["dim"] % out.dim()
    stacked = call.name == "stack"
    given = [
        None if p is None else p.each(lambda t: t.unsqueeze(dim)) if stacked else p for p in map(call.place, tensors)
    ]
    given = [p for p, t in zip(given, tensors, strict=True) if p is not None or t.dim() == out.dim() or stacked]
    lengths = [1 if stacked else t.shape[dim] for t in tensors if t.dim() == out.dim() or stacked]
    places = [p for p in given if p is not None]
    first = places[0].position
    if all(p.position.shape == first.shape and torch.equal(p.position % SHIFT, first % SHIFT) for p in places):
        given = [p and replace(p, position=first) for p in given]  # of several layers, each where the others are

    def column(pick: Callable[[Place], Tensor], none: int) -> Tensor:
        labels = [torch.full((1,) * out.dim(), none, device="cpu") if p is None else pick(p) for p in given]
        wide = [max(label.shape[d] for label in labels) for d in range(out.dim())]
        parts = [
            label.expand([length if d == dim else n for d, n in enumerate(wide)])
            for label, length in zip(labels, lengths, strict=True)
        ]
        return compress(torch.cat(parts, dim))

    axes = range(len(places[0].low))
    jump = tuple(max(some, key=abs) for some in zip(*(p.jump for p in places), strict=True))
    merged = join([p.each(lambda t: t.flatten()[:1]) for p in places], 1)  # kind, exact, masked and wild of all
    whole = any(p.kind != "extent" for p in places)
    return [
        replace(
            merged, channel=column(lambda p: p.channel, 0), position=column(lambda p: p.position, 0),
            low=tuple(column(partial(_bound, "low", a), ALL) for a in axes),
            high=tuple(column(partial(_bound, "high", a), -ALL) for a in axes), jump=jump,
            kind=max((p.kind for p in places), key=("extent", "?", "any").index) if whole else "extent",
            exact=all(p.exact for p in places),
        )
    ]  # fmt: skip


# --- along axes


def _dims(call: Call, name: str, dims: int) -> list[int]:
    given = call.given.get(name)
    given = [given] if isinstance(given, int) else given
    return [d % dims for d in given] if given else list(range(dims))


def _reduced(call: Call) -> Place:
    if call.given.get("other") is not None:  # the larger of two tensors
        return _pointwise(call)
    source = "self" if "self" in call.given else "input"
    t, place = call.tensor(source), call.main(source)
    dims = _dims(call, "dim", t.dim())
    call.mixes = varies(place.position, dims)
    found = over(place, dims)
    if call.mixes:
        found = settled(found)
    if call.made[0].dim() < t.dim():
        keep = [d for d in range(t.dim()) if d not in dims]
        found = found.each(lambda label: label.permute(*keep, *dims).flatten(len(keep)).select(-1, 0) if keep
                           else label.flatten()[0])  # fmt: skip
    if call.mixes and found.position.numel() == 1:
        found = replace(found, position=torch.zeros_like(found.position))
    return found


def _along(call: Call) -> Place:
    """Every entry along an axis depends on all of them: a softmax, a running sum, a sort."""
    t, place = call.tensor("self"), call.main("self")
    dims = _dims(call, "dim", t.dim()) if call.given.get("dim") is not None else [t.dim() - 1]
    call.mixes = varies(place.position, dims)
    found = over(place, dims)
    # what one entry reads of the others; itself it is
    exact = place.exact and not (place.masked and call.mixes) and call.name in SOFTMAXES | FOURIER
    found = replace(found, exact=exact or (not call.mixes and place.exact), masked=False)
    found = settled(found) if call.mixes else found
    if call.made[0].shape == t.shape and call.name not in ("sort", "topk"):
        return replace(found, channel=place.channel, position=place.position)
    if call.mixes:
        position = number(call.made[0].shape, [d for d in range(t.dim()) if varies(place.position, (d,))]) + stage()
        return replace(found, position=position)
    return replace(found, channel=number(call.made[0].shape, dims))


SOFTMAXES = frozenset(("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax"))
FOURIER = frozenset(("_fft_c2c", "_fft_r2c", "_fft_c2r"))


def _glu(call: Call) -> Place:
    t, place = call.tensor("self"), call.main("self")
    dim = call.given["dim"] % t.dim()
    halves = _moved(place, t.shape, lambda label: label.chunk(2, dim))
    call.mixes = apart(halves[0].position, halves[1].position)
    return join(halves, t.dim())


def _norm(dims: Callable[[Call, Tensor], Sequence[int]]) -> Callable[[Call], Place | list[Place]]:
    """A normalisation over axes; its statistics, which come with it, are of those."""

    def rule(call: Call) -> Place | list[Place]:
        t, place = call.tensor("input"), call.main("input")
        axes = dims(call, t)
        call.mixes = varies(place.position, axes)
        found = over(place, axes)
        found = settled(found) if call.mixes else found
        main = replace(found, channel=place.channel, position=place.position)
        return [main, *(unknown(place, s.shape) for s in call.made[1:])]

    return rule


def _layer_axes(call: Call, t: Tensor) -> Sequence[int]:
    return range(t.dim() - len(call.given["normalized_shape"]), t.dim())


def _batch_axes(call: Call, t: Tensor) -> Sequence[int]:
    return [d for d in range(t.dim()) if d != 1] if call.given.get("training") else ()


def _group_norm(call: Call) -> Place | list[Place]:
    t, place, groups = call.tensor("input"), call.main("input"), call.given["group"]
    grid = range(2, t.dim())
    call.mixes = varies(place.position, grid)
    found = settled(over(place, grid)) if call.mixes else place
    found = channels(found, 1, t.shape, groups, t.shape)
    main = replace(found, channel=place.channel, position=place.position)
    return [main, *(unknown(place, s.shape) for s in call.made[1:])]


# --- sums of products


def _product(first: str, second: str) -> Callable[[Call], Place]:
    """Of matrices: entry (i, j) depends on row i and column j."""

    def rule(call: Call) -> Place:
        a, b = call.tensor(first), call.tensor(second)
        pa, pb = call.place(a), call.place(b)
        parts = []
        if pa is not None:
            parts.append(over(pa, (a.dim() - 1,)))
            call.mixes |= varies(pa.position, (a.dim() - 1,))
        if pb is not None:
            parts.append(over(pb, (b.dim() - 2,)))
            call.mixes |= varies(pb.position, (b.dim() - 2,))
        if not parts:  # added to a product of weights
            return _pointwise(call)
        shape, dims = call.made[0].shape, call.made[0].dim()
        zeroes = any(p is None and not call.solid(t) for t, p in ((a, pa), (b, pb)))
        found = replace(join(parts, dims), masked=False)
        if zeroes:
            found = replace(found, exact=False)
        free = [d for d in range(dims) if any(varies(p.position, (d,)) for p in parts)]
        if len(parts) == 2:
            call.mixes |= apart(parts[0].position, parts[1].position)
            found = replace(found, position=number(shape, free) + stage())
        if call.mixes and len(parts) == 1:  # hidden positions lie where those that were mixed lay
            axis = dims - 1 if pa is not None else dims - 2
            found = replace(found, position=number(shape, {*free, axis}) + stage())
        elif len(parts) == 1:
            found = replace(found, channel=number(shape, (dims - 1 if pa is not None else dims - 2,)))
        elif not varies(found.channel, range(dims)):
            found = replace(found, channel=number(shape, (dims - 1,)))
        return settled(found) if call.mixes else found

    return rule


def _attention(call: Call) -> list[Place]:
    call.mixes = True
    places = [call.place(call.given[name]) for name in ("query", "key", "value")]
    masked = any(call.given.get(n) is not None for n in ("attn_mask", "attn_bias")) or call.given.get("is_causal")
    query, keys = places[0], [p for p in places[1:] if p is not None]
    dims = call.made[0].dim()
    parts = [over(p, (dims - 2, dims - 1)) for p in keys] + ([over(query, (dims - 1,))] if query is not None else [])
    found = settled(join(parts, dims))
    if masked:
        found = replace(found, exact=False)
    source = query or keys[0]
    out = replace(found, position=least(source.position, (dims - 1,)), channel=source.channel)
    if query is None:
        out = replace(out, position=number(call.made[0].shape, (dims - 2,)) + stage())
    return [out, *(unknown(source, t.shape) for t in call.made[1:])]


# --- windows


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


def _convolution(call: Call) -> Place:
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


def _pooled(count: int) -> Callable[[Call], Place | list[Place]]:
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


def _adaptive(count: int) -> Callable[[Call], Place | list[Place]]:
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


def _upsampled(taps: int, count: int) -> Callable[[Call], Place | list[Place]]:
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


def _padded(call: Call) -> Place:
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


def _embedding(call: Call) -> Place:
    call.only("indices")
    place = call.main("indices").each(lambda t: t[..., None])
    return replace(place, channel=number(call.made[0].shape, (-1,)))


def _as_real(call: Call) -> Place:
    place = call.main("self").each(lambda t: t[..., None])
    return place


def _as_complex(call: Call) -> Place:
    t, place = call.tensor("self"), call.main("self")
    call.mixes = varies(place.position, (t.dim() - 1,))
    return over(place, (t.dim() - 1,)).each(lambda label: label[..., 0])


Rule = Callable[[Call], Place | list[Place]]
_GROUPS: tuple[tuple[Rule, str], ...] = (
    (_same, "_to_copy clone alias detach contiguous lift_fresh lift_fresh_copy dropout native_dropout _conj "
            "_neg_view fill zero bernoulli"),
    (_copy, "copy"),
    (_view, "view _unsafe_view _reshape_alias reshape permute transpose t expand select unsqueeze squeeze split "
            "split_with_sizes chunk unbind repeat channel_shuffle unsafe_split diagonal movedim swapaxes"),
    (_moving, "flip roll rot90 unfold pixel_shuffle pixel_unshuffle"),
    (_slice, "slice"),
    (_indexed, "index index_select gather"),
    (_joined, "cat stack"),
    (_reduced, "mean sum amax amin max min var std var_mean std_mean linalg_vector_norm logsumexp prod any all "
               "argmax argmin median nansum norm aminmax"),
    (_along, " ".join(sorted(SOFTMAXES | FOURIER)) + " cumsum cumprod cummax cummin logcumsumexp sort topk"),
    (_glu, "glu"),
    (_norm(_layer_axes), "native_layer_norm _fused_rms_norm rms_norm"),
    (_norm(_batch_axes), "native_batch_norm _native_batch_norm_legit cudnn_batch_norm"),
    (_norm(lambda call, t: ()), "_native_batch_norm_legit_no_training"),
    (_group_norm, "native_group_norm"),
    (_product("self", "mat2"), "mm bmm"),
    (_product("mat1", "mat2"), "addmm"),
    (_product("batch1", "batch2"), "baddbmm"),
    (_attention, " ".join(f"_scaled_dot_product_{name}" for name in (
        "flash_attention_for_cpu", "flash_attention", "efficient_attention", "attention_math", "cudnn_attention",
        "fused_attention_overrideable", "attention_math_for_mps")) + " scaled_dot_product_attention"),
    (_convolution, "convolution"),
    (_pooled(1), "avg_pool1d max_pool1d"),
    (_pooled(2), "avg_pool2d max_pool2d_with_indices"),
    (_pooled(3), "avg_pool3d max_pool3d_with_indices"),
    (_adaptive(1), "adaptive_avg_pool1d adaptive_max_pool1d"),
    (_adaptive(2), "_adaptive_avg_pool2d adaptive_max_pool2d"),
    (_adaptive(3), "_adaptive_avg_pool3d adaptive_max_pool3d"),
    *((_upsampled(taps, n), f"upsample_{name}{n}d") for name, taps, axes in (
        ("nearest", 1, (1, 2, 3)), ("linear", 2, (1,)), ("bilinear", 2, (2,)), ("trilinear", 2, (3,)),
        ("bicubic", 4, (2,))) for n in axes),
    (_padded, "constant_pad_nd " + " ".join(f"{m}_pad{n}d" for m in ("reflection", "replication") for n in (1, 2, 3))),
    (_embedding, "embedding"),
    (_as_real, "view_as_real"),
    (_as_complex, "view_as_complex"),
)  # fmt: skip
RULES: dict[str, Rule] = {name: rule for rule, names in _GROUPS for name in names.split()}
# What is new: of the shape of its arguments, and of nothing they hold.
EMPTY = frozenset(
    (
        "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones",
        "new_empty", "new_full", "new_empty_strided", "empty_strided", "zero", "fill",
    )
)  # fmt: skip
