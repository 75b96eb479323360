"""Approximate selection by partial reduction: the k best of the maxima of L bins, in plain PyTorch, on any device.

Keys fall into L bins at random, and only the best of a bin is kept. The i-th best key is lost when one of the i - 1
better ones lies in its bin, so that it is found with probability (1 - 1/L)^(i - 1); the mean of that over the k best is

    expected recall = L/k (1 - (1 - 1/L)^k)

which holds for any data. L is the smallest number for which it is what was asked. Bins of equal size, as here, lose a
little less: a bin that holds a better key has one place less. The order is random and not that of the positions, since
maps are smooth: the best keys are neighbours, and every L-th of them would share a bin. It is one fixed permutation,
so that equal inputs have equal results; data made against it can lose more.

Source: Chern et al., TPU-KNN (NeurIPS 2022, arXiv 2206.14286). What it saves over the exact two-step search of
`select_torch` is the second step and, for distances, the margin for the rounding of the matrix product.

Shape legend: P problems (batch x heads), M queries, R keys, e embedded features, k slots, L bins.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nearfold.kernels.names import INVALID, NORMED
from nearfold.kernels.search import Search
from nearfold.kernels.select_torch import (
    BLOCK_BYTES,
    _chosen,
    _class_count,
    _distance_rank,
    _own_column,
    _score,
)


def expected_recall(k: int, bins: int) -> float:
    """Share of the k best keys expected among the maxima of this many random bins.

    >>> round(expected_recall(9, 78), 4)
    0.9502
    """
    return bins / k * (1 - (1 - 1 / bins) ** k)


def bins_for(k: int, recall: float) -> int:
    """The fewest bins, at least k, whose expected recall is no smaller; ``recall`` below 1.

    >>> bins_for(9, 0.95), bins_for(100, 0.9)
    (78, 462)
    """
    high = k
    while expected_recall(k, high) < recall:
        high *= 2
    low = max(k, high // 2)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if expected_recall(k, middle) >= recall else (middle + 1, high)
    return high


def fastest(k: int, keys: int) -> int:
    """How many bins take least time: the maxima are searched once, and k bins for their best (docs/log.md)."""
    return max(k, _class_count(keys, k) // 2)


def select(query: Tensor, key: Tensor, search: Search, bins: int) -> tuple[Tensor, Tensor]:
    """Scores and indices (P, M, k) of about the k best keys of (P, M, e) and (P, R, e), best first.

    All keys are finite and any may be chosen, but for ``own`` the one at the query's position: grid, rule and
    ``again`` are not read.
    """
    k, metric, squared, query_index, key_index, _, _, own, _ = search
    P, M, _ = query.shape
    R = key.shape[1]
    order = torch.randperm(R, generator=torch.Generator().manual_seed(0)).to(key.device)
    near, column = key.index_select(1, order), None
    if own:
        place = torch.empty_like(order).scatter_(0, order, torch.arange(R, device=order.device))
        column = _own_column(query_index, key_index)
        column = torch.where(column < 0, column, place[column.clamp(min=0)])
    distance = metric in NORMED
    q, centred, q_norm, k_norm = query, near, None, None
    if distance:  # distances do not change, and fewer digits cancel
        centre = near.mean(1, keepdim=True)
        q, centred = query - centre, near - centre
        q_norm, k_norm = q.square().sum(-1), centred.square().sum(-1)
    score = query.new_empty(P, M, k)
    index = torch.empty(P, M, k, dtype=torch.long, device=query.device)
    m = max(1, min(M, BLOCK_BYTES // (R * query.element_size())))
    buffer = query.new_empty(m * R)
    for p in range(P):
        for start in range(0, M, m):
            ps, ms = slice(p, p + 1), slice(start, min(start + m, M))
            norms = (None, None) if q_norm is None or k_norm is None else (q_norm[ps, ms], k_norm[ps])
            out = buffer[: (ms.stop - start) * R].view(1, -1, R)
            block = _score(metric, q[ps, ms], centred[ps], norms[0], norms[1], out)
            if column is not None:
                here = (column[ms] != INVALID).nonzero()[:, 0]
                block[:, here, column[ms][here]] = float("-inf")
            best, found = _winners(block, k, bins)
            if distance:
                for part, _, queries, rows in _chosen(query[ps, ms], near[ps], found):
                    best.view(-1, k)[part] = _distance_rank(queries, rows)
            index[ps, ms], score[ps, ms] = _ordered(order[found], best)
    if distance and not squared:
        score = -(-score).sqrt()
    return score, index


def _winners(block: Tensor, k: int, bins: int) -> tuple[Tensor, Tensor]:
    """The k largest maxima (p, m, k) over the bins of a block (p, m, R), and their columns.

    Column j is in bin j mod L: the maxima are element-wise ones of contiguous pieces. Columns beyond the last whole
    piece are bins of their own.
    """
    p, m, R = block.shape
    whole = R // bins * bins
    pieces = block[..., :whole].unflatten(-1, (R // bins, bins))
    best, place = torch.cat([pieces.amax(-2), block[..., whole:]], -1).topk(k, -1)
    bin_ = place.clamp(max=bins - 1)
    row = pieces.gather(-1, bin_[..., None, :].expand(p, m, R // bins, k)).argmax(-2)
    return best, torch.where(place < bins, row * bins + bin_, place - bins + whole)


def _ordered(index: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """By score, equal ones by index."""
    order = index.argsort(-1)
    order = order.gather(-1, score.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices)
    return index.gather(-1, order), score.gather(-1, order)
