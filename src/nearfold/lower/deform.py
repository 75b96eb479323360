"""Fractional positions: which neighbours on the grid a moved slot reads, and by how much.

Shape legend: B batch, G groups of channels, M outputs, S slots, E = 2^a corners, a grid axes, `out` the output grid.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.grammar import Basic
from nearfold.grammar.words import Deformable, Modulated
from nearfold.kernels import corners_torch
from nearfold.kernels.corners_torch import Frame
from nearfold.lower.call import Call
from nearfold.lower.geometry import WindowGeometry

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


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


def moved(call: Call) -> tuple[Tensor, Tensor | None, Frame]:
    """What `nearfold::corners` takes: offset (B * G, S, a, M), mask (B * G, S, M) or None, and where the window lies.

    The offset channels are ordered (group, slot, axis), as torchvision's and the papers' code have them. Both are in
    float32 at least: in half precision, positions beyond 2048 would be off by whole pixels.
    """
    op, geometry = call.op, WindowGeometry.of(call.op, call.ndim)
    assert isinstance(op.path, Deformable)
    wide = torch.promote_types(call.value.dtype, torch.float32)
    frame = Frame(
        list(call.grid),
        list(call.out_grid),
        list(geometry.size),
        list(geometry.stride),
        list(geometry.dilation),
        list(geometry.before),
    )
    slots, outputs = math.prod(frame.size), math.prod(frame.out)
    modulated = isinstance(op.weight.rho, Modulated)
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
