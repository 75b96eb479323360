"""Arithmetic of graph convolutions in PyTorch, for the CPU and CUDA alike: what neighbours bring a query.

Rows of channels, and at most one row for each query and slot where a perceptron of pairs asks for it; a single map is
split into one of the query and one of what it reads, so that it runs once for each position and not for each pair.

Shape legend: B batch, N positions, M queries, S slots, C channels, O output channels, h hidden channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.kernels.names import INVALID


def rows_at(rows_BNC: Tensor, at_BM: Tensor) -> Tensor:
    """Rows (B, M, C) at positions (B, M); negative ones read the first."""
    B, N, C = rows_BNC.shape
    flat = at_BM.clamp(min=0) + torch.arange(B, device=at_BM.device)[:, None] * N
    return rows_BNC.reshape(B * N, C).index_select(0, flat.flatten()).unflatten(0, at_BM.shape)


def largest(rows_BNC: Tensor, at_BMS: Tensor) -> Tensor:
    """For every query and channel the position (B, M, C) of the largest value that it reads, the first among equals.

    A NaN is the largest. Negative positions in ``at`` read nothing; -1 where all of them do. A pass for each slot:
    memory is that of the output.

    >>> rows = torch.tensor([[[1.0, 5.0], [3.0, 5.0], [2.0, 9.0]]])
    >>> largest(rows, torch.tensor([[[0, 1, -1]]])).tolist()
    [[[1, 0]]]
    """
    rows_BNC = rows_BNC.detach()
    B, M, S = at_BMS.shape
    where = at_BMS.new_full((B, M, rows_BNC.shape[2]), INVALID)
    best = rows_BNC.new_full(where.shape, -float("inf"))
    for slot in range(S):
        at_BM1 = at_BMS[..., slot, None]
        read = rows_at(rows_BNC, at_BMS[..., slot])
        better = (read > best) | (where < 0) | (read.isnan() & ~best.isnan())
        better = better & (at_BM1 >= 0)
        best, where = torch.where(better, read, best), torch.where(better, at_BM1, where)
    return where


def largest_values(rows_BNC: Tensor, at_BMS: Tensor) -> Tensor:
    """The largest values (B, M, C) that every query reads, channel by channel; zero where it reads nothing."""
    where = largest(rows_BNC, at_BMS)
    return rows_BNC.gather(1, where.clamp(min=0)).masked_fill(where < 0, 0)


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
    most = largest_values(F.linear(rows_BNC, read), at_BMS)
    y = F.leaky_relu(F.linear(own_BMC, own, bias) + most, slope)
    return y.masked_fill((at_BMS < 0).all(-1)[..., None], 0)


def largest_slot(message_BMSO: Tensor, at_BMS: Tensor) -> Tensor:
    """The largest over the slots that read something, the first among equals: (B, M, O)."""
    there = (at_BMS >= 0)[..., None]
    first = message_BMSO.detach().masked_fill(~there, -float("inf")).argmax(2, keepdim=True)
    return message_BMSO.gather(2, first)[:, :, 0].masked_fill(~there.any(2), 0)
