"""Unions of paths, and the paths that are mostly asked for in such company.

Shape legend: B batch, H heads, M outputs, N positions, S slots, o outputs of an axis, s slots of an axis.
"""

from __future__ import annotations

import dataclasses
import math
from typing import cast

import torch
from torch import Tensor

from nearfold._kept import kept
from nearfold._scrambled import scrambled
from nearfold.grammar import Basic
from nearfold.grammar.unions import Listed, alone
from nearfold.grammar.words import Axial, First, Path, Scattered, Union
from nearfold.kernels.names import INVALID
from nearfold.lower.call import Call, count_positions
from nearfold.lower.meaning import Lengths, meaning, means
from nearfold.lower.selection import Selection
from nearfold.lower.windows import AxesMeaning, TableMeaning, is_table, owns_slots


class ListedMeaning(TableMeaning):
    """A table of few positions, which answers at every one."""

    def home(self, op: Basic, grid: Lengths, device: torch.device) -> Tensor:
        return torch.arange(math.prod(grid), device=device)

    def fit(self, op: Basic, grid: Lengths, source: Lengths, drawing: bool) -> Basic:
        path = cast(Listed, op.path)
        n = min(path.n, math.prod(grid))
        return op if owns_slots(op) or n == path.n else dataclasses.replace(op, path=dataclasses.replace(path, n=n))


@means(First)
class FirstMeaning(ListedMeaning):
    """The first positions."""

    def index(self, op: Basic, grid: Lengths, device: torch.device, missing: int = 0) -> tuple[Tensor, Tensor]:
        N, n = math.prod(grid), cast(First, op.path).n
        at_MS = torch.arange(n, device=device).expand(N, n)
        valid_MS = at_MS < N
        if op.shape.causal:
            valid_MS = valid_MS & (at_MS <= torch.arange(N, device=device)[:, None])
        return at_MS.masked_fill(~valid_MS, missing), valid_MS


@means(Scattered)
class ScatteredMeaning(ListedMeaning):
    """Positions drawn for every query, no two of them equal."""

    def index(self, op: Basic, grid: Lengths, device: torch.device, missing: int = 0) -> tuple[Tensor, Tensor]:
        path, N = cast(Scattered, op.path), math.prod(grid)
        at_M = torch.arange(N, device=device)
        among_M = at_M + 1 if op.shape.causal else torch.full_like(at_M, N)
        stream_M = scrambled(at_M ^ scrambled(torch.full_like(at_M, path.seed)))
        chosen: list[Tensor] = []
        for slot in range(path.n):  # Floyd's sample: the last of a growing range wherever the draw was there already
            last_M = among_M - path.n + slot
            drawn_M = scrambled(stream_M ^ scrambled(torch.full_like(at_M, slot + 1))) % (last_M + 1).clamp(min=1)
            twice_M = torch.zeros_like(at_M, dtype=torch.bool)
            for other_M in chosen:
                twice_M = twice_M | (other_M == drawn_M)
            chosen.append(torch.where(last_M < 0, N, torch.where(twice_M, last_M, drawn_M)))
        at_MS = torch.stack(chosen, -1).sort(-1).values
        valid_MS = at_MS < N
        return at_MS.masked_fill(~valid_MS, missing), valid_MS


@means(Axial)
class AxialMeaning(AxesMeaning):
    """A line of the grid."""

    pieces = True

    def output(self, op: Basic, grid: Lengths) -> Lengths:
        axis = cast(Axial, op.path).axis
        if axis >= len(grid):
            raise ValueError(f"{op}: axis={axis} is beyond the input's {len(grid)} grid axes, counted from 0")
        return grid

    def axis(self, op: Basic, grid: Lengths, axis: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        home_o = torch.arange(grid[axis], device=device)
        if axis != cast(Axial, op.path).axis:
            return home_o[:, None], torch.ones_like(home_o, dtype=torch.bool)[:, None], home_o
        at_os = home_o.expand(grid[axis], grid[axis])
        return at_os, at_os <= home_o[:, None] if op.shape.causal else torch.ones_like(at_os, dtype=torch.bool), home_o


@means(Union)
class UnionMeaning(TableMeaning):
    """The slots of several paths; one that reads what an earlier path reads is not valid."""

    def is_table(self, path: Path) -> bool:
        return all(is_table(part) for part in path.inside)

    def output(self, op: Basic, grid: Lengths) -> Lengths:
        found = {part.path: meaning(part.path).output(part, grid) for part in alone(op)}
        first, *others = found.values()
        if any(out != first for out in others):
            said = ", ".join(f"{path}: {'x'.join(map(str, out))}" for path, out in found.items())
            raise ValueError(f"{op}: its paths answer on different output grids, {said}")
        return first

    def fit(self, op: Basic, grid: Lengths, source: Lengths, drawing: bool) -> Basic:
        if owns_slots(op):
            return op
        parts = alone(op)
        fitted = tuple(meaning(part.path).fit(part, grid, source, drawing) for part in parts)
        if all(fit is part for fit, part in zip(fitted, parts, strict=True)):
            return op
        return dataclasses.replace(op, path=Union(tuple(fit.path for fit in fitted)))

    def unfilled(self, op: Basic, grid: Lengths, context: Lengths | None) -> str | None:
        notes = (meaning(part.path).unfilled(part, grid, context) for part in alone(op))
        return next((note for note in notes if note is not None), None)

    def takes_mask(self, op: Basic) -> bool:
        return all(meaning(part.path).takes_mask(part) for part in alone(op))

    def home(self, op: Basic, grid: Lengths, device: torch.device) -> Tensor:
        part = next(part for part in alone(op) if is_table(part.path))
        return meaning(part.path).home(part, grid, device)

    def own(self, call: Call) -> Tensor:
        return meaning(call.op.path.inside[0]).own(on(call, alone(call.op)[0]))

    def index(self, op: Basic, grid: Lengths, device: torch.device, missing: int = 0) -> tuple[Tensor, Tensor]:
        index_MS = _table(op, grid, device)
        valid_MS = index_MS >= 0
        return index_MS if missing == INVALID else index_MS.masked_fill(~valid_MS, missing), valid_MS

    def select(self, call: Call) -> Selection:
        if self.is_table(call.op.path):
            return super().select(call)
        found = [meaning(part.path).select(on(call, part)) for part in alone(call.op)]
        B, H = call.value.shape[0], max(one.index.shape[1] for one in found)
        scores = [one.score for one in found if one.score is not None]
        score = None
        if scores:
            H = max(H, *(s.shape[1] for s in scores))
            each = [scores[0].new_zeros(one.index.shape) if one.score is None else one.score for one in found]
            score = torch.cat([s.expand(B, H, -1, -1) for s in each], -1)
        index, valid = together(
            [one.index.expand(B, H, -1, -1) for one in found], [one.valid.expand(B, H, -1, -1) for one in found]
        )
        if score is not None:
            lost = score.isnan()  # the mark of a query that was NaN stays
            score = score.masked_fill(~valid & ~lost, float("-inf"))
        return Selection(index, valid, score, count_positions(call.padded))


def _made(op: Basic, grid: Lengths, device: torch.device) -> Tensor:
    """Raster positions (M, S) that the slots of tables read, -1 where they read none."""
    places = [meaning(part.path).index(part, grid, device, INVALID)[0] for part in alone(op)]
    return torch.cat(places, -1).masked_fill(repeated(places), INVALID)


_table = kept(_made, most=2**22, tables=8)  # to sort one takes longer than to read by it: 256 MiB at most


def on(call: Call, part: Basic) -> Call:
    """The call of one path of a union, with the same query, key and value."""
    return dataclasses.replace(call, at=dataclasses.replace(call.at, op=part))


def together(index: list[Tensor], valid: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Indices and validity (..., M, S) of several paths, one after the other; a position is valid where it is first."""
    places = [at.masked_fill(~there, INVALID) for at, there in zip(index, valid, strict=True)]
    at = torch.cat(places, -1)
    all_valid = (at >= 0) & ~repeated(places)
    return at.masked_fill(~all_valid, 0), all_valid


def repeated(places: list[Tensor]) -> Tensor:
    """Which slots (..., M, S) of several paths, one after the other, read what an earlier path reads; -1 is nothing."""
    found, known = [torch.zeros_like(places[0], dtype=torch.bool)], places[0]
    for more in places[1:]:
        ordered = known.sort(-1).values.contiguous()
        at = torch.searchsorted(ordered, more.contiguous()).clamp(max=ordered.shape[-1] - 1)
        found.append((ordered.gather(-1, at) == more) & (more >= 0))
        known = torch.cat([known, more], -1)
    return torch.cat(found, -1)
