"""`deformable` and `modulated`: a window whose slots are moved by fractions, and weighed by a mask.

Shape legend: B batch, G groups of channels, M outputs, S slots, E = 2^a corners, a grid axes, `out` the output grid.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.grammar import Basic
from nearfold.grammar.word import as_tuple
from nearfold.grammar.words import Deformable, Modulated
from nearfold.kernels import corners_torch
from nearfold.kernels.corners_torch import Frame
from nearfold.lower.call import Call, count_positions
from nearfold.lower.geometry import WindowGeometry
from nearfold.lower.meaning import Lengths, PathMeaning, RhoMeaning, Sizes, means
from nearfold.lower.parameters import Parameter, linear
from nearfold.lower.selection import Selection
from nearfold.lower.weighting import wide_dtype

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@means(Deformable)
class DeformableMeaning(PathMeaning):
    """A window with moved slots; a slot reads the corners around its place."""

    groups = "groups"
    slots = "place"
    generating = ("offset",)

    def parameters(self, op: Basic, sizes: Sizes) -> dict[str, Parameter]:
        if sizes.ndim > 3:
            raise ValueError(f"{op}: deformable goes with one to three grid axes, got ndim={sizes.ndim}")
        return _net(op, sizes, "offset", sizes.ndim)

    def output(self, op: Basic, grid: Lengths) -> Lengths:
        return WindowGeometry.of(op, len(grid)).output(grid)

    def select(self, call: Call) -> Selection:
        index, valid, coefficient = sampled(call)
        return Selection(index, valid, None, count_positions(call.grid), coefficient, 2**call.ndim)


@means(Modulated)
class ModulatedMeaning(RhoMeaning):
    """A mask from a second net; it is part of the coefficients, which come with the positions."""

    generating = ("mask",)
    first = 0.5  # the sigmoid of zero

    def parameters(self, op: Basic, sizes: Sizes) -> dict[str, Parameter]:
        return _net(op, sizes, "mask", 1)

    def constant(self, call: Call, valid: Tensor, index: Tensor) -> Tensor:
        return valid.to(wide_dtype(call))


def _net(op: Basic, sizes: Sizes, name: str, numbers: int) -> dict[str, Parameter]:
    """A convolution of the input over the path's own window that makes so many numbers of every slot; zero at first."""
    path = cast(Deformable, op.path)
    slots = as_tuple(path.size, sizes.ndim, "size")
    made = numbers * path.groups * math.prod(slots)
    return linear(name, made, sizes.in_channels, sizes.bias, slots, "constant:0")


def _over_window(op: Basic, params: dict[str, Tensor], names: tuple[str, ...], x: Tensor) -> Tensor:
    """Convolutions of the input over the path's own window, as one: (B, channels of all of them, *out)."""
    if x.dim() - 2 not in _CONV:
        raise ValueError(f"{op}: its offsets are convolutions, over 1 to 3 axes; got {x.dim() - 2}")
    geometry = WindowGeometry.of(op, x.dim() - 2)
    padding = geometry.before
    if geometry.before != geometry.after:
        x, padding = geometry.pad(x, "zeros"), (0,) * (x.dim() - 2)
    weight = torch.cat([params[f"{name}_weight"] for name in names])
    biases = [params[f"{name}_bias"] for name in names if f"{name}_bias" in params]
    bias = torch.cat(biases) if biases else None
    return _CONV[x.dim() - 2](x, weight, bias, geometry.stride, padding, geometry.dilation)


def window_of(op: Basic, grid: Lengths, out: Lengths) -> Frame:
    """Where the window lies before its slots move."""
    geometry = WindowGeometry.of(op, len(grid))
    window = (geometry.size, geometry.stride, geometry.dilation, geometry.before)
    return Frame(list(grid), list(out), *map(list, window))


def moved(call: Call) -> tuple[Tensor, Tensor | None, Frame]:
    """What `nearfold::corners` takes: offset (B * G, S, a, M), mask (B * G, S, M) or None, and where the window lies.

    The offset channels are ordered (group, slot, axis), as torchvision's and the papers' code have them. Both are in
    float32 at least: in half precision, positions beyond 2048 would be off by whole pixels.
    """
    op, frame = call.op, window_of(call.op, call.grid, call.out_grid)
    wide = torch.promote_types(call.value.dtype, torch.float32)
    slots, outputs = math.prod(frame.size), math.prod(frame.out)
    modulated = "mask_weight" in call.params
    made = _over_window(op, call.params, ("offset", "mask") if modulated else ("offset",), call.x).to(wide)
    points = call.heads * slots
    offset = made[:, : points * call.ndim].reshape(-1, slots, call.ndim, outputs)
    mask = torch.sigmoid(made[:, points * call.ndim :]).reshape(-1, slots, outputs) if modulated else None
    return offset, mask, frame


def sampled(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """From the formula: index, valid and coefficient (times the modulation), each (B, G, M, S * E).

    Corners outside the grid are not valid: the map fades to zero within one position of its border.
    """
    offset, mask, frame = moved(call)
    share, index = (
        t.unflatten(0, (call.value.shape[0], call.heads)) for t in corners_torch.corners(offset, mask, frame)
    )
    return index.clamp(min=0), index >= 0, share
