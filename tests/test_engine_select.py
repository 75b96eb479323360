"""The search on every instruction set of the compiled engine: the truth is the PyTorch path of the same operator."""

import random

import pytest
import torch
import torch.nn.functional as F
from helpers.engine_draws import CASES_PER_TEST, assert_near, both, draw_select, every_set, laid_out, scores_at

from nearfold.kernels import engine
from nearfold.kernels.select import select, select_backward


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
