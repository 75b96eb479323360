"""Operators along whole axes: reductions, softmaxes, norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nearfold.recognise.field import channels
from nearfold.recognise.operators.call import Call
from nearfold.recognise.operators.entries import pointwise
from nearfold.recognise.operators.views import moved
from nearfold.recognise.place import Place, apart, join, number, over, settled, stage, unknown, varies


def _dims(call: Call, name: str, dims: int) -> list[int]:
    given = call.given.get(name)
    given = [given] if isinstance(given, int) else given
    return [d % dims for d in given] if given else list(range(dims))


def reduced(call: Call) -> Place:
    """A mean, a sum, a maximum: one entry of all along some axes."""
    if call.given.get("other") is not None:  # the larger of two tensors
        return pointwise(call)
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


def along(call: Call) -> Place:
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


def glu(call: Call) -> Place:
    """Half of the channels gates the other half."""
    t, place = call.tensor("self"), call.main("self")
    dim = call.given["dim"] % t.dim()
    halves = moved(place, t.shape, lambda label: label.chunk(2, dim))
    call.mixes = apart(halves[0].position, halves[1].position)
    return join(halves, t.dim())


def normed(dims: Callable[[Call, Tensor], Sequence[int]]) -> Callable[[Call], Place | list[Place]]:
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


def layer_axes(call: Call, t: Tensor) -> Sequence[int]:
    """The axes of a layer norm."""
    return range(t.dim() - len(call.given["normalized_shape"]), t.dim())


def batch_axes(call: Call, t: Tensor) -> Sequence[int]:
    """The axes of a batch norm: none where it has statistics of its own."""
    return [d for d in range(t.dim()) if d != 1] if call.given.get("training") else ()


def group_norm(call: Call) -> Place | list[Place]:
    """Statistics over the grid and a group of channels."""
    t, place, groups = call.tensor("input"), call.main("input"), call.given["group"]
    grid = range(2, t.dim())
    call.mixes = varies(place.position, grid)
    found = settled(over(place, grid)) if call.mixes else place
    found = channels(found, 1, t.shape, groups, t.shape)
    main = replace(found, channel=place.channel, position=place.position)
    return [main, *(unknown(place, s.shape) for s in call.made[1:])]


def as_complex(call: Call) -> Place:
    """Two real numbers along the last axis are one complex number."""
    t, place = call.tensor("self"), call.main("self")
    call.mixes = varies(place.position, (t.dim() - 1,))
    return over(place, (t.dim() - 1,)).each(lambda label: label[..., 0])
