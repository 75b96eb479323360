"""Functions over query, key and value, for those who bring their own projections.

Shape legend: B batch, H heads, M queries, N keys, d features of a head, k neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nearfold.kernels.aggregate import aggregate
from nearfold.kernels.select import select
from nearfold.kernels.weigh import slot_softmax


def knn_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k: int,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    recall: float = 1.0,
) -> Tensor:
    """Attention to the k best keys of every query: `F.scaled_dot_product_attention` with all weights but k zero.

    Exact: the k keys are those with the largest scaled dot products, ties by the lowest index, and their weights are a
    softmax over those k. The N x M scores are never stored, forward or backward; with k >= N it is dense attention.

    Args:
        query: (B, H, M, d), float32, float64, bfloat16 or float16; scores are computed in float32 at least.
        key: (B, H, N, d), same dtype.
        value: (B, H, N, d_v), same dtype.
        k: neighbours, at least 1.
        is_causal: query i sees keys 0 .. i.
        scale: of the dot products; default 1 / sqrt(d).
        recall: below 1, an approximate search is enough that is expected to find this share of the k best keys.

    Returns:
        (B, H, M, d_v), in value's dtype. A query that is NaN gives NaN; a key that is NaN is never chosen.

    ValueError when shapes or dtypes do not fit. Source: KVT (arXiv 2106.00515); ConvNN attention (arXiv 2606.14725).

    >>> q, k, v = torch.randn(3, 2, 4, 50, 16).unbind()
    >>> knn_attention(q, k, v, 9).shape
    torch.Size([2, 4, 50, 16])
    >>> dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    >>> torch.allclose(knn_attention(q, k, v, 50), dense, atol=1e-5)
    True
    """
    shapes = tuple(query.shape), tuple(key.shape), tuple(value.shape)
    if any(t.dim() != 4 for t in (query, key, value)):
        raise ValueError("query, key and value must be (B, H, N, d), got {}, {} and {}".format(*shapes))
    if query.shape[:2] != key.shape[:2] or key.shape[:3] != value.shape[:3] or query.shape[3] != key.shape[3]:
        raise ValueError("query, key and value must agree in B, H, N and d, got {}, {} and {}".format(*shapes))
    if not (query.dtype == key.dtype == value.dtype and query.is_floating_point()):
        raise ValueError(
            f"query, key and value must have one floating dtype, got {query.dtype}, {key.dtype} and {value.dtype}"
        )
    if type(k) is not int or k < 1:
        raise ValueError(f"k must be a positive integer, got {k!r}")
    if not 0 < recall <= 1:
        raise ValueError(f"recall must be above 0 and at most 1 (exact), got {recall!r}")
    B, H, M, d = query.shape
    N = key.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    score, index = select(
        query.to(wide) * (d**-0.5 if scale is None else scale),
        key.to(wide),
        k,
        "dot",
        False,
        torch.arange(M, device=query.device),
        torch.arange(N, device=query.device),
        [max(M, N)],
        [int(is_causal), -1, 1],
        False,
        0.0,
        float(recall),
    )
    alpha = slot_softmax(score, index, 1.0)
    y = aggregate(
        value.flatten(0, 1), index.flatten(0, 1)[..., None], alpha.to(value.dtype).flatten(0, 1)[..., None], None, 1
    )
    return y.unflatten(0, (B, H))
