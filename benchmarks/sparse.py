"""Attention that reads few of many positions: unions, an indexer, blocks; each beside dense attention of the same map.

The layers have no projections, so that only attention is timed; an indexer has its own. Each is checked by a mask over
all positions for some queries, which are drawn.

Shape legend: B batch, C channels, H heads, N positions, n drawn queries, d features of a head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case, Forward, Peer
from nearfold.grammar.unions import alone
from nearfold.lower.windows import window_index
from nearfold.nn import Mixer

Shape = tuple[int, ...]
SAMPLE = 64


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, C, N) -> (B, H, N, d)."""
    return x.unflatten(1, (heads, -1)).transpose(2, 3)


def _masked(heads: int, chosen: Tensor, mask_of: Forward) -> Peer:
    """Attention of the drawn queries under ``mask_of(x)`` (B|1, H|1, n, N): only they are compared."""

    def forward(x: Tensor) -> Tensor:
        q = _heads(x, heads)
        score = (q[:, :, chosen] @ q.mT / math.sqrt(q.shape[-1])).masked_fill(~mask_of(x), -math.inf)
        y = (score.softmax(-1) @ q).transpose(2, 3).flatten(1, 2)
        return torch.zeros_like(x).index_copy(2, chosen, y)

    return Peer(forward, timed=False, part=lambda y, *_: y[:, :, chosen])


def _dense(heads: int, causal: bool = False) -> Peer:
    def forward(x: Tensor) -> Tensor:
        q = _heads(x, heads)
        return F.scaled_dot_product_attention(q, q, q, is_causal=causal).transpose(2, 3).flatten(1, 2)

    return Peer(forward, same=False)


def union(shape: Shape, heads: int, paths: str) -> Case:
    """A union of tables: against SDPA under its dense mask, which computes the same."""
    layer = Mixer(f"{paths} | box | softmax(heads={heads}, project=none)", shape[1], ndim=1)
    index, valid = window_index(layer.operation, shape[2:], torch.device("cpu"))
    assert len(alone(layer.operation)) > 1
    mask = torch.zeros(shape[2], shape[2], dtype=torch.int32).scatter_add_(1, index, valid.int()) > 0

    def under_mask(x: Tensor) -> Tensor:
        q = _heads(x, heads)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask).transpose(2, 3).flatten(1, 2)

    return Case((torch.randn(shape),), layer, {"SDPA, dense mask": Peer(under_mask)}, module=layer)


def indexed(shape: Shape, heads: int, k: int, by: str) -> Case:
    """Attention to k keys that an indexer chooses, its scores included; against attention to all."""
    layer = Mixer(f"nearest({k}, scaled, by={by}) | ranked | softmax(heads={heads}, project=none)", shape[1], ndim=1)
    chosen = torch.randperm(shape[2])[:SAMPLE]

    def mask_of(x: Tensor) -> Tensor:
        p, rows = layer.tensors(), x.detach().mT
        indexer_heads = p["index_share_weight"].shape[0]
        query = F.linear(rows[:, chosen], p["index_query_weight"]).unflatten(-1, (indexer_heads, -1))
        each = (query @ F.linear(rows, p["index_key_weight"]).mT[:, None]).relu()
        scores = (F.linear(rows[:, chosen], p["index_share_weight"])[..., None] * each).sum(2)
        at = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, at, value=True)[:, None]

    return Case(
        (torch.randn(shape),),
        layer,
        {f"masked, {SAMPLE} queries": _masked(heads, chosen, mask_of), "SDPA": _dense(heads)},
        module=layer,
    )


def blocks(shape: Shape, heads: int, k: int, size: int) -> Case:
    """Blocks as neighbours on a causal sequence, the own one among them; against dense causal attention."""
    layer = Mixer(
        f"nearest_blocks({k}, {size}, self) | causal | softmax(heads={heads}, project=none)", shape[1], ndim=1
    )
    chosen = torch.randperm(shape[2])[:SAMPLE]

    def mask_of(x: Tensor) -> Tensor:
        q = _heads(x.detach(), heads)
        home, whole = chosen // size, -(-shape[2] // size)
        means = F.pad(q, (0, 0, 0, whole * size - shape[2])).unflatten(2, (whole, size)).sum(3)
        means = means / torch.arange(whole * size).lt(shape[2]).view(whole, size).sum(1)[:, None]
        gate = (q[:, :, chosen] @ means.mT).masked_fill(torch.arange(whole) >= home[:, None], -math.inf)
        best, at = gate.sort(dim=-1, descending=True, stable=True)
        taken = torch.zeros_like(gate, dtype=torch.bool).scatter(-1, at[..., : k - 1], best[..., : k - 1] > -math.inf)
        taken = taken | (torch.arange(whole) == home[:, None])
        return taken.repeat_interleave(size, -1)[..., : shape[2]] & (torch.arange(shape[2]) <= chosen[:, None])

    return Case(
        (torch.randn(shape),),
        layer,
        {f"masked, {SAMPLE} queries": _masked(heads, chosen, mask_of), "SDPA, causal": _dense(heads, True)},
        module=layer,
    )
