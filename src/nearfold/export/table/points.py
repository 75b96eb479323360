"""Places between positions in core ATen: the corners of each, and the share of every corner.

Shape legend: P samples and groups, B batch, M queries, H heads, S slots or points, a grid axes, E = 2^a corners.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from nearfold.export.table.slots import NAN, aggregate
from nearfold.kernels.corners_torch import Frame
from nearfold.kernels.sampled_torch import maps

FAR = 1 << 20  # beyond every grid; integers that large can be multiplied


def _corners(where: Sequence[Tensor], grid: Sequence[int], share: Tensor | None) -> tuple[Tensor, Tensor]:
    """Index and share (.., E) of the corners of places, given axis by axis (..); -1 and 0 outside, NaN for NaN."""
    lost = where[0].isnan()
    for at in where[1:]:
        lost = lost | at.isnan()
    below = [torch.where(lost, 0, at).floor() for at in where]
    beyond = [at - low for at, low in zip(where, below, strict=True)]
    lows = [low.clamp(-2, FAR).long() for low in below]
    rows, parts = [], []
    for corner in itertools.product((0, 1), repeat=len(grid)):
        there, flat, part = None, None, share
        for low, n, one, over in zip(lows, grid, corner, beyond, strict=True):
            at = low + one
            ok = (at >= 0) & (at < n)
            there = ok if there is None else there & ok
            flat = at if flat is None else flat * n + at
            piece = over if one else 1 - over
            part = piece if part is None else part * piece
        assert there is not None and flat is not None and part is not None
        rows.append(torch.where(there, flat, -1).masked_fill(lost, 0))
        parts.append(part.masked_fill(~there, 0).masked_fill(lost, NAN))
    return torch.stack(rows, -1), torch.stack(parts, -1)


def corners(
    offset: Tensor,
    mask: Tensor | None,
    grid: list[int],
    out: list[int],
    size: list[int],
    stride: list[int],
    dilation: list[int],
    before: list[int],
) -> tuple[Tensor, Tensor]:
    """`nearfold::corners`."""
    where_PSaM = Frame(grid, out, size, stride, dilation, before).starts(offset) + offset
    made = _corners([where_PSaM[:, :, axis] for axis in range(len(grid))], grid, mask)
    index, share = (t.transpose(2, 3).flatten(1, 2).contiguous().transpose(1, 2) for t in made)
    return share, index


def sampled(value: Tensor, place: Tensor, share: Tensor, grid: list[int]) -> Tensor:
    """`nearfold::sampled`."""
    axes = place.shape[-1]
    each = maps(grid, axes)
    points = place.shape[3] // len(each)
    first, rows, parts = 0, [], []
    for level, sizes in enumerate(each):
        here = slice(level * points, (level + 1) * points)
        at_BMHpa = place[:, :, :, here]
        index, part = _corners([at_BMHpa[..., axis] for axis in range(axes)], sizes, share[:, :, :, here])
        rows.append(torch.where(index < 0, index, index + first).flatten(3))
        parts.append(part.flatten(3))
        count = sizes[0]
        for n in sizes[1:]:
            count = count * n
        first = first + count
    index, part = torch.cat(rows, 3).transpose(2, 3), torch.cat(parts, 3).transpose(2, 3)
    return aggregate(value, index, part, None, 1)
