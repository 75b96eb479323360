"""Arithmetic of graph convolutions: what neighbours bring a query. `nearfold::largest` has a compiled path on the CPU.

Rows of channels, and at most one row for each query and slot where a perceptron of pairs asks for it; a single map is
split into one of the query and one of what it reads, so that it runs once for each position and not for each pair.

Shape legend: B batch, N positions, M queries, S slots, C channels, O output channels, h hidden channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nearfold.kernels import engine
from nearfold.kernels.names import INVALID, require_tensors
from nearfold.kernels.operator import operator


def rows_at(rows_BNC: Tensor, at_BM: Tensor) -> Tensor:
    """Rows (B, M, C) at positions (B, M); negative ones read the first."""
    B, N, C = rows_BNC.shape
    flat = at_BM.clamp(min=0) + torch.arange(B, device=at_BM.device)[:, None] * N
    return rows_BNC.reshape(B * N, C).index_select(0, flat.flatten()).unflatten(0, at_BM.shape)


def _require(rows_BNC: Tensor, at_BMS: Tensor) -> None:
    require_tensors(rows=rows_BNC, at=at_BMS)
    fits = rows_BNC.dim() == at_BMS.dim() == 3 and rows_BNC.shape[0] == at_BMS.shape[0]
    if not fits or at_BMS.dtype != torch.long or not rows_BNC.is_floating_point():
        raise ValueError(
            "rows must be (B, N, C), floating point, and at (B, M, S) int64, got "
            f"{tuple(rows_BNC.shape)} {rows_BNC.dtype} and {tuple(at_BMS.shape)} {at_BMS.dtype}"
        )


@operator("nearfold::largest")
def largest(rows: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """For every query and channel the largest value (B, M, C) that it reads, and its position, the first among equals.

    Args:
        rows: (B, N, C).
        at: (B, M, S) int64, positions; negative ones read nothing. Zero, and position -1, where all of them do.

    A NaN is the largest. Memory is that of the output.

    >>> rows = torch.tensor([[[1.0, 5.0], [3.0, 5.0], [2.0, 9.0]]])
    >>> largest(rows, torch.tensor([[[0, 1, -1]]]))
    (tensor([[[3., 5.]]]), tensor([[[1, 0]]]))
    """
    _require(rows, at)
    B, M, S = at.shape
    if engine.serves(rows) and at.is_cpu:
        best = rows.new_empty(B, M, rows.shape[2])
        where = torch.empty(best.shape, dtype=torch.long)
        engine.run(
            "largest", rows.contiguous(), at.contiguous(), best, where, engine.threads(B * M * S * rows.shape[2])
        )
        return best, where
    if at.numel() and int(at.max()) >= rows.shape[1]:
        raise ValueError(f"at holds a position beyond the {rows.shape[1]} there are: {int(at.max())}")
    where = at.new_full((B, M, rows.shape[2]), INVALID)
    best = rows.new_zeros(where.shape)
    for slot in range(S):
        at_BM1 = at[..., slot, None]
        read = rows_at(rows, at[..., slot])
        better = ((read > best) | (where < 0) | (read.isnan() & ~best.isnan())) & (at_BM1 >= 0)
        best, where = torch.where(better, read, best), torch.where(better, at_BM1, where)
    return best, where


@largest.register_fake
def _(rows: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    shape = (*at.shape[:2], rows.shape[2])
    return rows.new_empty(shape), at.new_empty(shape)


@operator("nearfold::largest_backward")
def largest_backward(grad: Tensor, where: Tensor, positions: int) -> Tensor:
    """The gradient at `largest`'s rows (B, N, C): ``grad`` (B, M, C), added up at the positions ``where``."""
    if where.shape != grad.shape or grad.dim() != 3 or where.dtype != torch.long:
        raise ValueError(
            f"grad and where must be (B, M, C), where int64, got {tuple(grad.shape)} and {tuple(where.shape)} "
            f"{where.dtype}"
        )
    d_rows = grad.new_empty(grad.shape[0], positions, grad.shape[2])
    if engine.serves(grad) and where.is_cpu:
        engine.run("largest_backward", grad.contiguous(), where.contiguous(), d_rows, engine.threads())
        return d_rows
    return d_rows.zero_().scatter_add_(1, where.clamp(min=0), grad.masked_fill(where < 0, 0))


@largest_backward.register_fake
def _(grad: Tensor, where: Tensor, positions: int) -> Tensor:
    return grad.new_empty(grad.shape[0], positions, grad.shape[2])


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(output[1])
    ctx.positions = inputs[0].shape[1]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    return None if grad is None else largest_backward(grad, ctx.saved_tensors[0], ctx.positions), None


def _setup_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(inputs[1])


def _backward_backward(ctx, grad):  # type: ignore[no-untyped-def]
    (where,) = ctx.saved_tensors
    return grad.gather(1, where.clamp(min=0)).masked_fill(where < 0, 0), None, None


largest.register_autograd(_backward, setup_context=_setup)
largest_backward.register_autograd(_backward_backward, setup_context=_setup_backward)


@register_flop_formula(torch.ops.nearfold.largest)
def _flops(rows_shape, at_shape, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return int(math.prod(at_shape) * rows_shape[2])


@register_flop_formula(torch.ops.nearfold.largest_backward)
def _backward_flops(grad_shape, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return int(math.prod(grad_shape))


def split_map(weight_o2C: Tensor) -> tuple[Tensor, Tensor]:
    """A map of [x_i, x_j - x_i] as one of x_i and one of x_j."""
    own, relative = weight_o2C.tensor_split(2, 1)
    return own - relative, relative


def pairs(
    rows_BNC: Tensor, own_BMC: Tensor, at_BMS: Tensor, weight: Tensor, bias: Tensor | None, slope: float
) -> Tensor:
    """A map and a leaky ReLU of every pair: (B, M, S, h)."""
    own, read = split_map(weight)
    u_BNh, a_BMh = F.linear(rows_BNC, read), F.linear(own_BMC, own, bias)
    u_BMSh = rows_at(u_BNh, at_BMS.flatten(1)).unflatten(1, at_BMS.shape[1:])
    return F.leaky_relu(a_BMh[:, :, None] + u_BMSh, slope)


def largest_pair(
    rows_BNC: Tensor, own_BMC: Tensor, at_BMS: Tensor, weight: Tensor, bias: Tensor | None, slope: float
) -> Tensor:
    """The largest of `pairs` (B, M, O): a leaky ReLU rises, so that it comes once, after the largest."""
    own, read = split_map(weight)
    most = largest(F.linear(rows_BNC, read), at_BMS)[0]
    y = F.leaky_relu(F.linear(own_BMC, own, bias) + most, slope)
    return y.masked_fill((at_BMS < 0).all(-1)[..., None], 0)


def largest_slot(message_BMSO: Tensor, at_BMS: Tensor) -> Tensor:
    """The largest over the slots that read something, the first among equals: (B, M, O)."""
    there = (at_BMS >= 0)[..., None]
    first = message_BMSO.detach().masked_fill(~there, -float("inf")).argmax(2, keepdim=True)
    return message_BMSO.gather(2, first)[:, :, 0].masked_fill(~there.any(2), 0)
