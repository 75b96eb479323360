"""An operation on a grid: all that follows from sizes, made at the first call on them and kept.

Shape legend: M outputs, N positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nearfold._kept import once
from nearfold.grammar import Basic
from nearfold.grammar.word import as_tuple
from nearfold.lower.meaning import meaning

Source = tuple[int, ...] | tuple[tuple[int, ...], ...]
"""The grid of a second input, or those of several maps; () where there is none."""


@dataclass(frozen=True)
class Frame:
    """One `Basic` operation on one grid.

    Attributes:
        op: the operation, without slots that no position of the map can fill.
        grid: the grid of queries, filled to whole blocks.
        source: the grid of keys and values where that is another one (`cross`), or ().
        inner: the input's own grid where `grid` was filled, or ().
        added: zero inputs before and after every axis, last axis first, as F.pad takes them; () for none.
        heads: groups of channels that look on their own.
        padding: zero inputs that `nearest` adds on every side.
        padded: the grid that values and keys live on (and queries, but for `cross`).
        stride: output stride per axis.
        out_grid: the output grid.
        features: whether query and key are read.
        maps: the grids of several maps that are read, one after another, on `padded`'s one axis; () for one map.
        same: whether key and query are the same tensor.
        kv: heads of key and value where they are fewer than the queries'.
    """

    op: Basic
    grid: tuple[int, ...]
    source: tuple[int, ...]
    inner: tuple[int, ...]
    added: tuple[int, ...]
    heads: int
    padding: int
    padded: tuple[int, ...]
    stride: tuple[int, ...]
    out_grid: tuple[int, ...]
    features: bool
    maps: tuple[tuple[int, ...], ...]
    same: bool
    kv: int | None


def _reads_features(op: Basic) -> bool:
    """Whether query and key matter: some scores are computed from features, or maps of them are shifted."""
    if meaning(op.weight.kernel).reads_features:
        return True
    compares = op.path.searches or op.weight.rho.needs_score
    return compares and any(near.uses_features for near in op.path.compared_by)


@once
def frame(op: Basic, grid: tuple[int, ...], source: Source, drawing: bool) -> Frame:
    """The frame of an operation; ``source``: a second input's grids, or (); ``drawing``: candidates are drawn."""
    path, rho = meaning(op.path), meaning(op.weight.rho)
    border, fill = path.border(op), path.fill(op, grid)
    inner: tuple[int, ...] = ()
    added: tuple[int, ...] = ()
    if border or any(fill):
        added = tuple(n for end in fill[::-1] for n in (border, border + end))
    if added and not border:
        inner, grid = grid, tuple(n + end for n, end in zip(grid, fill, strict=True))
    maps: tuple[tuple[int, ...], ...] = ()
    if source and isinstance(source[0], tuple):
        maps = source
        source = (sum(map(math.prod, maps)),)
    padded: tuple[int, ...] = source or tuple(n + 2 * border for n in grid)  # type: ignore[assignment]
    stride = as_tuple(getattr(op.path, "stride", 1), len(grid), "stride")
    # a graph holds for other sizes, too
    own = op if torch.compiler.is_compiling() else path.fit(op, grid, padded, drawing)
    return Frame(
        op=own,
        grid=grid,
        source=source,  # type: ignore[arg-type]
        inner=inner,
        added=added,
        heads=op.heads,
        padding=border,
        padded=padded,
        stride=stride,
        out_grid=rho.output(own, grid, path.output(own, grid)),
        features=_reads_features(op),
        maps=maps,
        same=not {"q", "k"} & set(op.weight.projections) and not op.cross,
        kv=op.weight.rho.kv,
    )
