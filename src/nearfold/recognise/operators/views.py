"""Operators that move entries: views, indices, what is laid side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from nearfold.recognise.operators.call import Call, Unfollowed, tensors
from nearfold.recognise.place import ALL, SHIFT, Place, compress, join, number, over, stage, varies


def moved(place: Place, shape: Sequence[int], change: Callable[[Tensor], Any]) -> list[Place]:
    """The same rearrangement of every tensor of a place."""
    columns = [
        [compress(t) for t in tensors(change(t.expand(tuple(shape))))]
        for t in (place.channel, place.position, *place.low, *place.high)
    ]
    axes = len(place.low)
    return [
        replace(place, channel=c, position=p, low=tuple(rest[:axes]), high=tuple(rest[axes:]))
        for c, p, *rest in zip(*columns, strict=True)
    ]


def viewed(call: Call) -> list[Place]:
    """The same entries in another order or shape."""
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

    return moved(place, t.shape, change)


def moving(call: Call) -> list[Place]:
    """As a view; what it moves along an axis of positions counts as mixing."""
    (name, _), *_ = [(n, t) for n, t in call.given.items() if isinstance(t, Tensor)]
    position = call.main(name).position
    found = viewed(call)
    call.mixes = any(f.position.shape != position.shape or bool((f.position != position).any()) for f in found)
    return found


def sliced(call: Call) -> list[Place]:
    """Some entries along an axis; a step of more than one counts as mixing."""
    found = viewed(call)
    dim = call.given["dim"] % call.tensor("self").dim()
    call.mixes = call.given["step"] > 1 and call.made[0].shape[dim] > 1 and varies(call.main("self").position, (dim,))
    return found


def indexed(call: Call) -> list[Place]:
    """Picked by indices: those that are known are followed, those that come from the input decide by it."""
    source = "self" if "self" in call.given else next(iter(call.given))
    indices = [t for name, value in call.given.items() if name != source for t in tensors(value)]
    if any(call.place(t) is not None or t.device.type == "meta" for t in indices):
        return [_picked(call, source)]
    t, place = call.tensor(source), call.main(source)
    others = tree_map(lambda v: v.cpu() if isinstance(v, Tensor) else v, {n: v for n, v in call.given.items()
                                                                         if n != source})  # fmt: skip
    found = moved(place, t.shape, lambda label: call.func(label, **others))
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


def joined(call: Call) -> list[Place]:
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


def as_real(call: Call) -> Place:
    """A complex number as two real ones along a new last axis."""
    return call.main("self").each(lambda t: t[..., None])
