"""`knn`, `knn_graph`: the nearest points of clouds of points, as edges of a graph.

Exact. On the CPU and in few coordinates a tree of boxes of the compiled engine serves all clouds in one call; otherwise
`select` does, several clouds of about one size at a time.

Shape legend: N keys, M queries, e coordinates, k neighbours, E edges, n clouds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold._numbers import flag, integer, shown
from nearfold.kernels import engine
from nearfold.kernels.names import LOW, require_tensors
from nearfold.kernels.operator import operator
from nearfold.kernels.select import select
from nearfold.kernels.select_torch import BLOCK_BYTES, ranked

METRICS = ("euclidean", "chebyshev", "cosine")
MOST_COORDINATES = 8  # beyond, hardly a box of a tree is left out
WASTE = 1.3  # clouds are searched together while padding them to one size makes no more of the work than this


def knn(
    x: Tensor,
    y: Tensor,
    k: int,
    batch_x: Tensor | None = None,
    batch_y: Tensor | None = None,
    *,
    metric: str = "euclidean",
) -> Tensor:
    """For every point of ``y`` the ``k`` nearest points of ``x``, as edges: exact, ties by the lowest index.

    Args:
        x: (N, e) points, floating point and finite.
        y: (M, e) points, same dtype and device.
        k: neighbours, at least 1. A cloud that has fewer points gives fewer edges.
        batch_x: (N,) whole numbers in ascending order: which cloud each point belongs to; None: there is one.
        batch_y: (M,), the same of ``y``. A point of ``y`` is joined with points of its own cloud only.
        metric: "euclidean", "chebyshev" (the largest difference of a coordinate) or "cosine".

    Returns:
        (2, E) int64, as PyTorch Geometric's ``knn``: row 0 holds points of ``y``, ascending, row 1 the points of ``x``
        next to them, nearest first. No gradient flows through a choice.

    ValueError where shapes, dtypes or the order of a batch do not fit.

    >>> x = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    >>> knn(x, torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), 2)
    tensor([[0, 0, 1, 1],
            [0, 1, 2, 3]])
    """
    k = integer("k", k)
    _require_points("x", x, "batch_x", batch_x)
    _require_points("y", y, "batch_y", batch_y)
    if x.shape[1] != y.shape[1] or x.dtype != y.dtype or x.device != y.device:
        raise ValueError(
            f"x and y must have one number of coordinates, dtype and device, got {tuple(x.shape)} {x.dtype} {x.device} "
            f"and {tuple(y.shape)} {y.dtype} {y.device}"
        )
    if (batch_x is None) != (batch_y is None):
        missing = "batch_x" if batch_x is None else "batch_y"
        raise ValueError(f"batch_x and batch_y say together which points belong to one cloud; {missing} is missing")
    return _edges(_neighbours(x, y, k, batch_x, batch_y, _metric(metric), own=False), y.device)


def knn_graph(
    x: Tensor, k: int, batch: Tensor | None = None, loop: bool = False, *, metric: str = "euclidean"
) -> Tensor:
    """The graph in which every point is joined with its ``k`` nearest other points: exact, ties by the lowest index.

    Args:
        x: (N, e) points, floating point and finite.
        k: neighbours, at least 1. A cloud that has fewer points gives fewer edges.
        batch: (N,) whole numbers in ascending order: which cloud each point belongs to; None: there is one.
        loop: whether a point is one of its own candidates; it is then among the ``k``, unless as many lie in its place.
        metric: as in `knn`.

    Returns:
        (2, E) int64, as PyTorch Geometric's ``knn_graph`` with the flow from source to target: row 0 holds the
        neighbours (the sources of messages), nearest first, row 1 the points that they are neighbours of, ascending.

    ValueError where shapes, dtypes or the order of the batch do not fit.

    >>> knn_graph(torch.tensor([[0.0], [1.0], [3.0]]), 1)
    tensor([[1, 0, 1],
            [0, 1, 2]])
    """
    k = integer("k", k)
    _require_points("x", x, "batch", batch)
    index = _neighbours(x, x, k, batch, batch, _metric(metric), own=not flag("loop", loop))
    return _edges(index, x.device).flip(0)


def _metric(metric: str) -> str:
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {shown(metric)}")
    return metric


def _require_points(name: str, x: Tensor, batch_name: str, batch: Tensor | None) -> None:
    require_tensors(**{name: x})
    if x.dim() != 2 or x.shape[1] == 0 or not x.is_floating_point():
        raise ValueError(
            f"{name} must be points (N, e), floating point, got {tuple(x.shape)} {x.dtype}; one coordinate each: "
            f"{name}[:, None]"
        )
    # squares of differences must be numbers, too
    most = (torch.finfo(torch.promote_types(x.dtype, torch.float32)).max / (4 * x.shape[1])) ** 0.5
    if x.numel() and not bool(x.detach().abs().amax() <= most):
        bad = x.isfinite().logical_not().any(1).nonzero().flatten()
        said = f"row {int(bad[0])} is not finite; leave such points out" if len(bad) else "scale them down"
        raise ValueError(f"{name} must hold numbers of at most {most:.0e} in size: {said}")
    if batch is None:
        return
    require_tensors(**{batch_name: batch})
    if batch.shape != x.shape[:1] or batch.is_floating_point() or batch.is_complex() or batch.dtype == torch.bool:
        raise ValueError(
            f"{batch_name} must hold a whole number for each of the {len(x)} points of {name}, got "
            f"{tuple(batch.shape)} {batch.dtype}"
        )
    if batch.device != x.device:
        raise ValueError(f"{batch_name} must be on {name}'s device {x.device}, got {batch.device}")
    falls = (batch[1:] < batch[:-1]).nonzero()
    if len(falls):
        i = int(falls[0, 0])
        raise ValueError(
            f"{batch_name} must be ascending, each cloud's points next to one another, but goes from {int(batch[i])} "
            f"to {int(batch[i + 1])} at {i + 1}; sort the points by it"
        )


def _firsts(batch_x: Tensor | None, batch_y: Tensor | None, N: int, M: int) -> tuple[Tensor, Tensor]:
    """First rows of every cloud (n + 1,) among keys and queries, on the host."""
    if batch_x is None or batch_y is None:
        return torch.tensor([0, N]), torch.tensor([0, M])
    each = [batch.to(torch.long).unique_consecutive() for batch in (batch_x, batch_y)]
    clouds = torch.cat(each).unique()
    firsts = (torch.searchsorted(batch.to(torch.long).contiguous(), clouds) for batch in (batch_x, batch_y))
    at_x, at_y = (torch.cat([first.cpu(), torch.tensor([n])]) for first, n in zip(firsts, (N, M), strict=True))
    return at_x, at_y


def _neighbours(
    x: Tensor, y: Tensor, k: int, batch_x: Tensor | None, batch_y: Tensor | None, metric: str, own: bool
) -> Tensor:
    """Rows of x (M, k), nearest first, -1 where there are no more; no wider than some cloud can fill."""
    x_first, y_first = _firsts(batch_x, batch_y, len(x), len(y))
    most = int((x_first[1:] - x_first[:-1]).max()) - own if len(x_first) > 1 else 0
    k = min(k, most)
    if k < 1 or len(y) == 0:
        return torch.empty(len(y), 0, dtype=torch.long, device=x.device)
    x, y = x.detach(), y.detach()
    if x.dtype in LOW:
        x, y = x.float(), y.float()
    if metric == "cosine":
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    return nearest_points(y, x, y_first, x_first, k, metric, own)


def nearest_in_each(position: Tensor, k: int) -> Tensor:
    """The k nearest points (B, N, k) of every point among the N of its own input (B, N, e), itself among them."""
    B, N, e = position.shape
    flat = position.detach().reshape(B * N, e)
    if not torch.compiler.is_compiling():  # a look at the numbers would break the graph
        _require_points("position", flat, "", None)
    flat = flat.float() if flat.dtype in LOW else flat
    firsts = torch.arange(B + 1) * N
    at = nearest_points(flat, flat, firsts, firsts.clone(), k, "euclidean", False).unflatten(0, (B, N))
    return at - (torch.arange(B, device=at.device) * N)[:, None, None]


@operator("nearfold::nearest_points")
def nearest_points(
    query: Tensor, key: Tensor, query_first: Tensor, key_first: Tensor, k: int, metric: str, own: bool
) -> Tensor:
    """Indices (M, k) of the nearest keys of the same cloud, nearest first, ties by the lowest; -1 where none is left.

    Args:
        query: (M, e), float32 or float64, finite.
        key: (N, e), same dtype.
        query_first: (n + 1,) int64 on the host: cloud b has the queries query_first[b] .. query_first[b + 1].
        key_first: (n + 1,), the same of the keys.
        k: how many.
        metric: euclidean, chebyshev or cosine; rows have length one under the latter.
        own: query i is key i, which is not its own neighbour.
    """
    _require_operands(query, key, query_first, key_first, k, metric, own)
    index = torch.empty(len(query), k, dtype=torch.long, device=query.device)
    if metric == "euclidean" and query.shape[1] <= MOST_COORDINATES and engine.serves(query, key):
        engine.run(
            "points",
            query.contiguous(),
            key.contiguous(),
            query_first.contiguous(),
            key_first.contiguous(),
            own,
            index,
            engine.threads(),
        )
        return index
    firsts = query_first.tolist(), key_first.tolist()
    clouds = [(q1 - q0, k1 - k0, q0, k0) for q0, q1, k0, k1 in zip(*_ends(firsts[0]), *_ends(firsts[1]), strict=True)]
    clouds = [cloud for cloud in clouds if cloud[0]]
    if metric == "euclidean" and query.shape[1] <= MOST_COORDINATES and query.device.type == "cpu":
        return _by_differences(query, key, clouds, own, index)
    return _by_sizes(query, key, clouds, metric, own, index)


def _require_operands(
    query: Tensor, key: Tensor, query_first: Tensor, key_first: Tensor, k: int, metric: str, own: bool
) -> None:
    require_tensors(query=query, key=key, query_first=query_first, key_first=key_first)
    both = query.dim() == 2 and key.dim() == 2 and query.shape[1] == key.shape[1] >= 1
    if not both or query.dtype != key.dtype or query.dtype not in engine.COMPUTE:
        raise ValueError(
            "query (M, e) and key (N, e) must be float32 or float64 alike, got "
            f"{tuple(query.shape)} {query.dtype} and {tuple(key.shape)} {key.dtype}"
        )
    for name, first, rows in (("query_first", query_first, len(query)), ("key_first", key_first, len(key))):
        fits = first.dim() == 1 and len(first) >= 1 and first.dtype == torch.long and first.device.type == "cpu"
        if not fits or len(first) != len(query_first):
            raise ValueError(f"{name} must be (clouds + 1,) int64 on the host, got {tuple(first.shape)} {first.dtype}")
        if int(first[0]) != 0 or int(first[-1]) != rows or bool((first.diff() < 0).any()):
            raise ValueError(f"{name} must ascend from 0 to the {rows} rows there are, got {shown(first.tolist())}")
    if k < 1 or metric not in METRICS or (own and not torch.equal(query_first, key_first)):
        raise ValueError(f"k must be at least 1, metric one of {', '.join(METRICS)}, and queries keys where own, {k=}")


def _ends(first: list[int]) -> tuple[list[int], list[int]]:
    return first[:-1], first[1:]


@nearest_points.register_fake
def _(query: Tensor, key: Tensor, query_first: Tensor, key_first: Tensor, k: int, metric: str, own: bool) -> Tensor:
    return query.new_empty((query.shape[0], k), dtype=torch.long)


Cloud = tuple[int, int, int, int]
"""Queries, keys, the first query and the first key."""


def _by_differences(query: Tensor, key: Tensor, clouds: list[Cloud], own: bool, index: Tensor) -> Tensor:
    """`nearest_points` in few coordinates in plain PyTorch: by products of matrices too many keys would be as near."""
    k = index.shape[1]
    for M, R, q0, k0 in clouds:
        size = max(1, BLOCK_BYTES // max(1, R * query.element_size()))
        for first in range(q0, q0 + M, size):
            rows = query[first : min(first + size, q0 + M)]
            score = query.new_zeros(len(rows), R)
            for e in range(query.shape[1]):
                score -= (rows[:, e, None] - key[k0 : k0 + R, e]).square_()
            if own:
                score.diagonal(first - q0).fill_(-float("inf"))
            found = index[first : first + len(rows)].fill_(-1)
            if own < R:
                most = min(k, R - own)
                found[:, :most] = ranked(score, most)[1] + k0
    return index


def _by_sizes(query: Tensor, key: Tensor, clouds: list[Cloud], metric: str, own: bool, index: Tensor) -> Tensor:
    """`nearest_points` by `select`, of clouds of about one size in one call: padded keys are NaN, never chosen."""
    sizes = sorted(clouds, reverse=True)
    index.fill_(-1)
    while sizes:
        some, work, M, R = 0, 0, sizes[0][0], 0
        for m, r, _, _ in sizes:
            R, work = max(R, r), work + m * r
            if some and (some + 1) * M * R > WASTE * work:
                break
            some += 1
        group, sizes = sizes[:some], sizes[some:]
        if R := max(r for _, r, _, _ in group):
            _search_group(query, key, group, M, R, metric, own, index)
    return index


def _search_group(
    query: Tensor, key: Tensor, group: list[Cloud], M: int, R: int, metric: str, own: bool,
    index: Tensor,
) -> None:  # fmt: skip
    m_n, r_n, query_n, key_n = (
        torch.tensor(column, device=query.device)[:, None] for column in zip(*group, strict=True)
    )
    row_M, row_R = (torch.arange(n, device=query.device) for n in (M, R))
    there_nM, there_nR = row_M < m_n, row_R < r_n
    queries = query[(query_n + row_M).clamp(max=len(query) - 1)]
    keys = key[(key_n + row_R).clamp(max=len(key) - 1)].masked_fill(~there_nR[..., None], float("nan"))
    _, at = select(
        queries[:, None], keys[:, None], index.shape[1], metric, True, row_M, row_R, [R], [0, -1, 1], own, float("-inf")
    )
    at = at[:, 0]
    index[(query_n + row_M)[there_nM]] = torch.where(at < 0, -1, at + key_n[..., None])[there_nM]


def _edges(index: Tensor, device: torch.device) -> Tensor:
    """(M, k) -> (2, E), without the slots that are not filled."""
    M, k = index.shape
    query = torch.arange(M, device=device)[:, None].expand(M, k)
    if M * k == 0 or bool((index[:, -1] >= 0).all()):
        return torch.stack([query, index]).flatten(1)
    there = index >= 0
    return torch.stack([query[there], index[there]])
