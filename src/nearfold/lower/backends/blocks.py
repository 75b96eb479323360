"""`blocks`: whole blocks as neighbours: a search among their mean keys, then attention over their rows.

Where the queries of a block choose together, it is attention of every block's queries to the rows of the chosen blocks;
otherwise a table of positions, as in `gather`. Nothing of size N x N exists.

Shape legend: B batch, H heads, M queries, N positions, P blocks, s positions of a block, k chosen, e embedded features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nearfold.grammar.words import NearestBlocks, Softmax
from nearfold.kernels.attention import attention
from nearfold.kernels.names import LOST
from nearfold.kernels.select import MOST_SLOTS, select
from nearfold.kernels.slot_scores import slot_scores
from nearfold.lower.call import Call, refuse_derivatives, split_heads
from nearfold.lower.kernel import finish
from nearfold.lower.selection import present
from nearfold.lower.verdict import Facts, Verdict
from nearfold.lower.words.nearest_blocks import arranged, block_means, blocks_of, reads, reads_of, rows_of
from nearfold.lower.words.nearest_search import slots_last
from nearfold.lower.words.slots import summed, weighed

NAME = "blocks"


def supports(facts: Facts) -> Verdict:
    """Path nearest_blocks."""
    if not isinstance(facts.op.path, NearestBlocks):
        return Verdict.no(f"path is {facts.op.path.word}, not nearest_blocks")
    if facts.op.path.k > MOST_SLOTS:
        return Verdict.no(f"k={facts.op.path.k} is beyond {MOST_SLOTS}")
    return Verdict.yes("a search among mean keys, then the rows of the chosen blocks", "roundoff")


def _choice(call: Call, query: Tensor, key: Tensor) -> Tensor:
    """The chosen blocks (B, H, M, k), or (B, H, P, k) where a block's queries choose together."""
    path = call.op.path
    assert isinstance(path, NearestBlocks)
    block_N, _ = blocks_of(call.op, call.grid, query.device)
    keys = block_means(call, key)
    asks, home = query, block_N
    if path.pooled:
        asks, home = block_means(call, query, least=1), torch.arange(keys.shape[2], device=block_N.device)
    many, causal = path.k - path.include_self, call.op.shape.causal
    at = torch.empty(*asks.shape[:3], 0, dtype=torch.long, device=home.device)
    if many:
        place_P, shut = torch.arange(keys.shape[2], device=home.device), path.include_self or causal
        grid, rule = [keys.shape[2]], [int(causal), -1, 1]
        at = select(asks, keys, many, "dot", False, home, place_P, grid, rule, shut, float("-inf"))[1]
    lost = (at == LOST).any(-1, keepdim=True) if many else asks.isnan().any(-1, keepdim=True)
    return arranged(call, at, many, home).masked_fill(lost, LOST)


def _together(call: Call, at_BHPk: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of each block's queries to the rows of the chosen blocks: (B, H, N, d)."""
    _, at_Ps = blocks_of(call.op, call.grid, query.device)
    rho, H = call.op.weight.rho, query.shape[1]
    assert isinstance(rho, Softmax)
    B, P, s = query.shape[0], *at_Ps.shape
    index_BHPS = reads_of(at_Ps, at_BHPk)
    safe = index_BHPS.clamp(min=0)
    near_k, near_v = (
        t.gather(2, safe.flatten(2)[..., None].expand(-1, -1, -1, t.shape[3])).unflatten(2, (P, -1))
        for t in (key, value)
    )
    valid_BHPS = index_BHPS >= 0
    if call.keep is not None:
        valid_BHPS = valid_BHPS & present(call.keep, safe)
    ask = query[:, :, at_Ps.clamp(min=0)]  # (B, H, P, s, e)
    mask = valid_BHPS[..., None, :].expand(-1, -1, -1, s, -1)
    if call.op.shape.causal:
        mask = mask & (index_BHPS[..., None, :] <= at_Ps[None, None, :, :, None])
    q, k, v = (t.flatten(0, 2)[:, None].to(value.dtype) for t in (ask, near_k, near_v))
    y = attention(q, k, v, mask.flatten(0, 2)[:, None], scale=float(rho.scale))[:, 0].unflatten(0, (B, H, P))
    y = y.masked_fill(~mask.any(-1, keepdim=True), 0)
    y = y.masked_fill((at_BHPk == LOST).any(-1)[..., None, None], float("nan"))
    return y.flatten(2, 3)[:, :, rows_of(call.op, call.grid, y.device)]


def run(call: Call) -> Tensor:
    """(B, C, *grid)."""
    refuse_derivatives(call)
    path, rho, H = call.op.path, call.op.weight.rho, call.heads
    assert isinstance(path, NearestBlocks)
    B = call.value.shape[0]
    query, key = (t.expand(B, H, -1, -1) for t in call.embedded())
    at = _choice(call, query.detach(), key.detach())
    if path.pooled and isinstance(rho, Softmax):
        y_BHNd = _together(call, at, query, key, split_heads(call.value, H))
        y = y_BHNd.to(call.value.dtype).transpose(2, 3).flatten(1, 2)
        return finish(call, y.unflatten(2, call.out_grid))
    if path.pooled:
        at = at[:, :, blocks_of(call.op, call.grid, at.device)[0]]
    lost = (at == LOST).any(-1, keepdim=True)
    index = reads(call, at).masked_fill(lost, LOST)
    if rho.needs_score:
        query_rows, key_rows = (t.transpose(1, 2).flatten(2) for t in (query, key))
        score = slot_scores(query_rows, key_rows, slots_last(index, B, H)).permute(0, 3, 1, 2)
    else:
        score = torch.zeros_like(index, dtype=query.dtype)
    score = score.masked_fill(lost, float("nan"))
    return summed(call, index, weighed(call, score, index))
