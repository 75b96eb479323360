"""The Triton search for the k best keys against the PyTorch path, and its gradients against autograd."""

from __future__ import annotations

import math

import pytest
import torch

from nearfold.kernels import select_torch
from nearfold.kernels.search import Search
from nearfold.kernels.triton import select as kernels

INF = float("inf")
ANY = [0, -1, 1]
BLOCKS = {"block_m": 16, "block_n": 16}


def reference(query, key, k, metric, squared, *rest, dtype=torch.float64):
    """`select_torch.select` of the same numbers."""
    B, H, M, _ = query.shape
    flat = (x.to(dtype).flatten(0, 1).contiguous() for x in (query, key))
    score, index = select_torch.select(*flat, Search(k, metric, squared, *rest))
    return score.view(B, H, M, k), index.view(B, H, M, k)


def where(M, R, grid=None):
    """Every position of the grid, for queries and keys."""
    return torch.arange(M), torch.arange(R), grid or [max(M, R)]


def small_integers(*shape):
    """Few of them, so that scores are exact and many are equal."""
    return torch.randint(-2, 3, shape).float()


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(shape), dim=-1)


def check_exact(query, key, k, metric, squared, *rest, **blocks):
    """The same indices, ties and all: for inputs whose scores have no rounding."""
    score, index = kernels.select(query, key, Search(k, metric, squared, *rest), **(blocks or BLOCKS))
    expected = reference(query, key, k, metric, squared, *rest)
    assert score.dtype == torch.float32
    assert index.dtype == torch.long
    assert torch.equal(index, expected[1])
    torch.testing.assert_close(score.double(), expected[0], rtol=1e-6, atol=0, equal_nan=True)
    return score, index


def check_close(query, key, k, metric, squared, *rest, tolerance=1e-5):
    """The same scores up to rounding, and other indices only among keys that are as good up to rounding."""
    score, index = kernels.select(query, key, Search(k, metric, squared, *rest), **BLOCKS)
    all_scores = reference(query, key, key.shape[2], metric, squared, *rest)
    expected = all_scores[0][..., :k]
    torch.testing.assert_close(score.double(), expected, rtol=tolerance, atol=tolerance)
    by_key = all_scores[0].gather(-1, all_scores[1].clamp(min=0).argsort(-1))
    assert (index >= 0).all()
    torch.testing.assert_close(by_key.gather(-1, index), score.double(), rtol=tolerance, atol=tolerance)
    assert (index.sort(-1).values.diff() > 0).all(), "an index twice"
    gaps = all_scores[0].diff().abs()
    sure = ((gaps[..., :k] > tolerance * 4) if gaps.shape[-1] >= k else gaps > tolerance * 4).all(-1)
    assert sure.any()
    assert torch.equal(index[sure], all_scores[1][..., :k][sure])


@pytest.mark.parametrize(
    ("metric", "squared", "k"),
    [
        *(("dot", False, k) for k in (1, 3, 9, 17, 40)),
        *(("euclidean", False, k) for k in (1, 9)),
        ("euclidean", True, 40),
    ],
)
def test_ties_fall_to_the_lowest_index(metric, squared, k):
    heads = 2 if k == 9 else 1
    query, key = small_integers(heads, heads, 19, 3), small_integers(heads, heads, 37, 3)
    _, index = check_exact(query, key, k, metric, squared, *where(19, 37), ANY, False, 0.0)
    assert (index == -1).any() == (k > 37)


def test_equal_cosines_at_the_end_of_the_range_are_ties():
    direction = unit(1, 1, 1, 40)
    key = direction.expand(1, 1, 40, 40) * (1 + torch.arange(40)[:, None] * 3e-7)
    assert (key[0, 0, 1:] != key[0, 0, :-1]).any()
    score, index = kernels.select(direction, key, Search(5, "cosine", False, *where(1, 40), ANY, False, 0.0), **BLOCKS)
    assert score.max() == 1
    products = (key.double() @ direction.double().mT)[0, 0, :, 0]
    clear = int((products > 1 + 1e-6).nonzero()[0])  # beyond rounding above 1, and so are all after it
    assert (index[0, 0, 0] <= clear + 5).all()
    assert (index.diff() > 0).all()


@pytest.mark.parametrize("e", [1, 3, 16, 40])
@pytest.mark.parametrize(("metric", "squared"), [("dot", False), ("cosine", False), ("euclidean", False)])
def test_random_vectors(metric, squared, e):
    if metric == "cosine" and e == 1:
        pytest.skip("unit numbers are all ties")
    query, key = (unit(1, 2, n, e) if metric == "cosine" else torch.randn(1, 2, n, e) for n in (17, 33))
    check_close(query, key, 5, metric, squared, *where(17, 33), ANY, False, 0.0)


@pytest.mark.parametrize("metric", ["dot", "euclidean"])
def test_more_features_than_are_held_at_once(metric, monkeypatch):
    monkeypatch.setattr(kernels, "MOST_FEATURES", 16)
    query, key = small_integers(1, 2, 5, 40), small_integers(1, 2, 21, 40)
    query[0, 1, 3, 37] = math.nan
    key[0, 0, 2, 39] = math.nan
    _, index = check_exact(query, key, 4, metric, True, *where(5, 21), ANY, False, 0.0)
    assert (index[0, 1, 3] == -2).all()


RULES = {
    "causal": ([37], [1, -1, 1]),
    "reach": ([37], [0, 4, 1]),
    "causal reach": ([37], [1, 4, 1]),
    "dilation": ([37], [0, -1, 3]),
    "plane reach": ([5, 8], [0, 1, 1]),
    "plane causal reach": ([5, 8], [1, 2, 1]),
    "plane dilated": ([5, 8], [0, 2, 2]),
    "thin plane": ([1, 40], [0, 3, 1]),
    "volume": ([3, 4, 3], [0, 1, 1]),
    "four axes": ([2, 3, 1, 3, 2], [0, 1, 1]),
}


@pytest.mark.parametrize(("metric", "name"), [*(("dot", name) for name in RULES), ("euclidean", "plane causal reach")])
def test_rules(metric, name):
    grid, rule = RULES[name]
    n = math.prod(grid)
    query, key = small_integers(1, 2, n, 3), small_integers(1, 2, n, 3)
    _, index = check_exact(query, key, 6, metric, False, *where(n, n, grid), rule, False, 0.0)
    assert (index == -1).any() == (name not in ("dilation", "four axes", "volume"))


@pytest.mark.parametrize(
    ("metric", "squared", "again"),
    [
        *((metric, False, again) for metric in ("dot", "euclidean") for again in (-INF, -1.5, 0.5, 50.0)),
        ("euclidean", True, -2.0),
    ],
)
def test_the_own_position(metric, squared, again):
    x = small_integers(1, 2, 37, 3)
    _, index = check_exact(x, x, 4, metric, squared, *where(37, 37), ANY, True, again)
    chosen = (index == torch.arange(37)[:, None]).any(-1)
    assert chosen.all() if again == 50 else not chosen.any() if again == -INF else True


@pytest.mark.parametrize("rule", [ANY, [1, -1, 1], [0, 1, 1], [0, 2, 2]])
def test_some_positions_only(rule):
    grid = [6, 8]
    query_index = torch.randperm(48)[:19]
    key_index = torch.randperm(48)[:23].sort().values
    query, key = small_integers(2, 1, 19, 3), small_integers(2, 1, 23, 3)
    for again in (-INF, 1.5):
        check_exact(query, key, 3, "dot", False, query_index, key_index, grid, rule, True, again)


@pytest.mark.parametrize("metric", ["dot", "euclidean"])
def test_nan_and_infinity(metric):
    query, key = small_integers(1, 2, 18, 3), small_integers(1, 2, 35, 3)
    query[0, 0, 4, 1] = query[0, 1, 17, 2] = math.nan
    query[0, 0, 5, 0], query[0, 0, 6, 0] = INF, -INF
    key[0, 0, 3, 0] = key[0, 1, 34, 2] = key[0, 1, 0, 1] = math.nan
    key[0, 0, 20, 1], key[0, 1, 7, 0] = INF, -INF
    score, index = check_exact(query, key, 9, metric, True, *where(18, 35), ANY, False, 0.0)
    assert score[0, 0, 4].isnan().all()
    assert (index[0, 0, 4] == -2).all()
    assert not (index[0, 0] == 3).any()
    assert not (index[0, 1] == 34).any()
    check_exact(query[:, :, :5], key, 40, metric, False, *where(5, 35), ANY, True, -INF)


def test_a_nan_key_at_the_own_position_counts_as_given():
    x = small_integers(1, 1, 20, 3)
    key = x.clone()
    key[0, 0, 7] = math.nan
    _, index = check_exact(x, key, 3, "dot", False, *where(20, 20), ANY, True, 50.0)
    assert (index[0, 0, :, 0] == torch.arange(20)).all()


def test_all_keys_nan_or_equal():
    key = torch.full((1, 1, 33, 3), math.nan)
    query = small_integers(1, 1, 3, 3)
    _, index = check_exact(query, key, 2, "dot", False, *where(3, 33), ANY, False, 0.0)
    assert (index == -1).all()
    _, index = check_exact(query, torch.ones_like(key), 20, "euclidean", False, *where(3, 33), ANY, False, 0.0)
    assert (index == torch.arange(20)).all()


def test_the_two_zeros_are_one():
    x = torch.zeros(1, 1, 5, 1)
    _, index = check_exact(x, x, 5, "dot", False, *where(5, 5), ANY, True, -0.0)
    assert (index == torch.arange(5)).all()


@pytest.mark.parametrize("M", [1, 16, 17])
@pytest.mark.parametrize("R", [1, 2, 16, 31])
def test_sizes(M, R):
    check_exact(small_integers(1, 1, M, 2), small_integers(1, 1, R, 2), 3, "dot", False, *where(M, R), ANY, False, 0.0)


def test_blocks_do_not_matter():
    query, key = small_integers(1, 1, 40, 3), small_integers(1, 1, 50, 3)
    for block_m, block_n in ((16, 64), (64, 16), (None, None)):
        rest = (*where(40, 50), ANY, True, -INF)
        check_exact(query, key, 9, "dot", False, *rest, block_m=block_m, block_n=block_n)


def test_nothing_to_search():
    score, index = kernels.select(
        torch.ones(1, 2, 3, 4), torch.ones(1, 2, 0, 4), Search(2, "dot", False, *where(3, 0), ANY, True, 0.0)
    )
    assert (score == -INF).all()
    assert (index == -1).all()
    assert kernels.select(
        torch.ones(1, 2, 0, 4), torch.ones(1, 2, 3, 4), Search(2, "dot", False, *where(0, 3), ANY, False, 0.0)
    )[1].shape == (1, 2, 0, 2)


def test_strides():
    query = small_integers(2, 19, 3, 5).transpose(1, 2)  # heads after positions
    key = small_integers(2, 3, 5, 33).mT  # features first
    check_exact(query, key, 4, "dot", False, *where(19, 33), ANY, False, 0.0)
    check_exact(query, key, 4, "euclidean", False, *where(19, 33), ANY, False, 0.0)
    check_exact(query[:, :1].expand(2, 3, 19, 5), key, 4, "dot", False, *where(19, 33), ANY, False, 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", ["dot", "euclidean"])
def test_sixteen_bits(metric, dtype):
    query, key = torch.randn(1, 2, 18, 20).to(dtype), torch.randn(1, 2, 35, 20).to(dtype)
    check_close(query, key, 5, metric, False, *where(18, 35), ANY, False, 0.0)


def test_equal_inputs_have_equal_results():
    x = torch.randn(1, 2, 35, 20)
    search = Search(5, "euclidean", False, *where(35, 35), ANY, True, -INF)
    runs = [kernels.select(x, x, search, **BLOCKS) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_what_is_not_served_says_why():
    x = torch.ones(1, 1, 4, 2)
    nearest = Search(3, "dot", False, *where(4, 4), ANY, False, 0.0)
    wide = nearest._replace(grid=[2, 2, 2, 2, 2])
    assert kernels.refusal(x, x, nearest) == "" == kernels.refusal(x, x, wide)
    assert "gram" in kernels.refusal(x, x, nearest._replace(metric="gram"))
    assert "chebyshev" in kernels.refusal(x, x, nearest._replace(metric="chebyshev"))
    assert "float64" in kernels.refusal(x.double(), x.double(), nearest)
    assert "1000" in kernels.refusal(x, x, nearest._replace(k=1000))
    assert "axes" in kernels.refusal(x, x, wide._replace(rule=[0, 1, 1]))
    assert "32 bits" in kernels.refusal(x, x, nearest._replace(grid=[2**16, 2**15]))
    with pytest.raises(NotImplementedError, match="gram"):
        kernels.select(x, x, nearest._replace(metric="gram"))


BINS = {"block_m": 16, "classes": 16, "exact_block_m": 16, "exact_block_n": 16}


def check_binned(query, key, k, metric, *rest):
    """The same as the exact search, to the bit; returns how many queries needed it."""
    score, index, searched_again = kernels.select_binned(query, key, Search(k, metric, False, *rest), **BINS)
    expected = kernels.select(query, key, Search(k, metric, False, *rest), **BLOCKS)
    assert torch.equal(index, expected[1])
    assert torch.equal(score.nan_to_num(7.0), expected[0].nan_to_num(7.0))
    assert searched_again.shape == (query.shape[0] * query.shape[1],)
    return searched_again


@pytest.mark.parametrize("k", [1, 4])
def test_bins(k):
    query, key = torch.randn(1, 2, 37, 3), torch.randn(1, 2, 150, 3)
    again = check_binned(query, key, k, "dot", *where(37, 150), ANY, False, 0.0)
    assert (again < 20).all()


@pytest.mark.parametrize("rule", [ANY, [1, -1, 1], [0, 4, 2]])
def test_bins_with_ties(rule):
    x = small_integers(2, 1, 70, 3)
    grid = [7, 10]
    query_index = torch.arange(0, 70, 3)
    rest = (query_index, torch.arange(70), grid, rule, True, -INF)
    again = check_binned(x[:, :, ::3], x, 3, "dot", *rest)
    assert (again > 0).any() == (rule != [0, 4, 2])  # which leaves too few keys for three in a class
    check_exact(x[:, :, ::3], x, 3, "dot", False, *rest)


@pytest.mark.parametrize("kept", [2, 3])
def test_bins_notice_that_they_left_one_out(kept):
    key = torch.rand(1, 1, 80, 1)
    tiles = torch.tensor([0, 2, 4])[:kept]
    key[0, 0, tiles * 16 + (5 + 45 * tiles) % 16, 0] = torch.tensor([3.0, 5.0, 4.0])[:kept]  # all of one class
    again = check_binned(torch.ones(1, 1, 19, 1), key, 3, "dot", *where(19, 80), ANY, False, 0.0)
    assert again.tolist() == [19 if kept == 3 else 0]


def test_bins_with_nan_infinity_and_few_keys():
    query, key = small_integers(1, 2, 18, 3), small_integers(1, 2, 35, 3)
    query[0, 0, 4, 1] = key[0, 0, 3, 0] = key[0, 1, 34, 2] = math.nan
    query[0, 0, 5, 0], key[0, 0, 20, 1], key[0, 1, 7, 0] = INF, INF, -INF
    check_binned(query, key, 9, "dot", *where(18, 35), ANY, False, 0.0)
    check_binned(query[:, :, :5], key[:, :, :6], 9, "cosine", *where(5, 6), ANY, True, 0.5)


def test_when_bins_are_of_use():
    x = torch.ones(1, 1, 2048, 2, dtype=torch.bfloat16)
    assert kernels.refusal_binned(x, x, 9, "dot") == ""
    assert "euclidean" in kernels.refusal_binned(x, x, 9, "euclidean")
    assert "float32" in kernels.refusal_binned(x.float(), x.float(), 9, "dot")
    assert "40" in kernels.refusal_binned(x, x, 40, "cosine")
    assert "100" in kernels.refusal_binned(x, x[:, :, :100], 9, "dot")
    with pytest.raises(NotImplementedError, match="euclidean"):
        kernels.select_binned(x, x, Search(3, "euclidean", False, *where(2048, 2048), ANY, False, 0.0))


def dense_gradients(grad, query, key, index, metric, squared):
    """By autograd of the chosen scores among all of them, in float64."""
    q, k = (x.detach().double().requires_grad_() for x in (query, key))
    if metric == "euclidean":
        apart = (q[..., :, None, :] - k[..., None, :, :]).square().sum(-1)
        chosen = apart.gather(-1, index.clamp(min=0))
        # a root has no gradient at zero, and there it is taken to be zero
        score = -chosen if squared else -torch.where(chosen > 0, torch.where(chosen > 0, chosen, 1).sqrt(), 0)
    else:
        score = (q @ k.mT).gather(-1, index.clamp(min=0))
    (score * grad.double() * (index >= 0)).sum().backward()
    return q.grad, k.grad


METRICS = [("dot", False), ("cosine", False), ("euclidean", False), ("euclidean", True)]


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(("metric", "squared"), METRICS)
def test_gradients(metric, squared, deterministic):
    query = torch.randn(2, 18, 2, 5).transpose(1, 2)
    key = torch.randn(2, 2, 23, 5)
    index = torch.rand(2, 2, 18, 23).argsort(-1)[..., :7]
    index[0, 0, 3, 4:], index[1, 1, 17] = -1, -2
    index[0, 1, :, 0] = 11  # a key that all have chosen
    key[0, 1, 11] = query[0, 1, 2]  # one of them at distance zero
    key[1, 0, 5] = query[1, 0, 6] = 0.25
    grad = torch.randn(2, 2, 18, 7)
    found = kernels.select_backward(grad, query, key, index, metric, squared, deterministic=deterministic, block_m=16)
    for mine, true, like in zip(
        found, dense_gradients(grad, query, key, index, metric, squared), (query, key), strict=True
    ):
        assert mine.dtype == torch.float32
        assert mine.shape == like.shape
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("metric", "squared"), METRICS[1:])
def test_gradients_of_more_features_than_are_held_at_once(metric, squared, monkeypatch):
    monkeypatch.setattr(kernels, "MOST_FEATURES", 16)
    query, key = torch.randn(1, 2, 6, 40), torch.randn(1, 2, 9, 40)
    index, grad = torch.rand(1, 2, 6, 9).argsort(-1)[..., :4], torch.randn(1, 2, 6, 4)
    true = dense_gradients(grad, query, key, index, metric, squared)
    for deterministic in (True, False):
        found = kernels.select_backward(grad, query, key, index, metric, squared, deterministic=deterministic)
        for mine, expected in zip(found, true, strict=True):
            torch.testing.assert_close(mine.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("metric", "squared"), [("dot", False), ("euclidean", False)])
def test_gradients_of_sixteen_bits(metric, squared, dtype):
    query, key = torch.randn(1, 2, 17, 5).to(dtype), torch.randn(1, 2, 9, 5).to(dtype)
    index, grad = torch.rand(1, 2, 17, 9).argsort(-1)[..., :4], torch.randn(1, 2, 17, 4)
    found = kernels.select_backward(grad, query, key, index, metric, squared)
    for mine, expected in zip(found, dense_gradients(grad, query, key, index, metric, squared), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("metric", ["dot", "euclidean"])
def test_what_nobody_chose_does_not_reach_the_gradients(metric):
    query, key = torch.randn(1, 1, 4, 3), torch.randn(1, 1, 5, 3)
    query[0, 0, 2] = math.nan
    key[0, 0, 0] = math.nan
    rest = (*where(4, 5), ANY, False, 0.0)
    _, index = kernels.select(query, key, Search(6, metric, False, *rest), **BLOCKS)
    assert (index[0, 0, 2] == -2).all()
    d_query, d_key = kernels.select_backward(torch.ones(1, 1, 4, 6), query, key, index, metric, False)
    assert d_query.isfinite().all()
    assert d_key.isfinite().all()
    assert (d_query[0, 0, 2] == 0).all()
    assert (d_key[0, 0, 0] == 0).all()


def test_gradients_are_deterministic():
    query, key, grad = torch.randn(1, 2, 40, 5), torch.randn(1, 2, 7, 5), torch.randn(1, 2, 40, 3)
    index = torch.randint(0, 7, (1, 2, 40, 3))
    runs = [kernels.select_backward(grad, query, key, index, "euclidean", False) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_gradients_without_queries_or_keys():
    for M, R in ((0, 3), (3, 0)):
        grad, index = torch.ones(1, 1, M, 2), torch.full((1, 1, M, 2), -1)
        d_query, d_key = kernels.select_backward(
            grad, torch.ones(1, 1, M, 4), torch.ones(1, 1, R, 4), index, "dot", False
        )
        assert d_query.shape == (1, 1, M, 4)
        assert d_key.shape == (1, 1, R, 4)
        assert (d_query == 0).all()
        assert (d_key == 0).all()
