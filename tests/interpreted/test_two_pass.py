"""The search in two passes against the search by threshold and the PyTorch path; what it notes, and what it leaves."""

from __future__ import annotations

import math

import pytest
import torch

from nearfold.kernels import select_torch
from nearfold.kernels.search import Search
from nearfold.kernels.triton import threshold, two_pass

INF = float("inf")
ANY = [0, -1, 1]
SMALL = {"block_m": 16, "classes": 16, "room": 16}


@pytest.fixture(autouse=True)
def _few_keys_are_enough(monkeypatch):
    monkeypatch.setattr(two_pass, "FEWEST_KEYS", 1)


def search_of(k, metric, M, R, rule=ANY, own=False, again=0.0, squared=False, grid=None):
    """Every position of the grid, for queries and keys."""
    return Search(k, metric, squared, torch.arange(M), torch.arange(R), grid or [max(M, R)], list(rule), own, again)


def small_integers(*shape):
    """Few of them, so that scores are exact and many are equal."""
    return torch.randint(-2, 3, shape).float()


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(shape), dim=-1)


def reference(query, key, search):
    """`select_torch.select` of the same numbers in float64."""
    flat = (x.double().flatten(0, 1).contiguous() for x in (query, key))
    score, index = select_torch.select(*flat, search)
    return score.view(*query.shape[:3], search.k), index.view(*query.shape[:3], search.k)


def check(query, key, search, **blocks):
    """The very keys that the definition names in float64; returns how many queries were left to the threshold."""
    score, index, left = two_pass.select(query, key, search, **(SMALL | blocks))
    expected = reference(query, key, search)
    assert score.dtype == torch.float32 and index.dtype == torch.long
    assert torch.equal(index, expected[1])
    torch.testing.assert_close(score.double(), expected[0], rtol=1e-5, atol=1e-5, equal_nan=True)
    assert left.shape == (query.shape[0] * query.shape[1],)
    return left


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("metric", "k", "squared"),
    [("dot", 1, False), ("dot", 7, False), ("cosine", 4, False), ("euclidean", 4, False), ("euclidean", 4, True)],
)
def test_random_vectors(metric, k, squared, dtype):
    query, key = ((unit if metric == "cosine" else torch.randn)(1, 2, n, 20).to(dtype) for n in (37, 150))
    left = check(query, key, search_of(k, metric, 37, 150, squared=squared))
    assert (left < 12).all()


@pytest.mark.parametrize("k", [17, 24])
def test_many_slots(k):
    query, key = torch.randn(1, 1, 20, 8), torch.randn(1, 1, 260, 8)
    assert check(query, key, search_of(k, "dot", 20, 260), classes=64, room=64) < 10


@pytest.mark.parametrize("metric", ["dot", "euclidean"])
@pytest.mark.parametrize("own", [False, True])
def test_ties_fall_to_the_lowest_index(metric, own):
    """Whole numbers: also the scores are those of the threshold, to the bit."""
    x = small_integers(2, 1, 70, 3)
    search = search_of(5, metric, 70, 70, own=own, again=-1.0)
    left = check(x, x, search)
    assert (left > 0).any()
    score, index, _ = two_pass.select(x, x, search, **SMALL)
    expected = threshold.select(x, x, search, block_m=16, block_n=16)
    assert torch.equal(score, expected[0]) and torch.equal(index, expected[1])


def test_ties_among_noted_keys_fall_to_the_lowest_index():
    """Pairs of equal keys, of whole numbers whose products are exact, and so few that none is left to the threshold."""
    key = torch.randint(-99, 100, (1, 1, 40, 8)).float().repeat_interleave(2, 2)[:, :, torch.randperm(80)]
    query = torch.randint(-99, 100, (1, 1, 19, 8)).float()
    left = check(query, key, search_of(6, "dot", 19, 80))
    assert left < 10


RULES = {
    "causal": ([70], [1, -1, 1]),
    "reach": ([70], [0, 9, 1]),
    "causal reach": ([70], [1, 40, 1]),
    "causal plane": ([7, 10], [1, -1, 1]),
}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_rules(name, own):
    grid, rule = RULES[name]
    query, key = torch.randn(1, 2, 70, 5), torch.randn(1, 2, 70, 5)
    left = check(query, key, search_of(6, "dot", 70, 70, rule, own, 0.25, grid=grid))
    assert (left < 35).all()


@pytest.mark.parametrize("again", [-INF, -1.5, 0.5, 50.0])
@pytest.mark.parametrize(("metric", "squared"), [("dot", False), ("euclidean", False), ("euclidean", True)])
def test_the_own_position(metric, squared, again):
    x = torch.randn(1, 1, 70, 6)
    search = search_of(4, metric, 70, 70, own=True, again=again, squared=squared)
    assert check(x, x, search) < 10
    index = two_pass.select(x, x, search, **SMALL)[1]
    chosen = (index == torch.arange(70)[:, None]).any(-1)
    assert chosen.all() if again == 50 else not chosen.any() if again == -INF else True


@pytest.mark.parametrize("rule", [ANY, [1, -1, 1]])
def test_some_positions_only(rule):
    query_index, key_index = torch.randperm(90)[:33], torch.randperm(90)[:60].sort().values
    query, key = torch.randn(2, 1, 33, 5), torch.randn(2, 1, 60, 5)
    for again in (-INF, 1.5):
        check(query, key, Search(3, "dot", False, query_index, key_index, [90], rule, True, again))


@pytest.mark.parametrize("R", [1, 2, 15, 16, 17, 32])
def test_sizes(R):
    for M in (1, 16, 17):
        check(torch.randn(1, 1, M, 4), torch.randn(1, 1, R, 4), search_of(5, "dot", M, R))


@pytest.mark.parametrize("metric", ["dot", "euclidean"])
def test_nan_and_infinity(metric):
    query, key = small_integers(1, 3, 18, 3), torch.randn(1, 3, 70, 3)
    query[0, 0, 4, 1] = query[0, 2, 17, 2] = math.nan
    query[0, 0, 5, 0], query[0, 0, 6, 0] = INF, -INF
    key[0, 0, 3, 0] = key[0, 2, 34, 2] = key[0, 2, 0, 1] = math.nan
    key[0, 1, 20, 1], key[0, 1, 7, 0] = INF, -INF
    for own in (False, True):
        left = check(query, key, search_of(5, metric, 18, 70, own=own, again=-3.0))
        assert left[1] == 18  # an infinite key: nothing is sure
        assert 0 < left[2] < 18 or metric == "euclidean"  # but a NaN key hinders nobody
    assert (two_pass.select(query, key, search_of(5, metric, 18, 70), **SMALL)[1][0, 0, 4] == -2).all()


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("metric", ["dot", "euclidean"])
def test_numbers_of_any_size(metric, size):
    """Beyond what the passes can hold, the threshold serves; the numbers' squares are beyond it, too."""
    query, key = torch.randn(1, 1, 18, 6), torch.randn(1, 1, 70, 6)
    plain = threshold.select(query * (1 if metric == "dot" else size), key * size, search_of(5, metric, 18, 70))
    found = two_pass.select(query * (1 if metric == "dot" else size), key * size, search_of(5, metric, 18, 70), **SMALL)
    assert torch.equal(found[1], plain[1])


def test_zeros_and_equal_keys_are_left_to_the_threshold():
    query, key = torch.randn(1, 1, 18, 3), torch.randn(1, 1, 70, 3)
    query[0, 0, 3] = 0
    assert check(query, key, search_of(5, "dot", 18, 70)) >= 1
    assert check(query, torch.ones_like(key), search_of(5, "dot", 18, 70)) == 18
    assert check(query, torch.zeros_like(key), search_of(5, "euclidean", 18, 70)) == 18


def of_class(lane, tile):
    """The key of a class in a tile of 16."""
    return tile * 16 + (lane + 45 * tile) % 16


@pytest.mark.parametrize(("noted", "left"), [(3, 0), (4, 19), (5, 19), (7, 19)])
def test_a_class_that_has_no_room_for_all_is_noticed(noted, left):
    """Whichever tiles its first ones, which are pushed out, are in."""
    key = -1 - torch.rand(1, 1, 16 * 9, 1)
    tiles = torch.tensor([0, 1, 2, 3, 5, 6, 8])[-noted:]
    key[0, 0, of_class(5, tiles), 0] = 3 + torch.rand(noted)
    key[0, 0, of_class(torch.arange(6, 12), torch.tensor(4)), 0] = 2 + torch.rand(6)
    assert check(torch.ones(1, 1, 19, 1), key, search_of(7, "dot", 19, 144)) == left


def test_more_keys_than_there_is_room_for_are_noticed():
    """Sixteen: five classes have three that are above the best of the sixth."""
    key = -1 - torch.rand(1, 1, 64, 1)
    lanes = torch.arange(1, 6).repeat(3)
    key[0, 0, of_class(lanes, torch.arange(3).repeat_interleave(5)), 0] = 3 + torch.rand(15)
    key[0, 0, of_class(torch.tensor(0), torch.tensor(3)), 0] = 2.0
    query = torch.ones(1, 1, 19, 1)
    assert check(query, key, search_of(6, "dot", 19, 64), room=16) == 0
    assert check(query, key, search_of(6, "dot", 19, 64), room=8) == 19
    assert check(query, key, search_of(5, "dot", 19, 64, own=True, again=9.0), room=16) == 19  # one place is taken
    key[0, 0, of_class(torch.tensor(5), torch.tensor(2)), 0] = -1.0
    assert check(query, key, search_of(5, "dot", 19, 64, own=True, again=9.0), room=16) == 0


def test_the_number_of_a_tile_is_read_back():
    """In tiles whose numbers are the first, the last, and those where a bit is carried."""
    tiles = torch.tensor([0, 1, 2, 3, 5, 6, 191, 192, 383, 384, 763, 764])
    R = two_pass.MOST_TILES * 16
    key = torch.zeros(1, 1, R, 16)
    key[0, 0, of_class(torch.arange(12), tiles), 0] = 1 + torch.rand(12)
    assert check(torch.ones(1, 1, 1, 16), key, search_of(12, "dot", 1, R, grid=[R])) == 0


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cosines_beyond_the_end_of_the_range_are_ties(dtype, sign):
    """Of rows that are longer than 1, later ones of a higher product."""
    query = unit(1, 1, 1, 40).to(dtype)
    key = (1.2 + sign * torch.arange(30) / 200)[:, None] * query * sign
    score, index, _ = two_pass.select(query, key.to(dtype), search_of(5, "cosine", 1, 30), **SMALL)
    assert (score == sign).all()
    assert torch.equal(index[0, 0, 0], torch.arange(5))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_keys_that_float16_cannot_tell_apart_are_ranked(metric, k):
    """Every key is there twice, but for noise far below its last bit, which decides who is nearest."""
    query, key = unit(1, 1, 30, 24), unit(1, 1, 80, 24)
    key = torch.cat([key, torch.nn.functional.normalize(key + 2e-5 * torch.randn(80, 24), dim=-1)], 2)
    assert check(query, key, search_of(k, metric, 30, 160)) < 20


def cut(x):
    """float32 without the bits that TF32 lacks."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("spread", [0.0, 3.0], ids=["even", "uneven"])
@pytest.mark.parametrize(
    ("metric", "dtype"), [("dot", torch.float32), ("cosine", torch.float32), ("euclidean", torch.bfloat16)], ids=str
)
def test_no_coarse_score_is_further_off_than_it_says(metric, dtype, spread):
    """Among random rows, rows of one direction, and numbers that are cut by nearly the whole last bit."""
    near = torch.randn(1, 1, 1, 96) + 0.1 * torch.randn(1, 2, 200, 96)
    worst = (1 + 2**-10 * 0.999) * torch.ones(1, 2, 8, 96)
    rows = torch.cat([torch.randn(1, 2, 200, 96), near, worst], 2) * (spread * torch.randn(1, 2, 408, 1)).exp()
    rows = torch.nn.functional.normalize(rows, dim=-1) if metric == "cosine" else rows.to(dtype)
    coarse = two_pass._coarse(rows, rows, metric)
    q, k = ((cut(x) if x.dtype == torch.float32 else x).double() for x in (coarse.query, coarse.key))
    found, sizes = q @ k.mT, q.norm(dim=-1)[..., None] * coarse.size[..., None, None]
    wide = rows.double()
    if metric == "euclidean":
        found = found - coarse.lift[..., None, :].double()
        wide = wide - wide.mean(2, keepdim=True)
        wide = wide / wide.norm(dim=-1).amax(-1)[..., None, None]
        sizes, true = torch.ones_like(sizes), wide @ wide.mT - wide.square().sum(-1)[..., None, :] / 2
    else:
        true = wide @ wide.mT
    share = ((found - true).abs() / (coarse.off / 2 * sizes)).max()
    assert share <= 1
    assert share > 0.02  # nor does it say far too much


def test_more_features_than_are_held_at_once(monkeypatch):
    monkeypatch.setattr(two_pass, "MOST_BYTES", 64)
    for metric in ("dot", "euclidean"):
        query, key = torch.randn(1, 2, 20, 75), torch.randn(1, 2, 70, 75)
        query[0, 1, 3, 70] = key[0, 0, 2, 72] = math.nan
        check(query, key, search_of(4, metric, 20, 70))


def test_strides():
    query = torch.randn(2, 19, 3, 5).transpose(1, 2)  # heads after positions
    key = torch.randn(2, 3, 5, 70).mT  # features first
    for metric in ("dot", "euclidean"):
        check(query, key, search_of(4, metric, 19, 70))
    check(query[:, :1].expand(2, 3, 19, 5), key, search_of(4, "dot", 19, 70))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_rows_that_are_queries_and_keys_are_made_coarse_once(metric):
    x = unit(1, 1, 70, 20)
    once, twice = two_pass._coarse(x, x, metric), two_pass._coarse(x, x.clone(), metric)
    assert once.query is once.key and twice.query is not twice.key
    assert torch.equal(once.query, twice.query) and torch.equal(once.key, twice.key)
    check(x, x, search_of(4, metric, 70, 70, own=True, again=-INF))


def test_blocks_do_not_matter():
    query, key = torch.randn(1, 1, 40, 3), torch.randn(1, 1, 200, 3)
    for block_m, classes, room in ((16, 64, 16), (64, 16, 32), (None, None, None)):
        check(query, key, search_of(5, "dot", 40, 200), block_m=block_m, classes=classes, room=room)


def test_equal_inputs_have_equal_results():
    """Whichever queries are left to the threshold, in whatever order."""
    x = torch.randn(1, 2, 60, 20).mul(4).round()
    runs = [two_pass.select(x, x, search_of(5, "euclidean", 60, 60, own=True, again=-INF), **SMALL) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_nothing_to_search():
    search = search_of(2, "dot", 0, 300)
    assert two_pass.select(torch.ones(1, 2, 0, 4), torch.ones(1, 2, 300, 4), search)[1].shape == (1, 2, 0, 2)


def test_what_is_of_no_use_says_why(monkeypatch):
    monkeypatch.undo()
    x = torch.ones(1, 1, 2048, 2, dtype=torch.bfloat16)
    plain = search_of(9, "dot", 2048, 2048)
    assert two_pass.refusal(x, x, plain) == "" == two_pass.refusal(x, x, plain._replace(k=40))
    assert "k = 41" in two_pass.refusal(x, x, plain._replace(k=41))
    assert "k = 40" in two_pass.refusal(x, x, plain._replace(k=40, own=True))
    assert "100" in two_pass.refusal(x, x[:, :, :100], plain)
    assert "dilation" in two_pass.refusal(x, x, plain._replace(rule=[0, -1, 2]))
    assert "grid" in two_pass.refusal(x, x, plain._replace(grid=[64, 32], rule=[0, 2, 1]))
    with pytest.raises(NotImplementedError, match="gram"):
        two_pass.select(x, x, plain._replace(metric="gram"))
