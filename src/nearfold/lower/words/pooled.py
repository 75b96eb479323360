"""`pooled`: the mean keys and values of blocks; `agent`: mean queries that ask for the others.

Shape legend: B batch, H heads, M queries, N positions, P blocks, s positions of a block, a agents,
e embedded features.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from nearfold._kept import kept
from nearfold._numbers import parts
from nearfold.grammar import Basic
from nearfold.grammar.word import as_tuple
from nearfold.grammar.words import Agent, Pooled
from nearfold.kernels.names import INVALID
from nearfold.lower.call import Call, count_positions, split_heads
from nearfold.lower.meaning import Lengths, PathMeaning, RhoMeaning, means
from nearfold.lower.selection import Selection, metric_scores
from nearfold.lower.weighting import wide_dtype


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
        at_Ps = block_positions(as_tuple(path.size, call.ndim, "size"), path.bins, call.grid, k_BHNe.device)
        k_BHPe, there_BPs, share_BPs = block_means(call, k_BHNe, at_Ps)
        valid_BMP = there_BPs.any(-1)[:, None]
        if (read_MP := readable(call.op, call.grid, at_Ps.device)) is not None:
            valid_BMP = valid_BMP & read_MP
        valid_BMP = valid_BMP.expand(-1, N, -1)
        score = metric_scores("dot", False, q_BHMe, k_BHPe).masked_fill(~valid_BMP[:, None], float("-inf"))
        valid = (valid_BMP[..., None] & there_BPs[:, None]).flatten(-2)[:, None]
        index = at_Ps.flatten().expand_as(valid).masked_fill(~valid, 0)
        share = share_BPs[:, None, None].expand(-1, -1, N, -1, -1).flatten(-2)
        return Selection(index, valid, score, N, share, at_Ps.shape[1])


@means(Agent)
class AgentMeaning(RhoMeaning):
    """Two softmaxes, multiplied."""

    takes_mask = False

    def constant(self, call: Call, valid: Tensor, index: Tensor) -> Tensor:
        assert call.query is not None and call.key is not None
        q_BHNe, k_BHNe = (split_heads(t, call.heads).to(wide_dtype(call)) for t in (call.query, call.key))
        size = as_tuple(cast(Agent, call.op.weight.rho).size, call.ndim, "size")
        a_BHae, there_Bas, _ = block_means(call, q_BHNe, block_positions(size, True, call.grid, q_BHNe.device))
        scale, there_B11a = q_BHNe.shape[-1] ** -0.5, there_Bas.any(-1)[:, None, None]
        asked = masked_softmax(metric_scores("dot", False, a_BHae, k_BHNe) * scale, valid[:, :, :1])
        heard = masked_softmax(metric_scores("dot", False, q_BHNe, a_BHae) * scale, there_B11a)
        return heard @ asked


def masked_softmax(score: Tensor, valid: Tensor) -> Tensor:
    """Of the slots that are valid; zero in the others."""
    return torch.softmax(score.masked_fill(~valid, torch.finfo(score.dtype).min), -1).masked_fill(~valid, 0)


def block_means(call: Call, x_BHNe: Tensor, at_Ps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means (B, H, P, e) over blocks, which of their positions are there (B|1, P, s), and the share of each."""
    there_BPs = (at_Ps >= 0)[None] if call.keep is None else (at_Ps >= 0) & call.keep[:, at_Ps.clamp(min=0)]
    share_BPs = there_BPs / there_BPs.sum(-1, keepdim=True).clamp(min=1).to(x_BHNe.dtype)
    return (x_BHNe[:, :, at_Ps.clamp(min=0)] * share_BPs[:, None, ..., None]).sum(-2), there_BPs, share_BPs


def readable(op: Basic, grid: Lengths, device: torch.device) -> Tensor | None:
    """Under `causal`, which blocks a query may read (N, P): those that end before it or with it; None for all."""
    if not op.shape.causal:
        return None
    (n,), (size,) = grid, as_tuple(cast(Pooled, op.path).size, 1, "size")
    last_P = (torch.arange(parts(n, size), device=device) + 1) * size - 1
    return last_P <= torch.arange(n, device=device)[:, None]


@kept
def block_positions(size: Lengths, bins: bool, grid: Lengths, device: torch.device) -> Tensor:
    """The positions (P, s) of every block in raster order, -1 where it has fewer."""
    at = torch.zeros(1, 1, dtype=torch.long, device=device)
    there = torch.ones_like(at, dtype=torch.bool)
    for n, many in zip(grid, size, strict=True):
        block_P = torch.arange(many if bins else parts(n, many), device=device)
        first_P, last_P = (
            (block_P * n // many, ((block_P + 1) * n + many - 1) // many)
            if bins
            else (block_P * many, (block_P + 1) * many)
        )
        line_Ps = first_P[:, None] + torch.arange(parts(n, many) + 1 if bins else many, device=device)
        inside_Ps = (line_Ps < last_P[:, None]) & (line_Ps < n)
        shape = at.shape[0] * line_Ps.shape[0], at.shape[1] * line_Ps.shape[1]
        at = (at[:, None, :, None] * n + line_Ps[None, :, None]).reshape(shape)
        there = (there[:, None, :, None] & inside_Ps[None, :, None]).reshape(shape)
    return at.masked_fill(~there, INVALID)
