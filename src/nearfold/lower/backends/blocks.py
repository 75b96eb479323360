"""`blocks`: whole blocks as neighbours: a search among their mean keys, then attention over their rows.

Where the queries of a block choose together, it is attention of every block's queries to the rows of the chosen blocks;
otherwise a table of positions, as in `gather`. Nothing of size N x N exists.

Shape legend: B batch, H heads, M queries, N positions, P blocks, s positions of a block, k chosen, e embedded features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nearfold.grammar import Basic
from nearfold.grammar.words import NearestBlocks, Softmax
from nearfold.kernels.aggregate import aggregate
from nearfold.kernels.names import INVALID, LOST
from nearfold.kernels.select import MOST_SLOTS, select
from nearfold.kernels.slot_scores import slot_scores
from nearfold.kernels.weigh import slot_softmax
from nearfold.lower.call import Call, autocast_dtype, refuse_derivatives, split_heads
from nearfold.lower.kernel import finish
from nearfold.lower.verdict import Facts, Verdict
from nearfold.lower.weighting import alpha_of
from nearfold.lower.words.nearest_blocks import arranged, block_means, blocks_of, reads, rows_of

NAME = "blocks"


def supports(facts: Facts) -> Verdict:
    """Path nearest_blocks."""
    if not isinstance(facts.op.path, NearestBlocks):
        return Verdict.no(f"path is {facts.op.path.word}, not nearest_blocks")
    if facts.op.path.k > MOST_SLOTS:
        return Verdict.no(f"k={facts.op.path.k} is beyond {MOST_SLOTS}")
    return Verdict.yes("a search among mean keys, then the rows of the chosen blocks", "roundoff")


def takes_keys(op: Basic) -> bool:
    """Whether it heeds a mask of the keys."""
    return True


def _choice(call: Call, query: Tensor, key: Tensor) -> Tensor:
    """The chosen blocks (B, H, M, k), or (B, H, P, k) where a block's queries choose together."""
    path = call.op.path
    assert isinstance(path, NearestBlocks)
    block_N, _ = blocks_of(call.op, call.grid, query.device)
    with torch.no_grad():
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
    near_k, near_v = (
        t.gather(2, index_BHPS.clamp(min=0).flatten(2)[..., None].expand(-1, -1, -1, t.shape[3])).unflatten(2, (P, -1))
        for t in (key, value)
    )
    valid_BHPS = index_BHPS >= 0
    if call.keep is not None:
        there = call.keep.gather(1, index_BHPS.clamp(min=0).flatten(1)).view(index_BHPS.shape)
        valid_BHPS = valid_BHPS & there
    ask = query[:, :, at_Ps.clamp(min=0)]  # (B, H, P, s, e)
    mask = valid_BHPS[..., None, :]
    if call.op.shape.causal:
        mask = mask & (index_BHPS[..., None, :] <= at_Ps[None, None, :, :, None])
    y = torch.nn.functional.scaled_dot_product_attention(
        ask.flatten(0, 2), near_k.flatten(0, 2).to(ask.dtype), near_v.flatten(0, 2).to(ask.dtype),
        mask.expand(-1, -1, -1, s, -1).flatten(0, 2), scale=float(rho.scale),
    ).unflatten(0, (B, H, P))  # fmt: skip
    y = y.masked_fill(~mask.any(-1, keepdim=True), 0)
    y = y.masked_fill((at_BHPk == LOST).any(-1)[..., None, None], float("nan"))
    return y.flatten(2, 3)[:, :, rows_of(call.op, call.grid, y.device)]


def reads_of(at_Ps: Tensor, at_BHPk: Tensor) -> Tensor:
    """Positions (B, H, P, k s) of the chosen blocks, -1 for none."""
    return at_Ps[at_BHPk.clamp(min=0)].masked_fill((at_BHPk < 0)[..., None], INVALID).flatten(-2)


def run(call: Call) -> Tensor:
    """(B, C, *grid)."""
    refuse_derivatives(call)
    path, rho, H = call.op.path, call.op.weight.rho, call.heads
    assert isinstance(path, NearestBlocks)
    B = call.value.shape[0]
    query, key = (t.expand(B, H, -1, -1) for t in call.embedded())
    at = _choice(call, query, key)
    if path.pooled and isinstance(rho, Softmax):
        y_BHNd = _together(call, at, query, key, split_heads(call.value, H))
        y = y_BHNd.to(call.value.dtype).transpose(2, 3).flatten(1, 2)
        return finish(call, y.unflatten(2, call.out_grid))
    if path.pooled:
        at = at[:, :, blocks_of(call.op, call.grid, at.device)[0]]
    lost = (at == LOST).any(-1, keepdim=True)
    index = reads(call, at).masked_fill(lost, LOST)
    table = index.permute(0, 2, 3, 1)
    if rho.needs_score:
        rows = [t.transpose(1, 2).flatten(2) for t in (query, key)]
        score = slot_scores(rows[0], rows[1], table).permute(0, 3, 1, 2)
    else:
        score = torch.zeros_like(index, dtype=query.dtype)
    if isinstance(rho, Softmax):
        alpha = slot_softmax(score, index, float(rho.scale))
    else:
        alpha = alpha_of(rho, score.masked_fill(lost, float("nan")), index >= 0)
    dtype = autocast_dtype(call.value) or call.value.dtype
    value = call.rows().to(dtype).contiguous()
    y = aggregate(value, table, alpha.permute(0, 2, 3, 1).to(dtype), None, 1)
    return finish(call, y.transpose(1, 2).unflatten(2, call.out_grid))
