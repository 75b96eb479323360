"""`nearfold::corners`: for slots that offsets have moved, the positions around each, and how much of every one.

One operator, three implementations: the compiled engine on the CPU, Triton on CUDA devices, and PyTorch
(`corners_torch`) everywhere else.

Shape legend: P samples and groups, S slots, M outputs, E = 2^a corners, a grid axes.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from nearfold.kernels import corners_torch, cuda, engine, second
from nearfold.kernels.corners_torch import Frame
from nearfold.kernels.names import require_tensors
from nearfold.kernels.operator import operator

MOST_NUMBER = 2**28  # of a frame: products stay integers


def _require(offset: Tensor, mask: Tensor | None, frame: Frame) -> None:
    """ValueError where the operands do not fit one another."""
    require_tensors(offset=offset)
    axes, slots, outputs = frame.axes, math.prod(frame.size), math.prod(frame.out)
    numbers = (frame.grid, frame.out, frame.size, frame.stride, frame.dilation)
    if (
        not 1 <= axes <= 3
        or any(len(n) != axes or min(n) < 1 for n in numbers)
        or len(frame.before) != axes
        or min(frame.before) < 0
        or max(map(max, (*numbers, frame.before))) > MOST_NUMBER
    ):
        raise ValueError(
            "grid, out, size, stride, dilation and before must be positive, one per axis (before: not negative), and "
            f"at most {MOST_NUMBER}, got {frame}"
        )
    if offset.dim() != 4 or offset.shape[1:] != (slots, axes, outputs) or not offset.is_floating_point():
        raise ValueError(
            f"offset must be (P, {slots}, {axes}, {outputs}), floating point, got {tuple(offset.shape)} {offset.dtype}"
        )
    if mask is not None and (mask.shape != (offset.shape[0], slots, outputs) or mask.dtype != offset.dtype):
        raise ValueError(
            f"mask must be ({offset.shape[0]}, {slots}, {outputs}) {offset.dtype}, got {tuple(mask.shape)} {mask.dtype}"
        )


def _served(offset: Tensor, mask: Tensor | None) -> bool:
    return offset.numel() > 0 and engine.serves(offset, mask)


def _on_gpu(offset: Tensor, mask: Tensor | None, frame: Frame, grad: Tensor | None = None) -> ModuleType | None:
    """The Triton kernels, where they can compute this."""
    kernels = cuda.kernels("corners", offset, mask, grad)
    return None if kernels is None or kernels.refusal(offset, mask, frame) else kernels


def _outputs(offset: Tensor) -> tuple[Tensor, Tensor]:
    P, S, axes, M = offset.shape
    share = offset.new_empty(P, S << axes, M)
    return share.transpose(1, 2), torch.empty_like(share, dtype=torch.long).transpose(1, 2)


@operator("nearfold::corners")
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
    """Share (P, M, S * E) and index (P, M, S * E) int64, a slot's corners next to one another, the last axis fastest.

    Args:
        offset: (P, S, a, M): how far every slot is moved on every axis, in positions.
        mask: (P, S, M): what a slot's shares are multiplied with, or None.
        grid: positions per axis.
        out: outputs per axis, M of them.
        size: slots per axis, S of them. Slot k of output o starts at o * stride + k * dilation - before.
        stride: per axis.
        dilation: per axis.
        before: padding before the first position, per axis.

    In memory both are (P, S * E, M). The shares of a slot are those of (bi, tri)linear interpolation. A corner outside
    the grid has index -1 and share 0; an offset that is NaN has shares that are NaN. Gradients flow to offset and mask.
    ValueError where operands do not fit.
    """
    frame = Frame(grid, out, size, stride, dilation, before)
    _require(offset, mask, frame)
    kernels = _on_gpu(offset, mask, frame)
    if kernels is not None:
        share, index = _outputs(offset)
        kernels.corners(offset, mask, frame, share.transpose(1, 2), index.transpose(1, 2))
        return share, index
    if not _served(offset, mask):
        with torch.autocast(offset.device.type, enabled=False):
            share, index = corners_torch.corners(offset, mask, frame)
        into = _outputs(offset)
        return into[0].copy_(share), into[1].copy_(index)
    share, index = _outputs(offset)
    still = None if mask is None else mask.contiguous()
    engine.run(
        "corners",
        *(offset.contiguous(), still, grid, out, size, stride, dilation, before),
        *(index.transpose(1, 2), share.transpose(1, 2), engine.threads()),
    )
    return share, index


@corners.register_fake
def _(
    offset: Tensor,
    mask: Tensor | None,
    grid: list[int],
    out: list[int],
    size: list[int],
    stride: list[int],
    dilation: list[int],
    before: list[int],
) -> tuple[Tensor, Tensor]:
    return _outputs(offset)


@operator("nearfold::corners_backward")
def corners_backward(
    grad: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    grid: list[int],
    out: list[int],
    size: list[int],
    stride: list[int],
    dilation: list[int],
    before: list[int],
) -> tuple[Tensor, Tensor]:
    """Gradients at offset and mask (an empty tensor where that is None)."""
    frame = Frame(grid, out, size, stride, dilation, before)
    _require(offset, mask, frame)
    require_tensors(grad=grad)
    entries = (offset.shape[0], offset.shape[3], offset.shape[1] << frame.axes)
    if grad.shape != entries or grad.dtype != offset.dtype:
        raise ValueError(f"grad must be {entries} {offset.dtype} as the shares, got {tuple(grad.shape)} {grad.dtype}")
    none = offset.new_empty(0)
    kernels = _on_gpu(offset, mask, frame, grad)
    if kernels is not None:
        d_offset, found = kernels.corners_backward(grad, offset, mask, frame)
        return d_offset, none if found is None else found
    if not _served(offset, mask):
        with torch.autocast(offset.device.type, enabled=False):
            d_offset, found = corners_torch.backward(grad, offset, mask, frame)
        return d_offset.contiguous(), none if found is None else found.contiguous()
    still = None if mask is None else mask.contiguous()
    d_offset = torch.empty_like(offset, memory_format=torch.contiguous_format)
    d_mask = None if still is None else torch.empty_like(still)
    engine.run(
        "corners_backward",
        *(
            grad.transpose(1, 2).contiguous(),
            offset.contiguous(),
            still,
            grid,
            out,
            size,
            stride,
            dilation,
            before,
            d_offset,
            d_mask,
        ),
        engine.threads(),
    )
    return d_offset, none if d_mask is None else d_mask


@corners_backward.register_fake
def _(
    grad: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    grid: list[int],
    out: list[int],
    size: list[int],
    stride: list[int],
    dilation: list[int],
    before: list[int],
) -> tuple[Tensor, Tensor]:
    return offset.new_empty(offset.shape), offset.new_empty(0) if mask is None else mask.new_empty(mask.shape)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    offset, mask, *ctx.frame = inputs
    ctx.save_for_backward(offset, mask)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the indices


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    offset, mask = ctx.saved_tensors
    if grad is None:
        return (None,) * 8
    d_offset, d_mask = corners_backward(grad, offset, mask, *ctx.frame)
    return d_offset, None if mask is None else d_mask, *(None,) * 6


corners.register_autograd(_backward, setup_context=_setup)


def _again(grad, offset, mask, *frame):  # type: ignore[no-untyped-def]
    return second.gradients(lambda o, m: corners_torch.corners(o, m, Frame(*frame))[0])(grad, offset, mask)


second.register(corners_backward, _again)
