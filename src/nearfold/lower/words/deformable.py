"""`deformable`, `points` and `modulated`: slots that the input moves by fractions, and weighs.

Shape legend: B batch, G groups of channels, M outputs, S slots, E = 2^a corners, a grid axes, C channels, `out` the
output grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.grammar import Basic
from nearfold.grammar.words import Deformable, Modulated, Points
from nearfold.kernels import corners_torch, sampled_torch
from nearfold.kernels.corners_torch import Frame
from nearfold.lower.call import Call, count_positions, pointwise
from nearfold.lower.geometry import WindowGeometry, crop
from nearfold.lower.meaning import Lengths, PathMeaning, RhoMeaning, Sizes, means
from nearfold.lower.parameters import Parameter, linear
from nearfold.lower.selection import Selection
from nearfold.lower.weighting import wide_dtype

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
Softmax = Callable[[Tensor, int], Tensor]
_ACTIVATIONS: dict[str, Callable[[Tensor, int, Softmax], Tensor]] = {
    "sigmoid": lambda made, axis, softmax: torch.sigmoid(made),
    "softmax": lambda made, axis, softmax: softmax(made, axis),
    "none": lambda made, axis, softmax: made,
}


@means(Deformable)
class DeformableMeaning(PathMeaning):
    """A window with moved slots; a slot reads the corners around its place."""

    groups = "groups"
    slots = "place"
    generating = ("offset", "feature", "norm")

    def parameters(self, op: Basic, sizes: Sizes) -> dict[str, Parameter]:
        _require_axes(op, sizes)
        C, found = sizes.in_channels, {}
        if cast(Deformable, op.path).net == "depthwise":
            slots = op.path.slot_shape(sizes.ndim)
            conv = linear("feature", C, 1, sizes.bias, slots)
            conv = {n: Parameter(p.shape, p.init, math.prod(slots)) for n, p in conv.items()}
            found = conv | {"norm_weight": Parameter((C,), "constant:1")}
            found |= {"norm_bias": Parameter((C,), "constant:0")} if sizes.bias else {}
        return found | _net(op, sizes, "offset", sizes.ndim)

    def output(self, op: Basic, grid: Lengths) -> Lengths:
        return WindowGeometry.of(op, len(grid)).output(grid)

    def select(self, call: Call) -> Selection:
        index, valid, coefficient = sampled(call)
        return Selection(index, valid, None, count_positions(call.grid), coefficient, 2**call.ndim)


@means(Points)
class PointsMeaning(PathMeaning):
    """Points around the query's place on the map that is read."""

    groups = "groups"
    generating = ("offset",)

    def parameters(self, op: Basic, sizes: Sizes) -> dict[str, Parameter]:
        _require_axes(op, sizes)
        found, path = _net(op, sizes, "offset", sizes.ndim), cast(Points, op.path)
        if bias := found.get("offset_bias"):
            rays = f"rays:{path.levels},{path.count},{sizes.ndim}"
            found["offset_bias"] = Parameter(bias.shape, rays, bias.fan_in)
        return found

    def select(self, call: Call) -> Selection:
        place, share, grid = placed(call)
        index, part = (t.permute(0, 3, 1, 2) for t in sampled_torch.entries(place, share, grid))
        return Selection(index.clamp(min=0), index >= 0, None, count_positions(call.padded), part, 2**call.ndim)


@means(Modulated)
class ModulatedMeaning(RhoMeaning):
    """A mask from a second net; it is part of the coefficients, which come with the positions."""

    generating = ("mask",)
    first = 0.5  # the sigmoid of zero

    def parameters(self, op: Basic, sizes: Sizes) -> dict[str, Parameter]:
        return _net(op, sizes, "mask", 1)

    def start(self, op: Basic, ndim: int) -> float | None:
        by_activation = {"sigmoid": 0.5, "softmax": 1 / math.prod(op.path.slot_shape(ndim))}
        return by_activation.get(cast(Modulated, op.weight.rho).activation)

    def constant(self, call: Call, valid: Tensor, index: Tensor) -> Tensor:
        return valid.to(wide_dtype(call))


def _require_axes(op: Basic, sizes: Sizes) -> None:
    if sizes.ndim > 3:
        raise ValueError(f"{op}: {op.path.word} goes with one to three grid axes, got ndim={sizes.ndim}")


def _over(op: Basic) -> bool:
    """Whether the offsets are a convolution over the path's own window."""
    return getattr(op.path, "net", "pointwise") == "window"


def _net(op: Basic, sizes: Sizes, name: str, numbers: int) -> dict[str, Parameter]:
    """A map of the input that makes so many numbers of every slot, over the path's own window or not; zero at first."""
    slots = op.path.slot_shape(sizes.ndim)
    made = numbers * (op.path.groups_of_channels or 1) * math.prod(slots)
    return linear(name, made, sizes.in_channels, sizes.bias, slots if _over(op) else (), "constant:0")


def _over_window(op: Basic, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
    """A convolution of the input over the path's own window: (B, made, *out)."""
    geometry = WindowGeometry.of(op, x.dim() - 2)
    padding = geometry.before
    if geometry.before != geometry.after:
        x, padding = geometry.pad(x, "zeros"), (0,) * (x.dim() - 2)
    return _CONV[x.dim() - 2](x, weight, bias, geometry.stride, padding, geometry.dilation, groups)


def _made(call: Call) -> Tensor:
    """Offsets, and the masks that follow them where there are any: (B, channels of both, *out), float32 at least."""
    op, x, params = call.op, call.x, call.params
    if x.dim() - 2 not in _CONV:
        raise ValueError(f"{op}: its offsets are made over 1 to 3 axes; got {x.dim() - 2}")
    names = ("offset", "mask") if "mask_weight" in params else ("offset",)
    wide = torch.promote_types(call.value.dtype, torch.float32)
    weight = torch.cat([params[f"{name}_weight"] for name in names])
    biases = [params[f"{name}_bias"] for name in names if f"{name}_bias" in params]
    bias = torch.cat(biases) if biases else None
    if _over(op):
        return _over_window(op, x, weight, bias).to(wide)
    x, weight, bias = x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)
    if "feature_weight" in params:
        feature, by, norm, shift = (_wide(params, name, wide) for name in FEATURES)
        assert feature is not None and norm is not None
        hidden = _over_window(op, x, feature, by, x.shape[1]).movedim(1, -1)
        x = F.gelu(F.layer_norm(hidden, tuple(norm.shape), norm, shift, 1e-6)).movedim(-1, 1)
    elif any(step > 1 for step in call.stride):
        x = crop(x, (0,) * call.ndim, call.grid, call.stride)
    return pointwise(x, weight, bias).to(wide)


FEATURES = ("feature_weight", "feature_bias", "norm_weight", "norm_bias")


def _wide(params: dict[str, Tensor], name: str, dtype: torch.dtype) -> Tensor | None:
    return params[name].to(dtype) if name in params else None


def _activated(op: Basic, made: Tensor, axis: int, softmax: Softmax = torch.softmax) -> Tensor:
    return _ACTIVATIONS[cast(Modulated, op.weight.rho).activation](made, axis, softmax)


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
    frame, made = window_of(call.op, call.grid, call.out_grid), _made(call)
    slots, outputs = math.prod(frame.size), math.prod(frame.out)
    points = call.heads * slots
    offset = made[:, : points * call.ndim].reshape(-1, slots, call.ndim, outputs)
    if "mask_weight" not in call.params:
        return offset, None, frame
    return offset, _activated(call.op, made[:, points * call.ndim :].reshape(-1, slots, outputs), 1), frame


def placed(call: Call, softmax: Softmax = torch.softmax) -> tuple[Tensor, Tensor, list[int]]:
    """What `nearfold::sampled` takes: place (B, M, G, S, a), share (B, M, G, S), and the maps that are read."""
    op, made_BMc = call.op, _made(call).flatten(2).transpose(1, 2)
    maps = call.at.maps or (call.padded,)
    if odd := [len(one) for one in maps if len(one) != call.ndim]:
        raise ValueError(f"{op}: x and context must have the same number of grid axes, got {call.ndim} and {odd[0]}")
    slots = math.prod(op.path.slot_shape(call.ndim))
    points = call.heads * slots
    offset = made_BMc[..., : points * call.ndim].unflatten(2, (call.heads, slots, call.ndim))
    place = offset + _before_moving(call, maps, offset)
    if "mask_weight" in call.params:
        share = _activated(op, made_BMc[..., points * call.ndim :].unflatten(2, (call.heads, slots)), -1, softmax)
    else:
        share = torch.ones_like(offset[..., 0])
    return place, share, [n for one in maps for n in one]


def _before_moving(call: Call, maps: tuple[Lengths, ...], like: Tensor) -> Tensor:
    """Where every slot lies before it moves: (M, 1, S | 1, a)."""
    if isinstance(call.op.path, Deformable):
        return window_of(call.op, call.grid, call.out_grid).starts(like).permute(2, 0, 1)[:, None]
    places = []
    for one in maps:
        axes = []
        for n, m in zip(call.grid, one, strict=True):
            middle = torch.arange(n, device=like.device, dtype=like.dtype) + 0.5
            axes.append(middle * (m / n) - 0.5)
        places.append(torch.stack(torch.meshgrid(axes, indexing="ij"), -1).flatten(0, -2))
    if len(places) == 1:
        return places[0][:, None, None]
    return torch.stack(places, 1).repeat_interleave(cast(Points, call.op.path).count, 1)[:, None]


def sampled(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """From the formula: index, valid and coefficient (times the modulation), each (B, G, M, S * E).

    Corners outside the grid are not valid: the map fades to zero within one position of its border.
    """
    offset, mask, frame = moved(call)
    share, index = (
        t.unflatten(0, (call.value.shape[0], call.heads)) for t in corners_torch.corners(offset, mask, frame)
    )
    return index.clamp(min=0), index >= 0, share
