"""`pooled`: keys and values are averaged over blocks first, and attended to by F.scaled_dot_product_attention then.

Shape legend: B batch, H heads, N positions, P blocks, e features of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from nearfold.grammar import Basic
from nearfold.grammar.word import as_tuple
from nearfold.grammar.words import Pooled, Softmax
from nearfold.kernels.attention import attention
from nearfold.lower.call import Call, split_heads
from nearfold.lower.verdict import Facts, Verdict
from nearfold.lower.words.pooled import readable

NAME = "pooled"
_MEAN: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_BINS: dict[int, Callable[..., Tensor]] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def supports(facts: Facts) -> Verdict:
    """Path pooled on up to three axes."""
    if not isinstance(facts.op.path, Pooled):
        return Verdict.no(f"path is {facts.op.path.word}, not pooled")
    if facts.ndim not in _MEAN:
        return Verdict.no(f"torch pools 1 to 3 axes, not {facts.ndim}")
    return Verdict.yes("mean keys and values, then F.scaled_dot_product_attention", "roundoff")


def takes_keys(op: Basic) -> bool:
    """Whether it heeds a mask of the keys."""
    return True


def _means(call: Call, x: Tensor) -> Tensor:
    """(B, C, *grid) -> (B, C, *blocks)."""
    path = call.op.path
    assert isinstance(path, Pooled)
    size = as_tuple(path.size, call.ndim, "size")
    return _BINS[call.ndim](x, size) if path.bins else _MEAN[call.ndim](x, size, size, ceil_mode=True)


def run(call: Call) -> Tensor:
    """(B, C, *grid)."""
    rho = call.op.weight.rho
    assert isinstance(rho, Softmax)
    query, key, scale = call.embedded_differences()
    value = call.value
    B, H, e = value.shape[0], call.heads, key.shape[-1]
    key = key.expand(B, H, -1, -1).transpose(2, 3).flatten(1, 2).unflatten(2, call.grid)
    key, value = (_means(call, t) for t in (key.to(value.dtype), value))
    mask = readable(call.op, call.grid, value.device)
    if call.keep is not None:  # what is absent is zero: the mean of the others is larger by the share of those
        share = _means(call, call.keep.to(value.dtype).view(B, 1, *call.grid))
        key, value = (t / share.masked_fill(share == 0, 1) for t in (key, value))
        there = (share > 0).flatten(2)[:, :, None]
        mask = there if mask is None else there & mask
    key, value = split_heads(key, H), split_heads(value, H)
    assert key.shape[-1] == e
    y = attention(query.to(value.dtype).expand(B, H, -1, -1), key, value, mask, scale=scale * rho.scale)
    if mask is not None:  # a query that may read nothing
        y = y.masked_fill(~mask.any(-1, True), 0)
    return y.transpose(2, 3).flatten(1, 2).unflatten(2, call.grid)
