"""Approximate selection among many keys: exact search inside the clusters that a group of queries looks into.

Keys fall into lists by k-means, queries into groups. Every query votes for the lists nearest to it, and a group
searches, exactly, the lists with the most votes for every key they hold: about N^1.5 similarities instead of N^2. How
many votes are enough is measured, on a sample of the call's own queries: their true neighbours are found by an exact
search, and each of them lies in some list, so that the recall of every possible threshold is known before any is used.
Where the data have no clusters and too many lists would be needed, the exact search runs.

Inverted lists are those of Sivic and Zisserman (2003) and of FAISS's IndexIVFFlat; groups of queries that share their
lists turn the scan into matrix products, which the exact search runs as fast as any other.

Shape legend: M queries, R keys, e embedded features, k slots, L lists, G groups, s sampled queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.kernels.names import DOT_LIKE, INVALID

Search = Callable[[Tensor | None, Tensor | None], tuple[Tensor, Tensor]]

BLOCK_BYTES = 4 << 20  # of similarities to the centres held at once
VOTES = 8  # lists a query votes for
VOTE = 840  # the first vote; the n-th is an n-th of it, still an integer: sums do not depend on the order
ROUNDS = 4  # of k-means
TRAINED = 32  # keys a list is trained on
SURE = 3.0  # standard errors that the sample's recall lies above what was asked
MOST = 0.4  # of all similarities; beyond, one exact search is faster than many small ones


@dataclass(frozen=True)
class Parts:
    """A set of vectors in parts: ``centre`` (n, e), ``of`` (N,) the part of every vector, ``size`` (n,)."""

    centre: Tensor
    of: Tensor
    size: Tensor


def select(
    query: Tensor, key: Tensor, k: int, metric: str, recall: float, search: Search
) -> tuple[Tensor, Tensor]:
    """Scores (M, k) and indices (M, k) of about the k best keys of every query.

    Args:
        query: (M, e), finite.
        key: (R, e), finite; the very same tensor where queries and keys are.
        k: slots, fewer than R.
        metric: "dot", "cosine" or "euclidean".
        recall: the share of the k best that is expected to be found, below 1.
        search: ``search(rows, keys)`` is the exact search of these queries (m,) among these keys (r,), ascending;
            None stands for all. Scores (m, k) and indices (m, k) into those keys.
    """
    lists = _parts(key, int(2 * len(key) ** 0.5), metric)
    groups = lists if query is key else _parts(query, int(2 * len(query) ** 0.5), metric)
    rank_GL = _preference(query, groups, lists, metric)
    sample = torch.randperm(len(query), generator=_generator())[: min(4096, max(512, len(query) // 32))]
    sample = sample.to(query.device)
    true_sk = search(sample, None)[1]
    found_sk = rank_GL[groups.of[sample]].gather(1, lists.of[true_sk])
    chosen_GL = (rank_GL >= _threshold(found_sk, recall)) | _first(rank_GL, lists.size, k + 1)
    cost = (groups.size.double() @ chosen_GL.double() @ lists.size.double()).item()
    if cost > MOST * len(query) * len(key):
        return search(None, None)
    score = query.new_empty(len(query), k)
    index = torch.empty(len(query), k, dtype=torch.long, device=query.device)
    start = 0
    members = groups.of.sort(stable=True).indices
    for chosen_L, size in zip(chosen_GL, groups.size.tolist(), strict=True):
        if size == 0:
            continue
        rows = members[start : start + size]
        start += size
        keys = chosen_L[lists.of].nonzero()[:, 0]  # ascending
        score[rows], at = search(rows, keys)
        index[rows] = torch.where(at < 0, at, keys[at.clamp(min=0)])
    return score, index


def _generator() -> torch.Generator:
    """One seed for every call: equal inputs have equal results."""
    return torch.Generator().manual_seed(0)


def _parts(x: Tensor, n: int, metric: str) -> Parts:
    """k-means: by distance, which for unit vectors is their cosine."""
    trained = x[torch.randperm(len(x), generator=_generator())[: n * TRAINED].to(x.device)]
    centre = trained[:n].clone()
    for _ in range(ROUNDS):
        part = Parts(centre, *_counted(_nearest(trained, centre, 1)[:, 0], n))
        centre = _means(trained, part)
    of, size = _counted(_nearest(x, centre, 1)[:, 0], n)
    return Parts(centre, of, size)


def _counted(of: Tensor, n: int) -> tuple[Tensor, Tensor]:
    return of, torch.bincount(of, minlength=n)


def _means(x: Tensor, parts: Parts) -> Tensor:
    """Mean of the vectors of every part; of an empty one the centre it had."""
    starts = parts.size.cumsum(0) - parts.size
    mean = F.embedding_bag(parts.of.sort(stable=True).indices, x, starts, mode="mean")
    return torch.where(parts.size[:, None] > 0, mean, parts.centre)


def _nearest(x: Tensor, centre: Tensor, n: int, metric: str = "euclidean") -> Tensor:
    """Indices (N, n) of the centres nearest to every vector."""
    bias = torch.zeros_like(centre[:, 0]) if metric == "dot" else centre.square().sum(1) / -2
    blocks = x.split(max(1, BLOCK_BYTES // (len(centre) * x.element_size())))
    if n == 1:
        return torch.cat([torch.addmm(bias, b, centre.T).argmax(1, keepdim=True) for b in blocks])
    return torch.cat([torch.addmm(bias, b, centre.T).topk(n, 1).indices for b in blocks])


def _preference(query: Tensor, groups: Parts, lists: Parts, metric: str) -> Tensor:
    """In which order groups should look into lists (G, L), larger first: votes for every key there.

    Lists without votes come after all others (below zero), by their distance from the mean of the group.
    """
    G, L = len(groups.centre), len(lists.centre)
    best = _nearest(query, lists.centre, VOTES, metric)
    vote = VOTE // torch.arange(1, VOTES + 1, device=query.device)
    votes_GL = torch.zeros(G * L, dtype=torch.long, device=query.device)
    votes_GL.scatter_add_(0, (groups.of[:, None] * L + best).flatten(), vote.expand_as(best).flatten())
    votes_GL = votes_GL.view(G, L)
    density = votes_GL / (groups.size[:, None] * lists.size).clamp(min=1)
    mean = _means(query, groups)
    near = mean @ lists.centre.T
    if metric != "dot":
        near = near - lists.centre.square().sum(1) / 2
    return torch.where(votes_GL > 0, density, near - near.amax(1, keepdim=True) - 1)


def _threshold(rank_sk: Tensor, recall: float) -> Tensor:
    """The largest threshold at which the recall over all queries is surely what was asked, from a sample's ranks."""
    s = len(rank_sk)
    ranks = rank_sk.flatten().sort(descending=True).values
    low, high = 0, len(ranks) - 1  # the last finds every neighbour
    while low < high:
        middle = (low + high) // 2
        share = (rank_sk >= ranks[middle]).double().mean(1)
        error = max(share.std().item(), s**-0.5) / s**0.5
        if share.mean().item() - SURE * error >= recall:
            high = middle
        else:
            low = middle + 1
    return ranks[low]


def _first(rank_GL: Tensor, size: Tensor, k: int) -> Tensor:
    """The first lists of every group (G, L) that hold k keys together."""
    order = rank_GL.argsort(1, descending=True)
    before = size[order].cumsum(1) - size[order]
    return torch.zeros_like(rank_GL, dtype=torch.bool).scatter_(1, order, before < k)
