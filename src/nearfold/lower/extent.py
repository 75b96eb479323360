"""What is there: an operation costs what its map holds, not what was asked for.

Slots that no position of the map can fill add nothing. They are left out before anything is computed, and with them the
numbers of a kernel or of a table of offsets that nobody would read. Nothing else changes.
"""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from nearfold._kept import once
from nearfold.grammar import Basic, Operation
from nearfold.grammar.words import All, AllCandidates, Block, Generated, Grid, Nearby, Nearest, Random, Strided, Window
from nearfold.lower.geometry import causal_axes, padding_of
from nearfold.lower.parameters import as_tuple, bias_reach


def _fillable(path: Nearest, grid: tuple[int, ...], source: tuple[int, ...], drawing: bool) -> int:
    """How many slots of `nearest` can be filled on this grid; ``source`` is where the keys are, its border included."""
    candidates, own = path.candidates, path.include_self is not False
    keys = math.prod(source)
    if isinstance(candidates, Random) and drawing:
        keys = min(keys, candidates.r)
    if isinstance(candidates, Grid) and (candidates.inset or any(candidates.r < n for n in grid)):  # not all of them
        keys = math.prod(min(candidates.r, n - 2 * min(candidates.inset, (n - 1) // 2)) for n in grid)
    if isinstance(candidates, Nearby):
        keys = math.prod(min(candidates.size, n) for n in source)
    # among all positions the own one, which has a slot, is taken out of the search
    return keys + int(own) - int(own and path.again is None and isinstance(candidates, AllCandidates))


def _axis(op: Basic, grid: tuple[int, ...], axis: int) -> int:
    """Slots of a window on one axis that some query can fill."""
    path, n = op.path, grid[axis]
    assert isinstance(path, Window)
    size = as_tuple(path.size, len(grid), "size")[axis]
    dilation = as_tuple(path.dilation, len(grid), "dilation")[axis]
    steps = (n - 1) // dilation  # from one end of the map to the other
    if path.mode == "inside" or axis in causal_axes(op, len(grid)):
        return min(size, steps + 1)
    # as many on both sides of the query; even sizes stay even, for their slots lie between
    return min(size, 2 * steps + 1 if size % 2 else 2 * steps + 4)


def fit(op: Basic, grid: tuple[int, ...], source: tuple[int, ...], drawing: bool) -> Basic:
    """The operation with no more slots than the map can fill; itself where it has no more.

    ``source`` is the grid of keys and values, a border included; ``drawing``: random candidates are drawn.
    """
    path, ndim = op.path, len(grid)
    if isinstance(path, Nearest):
        k = min(path.k, _fillable(path, grid, source, drawing))
        return op if k == path.k else dataclasses.replace(op, path=dataclasses.replace(path, k=k))
    if isinstance(path, All) and isinstance(op.shape, Strided):
        step = min(op.shape.step, math.prod(source))
        return op if step == op.shape.step else dataclasses.replace(op, shape=Strided(step))
    if op.weight.kernel is not None or isinstance(op.weight.rho, Generated):
        return op  # a kernel on the map costs as much as its numbers do
    if isinstance(path, Window) and path.mode != "reflect" and path.padding == "same":
        size = tuple(_axis(op, grid, axis) for axis in range(ndim))
        same = size == as_tuple(path.size, ndim, "size")
        return op if same else dataclasses.replace(op, path=dataclasses.replace(path, size=size))
    if isinstance(path, Block) and not getattr(path, "padded", False):
        sizes, shifts = as_tuple(path.size, ndim, "size"), as_tuple(path.shift, ndim, "shift")
        size = tuple(map(min, sizes, grid))
        shift = tuple(0 if n < m else s for n, m, s in zip(size, sizes, shifts, strict=True))
        return op if size == sizes else dataclasses.replace(op, path=dataclasses.replace(path, size=size, shift=shift))
    return op


def narrowed(op: Basic, fitted: Basic, params: dict[str, Tensor], ndim: int) -> dict[str, Tensor]:
    """The parameters of an operation without what `fit` left out of it."""
    if fitted is op:
        return params
    if isinstance(fitted.path, Nearest) and "weight" in params:
        params = params | {"weight": params["weight"][..., : fitted.path.k]}  # slots are filled from the first on
    if "relative_bias" in params:
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
    found = []
    for part in op.parts:
        if not isinstance(part.path, Nearest) or (part.cross and context is None):
            continue
        border = padding_of(part)
        source = context if part.cross and context is not None else tuple(n + 2 * border for n in grid)
        can = _fillable(part.path, grid, source, drawing=False)
        if 0 < can < part.path.k:
            where = " x ".join(map(str, context if part.cross and context is not None else grid))
            found.append(
                f"{part.path}: k={part.path.k}, but only {can} slots can be filled on a grid of {where}; the others "
                "read nothing"
            )
    return list(dict.fromkeys(found))
