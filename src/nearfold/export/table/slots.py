"""What is done with the neighbours that were found, in core ATen: gather, weigh, sum.

The neighbours' features (B, M, S, C) are held, which the library's operators never do.

Shape legend: B batch, N positions, M queries, S slots, E entries of a slot, H heads, C channels, d = C / H, O outputs,
G groups, c channels of a group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.kernels.names import INVALID, LOST
from nearfold.kernels.select import wide

NAN = float("nan")


def gathered(value: Tensor, index: Tensor) -> Tensor:
    """(B, N, C) at (B, M, S, H): (B, M, S, H, d), zero where the index is negative."""
    H = index.shape[3]
    d = value.shape[2] // H
    there = index >= 0
    rows = torch.where(there, index, 0).flatten(1, 2)[..., None].expand(-1, -1, -1, d)
    near = value.unflatten(2, (H, d)).gather(1, rows).unflatten(1, index.shape[1:3])
    return near.masked_fill(~there[..., None], 0)


def aggregate(
    value: Tensor, index: Tensor, alpha: Tensor | None, weight: Tensor | None, groups: int, entries: int = 1
) -> Tensor:
    """`nearfold::aggregate`."""
    dtype, C = value.dtype, value.shape[2]
    near_BMSHd = gathered(wide(value), index)
    if alpha is None:
        near_BMSHd = near_BMSHd.masked_fill((index == LOST)[..., None], NAN)
    else:
        near_BMSHd = near_BMSHd * wide(alpha)[..., None]
    near = near_BMSHd.flatten(3)
    if weight is None:
        return near.sum(2).to(dtype)
    if entries > 1:
        near = near.unflatten(2, (-1, entries)).sum(3)
    weight = wide(weight)
    O, c, S = weight.shape
    if c == 1 and groups == C == O:
        return (near * weight[:, 0].t()).sum(2).to(dtype)
    B, M = near.shape[:2]
    if groups == 1:  # where quantisers look for weights
        return F.linear(near.flatten(2), weight.permute(0, 2, 1).flatten(1)).to(dtype)
    rows = near.unflatten(3, (groups, c)).permute(3, 0, 1, 2, 4).reshape(groups, B * M, S * c)
    kernel = weight.unflatten(0, (groups, O // groups)).permute(0, 3, 2, 1).reshape(groups, S * c, O // groups)
    return (rows @ kernel).unflatten(1, (B, M)).permute(1, 2, 0, 3).flatten(2).to(dtype)


def slot_scores(query: Tensor, key: Tensor, index: Tensor) -> Tensor:
    """`nearfold::slot_scores`."""
    H = index.shape[3]
    near = gathered(wide(key), index)
    score = (near * wide(query).unflatten(2, (H, -1))[:, :, None]).sum(-1)
    return score.permute(0, 3, 1, 2).to(query.dtype).contiguous().permute(0, 2, 3, 1)


def largest(rows: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """`nearfold::largest`."""
    there = (at >= 0)[..., None]
    near = gathered(rows, at[..., None])[:, :, :, 0].masked_fill(~there, float("-inf"))
    none = ~there.any(2)
    best = near.amax(2).masked_fill(none, 0)
    slot = near.argmax(2)
    return best, torch.where(none, INVALID, at.gather(2, slot))


def entmax(score: Tensor, power: int) -> Tensor:
    """`nearfold::entmax`, by a sort (arXiv 1602.02068, algorithm 1; arXiv 1905.05702, algorithm 2)."""
    scores = wide(score)
    top = scores.amax(-1, keepdim=True)
    none = top == float("-inf")
    # of scores less the largest, those at -1 and below have no share
    z = ((scores - top.masked_fill(none, 0)) / power).clamp(min=-2)
    ordered = z.topk(z.shape[-1], -1).values
    count = torch.ones_like(ordered).cumsum(-1)
    mean = ordered.cumsum(-1) / count
    if power == 1:
        tau = mean - 1 / count
    else:
        spread = ordered.square().cumsum(-1) - count * mean.square()
        tau = mean - ((1 - spread) / count).clamp(min=0).sqrt()
    taking = (tau <= ordered).sum(-1, keepdim=True)
    share = (z - tau.gather(-1, (taking - 1).clamp(min=0))).clamp(min=0) ** power
    lost = top.isnan() | (top == float("inf"))
    return share.masked_fill(none, 0).masked_fill(lost, NAN).to(score.dtype)
