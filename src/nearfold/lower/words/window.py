"""`window`: fixed offsets from the query, moved at the border where asked for.

Shape legend: o outputs of an axis, s slots of an axis.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
from torch import Tensor

from nearfold.grammar import Basic
from nearfold.grammar.word import as_tuple
from nearfold.grammar.words import Window
from nearfold.kernels.local import reflect
from nearfold.lower.call import Call
from nearfold.lower.geometry import WindowGeometry, causal_axes
from nearfold.lower.meaning import Lengths, means
from nearfold.lower.windows import AxesMeaning, in_raster, owns_slots, spread_out


@means(Window)
class WindowMeaning(AxesMeaning):
    """A window of fixed offsets."""

    planes = True
    slots = "place"

    def output(self, op: Basic, grid: Lengths) -> Lengths:
        return WindowGeometry.of(op, len(grid)).output(grid)

    def fit(self, op: Basic, grid: Lengths, source: Lengths, drawing: bool) -> Basic:
        path, ndim = cast(Window, op.path), len(grid)
        if path.cross:
            return op
        if owns_slots(op) or path.mode == "reflect" or path.padding != "same":
            return op
        size = tuple(_fillable(op, path, grid, axis) for axis in range(ndim))
        same = size == as_tuple(path.size, ndim, "size")
        return op if same else dataclasses.replace(op, path=dataclasses.replace(path, size=size))

    def places(self, call: Call, missing: int = 0) -> tuple[Tensor, Tensor]:
        if not call.op.cross:
            return super().places(call, missing)
        geometry, device = WindowGeometry.of(call.op, call.ndim), call.value.device
        each = []
        for axis, (m, n) in enumerate(zip(call.grid, call.padded, strict=True)):
            home_o = torch.arange(m, device=device)
            # where the middle of a position of the one grid lies on the other
            middle_o = torch.div((2 * home_o + 1) * n, 2 * m, rounding_mode="floor")
            slot_s = torch.arange(geometry.size[axis], device=device) * geometry.dilation[axis] - geometry.before[axis]
            at_os = middle_o[:, None] + slot_s
            each.append((at_os, (at_os >= 0) & (at_os < n), home_o))
        at, valid, _ = spread_out(each)
        return in_raster(at, valid, call.padded, missing)

    def axis(self, op: Basic, grid: Lengths, axis: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        path, n, ndim = cast(Window, op.path), grid[axis], len(grid)
        geometry = WindowGeometry.of(op, ndim)
        size, dilation = geometry.size[axis], geometry.dilation[axis]
        out = geometry.output(grid)[axis]
        first_o = torch.arange(out, device=device) * geometry.stride[axis]
        home_o = first_o + geometry.home()[axis]
        slot_s = torch.arange(size, device=device) * dilation
        if path.mode != "inside":
            at_os = first_o[:, None] + slot_s - geometry.before[axis]
            if path.mode == "reflect":
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


def _fillable(op: Basic, path: Window, grid: Lengths, axis: int) -> int:
    """Slots on one axis that some query can fill."""
    size = as_tuple(path.size, len(grid), "size")[axis]
    dilation = as_tuple(path.dilation, len(grid), "dilation")[axis]
    steps = (grid[axis] - 1) // dilation  # from one end of the map to the other
    if path.mode == "inside" or axis in causal_axes(op, len(grid)):
        return min(size, steps + 1)
    # as many on both sides of the query; even sizes stay even, for their slots lie between
    return min(size, 2 * steps + 1 if size % 2 else 2 * steps + 4)
