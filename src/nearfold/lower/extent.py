"""What is there: an operation costs what its map holds, not what was asked for.

Slots that no position of the map can fill add nothing. They are left out before anything is computed, and with them the
numbers of a kernel or of a table of offsets that nobody would read. Nothing else changes. Which they are says the path,
`PathMeaning.fit`.
"""

from __future__ import annotations

from torch import Tensor

from nearfold._kept import once
from nearfold.grammar import Basic, Operation
from nearfold.lower.meaning import meaning
from nearfold.lower.parameters import bias_reach


def narrowed(op: Basic, fitted: Basic, params: dict[str, Tensor], ndim: int) -> dict[str, Tensor]:
    """The parameters of an operation without what `PathMeaning.fit` left out of it."""
    if fitted is op:
        return params
    params = meaning(op.path).narrow(fitted, params)
    if "relative_bias" in params and op.path.similarity.bias == "table":
        table = params["relative_bias"]
        for axis, (had, has) in enumerate(zip(bias_reach(op, ndim), bias_reach(fitted, ndim), strict=True)):
            table = table.narrow(1 + axis, had - has, 2 * has - 1)
        params = params | {"relative_bias": table}
    return params


@once
def unfilled(op: Operation, grid: tuple[int, ...], context: tuple[int, ...] | None = None) -> list[str]:
    """One sentence for every `nearest` that asks for more slots than there are positions to fill them.

    >>> from nearfold import parse
    >>> unfilled(parse("nearest(9, dot) | ranked | softmax"), (2, 3))
    ['nearest(9, dot): k=9, but only 6 slots can be filled on a grid of 2 x 3; the others read nothing']
    """
    found = (meaning(part.path).unfilled(part, grid, context) for part in op.parts)
    return list(dict.fromkeys(note for note in found if note is not None))
