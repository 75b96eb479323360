"""Gradients of the chosen scores, by Triton's kernels, against autograd."""

from __future__ import annotations

import math

import pytest
import torch

from nearfold.kernels.search import Search
from nearfold.kernels.triton import select_backward as kernels
from nearfold.kernels.triton import threshold

ANY = [0, -1, 1]
BLOCKS = {"block_m": 16, "block_n": 16}


def where(M, R, grid=None):
    """Every position of the grid, for queries and keys."""
    return torch.arange(M), torch.arange(R), grid or [max(M, R)]


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
    _, index = threshold.select(query, key, Search(6, metric, False, *rest), **BLOCKS)
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


@pytest.mark.parametrize(("metric", "squared"), METRICS)
def test_gradients_at_keys_that_very_many_have_chosen(metric, squared):
    """One by all queries, one by half of them; their blocks begin and end among other keys' slots."""
    query, key = torch.randn(1, 2, 50, 5), torch.randn(1, 2, 9, 5)
    index = torch.rand(1, 2, 50, 9).argsort(-1)[..., :4]
    index[..., 0] = 4
    index[:, 1, ::2, 1] = 8
    index[:, 0, :20] = -1
    grad = torch.randn(1, 2, 50, 4)
    true = dense_gradients(grad, query, key, index, metric, squared)
    for long in (4, 16):
        found = kernels.select_backward(grad, query, key, index, metric, squared, long=long)
        for mine, expected in zip(found, true, strict=True):
            torch.testing.assert_close(mine.double(), expected, rtol=1e-5, atol=1e-5)


def test_no_program_adds_up_more_than_two_blocks_slot_by_slot(monkeypatch):
    """Whole blocks are read where other programs left them: without these there is nothing but what lay there."""
    query, key, index = torch.randn(1, 1, 100, 5), torch.randn(1, 1, 3, 5), torch.zeros(1, 1, 100, 1, dtype=torch.long)
    right = kernels.select_backward(torch.ones(1, 1, 100, 1), query, key, index, "dot", False, long=16)[1]
    real = kernels._key_kernel

    class OnlyKeys:
        def __getitem__(self, grid):
            def launch(*operands, BLOCKS, **flags):
                if BLOCKS:
                    operands[5].zero_()
                else:
                    real[grid](*operands, BLOCKS=BLOCKS, **flags)

            return launch

    monkeypatch.setattr(kernels, "_key_kernel", OnlyKeys())
    left = kernels.select_backward(torch.ones(1, 1, 100, 1), query, key, index, "dot", False, long=16)[1]
    torch.testing.assert_close(right[0, 0, 0], query[0, 0].sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(left[0, 0, 0], query[0, 0, 96:].sum(0), rtol=1e-5, atol=1e-5)


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
