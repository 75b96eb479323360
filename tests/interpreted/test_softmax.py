"""The softmax over slots, by Triton's kernels, against PyTorch."""

from __future__ import annotations

import math

import pytest
import torch

from nearfold.kernels import cuda, weigh
from nearfold.kernels.triton import softmax as kernels


def in_pytorch(monkeypatch, function, *operands):
    """What the operator does where there is neither engine nor Triton."""
    with monkeypatch.context() as patched:
        patched.setattr(weigh.engine, "serves", lambda *_: False)
        return function(*operands)


def made(shape, dtype=torch.float32):
    """Scores of every kind, and indices of which some read nothing and some are lost."""
    score, index = torch.randn(shape).mul(4).to(dtype), torch.randint(-1, 9, shape)
    index[0, 0] = -1
    index[0, 1, 0] = -2
    score[0, 2, 0], score[0, 3, 0], score[0, 4] = math.nan, math.inf, -math.inf
    score[0, 5], index[0, 5] = -math.inf, 3
    index[0, 4, 0], index[0, 4, 1:] = -1, 2
    return score, index


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.3, -2.0])
@pytest.mark.parametrize("k", [1, 5, 16, 70])
def test_forward_and_backward(k, scale, dtype, monkeypatch):
    score, index = made((2, 7, k), dtype)
    alpha = in_pytorch(monkeypatch, weigh.slot_softmax, score, index, scale)
    found = kernels.slot_softmax(score, index, scale)
    eps = torch.finfo(dtype).eps
    assert found.dtype == dtype and found.is_contiguous()
    torch.testing.assert_close(found, alpha, rtol=2 * eps, atol=2 * eps, equal_nan=True)
    grad = torch.randn_like(alpha)
    right = in_pytorch(monkeypatch, weigh.slot_softmax_backward, grad.float(), alpha.float(), scale)
    d_score = kernels.slot_softmax_backward(grad, alpha, scale)
    torch.testing.assert_close(d_score, right.to(dtype), rtol=2 * eps, atol=4 * eps, equal_nan=True)


def test_strides():
    score, index = torch.randn(3, 5, 4).transpose(0, 1), torch.randint(0, 4, (5, 1, 4)).expand(5, 3, 4)
    expected = torch.softmax(score, -1)
    torch.testing.assert_close(kernels.slot_softmax(score, index, 1.0), expected)
    grad = torch.randn(4, 5, 3).permute(1, 2, 0)
    d_score = expected * (grad - (grad * expected).sum(-1, keepdim=True))
    torch.testing.assert_close(kernels.slot_softmax_backward(grad, expected, 1.0), d_score)


def test_the_operator_calls_them(monkeypatch):
    score, index = torch.randn(4, 3).requires_grad_(), torch.zeros(4, 3, dtype=torch.long)
    called = []
    for way in ("slot_softmax", "slot_softmax_backward"):
        real = getattr(kernels, way)
        monkeypatch.setattr(kernels, way, lambda *a, n=way, f=real: called.append(n) or f(*a))
    with cuda.interpreted():
        weigh.slot_softmax(score, index, 1.0).square().sum().backward()
    assert called == ["slot_softmax", "slot_softmax_backward"]
    assert score.grad is not None


def test_what_is_not_served_says_why():
    assert kernels.refusal(torch.ones(2, 3)) == ""
    assert "float64" in kernels.refusal(torch.ones(2, 3).double())
    assert "5000" in kernels.refusal(torch.ones(1, 5000))
