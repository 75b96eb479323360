"""`nearfold::grouped_conv`: a convolution of many small groups, whose channels are read from several maps.

The maps are never joined: the compiled engine gathers the channels of a group while it packs them, the Triton kernels
read them where they are. Everywhere else PyTorch joins and convolves.

Shape legend: B batch, G groups, I inputs of a group (over all maps), O outputs of a group, `*grid` the maps' grid,
`*out` the output grid; one to three grid axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nearfold.kernels import cuda, engine, second
from nearfold.kernels.local import pad, unpad
from nearfold.kernels.names import require_tensors
from nearfold.kernels.operator import operator

MOST_MAPS = 4
MOST_NUMBER = 2**24 - 1  # of a window: products stay integers
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _require(maps: Sequence[Tensor], weight: Tensor, *numbers: list[int]) -> None:
    """ValueError where the operands do not fit one another."""
    require_tensors(weight=weight, **{f"maps[{i}]": m for i, m in enumerate(maps)})
    axes = weight.dim() - 3
    if not 1 <= len(maps) <= MOST_MAPS or not 1 <= axes <= 3 or any(m.dim() != weight.dim() for m in maps):
        raise ValueError(
            f"grouped_conv: 1 to {MOST_MAPS} maps (B, G, inputs, *grid) and weight (G, O, I, *size), 1 to 3 grid axes; "
            f"got {[tuple(m.shape) for m in maps]} and {tuple(weight.shape)}"
        )
    B, G, _, *grid = maps[0].shape
    inputs = sum(m.shape[2] for m in maps)
    if any(m.shape[:2] != (B, G) or list(m.shape[3:]) != grid for m in maps) or weight.shape[:3:2] != (G, inputs):
        raise ValueError(f"grouped_conv: maps {[tuple(m.shape) for m in maps]} do not fit weight {tuple(weight.shape)}")
    if any(m.dtype != weight.dtype for m in maps):
        raise ValueError(f"grouped_conv: one dtype, got {[m.dtype for m in maps]} and {weight.dtype}")
    least = (1, 1, 0, 1)  # of strides, dilations, positions before and outputs
    if any(len(n) != axes or min(n) < low or max(n) > MOST_NUMBER for n, low in zip(numbers, least, strict=True)):
        raise ValueError(
            f"grouped_conv: stride, dilation, before and out must be {axes} numbers each, one per grid axis, positive "
            f"(before: not negative) and at most {MOST_NUMBER}, got {numbers}"
        )


def _after(
    maps: Sequence[Tensor], weight: Tensor, stride: list[int], dilation: list[int], before: list[int], out: list[int]
) -> list[int]:
    """Positions that the last outputs read beyond the grid, per axis."""
    sizes = zip(maps[0].shape[3:], weight.shape[3:], stride, dilation, before, out, strict=True)
    return [(o - 1) * t + (s - 1) * d + 1 - b - n for n, s, t, d, b, o in sizes]


@operator("nearfold::grouped_conv")
def grouped_conv(
    maps: Sequence[Tensor],
    weight: Tensor,
    stride: list[int],
    dilation: list[int],
    before: list[int],
    out: list[int],
    reflect: bool,
) -> Tensor:
    """y (B, O, G, *out) = sum over inputs and slots of weight (G, O, I, *size) times what the slots read.

    Args:
        maps: up to four of (B, G, inputs, *grid), any strides; their inputs follow one another.
        weight: (G, O, I, *size), I all inputs.
        stride: per axis. Slot k of output o reads the position o * stride + k * dilation - before of an axis.
        dilation: per axis.
        before: padding before the first position, per axis.
        out: outputs per axis; after the last position there is as much padding as they read.
        reflect: whether positions outside the grid are mirrored ones; otherwise they are zero.
    """
    _require(maps, weight, stride, dilation, before, out)
    B, G, O = maps[0].shape[0], weight.shape[0], weight.shape[1]
    kernels = _on_gpu(maps, weight, stride, dilation, before, out)
    if kernels is not None:
        made: Tensor = kernels.grouped_conv(maps, weight, stride, dilation, before, out, reflect)
        return made
    if _served(weight, *maps):
        y = weight.new_empty(B, O, G, *out)
        engine.run("grouped", list(maps), weight.contiguous(), stride, dilation, before, reflect, y, engine.threads())
        return y
    with torch.autocast(weight.device.type, enabled=False):
        return formula(maps, weight, stride, dilation, before, out, reflect)


def formula(
    maps: Sequence[Tensor],
    weight: Tensor,
    stride: list[int],
    dilation: list[int],
    before: list[int],
    out: list[int],
    reflect: bool,
) -> Tensor:
    """`grouped_conv` in PyTorch."""
    after = _after(maps, weight, stride, dilation, before, out)
    x = pad(torch.cat(list(maps), 2).flatten(1, 2), before, after, reflect)
    y = _CONV[len(out)](x, weight.flatten(0, 1), None, stride, 0, dilation, weight.shape[0])
    return y.unflatten(1, weight.shape[:2]).transpose(1, 2).contiguous()


def _on_gpu(
    maps: Sequence[Tensor],
    weight: Tensor,
    stride: list[int],
    dilation: list[int],
    before: list[int],
    out: list[int],
    *grad: Tensor,
) -> ModuleType | None:
    """The Triton kernels, where they can compute this."""
    kernels = cuda.kernels("grouped_conv", weight, *maps, *grad)
    read = [*maps, *(g.transpose(1, 2) for g in grad)]
    return None if kernels is None or kernels.refusal(read, weight, stride, dilation, before, out) else kernels


def _served(*tensors: Tensor) -> bool:
    return all(t.numel() > 0 for t in tensors) and engine.serves(*tensors)


@grouped_conv.register_fake
def _(
    maps: Sequence[Tensor],
    weight: Tensor,
    stride: list[int],
    dilation: list[int],
    before: list[int],
    out: list[int],
    reflect: bool,
) -> Tensor:
    return weight.new_empty(maps[0].shape[0], weight.shape[1], weight.shape[0], *out)


@operator("nearfold::grouped_conv_backward")
def grouped_conv_backward(
    grad: Tensor,
    maps: Sequence[Tensor],
    weight: Tensor,
    stride: list[int],
    dilation: list[int],
    before: list[int],
    reflect: bool,
) -> list[Tensor]:
    """Gradients at every map, and at weight."""
    require_tensors(grad=grad)
    out = list(grad.shape[3:])
    _require(maps, weight, stride, dilation, before, out)
    made_shape = (maps[0].shape[0], weight.shape[1], weight.shape[0])
    if grad.shape[:3] != made_shape or grad.dtype != weight.dtype:
        raise ValueError(
            f"grouped_conv: grad must be {(*made_shape, *out)} {weight.dtype}, got {tuple(grad.shape)} {grad.dtype}"
        )
    kernels = _on_gpu(maps, weight, stride, dilation, before, out, grad)
    if kernels is not None:
        made: list[Tensor] = kernels.grouped_conv_backward(grad, maps, weight, stride, dilation, before, reflect)
        return made
    d_maps, d_weight = (
        [torch.empty_like(m) for m in maps],
        torch.empty_like(weight, memory_format=torch.contiguous_format),
    )
    if _served(grad, weight, *maps):
        engine.run(
            "grouped_backward",
            *(grad, list(maps), weight.contiguous(), stride, dilation, before, reflect),
            *(d_maps, d_weight, engine.threads()),
        )
        return [*d_maps, d_weight]
    with torch.autocast(weight.device.type, enabled=False):
        after, G = _after(maps, weight, stride, dilation, before, out), weight.shape[0]
        x = torch.cat(list(maps), 2)
        d_x, d_w, _ = torch.ops.aten.convolution_backward(
            grad.transpose(1, 2).flatten(1, 2),
            pad(x.flatten(1, 2), before, after, reflect),
            weight.flatten(0, 1),
            None,
            stride,
            [0] * len(out),
            dilation,
            False,
            [0] * len(out),
            G,
            [True, True, False],
        )
        parts = unpad(d_x, x.shape[3:], before, after, reflect).view_as(x).split([m.shape[2] for m in maps], 2)
        for d_map, part in zip(d_maps, parts, strict=True):
            d_map.copy_(part)
        return [*d_maps, d_weight.copy_(d_w.view_as(weight))]


@grouped_conv_backward.register_fake
def _(
    grad: Tensor,
    maps: Sequence[Tensor],
    weight: Tensor,
    stride: list[int],
    dilation: list[int],
    before: list[int],
    reflect: bool,
) -> list[Tensor]:
    return [*(torch.empty_like(m) for m in maps), torch.empty_like(weight, memory_format=torch.contiguous_format)]


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    maps, weight, ctx.stride, ctx.dilation, ctx.before, _, ctx.reflect = inputs
    ctx.save_for_backward(weight, *maps)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    weight, *maps = ctx.saved_tensors
    *d_maps, d_weight = grouped_conv_backward(grad, maps, weight, ctx.stride, ctx.dilation, ctx.before, ctx.reflect)
    return d_maps, d_weight, *(None,) * 5


grouped_conv.register_autograd(_backward, setup_context=_setup)


def _again(grad, maps, weight, stride, dilation, before, reflect):  # type: ignore[no-untyped-def]
    out = list(grad.shape[3:])
    return second.gradients(lambda m, w: formula(m, w, stride, dilation, before, out, reflect))(grad, maps, weight)


second.register(grouped_conv_backward, _again)


@register_flop_formula(torch.ops.nearfold.grouped_conv)
def _forward_flops(maps, weight, stride, dilation, before, out, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return int(2 * maps[0][0] * math.prod(out) * math.prod(weight))


@register_flop_formula(torch.ops.nearfold.grouped_conv_backward)
def _backward_flops(grad, maps, weight, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return int(4 * maps[0][0] * math.prod(grad[3:]) * math.prod(weight))
