"""Which positions the slots of a window, a block or a moved window read. Integers; the meaning, for every backend.

Shape legend: M outputs, S slots, o outputs of an axis, s slots of an axis, a grid axes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nearfold.grammar import Basic
from nearfold.grammar.words import Block, Deformable, Window
from nearfold.kernels.local import reflect
from nearfold.lower.geometry import WindowGeometry, causal_axes
from nearfold.lower.parameters import as_tuple


def axis_reads(op: Basic, grid: tuple[int, ...], axis: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """One axis: positions read (o, s), which of them are valid (o, s), and the queries' own positions (o,)."""
    path, n, ndim = op.path, grid[axis], len(grid)
    if isinstance(path, Block):
        size, shift = as_tuple(path.size, ndim, "size")[axis], as_tuple(path.shift, ndim, "shift")[axis]
        home_o = torch.arange(n, device=device)
        # blocks end at shift, shift + size, ...
        start_o = torch.div(home_o - shift, size, rounding_mode="floor") * size + shift
        at_os = start_o[:, None] + torch.arange(size, device=device)
        return at_os, (at_os >= 0) & (at_os < n), home_o
    assert isinstance(path, Window | Deformable)
    geometry = WindowGeometry.of(op, ndim)
    size, dilation = geometry.size[axis], geometry.dilation[axis]
    out = geometry.output(grid)[axis]
    first_o = torch.arange(out, device=device) * geometry.stride[axis]
    home_o = first_o + geometry.home()[axis]
    slot_s = torch.arange(size, device=device) * dilation
    if isinstance(path, Deformable) or path.mode != "inside":
        at_os = first_o[:, None] + slot_s - geometry.before[axis]
        if isinstance(path, Window) and path.mode == "reflect":
            at_os = reflect(at_os, n)
        return at_os, (at_os >= 0) & (at_os < n), home_o
    step = as_tuple(path.step, ndim, "step")[axis]
    # positions a multiple of the dilation apart are a line of their own, `room` of them
    phase_o = home_o % dilation
    place_o = torch.div(home_o, dilation, rounding_mode="floor")
    room_o = torch.div(n - phase_o + dilation - 1, dilation, rounding_mode="floor")
    group_o = torch.div(place_o, step, rounding_mode="floor") * step
    if axis in causal_axes(op, ndim):
        start_o = torch.minimum(group_o + step, room_o) - size
        at_os = (start_o[:, None] + torch.arange(size, device=device)) * dilation + phase_o[:, None]
        return at_os, (at_os >= 0) & (at_os <= home_o[:, None]), home_o
    leader_o = torch.minimum(group_o + step // 2, room_o - 1)
    start_o = torch.minimum(leader_o - size // 2, room_o - size).clamp(min=0)
    at_os = (start_o[:, None] + torch.arange(size, device=device)) * dilation + phase_o[:, None]
    return at_os, at_os < n, home_o


def _joined(per_axis: list[Tensor]) -> Tensor:
    """(o, s) of every axis -> (M, S) of tuples: (M, S, a); (o,) -> (M, a)."""
    axes = len(per_axis)
    wide = []
    for axis, x in enumerate(per_axis):
        shape = [1] * (axes * x.dim())
        for part, n in enumerate(x.shape):
            shape[part * axes + axis] = n
        wide.append(x.reshape(shape))
    full = torch.broadcast_tensors(*wide)
    joined = torch.stack(full, -1)
    return joined.flatten(0, axes - 1) if per_axis[0].dim() == 1 else joined.flatten(axes, -2).flatten(0, axes - 1)


def window_reads(op: Basic, grid: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Positions read (M, S, a), valid (M, S), and the queries' own positions (M, a), slots in raster order."""
    axes = [axis_reads(op, grid, axis, device) for axis in range(len(grid))]
    at, valid, home = zip(*axes, strict=True)
    return _joined(list(at)), _joined(list(valid)).all(-1), _joined(list(home))


def flatten(at: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Positions as tuples (..., a) -> raster index (...)."""
    flat = torch.zeros_like(at[..., 0])
    for axis, n in enumerate(grid):
        flat = flat * n + at[..., axis]
    return flat


def window_index(op: Basic, grid: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Raster positions (M, S) that the slots read, and which are valid (index 0 where not)."""
    at, valid, _ = window_reads(op, grid, device)
    return flatten(at, grid).masked_fill(~valid, 0), valid
