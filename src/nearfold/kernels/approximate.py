"""About the k best keys of every query, at least a given share of them expected: `nearfold::select` with a recall.

Whatever it returns has its exact score. It never searches less exactly than was asked, and exactly where that is as
fast: `how` says which of three methods serves.

Shape legend: B batch, H heads, M queries, R keys, e embedded features, k slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nearfold.kernels import bins, clusters, engine
from nearfold.kernels.names import DOT_LIKE
from nearfold.kernels.search import Search

Exact = Callable[..., tuple[Tensor, Tensor]]

# fewest keys at which a method is faster than the exact search (docs/log.md)
CLUSTERS = {"dot": 65536, "cosine": 32768, "euclidean": 16384}
BINS = {"euclidean": 1024}
SMALLEST_BIN = 4


def how(metric: str, keys: int, queries: int, k: int, recall: float, compiled: bool) -> str:
    """The method that serves where any key may be chosen: "clusters", "bins" or "exact".

    Args:
        metric: as of `select`.
        keys: R.
        queries: M.
        k: slots.
        recall: what was asked.
        compiled: whether the compiled engine serves, whose exact search leaves bins nothing to save.

    >>> [how("euclidean", n, n, 9, 0.95, compiled) for n in (4096, 65536) for compiled in (True, False)]
    ['exact', 'bins', 'clusters', 'clusters']
    """
    if recall >= 1:
        return "exact"
    if keys >= CLUSTERS.get(metric, keys + 1) and queries >= CLUSTERS[metric] and k * 64 <= keys:
        return "clusters"
    if not compiled and keys >= BINS.get(metric, keys + 1) and SMALLEST_BIN * _bins(k, keys, recall) <= keys:
        return "bins"
    return "exact"


def describe(metric: str) -> str:
    """How a search with recall below 1 runs where any key may be chosen, in words.

    >>> describe("chebyshev"), describe("dot")
    ('exact', 'exact below 65536 keys, then by clusters')
    """
    if metric not in CLUSTERS:
        return "exact"
    said = f"exact below {CLUSTERS[metric]} keys, then by clusters"
    return said + (f"; without the compiled engine by bins from {BINS[metric]}" if metric in BINS else "")


def _bins(k: int, keys: int, recall: float) -> int:
    """Bins are as many as recall wants, and more where fewer would be slower."""
    return max(bins.bins_for(k, recall), bins.fastest(k, keys))


def select(query: Tensor, key: Tensor, search: Search, recall: float, exact: Exact) -> tuple[Tensor, Tensor] | None:
    """Scores and indices (B, H, M, k) as of `select`, ties among what was found by the lowest index; or None.

    None where the exact search is to be used; ``exact`` is that search.
    """
    k, metric = search.k, search.metric
    B, H, M, _ = query.shape
    R = key.shape[2]
    elsewhere = search.own and (search.again > float("-inf") or math.prod(search.grid) != R)
    plain = search.rule == [0, -1, 1] and not elsewhere
    method = how(metric, R, M, k, recall, engine.serves(query, key)) if plain else "exact"
    if method == "exact" or not _finite(query, key):
        return None
    with torch.autocast(query.device.type, enabled=False):
        if method == "bins":
            flat = bins.select(query.flatten(0, 1), key.flatten(0, 1), search, _bins(k, R, recall))
            return flat[0].view(B, H, M, k), flat[1].view(B, H, M, k)
        return _clustered(query, key, search, recall, exact)


def _finite(query: Tensor, key: Tensor) -> bool:
    """Whether every feature is, and the squares that the methods compute are."""
    return bool((query.square().sum() + key.square().sum()).isfinite())


def _clustered(query: Tensor, key: Tensor, search: Search, recall: float, exact: Exact) -> tuple[Tensor, Tensor]:
    """`clusters.select` for every problem; with ``own`` a query must not find the key at its position."""
    k, metric, squared, query_index, _, _, _, own, _ = search
    B, H, M, _ = query.shape
    score = query.new_empty(B, H, M, k)
    index = torch.empty(B, H, M, k, dtype=torch.long, device=query.device)
    same = query.data_ptr() == key.data_ptr() and query.shape == key.shape and query.stride() == key.stride()
    home = query_index if own else torch.zeros(M, dtype=torch.long, device=query.device)

    def among(q: Tensor, keys: Tensor, at: Tensor, name: Tensor) -> tuple[Tensor, Tensor]:
        # distances rank by their squares: equal roots need not be equally near
        asked = search._replace(
            squared=metric not in DOT_LIKE, query_index=at, key_index=name, grid=[key.shape[2]], again=float("-inf")
        )
        found = exact(q[None, None], keys[None, None], asked)
        return found[0][0, 0], found[1][0, 0]

    for b in range(B):
        for h in range(H):
            keys = key[b, h].contiguous()
            queries = keys if same else query[b, h].contiguous()
            score[b, h], index[b, h] = clusters.select(queries, keys, k, metric, recall, home, among)
    return score if squared or metric in DOT_LIKE else -(-score).sqrt(), index
