"""The corners' kernels equal the formula in float64, and PyTorch's float32 bit by bit; through the operator."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from nearfold.kernels import corners as operator
from nearfold.kernels import corners_torch, cuda
from nearfold.kernels.corners_torch import Frame
from nearfold.kernels.triton import corners as kernels
from nearfold.testing import poisoned_empties

# what numpy says of infinities, in the interpreter
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

# of the largest number; measured: float32 4e-7, bfloat16 5e-3, float16 4e-4; the interpreter cuts bfloat16 off
BUDGET = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
FRAMES = {
    "line": Frame([7], [4], [3], [2], [1], [1]),
    "image": Frame([5, 6], [5, 6], [3, 3], [1, 1], [1, 1], [1, 1]),
    "uneven": Frame([9, 4], [4, 3], [2, 3], [2, 1], [1, 2], [0, 2]),
    "volume": Frame([3, 4, 5], [3, 2, 5], [2, 1, 3], [1, 2, 1], [1, 1, 1], [1, 0, 1]),
    "point": Frame([1, 1], [1, 1], [3, 3], [1, 1], [1, 1], [1, 1]),
}


def operands(frame: Frame, masked: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
    S, M = math.prod(frame.size), math.prod(frame.out)
    offset = (2 * torch.randn(2, S, frame.axes, M)).to(dtype)
    return offset, torch.rand(2, S, M).to(dtype) if masked else None


def upstream(like: Tensor) -> Tensor:
    return torch.cos(torch.arange(like.numel(), dtype=torch.float64)).view(like.shape)


def outcome(offset: Tensor, mask: Tensor | None, frame: Frame) -> list[Tensor]:
    """Share, index, and the gradients that a fixed gradient at the shares gives; from the kernels, by the operator."""
    leaves = [t.detach().requires_grad_() for t in (offset, mask) if t is not None]
    with cuda.interpreted(), poisoned_empties():
        share, index = operator.corners(leaves[0], leaves[1] if mask is not None else None, *vars(frame).values())
        grads = torch.autograd.grad(share, leaves, upstream(share).to(share.dtype))
    assert share.dtype == offset.dtype and all(g.dtype == offset.dtype and g.is_contiguous() for g in grads)
    assert share.mT.is_contiguous() and index.mT.is_contiguous()
    return [share.detach(), index, *grads]


def wanted(offset: Tensor, mask: Tensor | None, frame: Frame, dtype: torch.dtype) -> list[Tensor]:
    """The same by PyTorch in that dtype, its gradients by autograd."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (offset, mask) if t is not None]
    share, index = corners_torch.corners(leaves[0], leaves[1] if mask is not None else None, frame)
    grad = upstream(share).to(offset.dtype).to(dtype)
    return [share.detach(), index, *torch.autograd.grad(share, leaves, grad)]


def dense(share: Tensor, index: Tensor, frame: Frame) -> Tensor:
    """(P, M, S, positions): equal also where another corner has a share that is nearly zero."""
    P, M, _ = share.shape
    share, index = (t.reshape(P, M, math.prod(frame.size), -1) for t in (share.double(), index))
    found = torch.zeros(*share.shape[:3], math.prod(frame.grid), dtype=torch.float64)
    return found.scatter_add_(3, index.clamp(min=0), share * (index >= 0))


def agree(mine: Tensor, truth: Tensor, budget: float) -> None:
    assert mine.shape == truth.shape
    off = (mine.double() - truth.double()).abs().max() / truth.double().abs().max().clamp(min=1)
    assert off <= budget, f"off by {off:.1e}, budget {budget:.0e}"


@pytest.mark.parametrize("name", FRAMES)
@pytest.mark.parametrize("masked", [True, False])
def test_equals_the_formula(name, masked, monkeypatch):
    frame = FRAMES[name]
    offset, mask = operands(frame, masked)
    ran = []
    real = kernels.corners
    monkeypatch.setattr(kernels, "corners", lambda *a: ran.append(a) or real(*a, block=16))
    monkeypatch.setattr(kernels, "corners_backward", functools.partial(kernels.corners_backward, block=16))
    mine = outcome(offset, mask, frame)
    assert ran
    for a, b in zip(mine[:2], wanted(offset, mask, frame, torch.float32)[:2], strict=True):
        assert torch.equal(a, b)
    truth = wanted(offset, mask, frame, torch.float64)
    agree(dense(*mine[:2], frame), dense(*truth[:2], frame), BUDGET[torch.float32])
    for a, b in zip(mine[2:], truth[2:], strict=True):
        agree(a, b, BUDGET[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_computed_in_float32(dtype):
    frame = FRAMES["uneven"]
    offset, mask = operands(frame, dtype=dtype)
    assert mask is not None
    mine, truth = outcome(offset, mask, frame), wanted(offset, mask, frame, torch.float64)
    agree(dense(*mine[:2], frame), dense(*truth[:2], frame), BUDGET[dtype])
    for a, b in zip(mine[2:], truth[2:], strict=True):
        agree(a, b, BUDGET[dtype])
    wide = wanted(offset.float(), mask.float(), frame, torch.float32)
    assert torch.equal(mine[1], wide[1])
    if dtype == torch.float16:  # rounded once, at the end; the interpreter cuts bfloat16 off
        assert torch.equal(mine[0], wide[0].to(dtype))


def test_far_away_and_lost():
    frame = FRAMES["image"]
    offset, mask = operands(frame)
    for m, far in enumerate((1e30, -1e30, math.inf, -math.inf, math.nan)):
        offset[0, 4, m % 2, m] = offset[0, 4, 1 - m % 2, 20 + m] = far
    share, index, d_offset, d_mask = outcome(offset, mask, frame)
    away, lost = [0, 1, 2, 3, 20, 21, 22, 23], [4, 24]
    assert (index[0, away, 16:20] == -1).all() and (share[0, away, 16:20] == 0).all()
    assert share[0, lost, 16:20].isnan().all() and share.isnan().sum() == 8
    assert (index[0, lost, 16:20] == 0).all() and index.max() < 30
    assert not d_offset[0, 4][:, away + lost].any() and not d_mask[0, 4, away + lost].any()
    assert d_offset.isfinite().all() and d_mask.isfinite().all()


def test_any_strides():
    frame = FRAMES["image"]
    offset, mask = operands(frame)
    assert mask is not None
    truth = outcome(offset, mask, frame)
    turned = offset.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    for a, b in zip(outcome(turned, torch.cat((mask, mask), 2)[..., :30], frame), truth, strict=True):
        assert torch.equal(a, b)
    one = torch.ones(())
    for grad in (one.expand(truth[0].shape), upstream(truth[0]).float().mT.contiguous().mT):
        mine = kernels.corners_backward(grad, offset, mask, frame)
        plain = kernels.corners_backward(grad.contiguous(), offset, mask, frame)
        assert torch.equal(mine[0], plain[0]) and torch.equal(mine[1], plain[1])


def test_gradients_that_are_not_needed_and_empty():
    frame = FRAMES["image"]
    offset, mask = operands(frame)
    assert mask is not None
    with cuda.interpreted():
        share, _ = operator.corners(offset, mask.requires_grad_(), *vars(frame).values())
        share.sum().backward()
        assert mask.grad is not None and mask.grad.isfinite().all()
        empty, index = operator.corners(offset[:0], mask.detach()[:0], *vars(frame).values())
        assert empty.shape == index.shape == (0, 30, 36)
        share, _ = operator.corners(offset[:0].requires_grad_(), None, *vars(frame).values())
        share.sum().backward()


def test_it_says_what_it_does_not_serve():
    frame = FRAMES["image"]
    offset, mask = operands(frame)
    assert mask is not None
    assert kernels.refusal(offset, mask, frame) == "" == kernels.refusal(offset.half(), None, frame)
    assert "torch.float64" in kernels.refusal(offset.double(), None, frame)
    assert "torch.float16" in kernels.refusal(offset, mask.half(), frame)
    assert "meta" in kernels.refusal(offset.to("meta"), None, frame)
    assert "28 bits" in kernels.refusal(offset, mask, Frame([2**14] * 2, *list(vars(frame).values())[1:]))
    with pytest.raises(NotImplementedError, match="float64"):
        kernels.corners(offset.double(), None, frame, offset, offset)
    with pytest.raises(NotImplementedError, match="float64"):
        kernels.corners_backward(offset, offset.double(), None, frame)
    with cuda.interpreted():  # and PyTorch does
        share, _ = operator.corners(offset.double(), None, *vars(frame).values())
    assert share.dtype == torch.float64


def test_strides_that_fit_32_bits_where_their_multiples_do_not():
    """Slots and axes are 2^30 numbers apart, in memory that is hardly touched."""
    frame, apart = Frame([2, 2, 2], [1, 1, 1], [3, 1, 1], [1, 1, 1], [1, 1, 1], [0, 0, 0]), 2**30
    room = torch.empty(4 * apart + 2, dtype=torch.float16)
    offset, mask = room.as_strided((1, 3, 3, 1), (0, apart, apart, 0)), room.as_strided((1, 3, 1), (0, apart, 0), 1)
    room[::apart].copy_(torch.rand(5).half())
    mask.copy_(torch.rand(1, 3, 1).half())
    grad = torch.randn(1, 1, 24).half()
    results = []
    for operands in ((offset, mask), (offset.contiguous(), mask.contiguous())):
        share, index = torch.empty(1, 24, 1).half(), torch.empty(1, 24, 1, dtype=torch.long)
        kernels.corners(*operands, frame, share, index)
        results.append([share, index, *kernels.corners_backward(grad, *operands, frame)])
    assert all(torch.equal(far, near) for far, near in zip(*results, strict=True))
