"""The compiled engine: every instruction set equals the oracle and the PyTorch path, on any number of threads.

The operators are called on random shapes, strides, ties and missing slots; the truth is the
PyTorch path of the same operator. Without a compiled engine most of this file has nothing to test.
"""

import math
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from nearfold import parse
from nearfold.kernels import engine
from nearfold.kernels.aggregate import aggregate, aggregate_backward
from nearfold.kernels.select import select, select_backward
from nearfold.kernels.weigh import slot_softmax, slot_softmax_backward
from nearfold.lower import lower
from nearfold.lower.verdict import Facts
from nearfold.nn import ACmix2d, BranchingConv2d, ConvNN2d, ConvNNAttention, KVTAttention
from nearfold.nn.functional import knn_attention
from nearfold.testing import CASES, conform, poisoned_empties

SETS = [name for name in engine.names() if name != engine.OFF]

every_set = pytest.mark.parametrize("isa", SETS)
compiled = pytest.mark.skipif(not SETS, reason="needs the compiled engine")


@pytest.fixture
def threads():
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ---- the conformance suite on every instruction set ------------------------------------------------------------------


def _uses_kernels(text):
    facts = [Facts(part, 2, torch.float64, "cpu", True) for part in parse(text).parts]
    return any(lower(f) in ("knn", "local") for f in facts)


KERNEL_CASES = [name for name, text in CASES.items() if _uses_kernels(text)]


def _conform(name, isa, grid, dtype):
    text = CASES[name]
    if "window" in text and ("padding=0" in text or "padding=1" in text) and min(grid) < 3:
        pytest.skip("a window without padding needs room")
    with engine.forced(isa), poisoned_empties():
        conform(text, grid, dtype)


@every_set
@pytest.mark.parametrize("grid", [(7, 6), (1, 1), (13,)], ids=str)
@pytest.mark.parametrize("name", KERNEL_CASES)
def test_conformance(name, grid, isa):
    if len(grid) == 1 and "(" in CASES[name].split("|")[0] and "window((" in CASES[name]:
        pytest.skip("a window of two axes")
    _conform(name, isa, grid, torch.float64)


@every_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", KERNEL_CASES)
def test_conformance_in_low_precision(name, dtype, isa):
    _conform(name, isa, (6, 7), dtype)


# ---- operators against the PyTorch path ------------------------------------------------------------------------------

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
CASES_PER_TEST = 30


def both(isa, op, *args):
    """What an operator gives on an instruction set, and on the PyTorch path."""
    with poisoned_empties():
        with engine.forced(isa):
            found = op(*args)
        with engine.forced(engine.OFF):
            truth = op(*args)
    return (found, truth) if isinstance(found, tuple) else ((found,), (truth,))


def assert_near(found, truth, what, tolerance=None):
    """Equal up to rounding, relative to the largest number; NaN and infinities in the same places."""
    assert found.shape == truth.shape and found.dtype == truth.dtype, what
    found, truth, tolerance = found.double(), truth.double(), tolerance or TOLERANCE[truth.dtype]
    odd = ~truth.isfinite()
    same = torch.equal(found.nan_to_num(3.0, 5.0, 7.0)[odd], truth.nan_to_num(3.0, 5.0, 7.0)[odd])
    assert same and found[~odd].isfinite().all(), f"{what}: NaN or infinity in other places"
    if truth.numel():
        gap = (found - truth).masked_fill(odd, 0).abs().max().item()
        scale = max(1.0, truth.masked_fill(odd, 0).abs().max().item())
        assert gap <= tolerance * scale, f"{what}: off by {gap:.2e} at a scale of {scale:.2e}"


def laid_out(rng, x):
    """The same numbers at other strides."""
    way = rng.choice(["plain", "plain", "turned", "inner", "stepped", "backwards"])
    if way == "turned":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if way == "inner":  # a slice of something larger: rows lie further apart than they are long
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 7), float("nan") if x.is_floating_point() else 99)
        wide[..., 3 : 3 + x.shape[-1]] = x
        return wide[..., 3 : 3 + x.shape[-1]]
    if way == "stepped":
        wide = x.new_full((*x.shape[:-2], 2 * x.shape[-2], x.shape[-1]), float("nan") if x.is_floating_point() else 99)
        wide[..., ::2, :] = x
        return wide[..., ::2, :]
    if way == "backwards":
        order = list(range(x.dim()))[::-1]
        return x.permute(order).contiguous().permute(order)
    return x


def draw_select(rng):
    """Arguments of `select`, and whether their arithmetic is exact."""
    B, H = rng.choice([(1, 1), (2, 1), (1, 3), (2, 2)])
    axes = rng.choice([1, 1, 2, 3])
    longest = 2500 if rng.random() < 0.25 else 700
    grid = [rng.randint(1, {1: longest, 2: 24, 3: 8}[axes]) for _ in range(axes)]
    positions = math.prod(grid)
    near = rng.random() < 0.3 and positions <= 700
    key_index = torch.arange(positions)
    if not near and rng.random() < 0.4:
        key_index = torch.randperm(positions)[: rng.randint(1, positions)].sort().values
    query_index = torch.randperm(positions)[: rng.randint(1, min(positions, 90))]  # in no order
    R, M = len(key_index), len(query_index)
    e, k = rng.choice([1, 2, 3, 5, 8, 16, 17, 33, 64, 130]), rng.choice([1, 2, 3, 9, 16, 17, 36, 79, 80, 100, 256])
    dtype = rng.choice([torch.float32, torch.float32, torch.float64])
    metric = rng.choice(["dot", "dot", "cosine", "euclidean", "chebyshev"])
    exact = rng.random() < 0.5

    def features(n):
        if exact:
            return torch.randint(-2, 3, (B, H, n, e)).to(dtype) * (0.5 if metric == "cosine" else 1)
        x = torch.randn(B, H, n, e, dtype=dtype) * rng.choice([1.0, 1.0, 1e-3, 1e3])
        if rng.random() < 0.2:  # all near one another: what is rounded coarsely ties
            x = x[:, :, :1] + 1e-5 * x
        return F.normalize(x, dim=-1) if metric == "cosine" else x

    query, key = features(M), features(R)
    if metric != "chebyshev":  # torch.cdist, which the truth is made of there, loses some of them
        for x in (query, key):
            for odd in ("nan",) if metric == "cosine" else ("nan", "inf", "-inf"):  # unit vectors hold no infinity
                if rng.random() < 0.1:
                    x[rng.randrange(B), rng.randrange(H), rng.randrange(x.shape[2]), rng.randrange(e)] = float(odd)
        if rng.random() < 0.1:
            key[:, :, torch.rand(R) < rng.choice([0.5, 0.98, 1.0])] = float(rng.choice(["nan", "nan", "-inf"]))
            if metric == "cosine":
                key.masked_fill_(key.isinf(), float("nan"))
    causal = int(rng.random() < 0.3)
    rule = [causal, rng.randint(0, 4) if rng.random() < 0.8 else -1, rng.randint(1, 3)] if near else [causal, -1, 1]
    own = rng.random() < 0.4
    again = rng.choice([1.1, 0.0, float("-inf"), 1.0, 5.0, -2.0])
    squared = metric == "euclidean" and rng.random() < 0.5
    query, key = laid_out(rng, query), laid_out(rng, key)
    return (query, key, k, metric, squared, query_index, key_index, grid, rule, own, again), exact


def scores_at(index, query, key, k, metric, squared, query_index, key_index, grid, rule, own, again):
    """The scores of chosen keys, in float64."""
    rows = key.double().gather(2, index.clamp(min=0).flatten(2)[..., None].expand(-1, -1, -1, key.shape[3]))
    rows, query = rows.unflatten(2, index.shape[2:]), query.double()[:, :, :, None]
    apart = query - rows
    score = {
        "dot": lambda: (query * rows).sum(-1),
        "cosine": lambda: (query * rows).sum(-1).clamp(-1, 1),
        "euclidean": lambda: -apart.square().sum(-1) if squared else -apart.square().sum(-1).sqrt(),
        "chebyshev": lambda: -apart.abs().amax(-1),
    }[metric]()
    if own:
        score[key_index[index.clamp(min=0)] == query_index[:, None]] = again
    lost = query.isnan().any(-1).expand(score.shape)
    return score.masked_fill(index < 0, float("-inf")).masked_fill(lost, float("nan"))


@every_set
@pytest.mark.parametrize("seed", range(4))
def test_select(isa, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for case in range(50):
        args, exact = draw_select(rng)
        query, key = args[:2]
        what = f"case {case}: {tuple(query.shape)} {tuple(key.shape)} {query.dtype} {args[2:5]} {args[7:]}"
        found, truth = both(isa, select, *args)
        if exact or query.dtype == torch.float64:
            assert_near(found[0], truth[0], what)
            assert torch.equal(found[1], truth[1]), what
            continue
        # roundoff decides which of two near keys comes first: the scores must be the best ones all the same
        with engine.forced(engine.OFF):
            best = select(query.double(), key.double(), *args[2:])[0]
        assert_near(found[0].double(), best, what, tolerance=2e-5)
        assert_near(found[0].double(), scores_at(found[1], *args), f"{what}, scores of the indices", tolerance=2e-5)
        once = found[1].sort(-1).values
        assert not ((once[..., 1:] == once[..., :-1]) & (once[..., 1:] >= 0)).any(), f"{what}: a key was chosen twice"


@every_set
def test_select_of_equal_keys_takes_the_first(isa):
    """All scores equal, or two values only: the lowest indices of the better one, then of the other."""
    for R, k in [(5, 9), (64, 9), (700, 1), (700, 64), (700, 256), (2000, 17)]:
        for dtype in (torch.float32, torch.float64):
            key = torch.ones(1, 1, R, 3, dtype=dtype)
            key[0, 0, 1::2] = 2
            query = torch.tensor([1.0, 0.0, -1.0], dtype=dtype)[:, None].expand(3, 3)[None, None]
            at = torch.arange(R)
            with engine.forced(isa):
                found = select(query, key, k, "dot", False, at[:3], at, [R], [0, -1, 1], False, 0.0)[1][0, 0]
            odd, even = at[1::2], at[::2]
            for row, order in zip(found, [torch.cat([odd, even]), at, torch.cat([even, odd])], strict=True):
                assert torch.equal(row[: min(k, R)], order[:k]) and (row[R:] == -1).all(), (R, k, dtype)


@every_set
@pytest.mark.parametrize("descending", [False, True])
def test_select_of_sorted_keys(isa, descending):
    """The buffer's worst case, every key better than all before it, and its best."""
    for R, k in [(700, 1), (700, 9), (700, 36), (3000, 256)]:
        for dtype in (torch.float32, torch.float64):
            key = torch.arange(R, dtype=dtype)[None, None, :, None]
            query = torch.full((1, 1, 7, 1), -1.0 if descending else 1.0, dtype=dtype)
            at = torch.arange(R)
            with engine.forced(isa):
                score, found = select(query, key, k, "dot", False, at[:7], at, [R], [0, -1, 1], False, 0.0)
            truth = at[:k] if descending else at.flip(0)[:k]
            assert torch.equal(found, truth.expand_as(found)), (R, k, dtype)
            assert torch.equal(score, (-truth if descending else truth).to(dtype).expand_as(score))


@every_set
def test_select_of_duplicates_by_cosine(isa):
    """Their products may be rounded to more than one, and count as one."""
    torch.manual_seed(0)
    at = torch.arange(2000)
    key = F.normalize(torch.randint(0, 3, (1, 1, 2000, 7)).float(), dim=-1)
    for k in (1, 9, 100):
        found, truth = both(
            isa, select, key[:, :, :300], key, k, "cosine", False, at[:300], at, [2000], [0, -1, 1], False, 0.0
        )
        assert (found[1] >= 0).all()
        torch.testing.assert_close(found[0], truth[0], rtol=0, atol=1e-6)


@every_set
def test_select_on_maps_of_few_levels(isa):
    """Whole numbers on smooth maps: sums are exact, ties are many, and the first threshold has to let them through."""
    for seed in range(40):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        grid = rng.choice([(16, 16), (23, 29), (32, 32), (40, 33), (64, 48)])
        e, levels = rng.choice([1, 3, 16, 17, 64]), rng.choice([1, 2, 4, 16, 200])
        smooth = F.interpolate(torch.randn(1, e, 4, 4), grid, mode="bicubic")
        x = (smooth * levels / 2).round().clamp(-levels, levels)[0].flatten(1).T.contiguous()
        R = len(x)
        x[rng.randrange(R) :] *= rng.choice([0, 1, 1])
        k, metric = rng.choice([1, 2, 9, 10, 11, 17, 36, 100, 161]), rng.choice(["dot", "dot", "euclidean"])
        rule, own = [int(rng.random() < 0.2), -1, 1], rng.random() < 0.5
        at, some = torch.arange(R), torch.randperm(R)[: rng.choice([1, 5, 64, 300])]
        args = (x[some][None, None], x[None, None], k, metric, True, some, at, list(grid), rule, own, 0.0)
        found, truth = both(isa, select, *args)
        what = f"seed {seed}: {grid} {e} features, {levels} levels, {args[2:4]} {rule} {own}"
        assert torch.equal(found[1], truth[1]) and torch.equal(found[0], truth[0]), what


def closest_pair():
    """A query and two keys whose scores differ by 4e-6, and by more than 1e-4 the other way round in two bfloat16.

    Every feature is as far from a bfloat16 as it can be, on the sides that add up.
    """
    x = (1 + torch.arange(1 << 16, dtype=torch.float64) * 2.0**-22).float()
    high = x.bfloat16().float()
    low = (x - high).bfloat16().float()
    q = (low + (x - high - low) / 2).argmax()
    gap = (high[q] * high + high[q] * low + low[q] * high).double() / x.double() - x[q].double()
    query, better, worse = (torch.full((17,), v.item()) for v in (x[q], x[gap.argmin()], x[gap.argmax()]))
    query[-1], better[-1], worse[-1] = 1, 0, 0
    behind = (query.double() * (worse.double() - better.double())).sum().item()
    step = torch.tensor(behind + 4e-6)
    better[-1] = step.bfloat16() + (step - step.bfloat16()).bfloat16()
    return query, better, worse


@every_set
def test_select_tells_keys_apart_that_two_bfloat16_do_not(isa):
    query, better, worse = closest_pair()
    assert (query.double() @ better.double()) > (query.double() @ worse.double())
    for R, place in [(600, 400), (2000, 150), (2000, 1999)]:
        for k in (1, 2, 9):
            key = torch.zeros(1, 1, R, 17)
            key[0, 0, 5:8], key[0, 0, place] = worse, better
            at = torch.arange(R)
            with engine.forced(isa):
                found = select(
                    query.expand(1, 1, 40, -1), key, k, "dot", False, at[:40], at, [R], [0, -1, 1], False, 0.0
                )
            assert (found[1][..., 0] == place).all(), (R, place, k)


@every_set
@pytest.mark.parametrize("odd", ["nan", "-inf", "inf"])
def test_select_among_keys_that_are_mostly_lost(isa, odd):
    """Six keys are left, fewer than slots; an infinite product is no score either."""
    for R in (64, 1024, 1500):
        for metric in ("dot", "euclidean"):
            for dtype in (torch.float32, torch.float64):
                key = torch.full((1, 1, R, 16), float(odd), dtype=dtype)
                left = torch.arange(0, R, R // 6 + 1)
                key[0, 0, left] = torch.randn(len(left), 16, dtype=dtype)
                query = (
                    -torch.rand(1, 1, 50, 16, dtype=dtype) if odd == "inf" else torch.rand(1, 1, 50, 16, dtype=dtype)
                )
                at = torch.arange(R)
                args = (query, key, 9, metric, False, at[:50] % R, at, [R], [0, -1, 1], False, 0.0)
                found, truth = both(isa, select, *args)
                assert torch.equal(found[1], truth[1]), (R, metric, dtype)
                assert ((found[1] >= 0).sum(-1) == len(left)).all(), (R, metric, dtype)


@every_set
@pytest.mark.parametrize("seed", range(2))
def test_select_backward(isa, seed):
    rng = random.Random(100 + seed)
    torch.manual_seed(seed)
    for case in range(CASES_PER_TEST):
        B, H, M, R = rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, 90), rng.randint(1, 200)
        e, k = rng.choice([1, 2, 3, 5, 16, 17, 33, 64, 130]), rng.choice([1, 2, 9, 36])
        dtype = rng.choice([torch.float32, torch.float64])
        metric = rng.choice(["dot", "cosine", "euclidean"])
        squared = metric == "euclidean" and rng.random() < 0.5
        make_it = torch.randn if rng.random() < 0.5 else lambda *s, dtype: torch.randint(-1, 2, s).to(dtype)
        query, key = (laid_out(rng, make_it(B, H, n, e, dtype=dtype)) for n in (M, R))
        grad = laid_out(rng, torch.randn(B, H, M, k, dtype=dtype))
        index = laid_out(rng, torch.randint(rng.choice([-2, 0]), R, (B, H, M, k)))
        what = f"case {case}: {(B, H, M, R, e, k, dtype, metric, squared)} {query.stride()} {key.stride()}"
        found, truth = both(isa, select_backward, grad, query, key, index, metric, squared)
        for name, f, t in zip(("d_query", "d_key"), found, truth, strict=True):
            assert_near(f, t, f"{name}, {what}")
            assert f.stride() == t.stride(), what


def expanded(rng, x):
    """The same numbers along one axis, at a stride of zero."""
    axis = rng.randrange(x.dim())
    return x.narrow(axis, 0, 1).expand_as(x)


def draw_aggregate(rng, kind):
    """value, index, alpha, weight, groups; heads and groups cut across one another."""
    dtype = rng.choice([torch.float32, torch.float64, torch.float64, torch.bfloat16])
    C = rng.choice([1, 2, 3, 4, 6, 12, 17, 20, 24, 36, 60, 100])
    divisors = [n for n in range(1, C + 1) if C % n == 0]
    H, G = rng.choice(divisors), rng.choice(divisors)
    B, N, M, S = rng.randint(1, 3), rng.randint(1, 70), rng.randint(1, 140), rng.randint(1, 10)
    index = torch.randint(rng.choice([-2, -1, 0, 0]), N, (B, M, S, H))
    index = expanded(rng, index) if rng.random() < 0.3 else laid_out(rng, index)
    alpha = weight = None
    if rng.random() < (0.5 if kind == "dense" else 0.7):
        alpha = torch.randn(B, M, S, H, dtype=dtype)
        alpha = expanded(rng, alpha) if rng.random() < 0.4 else laid_out(rng, alpha)
    if kind == "dense":
        O = G * rng.randint(1, max(1, 130 // G))
        weight = torch.randn(O, C // G, S, dtype=dtype)
    elif kind == "depthwise":
        G = C
        weight = torch.randn(C, 1, S, dtype=dtype)
    else:
        G = 1
    if weight is not None:
        weight = laid_out(rng, weight)
    return laid_out(rng, torch.randn(B, N, C, dtype=dtype)), index, alpha, weight, G


def _describe(value, index, alpha, weight, groups):
    shapes = [t if t is None else (*t.shape, t.stride()) for t in (value, index, alpha, weight)]
    return f"{value.dtype} {shapes} groups={groups}"


@every_set
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["dense", "depthwise", "none"])
def test_aggregate(kind, isa, seed):
    rng = random.Random(200 + seed)
    torch.manual_seed(seed)
    for case in range(CASES_PER_TEST):
        args = draw_aggregate(rng, kind)
        what = f"case {case}: {_describe(*args)}"
        found, truth = both(isa, aggregate, *args)
        assert_near(found[0], truth[0], what)
        grad = torch.randn(truth[0].shape, dtype=torch.float64).to(truth[0].dtype)
        if grad.dtype != torch.bfloat16:  # whose matrix products of torch 2.13 read what lies between the rows
            grad = laid_out(rng, grad)
        found, truth = both(isa, aggregate_backward, grad, *args)
        for name, f, t in zip(("d_value", "d_alpha", "d_weight"), found, truth, strict=True):
            assert_near(f, t, f"{name}, {what}")


@every_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_slot_softmax(isa, dtype):
    rng = random.Random(300)
    torch.manual_seed(300)
    for case in range(3 * CASES_PER_TEST):
        lead = [rng.randint(1, 14) for _ in range(rng.randint(0, 3))]
        k, scale = rng.choice([1, 2, 3, 8, 9, 16, 17, 36, 100]), rng.choice([1.0, 0.3, -1.0, 0.0, 40.0])
        score, index = torch.randn(*lead, k, dtype=dtype) * 3, torch.randint(-1, 4, (*lead, k))
        if rng.random() < 0.3:
            index[torch.rand(lead) < 0.3] = -1  # rows that read nothing
        if rng.random() < 0.3:
            index[torch.rand(lead) < 0.2] = -2  # rows of lost queries
        score = score.masked_fill(index == -1, rng.choice([float("-inf"), float("nan"), 1e30, 0.0]))
        score = score.masked_fill(index == -2, float("nan"))
        if len(lead) >= 1:
            score, index = laid_out(rng, score), laid_out(rng, index)
        what = f"case {case}: {(*lead, k)} scale={scale}"
        found, truth = both(isa, slot_softmax, score, index, scale)
        assert_near(found[0], truth[0], what)
        assert found[0].is_contiguous()
        if dtype == torch.float64:
            assert_near(found[0].nansum(-1), (index >= 0).any(-1).to(dtype) * (index != -2).all(-1), what)
        grad = torch.randn(*lead, k, dtype=dtype)
        found, truth = both(isa, slot_softmax_backward, grad, found[0], scale)
        assert_near(found[0], truth[0], f"d_score, {what}")


@every_set
def test_softmax_of_extreme_scores(isa):
    """Weights down to the smallest number, and scores so large that only their differences count."""
    for dtype in (torch.float32, torch.float64):
        score = torch.linspace(0, -200, 64, dtype=dtype).repeat(3, 1) + torch.tensor(
            [[0.0], [1e4], [-1e4]], dtype=dtype
        )
        index = torch.zeros(3, 64, dtype=torch.long)
        with engine.forced(isa):
            found = slot_softmax(score, index, 1.0)
        truth = torch.softmax(score, -1)
        normal = truth > torch.finfo(dtype).tiny * 1e3
        torch.testing.assert_close(found[normal], truth[normal], rtol=20 * torch.finfo(dtype).eps, atol=0)
        assert (found[~normal] <= torch.finfo(dtype).tiny * 1e3).all()


@every_set
def test_an_index_beyond_the_input_is_refused(isa):
    value, alpha = torch.randn(2, 5, 4), torch.randn(2, 3, 2, 1)
    query, key = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 5, 4)
    for wrong in (5, 6, 2**31, 2**32, 2**62, 2**63 - 1):
        index = torch.zeros(2, 3, 2, 1, dtype=torch.long)
        index[1, 2, 1, 0] = wrong
        with engine.forced(isa):
            for weight, groups in [(None, 1), (torch.randn(4, 1, 2), 4), (torch.randn(6, 4, 2), 1)]:
                for a in (None, alpha):
                    with pytest.raises(ValueError, match="beyond the input"):
                        aggregate(value, index, a, weight, groups)
                    grad = torch.randn(2, 3, 4 if weight is None else len(weight))
                    with pytest.raises(ValueError, match="beyond the input"):
                        aggregate_backward(grad, value, index, a, weight, groups)
            with pytest.raises(ValueError, match="beyond the input"):
                select_backward(torch.randn(1, 1, 3, 2), query, key, index[1:].mT.mT.view(1, 1, 3, 2), "dot", False)


def _bits(x):
    return x.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()])


# ---- determinism and threads -----------------------------------------------------------------------------------------


def _all_operators(dtype):
    """Results of every operator, forward and backward, at sizes that many threads share."""
    torch.manual_seed(0)
    found = []
    at = torch.arange(600)
    for metric, heads, e in [("dot", 3, 17), ("euclidean", 1, 33), ("chebyshev", 2, 5)]:
        query, key = torch.randn(1, heads, 600, e, dtype=dtype), torch.randn(1, heads, 600, e, dtype=dtype)
        for rule, grid in [([0, -1, 1], [600]), ([1, -1, 1], [600]), ([0, 3, 1], [20, 30])]:
            found += select(query, key, 9, metric, False, at, at, grid, rule, True, 0.5)
            if metric != "chebyshev":
                found += select_backward(found[-2].nan_to_num(0, 0, 0), query, key, found[-1], metric, False)
    # where many keys are near one another, and where they are not
    many = torch.arange(1100)
    key = torch.randn(1, 1, 1100, 40, dtype=dtype)
    key[:, :, ::2] = key[:, :, :1] + 1e-6 * key[:, :, ::2]
    query = key[:, :, torch.randperm(1100)]
    for metric in ("dot", "euclidean"):
        found += select(query, key, 9, metric, False, many, many, [1100], [0, -1, 1], False, 0.0)
    index = torch.randint(-1, 300, (2, 500, 5, 4))
    value = torch.randn(2, 300, 36, dtype=dtype)
    for alpha in (None, torch.randn(2, 500, 5, 4, dtype=dtype)):
        for weight, groups in [
            (None, 1),
            (torch.randn(36, 1, 5, dtype=dtype), 36),
            (torch.randn(66, 12, 5, dtype=dtype), 3),
        ]:
            found.append(aggregate(value, index, alpha, weight, groups))
            found += aggregate_backward(found[-1].cos(), value, index, alpha, weight, groups)
    score = torch.randn(3000, 9, dtype=dtype)
    found.append(slot_softmax(score, torch.zeros(3000, 9, dtype=torch.long), 1.0))
    found.append(slot_softmax_backward(score, found[-1], 1.0))
    return found


@every_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_same_bits_on_any_number_of_threads(isa, dtype, threads):
    with engine.forced(isa):
        threads(1)
        truth = _all_operators(dtype)
        for count in (1, 2, 3, 7):
            threads(count)
            for i, (found, t) in enumerate(zip(_all_operators(dtype), truth, strict=True)):
                assert torch.equal(_bits(found), _bits(t)), f"result {i} on {count} threads"


def _layers():
    torch.manual_seed(0)
    return [
        (ConvNN2d(8, 8), torch.randn(2, 8, 9, 8)),
        (ConvNNAttention(8, 2), torch.randn(2, 50, 8)),
        (KVTAttention(8, 2, k=5), torch.randn(2, 50, 8)),
        (BranchingConv2d(8, 8), torch.randn(2, 8, 7, 6)),
        (ACmix2d(8, 8, num_heads=2), torch.randn(2, 8, 7, 6)),
    ]


def _step(layer, x):
    """Output and the gradients at input and parameters, without touching the layer's own."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()], allow_unused=True)]


def _same(a, b):
    return all(s is t is None or torch.equal(_bits(s), _bits(t)) for s, t in zip(a, b, strict=True))


def test_layers_give_the_same_bits_on_any_number_of_threads(threads):
    layers = [pair for pair in _layers() if not isinstance(pair[0], BranchingConv2d)]  # holds a convolution of torch's
    for layer, x in layers:
        threads(1)
        truth = _step(layer, x)[0]
        for count in (2, 3):
            threads(count)
            assert torch.allclose(_step(layer, x)[0], truth, rtol=1e-5, atol=1e-6)
            again = _step(layer, x)
            assert _same(_step(layer, x), again), type(layer).__name__


def test_concurrent_calls(threads):
    """Four Python threads at once, each on two threads of its own."""
    threads(2)
    layers = _layers()
    truth = [_step(layer, x) for layer, x in layers]
    jobs = [i % len(layers) for i in range(10 * len(layers))]
    with ThreadPoolExecutor(4) as pool:
        for job, found in zip(jobs, pool.map(lambda i: _step(*layers[i]), jobs), strict=True):
            # torch itself splits its sums otherwise on a thread of Python's than on the main one
            for f, t in zip(found, truth[job], strict=True):
                assert f is t is None or torch.allclose(f, t, rtol=1e-5, atol=1e-6), type(layers[job][0]).__name__
        q = torch.randn(1, 4, 300, 16)
        serial = knn_attention(q, q, q, 9)
        for y in pool.map(lambda _: knn_attention(q, q, q, 9), range(40)):
            assert torch.equal(y, serial)


# ---- gradients and registration --------------------------------------------------------------------------------------


@every_set
def test_gradcheck(isa):
    torch.manual_seed(0)
    at = torch.arange(11)

    def wide(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    with engine.forced(isa):
        q, k = wide(1, 2, 5, 3), wide(1, 2, 11, 3)
        for metric, squared, again in [
            ("dot", False, -1.0),
            ("euclidean", False, 0.0),
            ("euclidean", True, float("-inf")),
        ]:

            def scores(q, k, metric=metric, squared=squared, again=again):
                score = select(q, k, 4, metric, squared, at[:5], at, [11], [1, -1, 1], True, again)[0]
                return score.masked_fill(score == float("-inf"), 0)

            assert torch.autograd.gradcheck(scores, (q, k), fast_mode=True)
        index = torch.randint(-1, 6, (2, 5, 3, 2))
        value, alpha = wide(2, 6, 12), wide(2, 5, 3, 2)
        for weight, groups in [(None, 1), (wide(12, 1, 3), 12), (wide(9, 4, 3), 3)]:
            for a in (None, alpha):
                assert torch.autograd.gradcheck(aggregate, (value, index, a, weight, groups), fast_mode=True)
        slots = torch.randint(-1, 2, (4, 7))
        assert torch.autograd.gradcheck(slot_softmax, (wide(4, 7), slots, 0.7), fast_mode=True)


@pytest.mark.parametrize("off", [False, True])
def test_slot_softmax_passes_opcheck(off):
    score, index = torch.randn(3, 4, 5, requires_grad=True), torch.randint(-1, 4, (3, 4, 5))
    with engine.forced(engine.OFF if off else engine.names()[0]):
        torch.library.opcheck(slot_softmax.registered, (score, index, 0.5))
        turned = torch.randn(4, 3, 5).transpose(0, 1).requires_grad_()
        torch.library.opcheck(slot_softmax.registered, (turned, index, -1.0))


@pytest.mark.parametrize("off", [False, True])
def test_fakes_have_the_strides_of_results(off):
    """Compiled code trusts them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    rng = random.Random(0)
    for kind in ("dense", "depthwise", "none") * 10:
        args = draw_aggregate(rng, kind)
        at = torch.arange(args[0].shape[1])
        q = laid_out(rng, torch.randn(1, 2, len(at), 5))
        grad = torch.randn(*args[0].shape[:1], args[1].shape[1], args[0].shape[2] if args[3] is None else len(args[3]))
        calls = [
            (aggregate, args),
            (aggregate_backward, (grad.to(args[0].dtype), *args)),
            (select, (q, q, 3, "dot", False, at, at, [len(at)], [0, -1, 1], False, 0.0)),
            (
                select_backward,
                (torch.randn(1, 2, len(at), 1), q, q, torch.zeros(1, 2, len(at), 1).long(), "dot", False),
            ),
        ]
        for op, operands in calls:
            with engine.forced(engine.OFF if off else engine.names()[0]):
                real = op(*operands)
            with FakeTensorMode() as mode:
                fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in operands))
            for f, r in zip([fake] if op is aggregate else fake, [real] if op is aggregate else real, strict=True):
                assert f.shape == r.shape and f.dtype == r.dtype
                assert f.numel() == 0 or f.stride() == r.stride(), (op, f.stride(), r.stride(), _describe(*args))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recall", [1.0, 0.9])
def test_low_precision_rows_have_float32_scores(dtype, recall):
    query, key = torch.randn(1, 2, 33, 12).to(dtype), torch.randn(1, 2, 41, 12).to(dtype)
    at = (torch.arange(33), torch.arange(41))

    def run(q, k):
        q, k = q.clone().requires_grad_(), k.clone().requires_grad_()
        score, index = torch.ops.nearfold.select(q, k, 5, "dot", False, *at, [41], [0, -1, 1], False, 0.0, recall)
        (score * torch.arange(5)).sum().backward()
        return score.detach(), index, q.grad, k.grad

    low, wide = run(query, key), run(query.float(), key.float())
    assert low[0].dtype == torch.float32
    assert torch.equal(low[0], wide[0]) and torch.equal(low[1], wide[1])
    for mine, truth in zip(low[2:], wide[2:], strict=True):
        assert mine.dtype == dtype and torch.equal(mine, truth.to(dtype))
