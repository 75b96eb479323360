"""Operators that sum products: of matrices, and attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from nearfold.recognise.operators.call import Call
from nearfold.recognise.operators.entries import pointwise
from nearfold.recognise.place import Place, apart, join, least, number, over, settled, stage, unknown, varies


def product(first: str, second: str) -> Callable[[Call], Place]:
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
            return pointwise(call)
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


def attention(call: Call) -> list[Place]:
    """Every query depends on itself and on all keys and values."""
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
