"""Which positions the slots of a window, a block or a moved window read. Integers; the meaning, for every backend.

Shape legend: M outputs, S slots, o outputs of an axis, s slots of an axis, a grid axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nearfold._numbers import shown
from nearfold.grammar import Basic
from nearfold.grammar.words import Block, Deformable, Path, Window
from nearfold.kernels.local import reflect
from nearfold.lower.geometry import WindowGeometry, block_shift, causal_axes
from nearfold.lower.parameters import as_tuple

Reads = Callable[[Any, tuple[int, ...], torch.device], tuple[Tensor, Tensor]]
READS: dict[type[Path], Reads] = {}
"""Paths from outside whose slots follow from the grid alone: (path, grid, device) -> positions (N, S), valid (N, S)."""


def is_table(path: Path) -> bool:
    """Whether the positions of a path's slots are whole and known from the grid alone."""
    return isinstance(path, (Window, Block)) or type(path) in READS


def _own_reads(op: Basic, grid: tuple[int, ...], device: torch.device, missing: int) -> tuple[Tensor, Tensor]:
    """What a path from outside reads, checked."""
    read = READS[type(op.path)](op.path, grid, device)
    if not (isinstance(read, tuple) and len(read) == 2 and all(isinstance(t, Tensor) for t in read)):
        raise ValueError(f"{op.path}: must read a pair of tensors, positions and which are valid, got {shown(read)}")
    index, valid = read
    N, given = math.prod(grid), (tuple(index.shape), index.dtype, tuple(valid.shape), valid.dtype)
    if index.dim() != 2 or given != ((N, index.shape[1]), torch.long, (N, index.shape[1]), torch.bool):
        raise ValueError(
            f"{op.path}: must read int64 positions ({N}, slots) and say in bool ({N}, slots) which are valid, got "
            f"{given[1]} {given[0]} and {given[3]} {given[2]}"
        )
    if not torch.compiler.is_compiling() and not index.is_meta:
        outside = index[valid & ((index < 0) | (index >= N))]
        if outside.numel():
            raise ValueError(f"{op.path}: reads position {int(outside[0])} of {N}; say that such a slot is not valid")
    return index.masked_fill(~valid, missing), valid


def axis_reads(op: Basic, grid: tuple[int, ...], axis: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """One axis: positions read (o, s), which of them are valid (o, s), and the queries' own positions (o,)."""
    path, n, ndim = op.path, grid[axis], len(grid)
    if isinstance(path, Block):
        size, shift = as_tuple(path.size, ndim, "size")[axis], block_shift(path, grid)[axis]
        home_o = torch.arange(n, device=device)
        # blocks end at shift, shift + size, ...
        start_o = torch.div(home_o - shift, size, rounding_mode="floor") * size + shift
        at_os = start_o[:, None] + torch.arange(size, device=device)
        return at_os, (at_os >= 0) & (at_os < n), home_o
    assert isinstance(path, (Window, Deformable))
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


def _axes(op: Basic, grid: tuple[int, ...], device: torch.device) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """`axis_reads` of every axis, shaped so that they broadcast to (o of every axis, s of every axis), or (o ...)."""
    ndim = len(grid)
    at, valid, home = [], [], []
    for axis in range(ndim):
        at_os, valid_os, home_o = axis_reads(op, grid, axis, device)
        alone = [1] * ndim
        alone[axis] = at_os.shape[0]
        slots = [1] * ndim
        slots[axis] = at_os.shape[1]
        at.append(at_os.view(*alone, *slots))
        valid.append(valid_os.view(*alone, *slots))
        home.append(home_o.view(alone))
    return at, valid, home


def window_reads(op: Basic, grid: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Positions read (M, S, a), valid (M, S), and the queries' own positions (M, a), slots in raster order."""
    at, valid, home = _axes(op, grid, device)
    ndim = len(grid)
    at_oosa = torch.stack(torch.broadcast_tensors(*at), -1)
    shape = math.prod(at_oosa.shape[:ndim]), math.prod(at_oosa.shape[ndim:-1]), ndim
    at_MSa = at_oosa.reshape(shape)
    valid_MS = torch.stack(torch.broadcast_tensors(*valid), -1).reshape(shape).all(-1)
    home_Ma = torch.stack(torch.broadcast_tensors(*home), -1).reshape(shape[0], ndim)
    return at_MSa, valid_MS, home_Ma


def flatten(at: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Positions as tuples (..., a) -> raster index (...)."""
    return _raster([at[..., axis] for axis in range(len(grid))], grid)


def _raster(at: list[Tensor], grid: tuple[int, ...]) -> Tensor:
    flat = at[0]
    for n, more in zip(grid[1:], at[1:], strict=True):
        flat = flat * n + more
    return flat


def window_index(op: Basic, grid: tuple[int, ...], device: torch.device, missing: int = 0) -> tuple[Tensor, Tensor]:
    """Raster positions (M, S) that the slots read, ``missing`` where they read none, and which read one.

    As `window_reads` says, by a few operations on as many numbers as there are slots.
    """
    if type(op.path) in READS:
        return _own_reads(op, grid, device, missing)
    at, valid, _ = _axes(op, grid, device)
    inside = valid[0]
    for more in valid[1:]:
        inside = inside & more
    flat = _raster(at, grid).masked_fill(~inside, missing)
    ndim = len(grid)
    shape = math.prod(flat.shape[:ndim]), math.prod(flat.shape[ndim:])
    flat, inside = flat.reshape(shape), inside.reshape(shape)
    if torch.compiler.is_compiling():  # as views, their strides are minima of open sizes, which nothing proves equal
        return tuple(t.clone(memory_format=torch.contiguous_format) for t in (flat, inside))  # type: ignore[return-value]
    return flat, inside


def home_index(op: Basic, grid: tuple[int, ...], device: torch.device) -> Tensor:
    """Raster positions (M,) of the queries."""
    if type(op.path) in READS:
        return torch.arange(math.prod(grid), device=device)
    return _raster(_axes(op, grid, device)[2], grid).flatten()
