"""`nearfold::corners`: every instruction set and the PyTorch path against a formula of one number at a time."""

from __future__ import annotations

import contextlib
import itertools
import math

import pytest
import torch

from nearfold.kernels import engine
from nearfold.kernels.corners import corners

FRAMES = {
    "line": ([7], [4], [3], [2], [1], [1]),
    "image": ([5, 6], [5, 6], [3, 3], [1, 1], [1, 1], [1, 1]),
    "uneven": ([9, 4], [4, 3], [2, 3], [2, 1], [1, 2], [0, 2]),
    "volume": ([3, 4, 5], [3, 2, 5], [2, 1, 3], [1, 2, 1], [1, 1, 1], [1, 0, 1]),
    "point": ([1, 1], [1, 1], [3, 3], [1, 1], [1, 1], [1, 1]),
}


def using(which):
    """The engine as it is, or one instruction set of it, or none."""
    return contextlib.nullcontext() if which == "auto" else engine.forced(which)


def operands(frame, planes=3, masked=True, dtype=torch.float64, seed=0):
    grid, out, size, *_ = frame
    generator = torch.Generator().manual_seed(seed)
    shape = (planes, math.prod(size), len(grid), math.prod(out))
    offset = torch.randn(shape, generator=generator, dtype=torch.float64) * 2
    mask = torch.rand(shape[0], shape[1], shape[3], generator=generator, dtype=torch.float64)
    return offset.to(dtype), mask.to(dtype) if masked else None


def plain(offset, mask, grid, out, size, stride, dilation, before):
    """{(plane, output, slot): {position: share}}."""
    found = {}
    for p in range(offset.shape[0]):
        for m, o in enumerate(itertools.product(*map(range, out))):
            for s, k in enumerate(itertools.product(*map(range, size))):
                shares = {}
                at = [
                    o[a] * stride[a] + k[a] * dilation[a] - before[a] + offset[p, s, a, m].item()
                    for a in range(len(grid))
                ]
                for position in itertools.product(*map(range, grid)):
                    share = math.prod(max(0.0, 1 - abs(x - y)) for x, y in zip(at, position, strict=True))
                    if share:
                        flat = 0
                        for n, y in zip(grid, position, strict=True):
                            flat = flat * n + y
                        shares[flat] = share * (1.0 if mask is None else mask[p, s, m].item())
                found[p, m, s] = shares
    return found


@pytest.mark.parametrize("name", FRAMES)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("which", ["auto", "generic", engine.OFF])
def test_shares_are_those_of_interpolation(name, masked, which):
    frame = FRAMES[name]
    offset, mask = operands(frame, masked=masked)
    with using(which):
        share, index = corners(offset, mask, *frame)
    entries = 2 ** len(frame[0])
    for (p, m, s), shares in plain(offset, mask, *frame).items():
        mine = {}
        for e in range(s * entries, (s + 1) * entries):
            if index[p, m, e] >= 0 and share[p, m, e] != 0:
                mine[index[p, m, e].item()] = share[p, m, e].item()
            assert index[p, m, e] >= 0 or share[p, m, e] == 0
        assert mine.keys() == shares.keys()
        assert all(abs(mine[n] - shares[n]) < 1e-12 for n in shares)


@pytest.mark.parametrize("name", FRAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_engine_and_pytorch_agree(name, dtype):
    frame = FRAMES[name]
    results = []
    for which in ("auto", engine.OFF):
        offset, mask = (t.requires_grad_() for t in operands(frame, planes=5, dtype=dtype))
        with using(which):
            share, index = corners(offset, mask, *frame)
            share.backward(torch.cos(torch.arange(share.numel(), dtype=dtype)).view_as(share))
        results.append((index, share.detach(), offset.grad, mask.grad))
    assert torch.equal(results[0][0], results[1][0])
    for mine, theirs in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-6)


@pytest.mark.parametrize("which", ["auto", engine.OFF])
@pytest.mark.parametrize("masked", [True, False])
def test_gradients(which, masked):
    frame = FRAMES["uneven"]
    offset, mask = operands(frame, planes=2, masked=masked)
    inputs = [t.requires_grad_() for t in (offset, mask) if t is not None]
    with using(which):
        call = lambda o, *m: corners(o, m[0] if m else None, *frame)[0]  # noqa: E731
        assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("which", ["auto", engine.OFF])
def test_far_away_and_lost(which):
    frame = FRAMES["image"]
    offset, _ = operands(frame, planes=1, masked=False)
    for far in (1e30, -1e30, math.inf, -math.inf):
        offset[0, 4, 0, 7] = far
        with using(which):
            share, index = corners(offset, None, *frame)
        assert (index[0, 7, 16:20] == -1).all() and (share[0, 7, 16:20] == 0).all()
    offset[0, 4, 0, 7] = math.nan
    with using(which):
        share, index = corners(offset, None, *frame)
    assert share[0, 7, 16:20].isnan().all() and share.isnan().sum() == 4
    assert index.max() < 30


def test_bad_operands_are_named():
    frame = FRAMES["image"]
    offset, mask = operands(frame)
    for change, message in (
        ((offset[:, :8], mask, *frame), r"offset must be \(P, 9, 2, 30\)"),
        ((offset.long(), None, *frame), "floating point"),
        ((offset, mask[:2], *frame), r"mask must be \(3, 9, 30\)"),
        ((offset, mask.float(), *frame), "mask must be"),
        ((offset, mask, *frame[:4], [0, 1], frame[5]), "must be positive, one per axis"),
        ((offset, mask, *frame[:5], [1]), "must be positive, one per axis"),
    ):
        with pytest.raises(ValueError, match=message):
            corners(*change)


def test_opcheck_and_empty():
    frame = FRAMES["uneven"]
    offset, mask = (t.requires_grad_() for t in operands(frame, planes=2))
    torch.library.opcheck(corners.registered, (offset, mask, *frame))
    torch.library.opcheck(corners.registered, (offset, None, *frame))
    share, index = corners(offset[:0], None, *frame)
    assert index.shape == share.shape == (0, 12, 24)
