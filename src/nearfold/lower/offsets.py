"""Slots of a kernel as long as the map: slot o of output i reads position i - o.

Shape legend: B batch, H heads, M outputs, N positions, S slots, a grid axes.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from nearfold.grammar import Basic
from nearfold.grammar.place import Place
from nearfold.lower.call import Call
from nearfold.lower.selection import Selection

Ranges = tuple[tuple[int, int], ...]


def offsets(op: Basic, grid: tuple[int, ...]) -> Ranges:
    """First and last offset of every slot axis: one axis in raster order where the shape is causal."""
    if op.shape.causal:
        return ((0, math.prod(grid) - 1),)
    return tuple((0 if op.weight.kernel.circular else 1 - n, n - 1) for n in grid)  # type: ignore[union-attr]


def reads(op: Basic, grid: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Raster positions (M, S) that the slots read, 0 where they read none, and which read one."""
    lines = (math.prod(grid),) if op.shape.causal else grid
    place_Ma = Place(lines, device, torch.float32).index()
    axes = [torch.arange(first, last + 1, device=device) for first, last in offsets(op, grid)]
    offset_Sa = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(lines))
    at_MSa = place_Ma[:, None] - offset_Sa
    size_a = torch.tensor(lines, device=device)
    if op.weight.kernel.circular:  # type: ignore[union-attr]
        at_MSa = at_MSa % size_a
    valid_MS = ((at_MSa >= 0) & (at_MSa < size_a)).all(-1)
    step = [1, *itertools.accumulate(lines[:0:-1], lambda a, b: a * b)][::-1]
    index_MS = (at_MSa * torch.tensor(step, device=device)).sum(-1)
    return index_MS.masked_fill(~valid_MS, 0), valid_MS


def by_offset(call: Call, whole: Selection) -> Selection:
    """The selection of path `all` in the order of the offsets; ``whole`` has it in that of the positions."""
    index_MS, valid_MS = reads(call.op, call.grid, call.value.device)
    index, valid, score = index_MS[None, None], valid_MS[None, None], whole.score
    if score is not None:
        score = score.gather(-1, index.expand(*score.shape[:2], *index_MS.shape))
        score = torch.where(score.isnan() | valid, score, float("-inf"))
    return Selection(index, valid, score, whole.positions)
