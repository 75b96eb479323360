"""Operators that act entry by entry."""

from __future__ import annotations

from dataclasses import replace

from nearfold.recognise.operators.call import Call, Unfollowed, tensors
from nearfold.recognise.place import Place, apart, join, number

UNTAGGED = frozenset(("hardswish", "hardsigmoid", "log_sigmoid_forward", "_prelu_kernel", "prelu", "rrelu_with_noise",
                      "softplus", "softshrink", "hardshrink", "threshold", "mish", "polar"))  # fmt: skip
ZEROING = frozenset(("mul", "div", "where", "masked_fill", "minimum", "maximum", "pow", "bitwise_and", "logical_and"))


def pointwise(call: Call) -> Place:
    """Each entry of those at its own place; a constant that may be zero there masks."""
    given = tensors(call.given)
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


def same(call: Call) -> Place:
    """What it is given."""
    return join([p for t in tensors(call.given) if (p := call.place(t)) is not None], call.made[0].dim())


def copied(call: Call) -> Place:
    """x.copy_(y): y alone, laid over x."""
    source = call.place(call.tensor("src"))
    if source is None:
        raise Unfollowed
    return source.each(lambda t: t[(None,) * (call.made[0].dim() - t.dim())])


def embedding(call: Call) -> Place:
    """A row of a table for every index."""
    call.only("indices")
    place = call.main("indices").each(lambda t: t[..., None])
    return replace(place, channel=number(call.made[0].shape, (-1,)))
