"""Receptive fields: how much of the model's input one position of a layer can depend on, per axis."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nearfold.grammar import Basic, Branch, Operation, Sum
from nearfold.grammar.complexity import features_share
from nearfold.grammar.words import Block, Deformable, Nearest, Size, Window

# what a field can be, the later the wider: known extents; not known; wherever the data says; everywhere
KINDS = ("extent", "?", "any", "all")


@dataclass(frozen=True)
class Field:
    """What one position depends on.

    Attributes:
        kind: one of `KINDS`.
        extent: positions of the model's input, per axis (kind extent).
        reach: how far from the position they may lie, both sides together. A block does not lie around its position,
            so that its reach is larger than its extent.
        jump: distance of two neighbouring positions in the model's input.
        exact: False where the extents are a bound.
    """

    kind: str
    extent: tuple[int, ...]
    reach: tuple[int, ...]
    jump: tuple[int, ...]
    exact: bool = True

    def __str__(self) -> str:
        if self.kind != "extent":
            return self.kind
        text = str(self.extent[0]) if len(set(self.extent)) == 1 else "x".join(map(str, self.extent))
        return text if self.exact else f"<={text}"


def start(ndim: int) -> Field:
    """A position of the input itself.

    >>> str(start(2))
    '1'
    """
    return Field("extent", (1,) * ndim, (0,) * ndim, (1,) * ndim)


def join(*fields: Field) -> Field:
    """Of a value made of several, such as the two sides of a residual connection: the widest."""
    kind = max((f.kind for f in fields), key=KINDS.index)
    if len({len(f.extent) for f in fields}) > 1:
        return replace(fields[0], kind=max(kind, "?", key=KINDS.index))
    extent, reach, jump = (
        tuple(map(max, zip(*axes, strict=True)))
        for axes in zip(*((f.extent, f.reach, f.jump) for f in fields), strict=True)
    )
    return Field(kind, extent, reach, jump, all(f.exact for f in fields))


def bounded(field: Field, grid: tuple[int, ...]) -> Field:
    """A bound that is no larger than the model's input; what is exact stays, as is usual."""
    if field.exact or len(grid) != len(field.extent):
        return field
    return replace(field, extent=tuple(map(min, zip(field.extent, grid, strict=True))))


def through(field: Field, op: Operation) -> Field:
    """The field behind an operation.

    >>> from nearfold import parse
    >>> strided = through(start(2), parse("window(3, stride=2) | box | kernel"))
    >>> print(through(strided, parse("window(3) | box | kernel")), through(strided, parse("all | row | softmax")))
    7 all
    """
    if isinstance(op, Sum):
        return join(*(through(field, term) for _, term in op.terms))
    if isinstance(op, Branch):
        return join(*(through(field, o) for o, share in ((op.first, op.ratio), (op.second, 1 - op.ratio)) if share))
    assert isinstance(op, Basic)
    path = op.path
    if isinstance(path, Nearest | Deformable):
        moved = isinstance(path, Deformable) or features_share(path.similarity) > 0
        return replace(field, kind=max(field.kind, "any" if moved else "?", key=KINDS.index))
    if not isinstance(path, Window | Block):
        return replace(field, kind="all")
    axes = len(field.extent)
    if any(isinstance(n, tuple) and len(n) != axes for n in vars(path).values()):
        return replace(field, kind=max(field.kind, "?", key=KINDS.index))  # other axes than the model's input
    size = _per_axis(path.size, axes)
    each = range(axes)
    if isinstance(path, Block):
        grown = [(size[a] - 1) * field.jump[a] for a in each]
        extent = tuple(grown[a] + field.reach[a] + 1 for a in each)
        reach = tuple(field.reach[a] + 2 * grown[a] for a in each)
        exact = field.exact and extent == tuple(g + e for g, e in zip(grown, field.extent, strict=True))
        return replace(field, extent=extent, reach=reach, exact=exact)
    dilation, stride = _per_axis(path.dilation, axes), _per_axis(path.stride, axes)
    step = _per_axis(path.step, axes)  # queries that share a window: it does not lie around each of them
    grown = [(size[a] - 1) * dilation[a] * field.jump[a] for a in each]
    shared = [(step[a] - 1) * field.jump[a] for a in each]
    return replace(
        field,
        extent=tuple(field.extent[a] + grown[a] for a in each),
        reach=tuple(field.reach[a] + grown[a] + shared[a] for a in each),
        jump=tuple(field.jump[a] * stride[a] for a in each),
    )


def _per_axis(value: Size, axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else value
