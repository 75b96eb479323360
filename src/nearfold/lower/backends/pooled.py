"""`pooled`: fewer keys, or fewer that ask: means or mixtures first, F.scaled_dot_product_attention then.

Attention to mean or mixed keys and values; and what stands between the positions: agents, landmarks, latents, seeds.

Shape legend: B batch, H heads, N positions, P blocks, e features of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.grammar.word import as_tuple
from nearfold.grammar.words import Agent, Latents, Nystrom, Pooled, Projected, Seeds, Size, Softmax
from nearfold.kernels.attention import attention
from nearfold.lower.call import Call, split_heads
from nearfold.lower.selection import metric_scores
from nearfold.lower.verdict import Facts, Verdict
from nearfold.lower.weighting import wide_dtype
from nearfold.lower.words.latents import competed, keys_of, learned, pseudo_inverse, require_inputs
from nearfold.lower.words.pooled import readable

NAME = "pooled"
_MEAN: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_BINS: dict[int, Callable[..., Tensor]] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def supports(facts: Facts) -> Verdict:
    """Paths to mean or mixed keys, and rhos with few that ask; means on up to three axes."""
    path, rho = facts.op.path, facts.op.weight.rho
    if isinstance(path, Projected):
        return Verdict.yes("mixed keys and values, then F.scaled_dot_product_attention", "roundoff")
    if isinstance(rho, (Seeds, Latents)):
        return Verdict.yes("F.scaled_dot_product_attention of a few learned vectors", "roundoff")
    if not isinstance(path, Pooled) and not isinstance(rho, (Agent, Nystrom)):
        return Verdict.no(f"{path.word} with {rho.word} reads no means")
    if facts.ndim not in _MEAN:
        return Verdict.no(f"torch pools 1 to 3 axes, not {facts.ndim}")
    if isinstance(rho, Nystrom):
        return Verdict.yes("three products through the landmarks, from right to left", "roundoff")
    if isinstance(rho, Agent):
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


def _to_mixtures(call: Call, path: Projected, rho: Softmax) -> Tensor:
    require_inputs(call, path.inputs)
    query, key, scale = call.embedded_differences()
    B, H, dtype = call.value.shape[0], call.heads, call.value.dtype
    key_PN, value_PN = call.params["key_table"].to(key.dtype), call.params["value_table"].to(dtype)
    key, value = (key_PN @ key).to(dtype), value_PN @ split_heads(call.value, H)
    there = None if call.keep is None else call.keep.any(1)[:, None, None, None].expand(-1, -1, -1, path.n)
    query, key = query.to(dtype).expand(B, H, -1, -1), key.expand(B, H, -1, -1)
    return _where_read(attention(query, key, value, there, scale=scale * rho.scale), there)


def _seeds(call: Call, rho: Seeds) -> Tensor:
    key, value = keys_of(call), split_heads(call.value, call.heads)
    seed = learned(call, "seed_weight", rho).to(key.dtype).expand(key.shape[0], -1, -1, -1)
    there = None if call.keep is None else call.keep[:, None, None]
    if not rho.competing:
        return _where_read(attention(seed, key, value, there), there)
    wide = wide_dtype(call)
    score = metric_scores("dot", False, seed.to(wide), key.to(wide)) * key.shape[-1] ** -0.5
    share = competed(score, torch.ones_like(score, dtype=torch.bool) if there is None else there)
    return share.to(value.dtype) @ value


def _latents(call: Call, rho: Latents) -> Tensor:
    key, value = keys_of(call), split_heads(call.value, call.heads)
    latent = learned(call, "latent_weight", rho).to(key.dtype).expand(key.shape[0], -1, -1, -1)
    there = None if call.keep is None else call.keep[:, None, None]
    gathered = _where_read(attention(latent, key, value, there, scale=1.0), there)
    return attention(key, latent, gathered, scale=1.0)


def _landmarks(call: Call, rho: Nystrom) -> Tensor:
    assert call.query is not None and call.key is not None
    means = (_means(call, t, rho.size, True)[0] for t in (call.query, call.key))
    value, wide = split_heads(call.value, call.heads), wide_dtype(call)
    query, key, q_marks, k_marks = (split_heads(t, call.heads).to(wide) for t in (call.query, call.key, *means))
    scale = query.shape[-1] ** -0.5
    between = torch.softmax(metric_scores("dot", False, q_marks, k_marks) * scale, -1)
    heard = pseudo_inverse(between) @ attention(q_marks, key, value.to(wide))
    return attention(query, k_marks, heard).to(value.dtype)


_RUNS: dict[type, Callable[..., Tensor]] = {
    Agent: _agents,
    Seeds: _seeds,
    Latents: _latents,
    Nystrom: _landmarks,
}


def run(call: Call) -> Tensor:
    """(B, C, *out)."""
    rho, path = call.op.weight.rho, call.op.path
    if type(rho) in _RUNS:
        y = _RUNS[type(rho)](call, rho)
    else:
        assert isinstance(rho, Softmax)
        y = _to_mixtures(call, path, rho) if isinstance(path, Projected) else _to_means(call, path, rho)  # type: ignore[arg-type]
    return y.transpose(2, 3).flatten(1, 2).unflatten(2, call.out_grid)
