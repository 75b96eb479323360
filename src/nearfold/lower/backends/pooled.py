"""`pooled`: fewer keys, or fewer that ask: means over blocks first, F.scaled_dot_product_attention then.

Attention to mean keys and values; and agent attention, of mean queries to all positions and of all positions to those.

Shape legend: B batch, H heads, N positions, P blocks, e features of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from nearfold.grammar.word import as_tuple
from nearfold.grammar.words import Agent, Pooled, Size, Softmax
from nearfold.kernels.attention import attention
from nearfold.lower.call import Call, split_heads
from nearfold.lower.verdict import Facts, Verdict
from nearfold.lower.words.pooled import readable

NAME = "pooled"
_MEAN: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_BINS: dict[int, Callable[..., Tensor]] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def supports(facts: Facts) -> Verdict:
    """Path pooled, or rho agent, on up to three axes."""
    agents = isinstance(facts.op.weight.rho, Agent)
    if not (isinstance(facts.op.path, Pooled) or agents):
        return Verdict.no(f"{facts.op.path.word} with {facts.op.weight.rho.word} reads no means")
    if facts.ndim not in _MEAN:
        return Verdict.no(f"torch pools 1 to 3 axes, not {facts.ndim}")
    if agents:
        return Verdict.yes("F.scaled_dot_product_attention of the agents, then to the agents", "roundoff")
    return Verdict.yes("mean keys and values, then F.scaled_dot_product_attention", "roundoff")


def _means(call: Call, x: Tensor, size: Size, bins: bool) -> tuple[Tensor, Tensor | None]:
    """Means (B, C, *blocks) of a map (B, C, *grid) over what is there, and which blocks hold any of it (B, 1, 1, P)."""
    size = as_tuple(size, call.ndim, "size")

    def pool(x: Tensor) -> Tensor:
        return _BINS[call.ndim](x, size) if bins else _MEAN[call.ndim](x, size, size, ceil_mode=True)

    if call.keep is None:
        return pool(x), None
    # what is absent is zero: the mean of the others is larger by the share of those
    share = pool(call.keep.to(x.dtype).view(-1, 1, *call.grid))
    return pool(x) / share.masked_fill(share == 0, 1), (share > 0).flatten(2)[:, :, None]


def _agents(call: Call, rho: Agent) -> Tensor:
    assert call.query is not None and call.key is not None
    pooled, there = _means(call, call.query, rho.size, True)
    query, agents, key, value = (split_heads(t, call.heads) for t in (call.query, pooled, call.key, call.value))
    heard = attention(agents, key, value, None if call.keep is None else call.keep[:, None, None])
    return _where_read(attention(query, agents, heard, there), there)


def _where_read(y: Tensor, mask: Tensor | None) -> Tensor:
    """(B, H, N, e), zero for a query that may read nothing."""
    return y if mask is None else y.masked_fill(~mask.any(-1, True), 0)


def _to_means(call: Call, path: Pooled, rho: Softmax) -> Tensor:
    query, key, scale = call.embedded_differences()
    value = call.value
    B, H = value.shape[0], call.heads
    key = key.expand(B, H, -1, -1).transpose(2, 3).flatten(1, 2).unflatten(2, call.grid)
    (key, there), (value, _) = (_means(call, t, path.size, path.bins) for t in (key.to(value.dtype), value))
    mask = readable(call.op, call.grid, value.device)
    if there is not None:
        mask = there if mask is None else there & mask
    key, value = split_heads(key, H), split_heads(value, H)
    query = query.to(value.dtype).expand(B, H, -1, -1)
    return _where_read(attention(query, key, value, mask, scale=scale * rho.scale), mask)


def run(call: Call) -> Tensor:
    """(B, C, *grid)."""
    rho, path = call.op.weight.rho, call.op.path
    if isinstance(rho, Agent):
        y = _agents(call, rho)
    else:
        assert isinstance(path, Pooled) and isinstance(rho, Softmax)
        y = _to_means(call, path, rho)
    return y.transpose(2, 3).flatten(1, 2).unflatten(2, call.grid)
