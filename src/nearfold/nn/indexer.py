"""The loss of an indexer: it learns to choose what attention would weigh most.

Shape legend: B batch, M queries, R candidates, S slots, I heads of the indexer, e features of one, H heads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nearfold.grammar import Basic
from nearfold.kernels.choose import index_scores
from nearfold.lower.call import Call, Run, count_positions
from nearfold.lower.execute import execute
from nearfold.lower.frame import Frame
from nearfold.lower.meaning import meaning
from nearfold.lower.selection import allowed, metric_scores
from nearfold.lower.words.indexer import index_maps, indexed_by
from nearfold.lower.words.nearest import candidates_of
from nearfold.lower.words.nearest_search import searched
from nearfold.nn.mixer import Mixer

BLOCK = 2**21  # numbers of the scores held at once, over all heads


def indexer_loss(layer: Mixer, x: Tensor, *, everywhere: bool = False) -> Tensor:
    """How far an indexer is from the attention that it chooses for: a scalar, in float32 at least.

    The Kullback-Leibler divergence of the softmax of the index scores from the attention, whose heads are averaged;
    the mean over all queries, the sum over the operation's parts that have an indexer. Attention and input are given:
    the gradient reaches the indexer's parameters (``index_...``) and nothing else.

    Args:
        layer: a `Mixer` (or a layer of tokens) with ``nearest(k, by=indexer(...))`` under softmax.
        x: what the layer is applied to.
        everywhere: over all positions that a query may read, to warm a new indexer up while attention is still dense;
            it costs what dense attention costs. Otherwise over the k that were chosen.

    Raises:
        ValueError: the layer has no indexer, or one under weights that are not shares of one, as softmax's are.

    Source: DeepSeek-V3.2 (arXiv 2512.02556, eq. 3 and 4).

    >>> layer = Mixer("nearest(4, scaled, by=indexer(2, 8)) | ranked | softmax(heads=2)", 8, ndim=1)
    >>> indexer_loss(layer, torch.randn(2, 8, 20)).backward()
    >>> [name for name, p in layer.named_parameters() if p.grad is not None]
    ['index_query_weight', 'index_key_weight', 'index_share_weight']
    """
    parts = [part for part in layer.operation.parts if indexed_by(part) is not None]
    if not parts:
        raise ValueError(f"layer has no indexer: {layer.operation}; write nearest(k, by=indexer(heads, size))")
    odd = next((part for part in parts if not meaning(part.weight.rho).shares), None)
    if odd is not None:
        raise ValueError(
            f"an indexer learns from attention; {odd} weighs by {odd.weight.rho}, which does not share one out"
        )
    losses: list[Tensor] = []

    def choose(op: Basic, at: Frame) -> Run:
        def run(call: Call) -> Tensor:
            if indexed_by(call.op) is not None:
                losses.append(_everywhere(call) if everywhere else _chosen(call))
            made = meaning(call.op.weight.kernel).made(call)
            return call.value.new_zeros(call.value.shape[0], made, *call.out_grid)

        return run

    read = layer.prepare(x).detach()
    own: dict[str, Any] = {n: t if ".index_" in f".{n}" else t.detach() for n, t in layer.tensors().items()}
    execute(layer.operation, own, read, choose, out_channels=layer.made_channels)
    return torch.stack(losses).sum()


def _divergence(attention: Tensor, score: Tensor, valid: Tensor) -> Tensor:
    """Sum over all queries of KL(attention | softmax of the scores), over valid slots."""
    said = torch.log_softmax(score.masked_fill(~valid, torch.finfo(score.dtype).min), -1)
    return (torch.xlogy(attention, attention) - attention * said.masked_fill(~valid, 0)).sum()


def _chosen(call: Call) -> Tensor:
    with torch.no_grad():
        weighed, at_BHMS = searched(call)
    assert weighed is not None
    at_BMS, valid = at_BHMS[:, 0].clamp(min=0), at_BHMS[:, 0] >= 0
    attention = _attention(call, weighed, valid[:, None]).to(weighed.dtype)
    B, M, S = at_BMS.shape
    every_N = torch.arange(count_positions(call.padded), device=at_BMS.device)
    query_BMIe, share_BMI, key_BNe = index_maps(call, call.query_index(), every_N)
    key_BMSe = key_BNe.gather(1, at_BMS.flatten(1)[..., None].expand(-1, -1, key_BNe.shape[-1])).view(B, M, S, -1)
    score_BMS = (share_BMI[:, :, None] @ (query_BMIe @ key_BMSe.mT).relu())[:, :, 0]
    return _divergence(attention, score_BMS, valid) / max(B * M, 1)


def _attention(call: Call, score: Tensor, valid: Tensor) -> Tensor:
    """Softmax over valid slots, the mean over the heads (B, M, S)."""
    rho = call.op.weight.rho
    alpha: Tensor = meaning(rho).weigh(rho, score.masked_fill(~valid, -math.inf), valid.expand_as(score))
    return alpha.mean(1)


def _everywhere(call: Call) -> Tensor:
    query_M, key_R = call.query_index(), candidates_of(call)
    (ask, share, answer), near = index_maps(call, query_M, key_R), call.similarity
    with torch.no_grad():
        query, key = call.embedded()
    key, total = key[:, :, key_R], share.new_zeros(())
    B, M = ask.shape[:2]
    step = max(1, BLOCK // max(B * max(ask.shape[2], query.shape[1]) * key_R.shape[0], 1))
    for start in range(0, M, step):
        rows = slice(start, min(start + step, M))
        mask = allowed(call, query_M[rows], key_R)
        with torch.no_grad():
            weighed = metric_scores(near.reduced, near.squared, query[:, :, query_M[rows]], key)
            every = torch.ones(weighed.shape[-2:], dtype=torch.bool, device=key_R.device)
            valid = (every if mask is None else mask)[None, None]
            attention = _attention(call, weighed, valid)
        total = total + _divergence(attention, index_scores(ask[:, rows], share[:, rows], answer), valid[:, 0])
    return total / max(B * M, 1)
