"""`nearfold::sampled` in PyTorch: the corners of every point, then a weighted sum over rows.

Shape legend: B batch, M queries, H heads, S points of a query and head, a grid axes, E = 2^a corners, L maps.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def maps(grid: list[int], axes: int) -> list[list[int]]:
    """The positions of every map, axis by axis, of the numbers that the operator takes."""
    return [grid[at : at + axes] for at in range(0, len(grid), axes)]


def _placed(place: Tensor, grid: list[int]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Of every corner its row (B, M, H, S), negative outside; of every axis how far a point is in; which are NaN."""
    axes = place.shape[-1]
    each = maps(grid, axes)
    points = place.shape[3] // len(each)
    sizes = torch.tensor(each, device=place.device).repeat_interleave(points, 0)  # (S, a)
    counts = [math.prod(one) for one in each]
    firsts = [sum(counts[:at]) for at in range(len(each))]
    first_S = torch.tensor(firsts, device=place.device).repeat_interleave(points)
    below = place.floor()
    inside = place - below
    lost = place.isnan().any(-1)
    # far outside there is no corner on a map, and no integer overflows
    low = below.clamp(-2, max(grid) + 1).nan_to_num(-2).long()
    rows = []
    for corner in itertools.product((0, 1), repeat=axes):
        at = low + torch.tensor(corner, device=place.device)
        there = ((at >= 0) & (at < sizes)).all(-1) & ~lost
        flat = at[..., 0]
        for axis in range(1, axes):
            flat = flat * sizes[:, axis] + at[..., axis]
        rows.append((flat + first_S).masked_fill(~there, -1))
    return rows, list(inside.unbind(-1)), lost


def _part(inside: list[Tensor], corner: tuple[int, ...], but: int = -1) -> Tensor:
    """What of every axis but one belongs to a corner."""
    part = torch.ones_like(inside[0])
    for axis, one in enumerate(corner):
        if axis != but:
            part = part * (inside[axis] if one else 1 - inside[axis])
    return part


def entries(place: Tensor, share: Tensor, grid: list[int]) -> tuple[Tensor, Tensor]:
    """Row and share (B, M, S * E, H) of every corner: -1 and 0 outside; 0 and NaN of a place that is NaN."""
    rows, inside, lost = _placed(place, grid)
    parts = []
    for row, corner in zip(rows, itertools.product((0, 1), repeat=place.shape[-1]), strict=True):
        part = (share * _part(inside, corner)).masked_fill(row < 0, 0)
        parts.append(part.masked_fill(lost, float("nan")))
    index = torch.stack(rows, -1).masked_fill(lost[..., None], 0)
    return index.flatten(3).transpose(2, 3), torch.stack(parts, -1).flatten(3).transpose(2, 3)


def backward(d_entry: Tensor, place: Tensor, share: Tensor, grid: list[int]) -> tuple[Tensor, Tensor]:
    """Gradients at place and share, of those at the shares of all corners (B, M, S * E, H)."""
    rows, inside, _ = _placed(place, grid)
    axes = place.shape[-1]
    each = d_entry.transpose(2, 3).unflatten(3, (place.shape[3], 2**axes)).unbind(-1)
    d_share, d_place = torch.zeros_like(share), [torch.zeros_like(share) for _ in range(axes)]
    for row, slope, corner in zip(rows, each, itertools.product((0, 1), repeat=axes), strict=True):
        slope = slope.masked_fill(row < 0, 0)
        d_share = d_share + (slope * _part(inside, corner)).masked_fill(row < 0, 0)
        for axis, one in enumerate(corner):
            step = share * slope * _part(inside, corner, axis)
            d_place[axis] = d_place[axis] + (step if one else -step).masked_fill(row < 0, 0)
    return torch.stack(d_place, -1), d_share
