"""`nearest_blocks`: whole blocks, chosen by the mean of their keys.

Shape legend: B batch, H heads, M queries, N positions, P blocks, s positions of a block, k chosen, S = k s slots,
e embedded features.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from nearfold._kept import kept
from nearfold._numbers import parts
from nearfold.grammar import Basic
from nearfold.grammar.word import as_tuple
from nearfold.grammar.words import NearestBlocks
from nearfold.kernels.names import INVALID, LOST
from nearfold.lower.call import Call, count_positions
from nearfold.lower.meaning import Lengths, PathMeaning, means
from nearfold.lower.selection import Selection, metric_scores, present


@means(NearestBlocks)
class NearestBlocksMeaning(PathMeaning):
    """The blocks whose mean key is most similar."""

    def output(self, op: Basic, grid: Lengths) -> Lengths:
        if op.shape.causal and len(grid) > 1:
            raise ValueError(f"{op}: causal blocks are those of a sequence, got {len(grid)} grid axes")
        return grid

    def unfilled(self, op: Basic, grid: Lengths, context: Lengths | None) -> str | None:
        path, many = cast(NearestBlocks, op.path), math.prod(block_counts(op, grid))
        return (
            f"{path}: k={path.k}, but the map has only {many} blocks; the others read nothing"
            if many < path.k
            else None
        )

    def select(self, call: Call) -> Selection:
        q_BHNe, k_BHNe = (t.expand(-1, call.heads, -1, -1) for t in call.embedded())
        at_BHMk = self._choice(call, q_BHNe, k_BHNe)
        index = reads(call, at_BHMk)
        lost = (at_BHMk == LOST).any(-1, keepdim=True)
        valid = index >= 0
        index = index.masked_fill(~valid, 0)
        if not call.op.weight.rho.needs_score:
            score = torch.zeros_like(index, dtype=q_BHNe.dtype)
        else:
            B, _, M, S = index.shape
            k_BHMSe = k_BHNe.expand(B, -1, -1, -1).gather(
                2, index.flatten(2)[..., None].expand(-1, -1, -1, k_BHNe.shape[3])
            )
            score = metric_scores("dot", False, q_BHNe.unsqueeze(-2), k_BHMSe.unflatten(2, (M, S))).squeeze(-2)
        score = score.masked_fill(~valid, float("-inf")).masked_fill(lost, float("nan"))
        return Selection(index, valid, score, count_positions(call.grid))

    def _choice(self, call: Call, q_BHNe: Tensor, k_BHNe: Tensor) -> Tensor:
        """The chosen blocks (B, H, M, k), from the definition; -1 where there are fewer, -2 for a query that is NaN."""
        path = cast(NearestBlocks, call.op.path)
        block_N, _ = blocks_of(call.op, call.grid, q_BHNe.device)
        keys, asks = block_means(call, k_BHNe), q_BHNe
        if path.pooled:
            asks = block_means(call, q_BHNe, least=1)[:, :, block_N]
        score_BHMP = metric_scores("dot", False, asks, keys)
        block_P = torch.arange(keys.shape[2], device=block_N.device)
        own = block_P == block_N[:, None]
        bad = own if path.include_self else torch.zeros_like(own)
        if call.op.shape.causal:
            bad = bad | (block_P >= block_N[:, None])
        score_BHMP = score_BHMP.masked_fill(bad, float("-inf"))
        lost = asks.isnan().any(-1, keepdim=True)
        score_BHMP = score_BHMP.masked_fill(score_BHMP.isnan(), float("-inf"))
        many = path.k - path.include_self
        best, at = score_BHMP.sort(dim=-1, descending=True, stable=True)
        at = at.masked_fill(best == float("-inf"), INVALID)[..., :many]
        return arranged(call, at, many, block_N).masked_fill(lost, LOST)


def block_counts(op: Basic, grid: Lengths) -> Lengths:
    """Blocks along each axis."""
    size = as_tuple(cast(NearestBlocks, op.path).size, len(grid), "size")
    return tuple(parts(n, s) for n, s in zip(grid, size, strict=True))


@kept
def _block_of(size: Lengths, grid: Lengths, device: torch.device) -> Tensor:
    """The block (N,) of every position, raster order of blocks."""
    flat = torch.zeros(1, dtype=torch.long, device=device)
    for n, s in zip(grid, size, strict=True):
        flat = (flat[:, None] * parts(n, s) + torch.arange(n, device=device) // s).reshape(-1)
    return flat


@kept
def _positions_of(size: Lengths, grid: Lengths, device: torch.device) -> Tensor:
    """The positions (P, s) of every block in raster order, -1 beyond the grid."""
    at = torch.zeros(1, 1, dtype=torch.long, device=device)
    there = torch.ones_like(at, dtype=torch.bool)
    for n, s in zip(grid, size, strict=True):
        line = torch.arange(parts(n, s) * s, device=device).view(-1, s)
        shape = at.shape[0] * line.shape[0], at.shape[1] * s
        at = (at[:, None, :, None] * n + line[None, :, None]).reshape(shape)
        there = (there[:, None, :, None] & (line < n)[None, :, None]).reshape(shape)
    return at.masked_fill(~there, INVALID)


@kept
def _row_of(size: Lengths, grid: Lengths, device: torch.device) -> Tensor:
    """Where every position (N,) stands in the blocks' rows, P of s."""
    inside = torch.zeros(1, dtype=torch.long, device=device)
    for n, s in zip(grid, size, strict=True):
        inside = (inside[:, None] * s + torch.arange(n, device=device) % s).reshape(-1)
    return _block_of(size, grid, device) * math.prod(size) + inside


def rows_of(op: Basic, grid: Lengths, device: torch.device) -> Tensor:
    """Where every position (N,) stands in the rows of all blocks (P s)."""
    return _row_of(as_tuple(cast(NearestBlocks, op.path).size, len(grid), "size"), grid, device)


def blocks_of(op: Basic, grid: Lengths, device: torch.device) -> tuple[Tensor, Tensor]:
    """The block (N,) of every position, and the positions (P, s) of every block, -1 beyond the grid."""
    size = as_tuple(cast(NearestBlocks, op.path).size, len(grid), "size")
    return _block_of(size, grid, device), _positions_of(size, grid, device)


def block_means(call: Call, x_BHNe: Tensor, least: int = 0) -> Tensor:
    """Means (B, H, P, e) over the positions of every block that are there, ``least`` of them: of none NaN, or zero."""
    _, at_Ps = blocks_of(call.op, call.grid, x_BHNe.device)
    there_BPs = (at_Ps >= 0)[None]
    if call.keep is not None:
        there_BPs = there_BPs & call.keep[:, at_Ps.clamp(min=0)]
    rows = x_BHNe[:, :, at_Ps.clamp(min=0)].masked_fill(~there_BPs[:, None, ..., None], 0)
    return rows.sum(-2) / there_BPs.sum(-1).clamp(min=least)[:, None, :, None]


def arranged(call: Call, at_BHMk: Tensor, many: int, block_N: Tensor) -> Tensor:
    """The chosen blocks, filled up to ``many``, with the own one first where asked for, in the order of the shape."""
    path, short = cast(NearestBlocks, call.op.path), many - at_BHMk.shape[-1]
    if short > 0:
        at_BHMk = torch.nn.functional.pad(at_BHMk, (0, short), value=INVALID)
    if path.include_self:
        at_BHMk = torch.cat([block_N[:, None].expand(*at_BHMk.shape[:2], -1, 1), at_BHMk], -1)
    if call.op.shape.word == "ranked":
        return at_BHMk
    behind = math.prod(block_counts(call.op, call.grid))
    return at_BHMk.gather(-1, at_BHMk.masked_fill(at_BHMk < 0, behind).sort(dim=-1, stable=True).indices)


def reads_of(at_Ps: Tensor, at_BHMk: Tensor) -> Tensor:
    """Positions (B, H, M, k s) of the chosen blocks; -1 beyond the grid, or where none is chosen."""
    return at_Ps[at_BHMk.clamp(min=0)].masked_fill((at_BHMk < 0)[..., None], INVALID).flatten(-2)


def reads(call: Call, at_BHMk: Tensor) -> Tensor:
    """As `reads_of`, and -1 after the query under a causal shape, or where the position is not there."""
    index = reads_of(blocks_of(call.op, call.grid, at_BHMk.device)[1], at_BHMk)
    if call.op.shape.causal:
        index = index.masked_fill(index > torch.arange(index.shape[2], device=index.device)[:, None], INVALID)
    if call.keep is not None:
        index = index.masked_fill(~present(call.keep, index.clamp(min=0)), INVALID)
    return index
