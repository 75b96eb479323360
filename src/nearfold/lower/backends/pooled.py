"""`pooled`: keys and values are averaged over blocks first, and attended to by F.scaled_dot_product_attention then.

Shape legend: B batch, H heads, N positions, P blocks, e features of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from nearfold.grammar import Basic
from nearfold.grammar.word import as_tuple
from nearfold.grammar.words import Pooled, Size, Softmax
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


def means(call: Call, x: Tensor, size: Size, bins: bool) -> tuple[Tensor, Tensor | None]:
    """Means (B, C, *blocks) of a map (B, C, *grid) over what is there, and which blocks hold any of it (B, 1, 1, P)."""
    size = as_tuple(size, call.ndim, "size")

    def pool(x: Tensor) -> Tensor:
        return _BINS[call.ndim](x, size) if bins else _MEAN[call.ndim](x, size, size, ceil_mode=True)

    if call.keep is None:
        return pool(x), None
    # what is absent is zero: the mean of the others is larger by the share of those
    share = pool(call.keep.to(x.dtype).view(-1, 1, *call.grid))
    return pool(x) / share.masked_fill(share == 0, 1), (share > 0).flatten(2)[:, :, None]


def run(call: Call) -> Tensor:
    """(B, C, *grid)."""
    rho, path = call.op.weight.rho, call.op.path
    assert isinstance(rho, Softmax) and isinstance(path, Pooled)
    query, key, scale = call.embedded_differences()
    value = call.value
    B, H = value.shape[0], call.heads
    key = key.expand(B, H, -1, -1).transpose(2, 3).flatten(1, 2).unflatten(2, call.grid)
    (key, there), (value, _) = (means(call, t, path.size, path.bins) for t in (key.to(value.dtype), value))
    mask = readable(call.op, call.grid, value.device)
    if there is not None:
        mask = there if mask is None else there & mask
    key, value = split_heads(key, H), split_heads(value, H)
    y = attention(query.to(value.dtype).expand(B, H, -1, -1), key, value, mask, scale=scale * rho.scale)
    if mask is not None:  # a query that may read nothing
        y = y.masked_fill(~mask.any(-1, True), 0)
    return y.transpose(2, 3).flatten(1, 2).unflatten(2, call.grid)
