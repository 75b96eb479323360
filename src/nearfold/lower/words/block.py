"""`block`: the block of the grid that holds the query, the same for all of its positions.

Shape legend: o outputs of an axis, s slots of an axis.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
from torch import Tensor

from nearfold._numbers import parts
from nearfold.grammar import Basic
from nearfold.grammar.word import as_tuple
from nearfold.grammar.words import Block
from nearfold.lower.meaning import Lengths, means
from nearfold.lower.windows import AxesMeaning, owns_slots


def block_shift(path: Block, grid: Lengths) -> Lengths:
    """By how much blocks are shifted along each axis: not at all where one of them covers the grid.

    >>> from nearfold import parse
    >>> block_shift(parse("block(7, shift=3) | box | softmax").path, (7, 9))
    (0, 3)
    """
    size, shift = (as_tuple(n, len(grid), name) for n, name in ((path.size, "size"), (path.shift, "shift")))
    return tuple(s if n > length else 0 for n, length, s in zip(grid, size, shift, strict=True))


@means(Block)
class BlockMeaning(AxesMeaning):
    """Blocks of the grid."""

    pieces = True

    def fill(self, op: Basic, grid: Lengths) -> Lengths:
        path = cast(Block, op.path)
        if not path.padded:
            return (0,) * len(grid)
        return tuple(-n % size for n, size in zip(grid, as_tuple(path.size, len(grid), "size"), strict=True))

    def fit(self, op: Basic, grid: Lengths, source: Lengths, drawing: bool) -> Basic:
        path, ndim = cast(Block, op.path), len(grid)
        if owns_slots(op) or path.padded:
            return op
        sizes, shifts = as_tuple(path.size, ndim, "size"), as_tuple(path.shift, ndim, "shift")
        size = tuple(map(min, sizes, grid))
        shift = tuple(0 if n < m else s for n, m, s in zip(size, sizes, shifts, strict=True))
        return op if size == sizes else dataclasses.replace(op, path=dataclasses.replace(path, size=size, shift=shift))

    def steps(self, op: Basic, grid: Lengths) -> Lengths:
        path = cast(Block, op.path)
        if not path.spread:
            return (1,) * len(grid)
        return tuple(parts(n, size) for n, size in zip(grid, as_tuple(path.size, len(grid), "size"), strict=True))

    def axis(self, op: Basic, grid: Lengths, axis: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        path, n = cast(Block, op.path), grid[axis]
        size, shift = as_tuple(path.size, len(grid), "size")[axis], block_shift(path, grid)[axis]
        home_o = torch.arange(n, device=device)
        if path.spread:
            step = self.steps(op, grid)[axis]
            at_os = (home_o % step)[:, None] + torch.arange(size, device=device) * step
            return at_os, at_os < n, home_o
        # blocks end at shift, shift + size, ...
        start_o = torch.div(home_o - shift, size, rounding_mode="floor") * size + shift
        halo = as_tuple(path.halo, len(grid), "halo")[axis]
        at_os = start_o[:, None] + torch.arange(-halo, size + halo, device=device)
        return at_os, (at_os >= 0) & (at_os < n), home_o
