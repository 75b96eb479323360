"""The search by threshold, which serves any search, against the PyTorch path."""

from __future__ import annotations

import math
import mmap

import pytest
import torch

from nearfold.kernels import select_torch
from nearfold.kernels.search import Search
from nearfold.kernels.triton import threshold as kernels

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


def test_offsets_beyond_32_bits():
    """Three features, half of what 32 bits count apart, in memory that is only claimed; a wrapped offset is in it."""
    apart, only_claim = 2**30 + 16, getattr(mmap, "MAP_NORESERVE", 0x4000)
    size = 2 * (2 * 2**31 + 2**20)
    claimed = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | only_claim)
    held = torch.frombuffer(claimed, dtype=torch.bfloat16)
    x = held[2**31 :].as_strided((1, 1, 40, 3), (1, 1, 1, apart))
    x.copy_(small_integers(1, 1, 40, 3))
    check_exact(x[:, :, :19], x, 6, "euclidean", True, *where(19, 40), ANY, False, 0.0)
