"""Receptive fields: what an operation of the grammar makes of the places of its input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nearfold.grammar import Basic, Branch, Operation
from nearfold.grammar.complexity import features_share
from nearfold.grammar.word import as_tuple, with_arguments
from nearfold.lower.meaning import meaning
from nearfold.lower.windows import AxesMeaning, axis_reads
from nearfold.recognise.place import Place, compress, join, least, most, over, settled, unknown, window


def through(place: Place, op: Operation, before: Sequence[int], after: Sequence[int], axis: int) -> Place:
    """The places behind an operation; channels and positions are still to be numbered.

    Args:
        place: of its input.
        op: the operation.
        before: shape of its input.
        after: shape of its output.
        axis: of the channels.

    >>> from nearfold import parse
    >>> from nearfold.recognise.place import begin, text
    >>> place = through(begin((1, 1, 9), 1), parse("window(3, stride=2) | box | kernel"), (1, 1, 9), (1, 1, 5), 1)
    >>> text(place, 1), text(through(place, parse("window(3) | box | kernel"), (1, 1, 5), (1, 1, 5), 1), 1)
    ('3', '7')
    """
    if not isinstance(op, Basic):
        if isinstance(op, Branch):  # which channels go where is not followed
            place = channels(place, axis % len(before), before, 1, after)
        return join([through(place, operand, before, after, axis) for operand in op.present], len(after))
    if _everywhere(op) or place.everywhere:
        return anywhere(place, len(after))
    if op.path.searches or op.path.dynamic:
        moved = op.path.dynamic or features_share(op.path.similarity) > 0
        kind = "any" if moved and place.kind != "?" else "?" if not moved else place.kind
        return replace(anywhere(place, len(after)), kind="any" if moved else kind)
    if not isinstance(meaning(op.path), AxesMeaning) or len(before) != len(after):
        return unknown(place, after)
    return _windows(place, op, before, after, axis % len(before))


def _everywhere(op: Basic) -> bool:
    """Whether an output depends on every position: by the path, by a kernel made of the map, or by a score's scale."""
    similarity = op.path.similarity
    scaled = op.weight.rho.needs_score and similarity.uses_features and not similarity.takes_keys
    return meaning(op.path).everywhere or meaning(op.weight.kernel).of_the_map or scaled


def anywhere(place: Place, dims: int) -> Place:
    """Behind something that looks at every position: what any of them depends on."""
    found = place.bounds(lambda t: t.amin().view([1] * dims), lambda t: t.amax().view([1] * dims))
    kind = "extent" if place.kind == "any" else place.kind
    return settled(replace(found, kind=kind), always=True)


def _windows(place: Place, op: Basic, before: Sequence[int], after: Sequence[int], axis: int) -> Place:
    if meaning(op.path).pieces and len(before) == 3 and len(op.path.slot_shape(2)) == 2:
        return replace(over(place, (1, 2)), exact=False)  # blocks that were cut before, and folded into the batch
    kernel = meaning(op.weight.kernel)
    alone = meaning(op.weight.rho).apart and not (kernel.maps_channels or kernel.reads_features)
    place = channels(place, axis, before, before[axis] if alone and not op.weight.projections else 1, after)
    dims = [d for d in range(1, len(before)) if d != axis]
    if getattr(op.path, "mode", "") == "reflect":
        op = replace(op, path=with_arguments(op.path, mode="zeros"))
    grid = tuple(before[d] for d in dims)
    try:
        stride = as_tuple(getattr(op.path, "stride", 1), len(dims), "stride")
        reads = [axis_reads(op, grid, a, torch.device("cpu"))[0] for a in range(len(dims))]
    except (ValueError, IndexError):  # other axes than the map has
        return unknown(place, after)
    for a, dim in enumerate(dims):
        if len(reads[a]) != after[dim]:
            return unknown(place, after)
        place = window(place, before[dim], dim, reads[a], a if len(dims) == len(place.grid) else None, stride[a])
    return place


def channels(place: Place, axis: int, before: Sequence[int], groups: int, after: Sequence[int]) -> Place:
    """What a map of channels makes of places: every output sees the inputs of its group."""
    count, out = before[axis], after[axis]
    if groups == 1 or out % groups or count % groups:
        return over(place, (axis,))

    def grouped(t: Tensor, pick: object) -> Tensor:
        if t.shape[axis] == 1:
            return t
        within = t.unflatten(axis, (groups, count // groups))
        one = pick(within, (axis + 1,)).squeeze(axis + 1)  # type: ignore[operator]
        return compress(one.repeat_interleave(out // groups, axis))

    found = place.bounds(lambda t: grouped(t, least), lambda t: grouped(t, most))
    return replace(found, position=least(place.position, (axis,)), channel=least(place.channel, (axis,)))
