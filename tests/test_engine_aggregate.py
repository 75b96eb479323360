"""Weights and sums on every instruction set of the compiled engine: the truth is the PyTorch path."""

import random

import pytest
import torch
from helpers.engine_draws import CASES_PER_TEST, assert_near, both, described, draw_aggregate, every_set, laid_out

from nearfold.kernels import engine
from nearfold.kernels.aggregate import aggregate, aggregate_backward
from nearfold.kernels.select import select_backward
from nearfold.kernels.weigh import slot_softmax, slot_softmax_backward


@every_set
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["dense", "depthwise", "none"])
def test_aggregate(kind, isa, seed):
    rng = random.Random(200 + seed)
    torch.manual_seed(seed)
    for case in range(CASES_PER_TEST):
        args = draw_aggregate(rng, kind)
        what = f"case {case}: {described(*args)}"
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


@every_set
@pytest.mark.parametrize("outputs", [3, 90])
@pytest.mark.parametrize("kernel", [True, False])
def test_alpha_that_is_nan_is_the_outputs_whatever_its_slot_reads(isa, outputs, kernel):
    """For few outputs and for many, which dense kernels compute in two ways."""
    value, index = torch.randn(1, 7, 4), torch.randint(7, (1, outputs, 3, 1))
    alpha, weight = torch.rand(1, outputs, 3, 1), torch.randn(5, 4, 3) if kernel else None
    index[0, 1, 2], alpha[0, 1, 2] = -1, float("nan")
    (found,), (truth,) = both(isa, aggregate, value, index, alpha, weight, 1)
    assert found[0, 1].isnan().all() and not found[0, 0].isnan().any()
    assert_near(found, truth, "a slot that reads nothing")
