"""Fractional positions: which neighbours on the grid a moved slot reads, and by how much.

Shape legend: B batch, G groups of channels, M outputs, S slots, E = 2^a corners, a grid axes, `out` the output grid.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.grammar import Basic
from nearfold.grammar.words import Deformable
from nearfold.lower.call import Call
from nearfold.lower.geometry import WindowGeometry
from nearfold.lower.windows import flatten, window_reads

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def over_window(op: Basic, params: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """A convolution of the input over the path's own window: (B, channels, *out)."""
    geometry = WindowGeometry.of(op, x.dim() - 2)
    padding = geometry.before
    if geometry.before != geometry.after:
        x, padding = geometry.pad(x, "zeros"), (0,) * (x.dim() - 2)
    weight, bias = params[f"{name}_weight"], params.get(f"{name}_bias")
    return _CONV[x.dim() - 2](x, weight, bias, geometry.stride, padding, geometry.dilation)


def sampled(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Index, valid and coefficient, each (B, G, M, S * E): the corners around every moved slot of one cell.

    The offset channels are ordered (group, slot, axis), as torchvision's and the papers' code have them. Corners
    outside the grid are not valid: the map fades to zero within one position of its border. Coefficients are in float32
    at least: in half precision, positions beyond 2048 would be off by whole pixels.
    """
    op = call.op
    assert isinstance(op.path, Deformable)
    wide = torch.promote_types(call.value.dtype, torch.float32)
    offset = over_window(op, call.params, "offset", call.x).to(wide)
    offset_BGMSa = offset.flatten(2).unflatten(1, (op.path.groups, -1, call.ndim)).permute(0, 1, 4, 2, 3)
    at_MSa, _, _ = window_reads(op, call.grid, call.value.device)
    where = at_MSa.to(wide) + offset_BGMSa
    low = where.floor()
    share = where - low
    # far outside or NaN: no corner is on the grid, and integers do not overflow
    low = low.clamp(-2, max(call.grid) + 1).nan_to_num(-2)
    index, valid, coefficient = [], [], []
    for corner in itertools.product((0, 1), repeat=call.ndim):
        at = low.long() + torch.tensor(corner, device=low.device)
        inside = ((at >= 0) & (at < torch.tensor(call.grid, device=low.device))).all(-1)
        part = torch.stack([share[..., a] if one else 1 - share[..., a] for a, one in enumerate(corner)], -1).prod(-1)
        index.append(flatten(at, call.grid).masked_fill(~inside, 0))
        valid.append(inside)
        coefficient.append(part.masked_fill(~inside, 0))
    return tuple(torch.stack(t, -1).flatten(-2) for t in (index, valid, coefficient))  # type: ignore[return-value]
