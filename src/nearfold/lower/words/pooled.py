"""`pooled`: the mean keys and values of blocks.

Shape legend: B batch, H heads, M queries, N positions, P blocks, s positions of a block, e embedded features.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from nearfold._kept import kept
from nearfold.grammar import Basic
from nearfold.grammar.word import as_tuple
from nearfold.grammar.words import Pooled
from nearfold.kernels.names import INVALID
from nearfold.lower.call import Call, count_positions
from nearfold.lower.meaning import Lengths, PathMeaning, means
from nearfold.lower.selection import Selection, metric_scores


@means(Pooled)
class PooledMeaning(PathMeaning):
    """A slot for every block, which reads all of its positions alike."""

    everywhere = True

    def output(self, op: Basic, grid: Lengths) -> Lengths:
        if op.shape.causal and len(grid) > 1:
            raise ValueError(f"{op}: causal blocks are those of a sequence, got {len(grid)} grid axes")
        return grid

    def select(self, call: Call) -> Selection:
        q_BHMe, k_BHNe = call.embedded()
        path, N = cast(Pooled, call.op.path), count_positions(call.grid)
        at_Ps = _positions(as_tuple(path.size, call.ndim, "size"), path.bins, call.grid, k_BHNe.device)
        there_BPs = (at_Ps >= 0)[None] if call.keep is None else (at_Ps >= 0) & call.keep[:, at_Ps.clamp(min=0)]
        share_BPs = there_BPs / there_BPs.sum(-1, keepdim=True).clamp(min=1).to(k_BHNe.dtype)
        k_BHPe = (k_BHNe[:, :, at_Ps.clamp(min=0)] * share_BPs[:, None, ..., None]).sum(-2)
        valid_BMP = there_BPs.any(-1)[:, None]
        if (read_MP := readable(call.op, call.grid, at_Ps.device)) is not None:
            valid_BMP = valid_BMP & read_MP
        valid_BMP = valid_BMP.expand(-1, N, -1)
        score = metric_scores("dot", False, q_BHMe, k_BHPe).masked_fill(~valid_BMP[:, None], float("-inf"))
        valid = (valid_BMP[..., None] & there_BPs[:, None]).flatten(-2)[:, None]
        index = at_Ps.flatten().expand_as(valid).masked_fill(~valid, 0)
        share = share_BPs[:, None, None].expand(-1, -1, N, -1, -1).flatten(-2)
        return Selection(index, valid, score, N, share, at_Ps.shape[1])


def readable(op: Basic, grid: Lengths, device: torch.device) -> Tensor | None:
    """Under `causal`, which blocks a query may read (N, P): those that end before it or with it; None for all."""
    if not op.shape.causal:
        return None
    (n,), (size,) = grid, as_tuple(cast(Pooled, op.path).size, 1, "size")
    last_P = (torch.arange(-(-n // size), device=device) + 1) * size - 1
    return last_P <= torch.arange(n, device=device)[:, None]


@kept
def _positions(size: Lengths, bins: bool, grid: Lengths, device: torch.device) -> Tensor:
    """The positions (P, s) of every block in raster order, -1 where it has fewer."""
    at = torch.zeros(1, 1, dtype=torch.long, device=device)
    there = torch.ones_like(at, dtype=torch.bool)
    for n, many in zip(grid, size, strict=True):
        block_P = torch.arange(many if bins else -(-n // many), device=device)
        first_P, last_P = (
            (block_P * n // many, ((block_P + 1) * n + many - 1) // many)
            if bins
            else (block_P * many, (block_P + 1) * many)
        )
        line_Ps = first_P[:, None] + torch.arange(-(-n // many) + 1 if bins else many, device=device)
        inside_Ps = (line_Ps < last_P[:, None]) & (line_Ps < n)
        shape = at.shape[0] * line_Ps.shape[0], at.shape[1] * line_Ps.shape[1]
        at = (at[:, None, :, None] * n + line_Ps[None, :, None]).reshape(shape)
        there = (there[:, None, :, None] & inside_Ps[None, :, None]).reshape(shape)
    return at.masked_fill(~there, INVALID)
