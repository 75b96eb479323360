"""`knn` and `knn_graph`: against sorted distances, scikit-learn's trees, and the order of PyTorch Geometric."""

from __future__ import annotations

import math

import pytest
import torch

import nearfold
from nearfold import knn, knn_graph
from nearfold.kernels import engine, points
from nearfold.kernels.points import nearest_points

every_engine = pytest.mark.parametrize("name", engine.names())


def drawn(N, e, clouds, dtype=torch.float32, levels=None, seed=0):
    """Points and their clouds; few ``levels`` make many equal distances."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, e, generator=generator, dtype=dtype)
    x = x if levels is None else (x * levels).round() / levels
    return x, torch.randint(0, clouds, (N,), generator=generator).sort().values


def sorted_edges(x, y, k, batch_x, batch_y, own=False, metric="euclidean"):
    """Pairs (query, key) from a stable sort of all distances, one query after the other."""
    edges = []
    for i in range(len(y)):
        rows = (batch_x == batch_y[i]).nonzero().flatten()
        rows = rows[rows != i] if own else rows
        if metric == "euclidean":
            far = torch.zeros(len(rows), dtype=x.dtype)
            for c in range(x.shape[1]):
                far = far + (y[i, c] - x[rows, c]) ** 2
        elif metric == "chebyshev":
            far = (y[i] - x[rows]).abs().amax(1) if len(rows) else torch.zeros(0)
        else:
            unit = torch.nn.functional.normalize
            far = -(unit(y[i : i + 1], dim=1) * unit(x[rows], dim=1)).sum(1)
        edges += [(i, int(j)) for j in rows[far.sort(stable=True).indices[:k]]]
    return edges


@every_engine
@pytest.mark.parametrize(
    ("N", "e", "k", "clouds", "dtype", "levels"),
    [
        (150, 3, 4, 3, torch.float32, None),
        (150, 3, 16, 5, torch.float64, 2),
        (200, 2, 7, 1, torch.float32, 1),
        (120, 1, 3, 60, torch.float64, 1),
        (90, 5, 200, 4, torch.float32, None),
        (90, 9, 4, 3, torch.float64, None),
        (300, 3, 40, 2, torch.float32, 0.3),
        (33, 8, 33, 1, torch.float64, None),
    ],
)
def test_every_edge_is_the_sorted_distances(name, N, e, k, clouds, dtype, levels):
    x, batch = drawn(N, e, clouds, dtype, levels)
    y, batch_y = drawn(N // 3, e, clouds + 1, dtype, levels, seed=1)
    with engine.forced(name):
        found = knn(x, y, k, batch, batch_y)
        graph = knn_graph(x, k, batch)
        looped = knn_graph(x, k, batch, loop=True)
    assert found.dtype == torch.long and found.shape[0] == 2
    assert list(map(tuple, found.T.tolist())) == sorted_edges(x, y, k, batch, batch_y)
    assert list(map(tuple, graph.flip(0).T.tolist())) == sorted_edges(x, x, k, batch, batch, own=True)
    assert list(map(tuple, looped.flip(0).T.tolist())) == sorted_edges(x, x, k, batch, batch)


@every_engine
@pytest.mark.parametrize("metric", points.METRICS)
def test_other_metrics(name, metric):
    x, batch = drawn(80, 4, 6, torch.float64)
    y, batch_y = drawn(50, 4, 6, torch.float64, seed=1)
    with engine.forced(name):
        found = knn(x, y, 5, batch, batch_y, metric=metric)
    assert list(map(tuple, found.T.tolist())) == sorted_edges(x, y, 5, batch, batch_y, metric=metric)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scikit_learns_trees_find_the_same_distances(dtype):
    neighbors = pytest.importorskip("sklearn.neighbors")
    x, batch = drawn(3000, 3, 4, dtype)
    index = knn(x, x, 16, batch, batch)[1].view(-1, 16)
    for b in range(4):
        cloud = x[batch == b]
        far, _ = neighbors.KDTree(cloud.double().numpy()).query(cloud.double().numpy(), 16)
        mine = (cloud[:, None] - x[index[batch == b]]).double().norm(dim=-1)
        torch.testing.assert_close(mine, torch.from_numpy(far), rtol=1e-6, atol=1e-6)


def test_the_order_is_that_of_pytorch_geometrics_documentation():
    x = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    batch = torch.zeros(4, dtype=torch.long)
    y, batch_y = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), torch.zeros(2, dtype=torch.long)
    assert knn(x, y, 2, batch, batch_y).tolist() == [[0, 0, 1, 1], [0, 1, 2, 3]]
    assert knn_graph(x, 2, batch).tolist() == [[1, 2, 0, 3, 0, 3, 1, 2], [0, 0, 1, 1, 2, 2, 3, 3]]
    assert knn_graph(x, 1, batch, loop=True).tolist() == [[0, 1, 2, 3]] * 2


@every_engine
def test_points_at_one_place_have_the_lowest_for_neighbours_soon(name):
    """Ten thousand of them: a search that looked at all would take minutes."""
    N = 300 if name == engine.OFF else 10_000
    x = torch.ones(N, 3)
    with engine.forced(name):
        graph = knn_graph(x, 3)
    assert graph[1].equal(torch.arange(N).repeat_interleave(3))
    rows = graph[0].view(N, 3)
    assert rows[:4].tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]] and (rows[4:] == torch.arange(3)).all()


@every_engine
@pytest.mark.parametrize("e", [3, 12])
def test_empty_clouds_and_no_points(name, e):
    x, y = torch.randn(6, e), torch.randn(5, e)
    with engine.forced(name):
        found = knn(x, y, 4, torch.tensor([1, 1, 1, 5, 5, 7]), torch.tensor([0, 1, 5, 5, 9]))
        assert found[0].tolist() == [1, 1, 1, 2, 2, 3, 3]
        assert found[1, :3].sort().values.tolist() == [0, 1, 2] and found[1, 3:5].sort().values.tolist() == [3, 4]
        assert knn(x[:0], y, 4).shape == knn(x, y[:0], 4).shape == knn_graph(x[:1], 4).shape == (2, 0)
        assert knn_graph(x[:0], 2, torch.empty(0, dtype=torch.long)).shape == (2, 0)
        assert knn(x[:2], y, 10**9).shape == (2, 10)


def test_ids_of_clouds_may_be_any_numbers():
    x = torch.randn(8, 3)
    ids = torch.tensor([-7, -7, -7, 2, 2, 10**12, 10**12, 10**12])
    counted = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2], dtype=torch.int32)
    assert torch.equal(knn_graph(x, 2, ids), knn_graph(x, 2, counted))


def test_strided_points_and_low_precision():
    x = torch.randn(3, 40).T
    assert torch.equal(knn_graph(x, 3), knn_graph(x.contiguous(), 3))
    low = x.to(torch.bfloat16)
    assert torch.equal(knn_graph(low, 3), knn_graph(low.float(), 3))


def test_points_that_want_gradients_give_whole_numbers():
    assert not knn_graph(torch.randn(9, 3, requires_grad=True), 2).requires_grad


@every_engine
def test_the_operator_passes_opcheck_and_compiles(name):
    query, key = torch.randn(7, 3), torch.randn(9, 3)
    firsts = torch.tensor([0, 3, 7]), torch.tensor([0, 4, 9])
    with engine.forced(name):
        torch.library.opcheck(nearest_points.registered, (query, key, *firsts, 2, "euclidean", False))
        eager = nearest_points(query, key, *firsts, 2, "euclidean", False)
        compiled = torch.compile(nearest_points, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(query, key, *firsts, 2, "euclidean", False), eager)


X = torch.zeros(4, 3)
BAD = {
    "flat": (lambda: knn_graph(torch.zeros(4), 1), r"x must be points (N, e), floating point, got (4,)"),
    "whole": (lambda: knn(X.long(), X.long(), 1), "got (4, 3) torch.int64"),
    "list": (lambda: knn(X, [[0.0]], 1), "y must be a torch.Tensor"),
    "width": (lambda: knn(X, X[:, :2], 1), "one number of coordinates"),
    "dtype": (lambda: knn(X, X.double(), 1), "torch.float32 cpu and (4, 3) torch.float64"),
    "k": (lambda: knn_graph(X, 0), "k must be"),
    "nan": (lambda: knn_graph(torch.tensor([[0.0], [math.nan]]), 1), "row 1 is not finite"),
    "large": (lambda: knn_graph(X + 1e30, 1), "scale them down"),
    "length": (lambda: knn_graph(X, 1, torch.zeros(3, dtype=torch.long)), "batch must hold a whole number for each of"),
    "float batch": (lambda: knn_graph(X, 1, torch.zeros(4)), "torch.float32"),
    "order": (lambda: knn_graph(X, 1, torch.tensor([0, 2, 1, 1])), "goes from 2 to 1 at 2; sort the points by it"),
    "one batch": (lambda: knn(X, X, 1, torch.zeros(4, dtype=torch.long)), "batch_y is missing"),
    "metric": (lambda: knn_graph(X, 1, metric="manhattan"), "euclidean, chebyshev, cosine"),
    "loop": (lambda: knn_graph(X, 1, loop="yes"), "loop"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, said = BAD[name]
    with pytest.raises(ValueError) as error:
        call()
    assert said in str(error.value)


def test_they_are_names_of_the_package():
    assert nearfold.knn is knn and {"knn", "knn_graph"} <= set(dir(nearfold))
