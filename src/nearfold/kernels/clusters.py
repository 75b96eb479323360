"""Approximate selection among many keys: an exact search inside the clusters that a group of queries looks into.

Keys fall into lists by k-means. Every query votes for the lists nearest to it, and queries whose first votes are for
the same few lists are a group. A group searches, exactly, every key of the lists with the most votes: about N^1.5
similarities instead of N^2. How many votes are enough is measured on a sample of the call's own queries: an exact
search finds their true neighbours, each of which lies in some list, so that the recall of every possible threshold is
known before one is used. Where the data have no clusters and too many lists would be needed, the exact search runs.

Inverted lists are those of Sivic and Zisserman (ICCV 2003) and of FAISS's IndexIVFFlat. Here queries share their lists
in groups, which turns the scan into matrix products that the exact search runs as fast as any other. The largest dot
product becomes the smallest distance by one more feature (Bachrach et al., RecSys 2014).

Shape legend: M queries, R keys, e embedded features, k slots, L lists, G groups, s sampled queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Search = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

BLOCK_BYTES = 4 << 20  # of distances to the centres held at once
VOTES = 8  # lists a query votes for
LISTS = 4  # whose queries are one group: more similarities, but fewer and larger products
VOTE = 840  # the first vote; the n-th is an n-th of it, still an integer: sums do not depend on the order
ROUNDS = 4  # of k-means
TRAINED = 32  # vectors that train a list
SURE = 3.0  # standard errors by which the sample's recall must exceed what was asked
MOST = 0.4  # of all similarities; beyond, one exact search is faster than many small ones


@dataclass(frozen=True)
class Parts:
    """Vectors in parts: ``of`` (N,) the part of each; part i is ``order[start[i] : start[i] + size[i]]``."""

    of: Tensor
    size: Tensor
    start: Tensor
    order: Tensor

    @staticmethod
    def made(of: Tensor, n: int) -> Parts:
        """From the part of every vector."""
        size = torch.bincount(of, minlength=n)
        return Parts(of, size, size.cumsum(0) - size, of.sort(stable=True).indices)

    def members(self, chosen: Tensor) -> Tensor:
        """Places in ``order``, ascending, of all vectors of the chosen parts, themselves ascending."""
        size = self.size[chosen]
        end = size.cumsum(0)
        shift = (self.start[chosen] - end + size).repeat_interleave(size)
        return shift + torch.arange(len(shift), device=shift.device)


def select(
    query: Tensor, key: Tensor, k: int, metric: str, recall: float, home: Tensor, search: Search
) -> tuple[Tensor, Tensor]:
    """Scores (M, k) and indices (M, k) of about the k best keys of every query, best first, ties by the lowest index.

    Args:
        query: (M, e), finite.
        key: (R, e), finite; the very same tensor where keys are the queries.
        k: slots, fewer than R.
        metric: "dot", "cosine" or "euclidean".
        recall: the share of the k best that is expected to be found, below 1.
        home: (M,) the key at the position of every query.
        search: ``search(query (m, e), key (r, e), home (m,), name (r,))`` is the exact search, where ``name`` has a
            number for every key, ascending, and ``home`` the number of every query: scores (m, k), indices (m, k).
    """
    q, keys = (query, key) if metric != "dot" else _as_distances(query, key)
    centre = _centres(keys, int(2 * len(key) ** 0.5))
    best = _nearest(q, centre, VOTES)
    first = best[:, :1]
    lists = Parts.made((first if q is keys else _nearest(keys, centre, 1))[:, 0], len(centre))
    joined = _centres(centre, max(1, len(centre) // LISTS))
    groups = Parts.made(_nearest(centre, joined, 1)[first[:, 0], 0], len(joined))
    rank_GL = _preference(q, groups, best, centre, lists)
    # from the end of the permutation whose beginning trains the centres: for those keys the recall is better
    sample = _shuffled(len(q), q.device)[-min(4096, max(512, len(q) // 32)) :]
    name = torch.arange(len(key), device=key.device)
    true_sk = search(query[sample], key, home[sample], name)[1].clamp(min=0)
    chosen_GL = rank_GL >= _threshold(rank_GL[groups.of[sample]].gather(1, lists.of[true_sk]), recall)
    chosen_GL |= _first(rank_GL, lists.size, k + 1)
    if _pairs(groups, chosen_GL, lists) > MOST * len(query) * len(key):
        return search(query, key, home, name)
    return _searched(query, key, k, home, search, groups, chosen_GL, lists)


def _searched(
    query: Tensor, key: Tensor, k: int, home: Tensor, search: Search, groups: Parts, chosen_GL: Tensor, lists: Parts
) -> tuple[Tensor, Tensor]:
    """The exact search of every group in its lists. Queries and keys are laid out by parts first."""
    query, key = query.index_select(0, groups.order), key.index_select(0, lists.order)
    place = torch.empty_like(lists.order).scatter_(0, lists.order, torch.arange(len(key), device=key.device))
    home = place[home[groups.order]]
    score = query.new_empty(len(query), k)
    index = torch.empty(len(query), k, dtype=torch.long, device=query.device)
    for chosen_L, start, size in zip(chosen_GL, groups.start.tolist(), groups.size.tolist(), strict=True):
        if size == 0:
            continue
        rows = slice(start, start + size)
        name = lists.members(chosen_L.nonzero()[:, 0])
        score[rows], found = search(query[rows], key.index_select(0, name), home[rows], name)
        index[rows] = torch.where(found < 0, found, lists.order[name[found.clamp(min=0)]])
    back = torch.empty_like(groups.order).scatter_(0, groups.order, torch.arange(len(query), device=query.device))
    return _by_index(score.index_select(0, back), index.index_select(0, back))


def _by_index(score: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Equal scores in the order of their indices: the searches had the keys in another."""
    tied = (score[:, 1:] == score[:, :-1]).any(1).nonzero()[:, 0]
    s, i = score[tied], index[tied]
    order = i.argsort(1)
    order = order.gather(1, s.gather(1, order).sort(dim=1, descending=True, stable=True).indices)
    return score.index_copy(0, tied, s.gather(1, order)), index.index_copy(0, tied, i.gather(1, order))


def _as_distances(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors of one length for keys, of another for queries: the nearest key has the largest dot product."""
    square = key.square().sum(1, keepdim=True)
    longest = square.amax().sqrt()
    length = query.square().sum(1, keepdim=True).sqrt()
    query = query * (longest / length.masked_fill(length == 0, 1))
    return F.pad(query, (0, 1)), torch.cat([key, (longest.square() - square).clamp(min=0).sqrt()], 1)


def _shuffled(n: int, device: torch.device) -> Tensor:
    """A permutation, the same at every call: equal inputs have equal results."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(device)


def _centres(x: Tensor, n: int) -> Tensor:
    """n centres (n, e) by k-means, from a few of the vectors."""
    trained = x[_shuffled(len(x), x.device)[: n * TRAINED]]
    centre = trained[:n].clone()
    for _ in range(ROUNDS):
        parts = Parts.made(_nearest(trained, centre, 1)[:, 0], n)
        centre = torch.where(parts.size[:, None] > 0, _means(trained, parts), centre)
    return centre


def _means(x: Tensor, parts: Parts) -> Tensor:
    """Mean of the vectors of every part (n, e); zero for an empty one."""
    return F.embedding_bag(parts.order, x, parts.start, mode="mean")


def _nearest(x: Tensor, centre: Tensor, n: int) -> Tensor:
    """Indices (N, n) of the centres nearest to every vector, nearest first."""
    half = centre.square().sum(1) / 2
    found = []
    for block in x.split(max(1, BLOCK_BYTES // (len(centre) * x.element_size()))):
        near = torch.addmm(half, block, centre.T, beta=-1)
        found.append(near.argmax(1, keepdim=True) if n == 1 else near.topk(n, 1).indices)
    return torch.cat(found)


def _preference(query: Tensor, groups: Parts, best: Tensor, centre: Tensor, lists: Parts) -> Tensor:
    """In which order groups look into lists (G, L), larger first: a query's mean vote for a key there.

    Lists without votes come after all others, below zero, by their distance from the mean of the group.
    """
    G, L = len(groups.size), len(centre)
    vote = VOTE // torch.arange(1, best.shape[1] + 1, device=best.device)
    votes_GL = torch.zeros(G * L, dtype=torch.long, device=best.device)
    votes_GL.scatter_add_(0, (groups.of[:, None] * L + best).flatten(), vote.expand_as(best).flatten())
    votes_GL = votes_GL.view(G, L)
    near_GL = torch.addmm(centre.square().sum(1) / 2, _means(query, groups), centre.T, beta=-1)
    far_GL = near_GL - near_GL.amax(1, keepdim=True) - 1
    return torch.where(votes_GL > 0, votes_GL / (groups.size[:, None] * lists.size).clamp(min=1), far_GL)


def _threshold(rank_sk: Tensor, recall: float) -> Tensor:
    """The largest rank down to which to look for the recall that was asked, from the ranks of a sample's neighbours."""
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


def _pairs(groups: Parts, chosen_GL: Tensor, lists: Parts) -> float:
    """How many similarities the searches of all groups compute."""
    return float(groups.size.double() @ chosen_GL.double() @ lists.size.double())
