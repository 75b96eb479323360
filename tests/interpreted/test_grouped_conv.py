"""ACmix's grouped convolution equals torch's in float64, forward and gradients, in tiles that are small."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from nearfold.kernels import cuda, engine
from nearfold.kernels import grouped_conv as operator
from nearfold.kernels.triton import grouped_conv as kernels
from nearfold.testing import poisoned_empties

# of the largest number; measured: float32 2e-7, bfloat16 6e-3, float16 4e-4; the interpreter cuts bfloat16 off
BUDGET = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 1e-3}
# batch, groups, channels of the maps, outputs; grid, size, stride, dilation, before, out; mirrored
CASES = {
    "acmix": (2, 2, (2, 2, 2), 3, [4, 5], [3, 3], [1, 1], [1, 1], [1, 1], [4, 5], False),
    "mirrored": (2, 1, (1, 1, 1), 2, [3, 4], [3, 3], [1, 1], [1, 1], [1, 1], [3, 4], True),
    "one map": (1, 2, (5,), 6, [3, 4], [3, 3], [1, 1], [1, 1], [1, 1], [3, 4], False),
    "uneven maps": (2, 1, (1, 4, 2), 3, [5, 4], [2, 3], [2, 1], [1, 2], [0, 2], [2, 4], False),
    "uneven, mirrored": (1, 1, (2, 2), 1, [5, 3], [2, 3], [2, 1], [2, 1], [1, 2], [2, 3], True),
    "four maps": (1, 2, (1, 1, 1, 1), 1, [7], [3], [3], [1], [1], [3], False),
    "line, mirrored": (2, 1, (2,), 5, [6], [5], [2], [2], [4], [4], True),
    "volume": (1, 1, (2, 2), 2, [2, 3, 4], [1, 2, 3], [1, 2, 1], [1, 1, 1], [0, 1, 1], [2, 2, 4], False),
    "window beyond the grid": (1, 1, (1,), 2, [2, 1], [5, 2], [1, 1], [1, 1], [4, 1], [2, 1], True),
    "two splits": (2, 1, (1,), 1, [75], [2], [1], [1], [0], [75], False),
    "nothing but border": (1, 1, (1,), 1, [2], [2], [1], [1], [4], [3], False),
}


def operands(case: tuple, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    B, G, widths, O, grid, size, *_ = case
    maps = [torch.randn(B, G, c, *grid).to(dtype) for c in widths]
    return maps, torch.randn(G, O, sum(widths), *size).to(dtype)


def upstream(like: Tensor) -> Tensor:
    return torch.cos(torch.arange(like.numel(), dtype=torch.float64)).view(like.shape).to(like.dtype)


def outcome(maps: list[Tensor], weight: Tensor, case: tuple) -> list[Tensor]:
    """Output and every gradient, by the operator."""
    leaves = [t.detach().requires_grad_() for t in (*maps, weight)]
    y = operator.grouped_conv(leaves[:-1], leaves[-1], *case[6:])
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream(y))]


def found(maps: list[Tensor], weight: Tensor, case: tuple) -> list[Tensor]:
    with cuda.interpreted(), poisoned_empties():
        made = outcome(maps, weight, case)
    assert all(t.dtype == weight.dtype for t in made) and made[0].is_contiguous() and made[-1].is_contiguous()
    assert all(d.stride() == torch.empty_like(m).stride() for d, m in zip(made[1:], maps, strict=False))
    return made


def wanted(maps: list[Tensor], weight: Tensor, case: tuple) -> list[Tensor]:
    """By PyTorch in float64, at the same upstream gradient."""
    leaves = [t.double().requires_grad_() for t in (*maps, weight)]
    with engine.forced(engine.OFF):
        y = operator.grouped_conv(leaves[:-1], leaves[-1], *case[6:])
        grad = upstream(y.detach().to(weight.dtype)).double()
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def agree(mine: list[Tensor], truth: list[Tensor], budget: float) -> None:
    for i, (a, b) in enumerate(zip(mine, truth, strict=True)):
        assert a.shape == b.shape
        off = ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)).item()
        assert off <= budget, f"tensor {i}: off by {off:.1e} (budget {budget:.0e})"


@pytest.fixture
def small(monkeypatch):
    """Tiles of 32 positions, and how often the kernels ran."""
    ran = []
    for name, more in (("grouped_conv", {}), ("grouped_conv_backward", {"programs": 60})):
        real = functools.partial(getattr(kernels, name), block=32, **more)
        monkeypatch.setattr(kernels, name, lambda *a, r=real, n=name: ran.append(n) or r(*a))
    return ran


@pytest.mark.parametrize("name", CASES)
def test_equals_a_convolution(name, small):
    case = CASES[name]
    maps, weight = operands(case)
    agree(found(maps, weight, case), wanted(maps, weight, case), BUDGET[torch.float32])
    assert small == ["grouped_conv", "grouped_conv_backward"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["acmix", "one map"])
def test_low_precision_is_added_up_in_float32(name, dtype, small):
    case = CASES[name]
    maps, weight = operands(case, dtype)
    agree(found(maps, weight, case), wanted(maps, weight, case), BUDGET[dtype])
    assert small == ["grouped_conv", "grouped_conv_backward"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_more_channels_than_a_tile_has(dtype):
    case = (1, 1, (17, 17), 70 if dtype == torch.float16 else 33, [3], [2], [1], [1], [0], [2], False)
    maps, weight = operands(case, dtype)
    agree(found(maps, weight, case), wanted(maps, weight, case), BUDGET[dtype])


def test_tiles_of_a_device():
    """And equal inputs have equal results."""
    case = CASES["line, mirrored"]
    maps, weight = operands(case)
    mine = found(maps, weight, case)
    agree(mine, wanted(maps, weight, case), BUDGET[torch.float32])
    assert all(torch.equal(a, b) for a, b in zip(found(maps, weight, case), mine, strict=True))


def test_any_strides():
    case = (2, 2, (2, 2), 1, [3, 4], [2, 2], [1, 1], [1, 1], [0, 1], [3, 4], False)
    maps, weight = operands(case)
    truth = found(maps, weight, case)
    last = [m.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2) for m in maps]
    parts = list(torch.cat(maps, 2).split(2, 2))
    turned = weight.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    mixed = [maps[0], last[1]]
    for others, kernel in ((last, weight), (parts, turned), (mixed, weight)):
        agree(found(others, kernel, case), truth, 0)
    one = torch.ones(()).expand(truth[0].shape)
    for grad in (one, upstream(truth[0]).permute(0, 3, 4, 2, 1).contiguous().permute(0, 4, 3, 1, 2)):
        mine, plain = (
            kernels.grouped_conv_backward(g, maps, weight, *case[6:9], case[10]) for g in (grad, grad.contiguous())
        )
        agree(mine, plain, 0)


def test_the_last_split_ends_with_the_batch():
    """Five tiles in two splits of three: the sixth would be of the next sample, which is not there."""
    case = (1, 1, (2,), 3, [150], [3], [1], [1], [1], [150], False)
    maps, weight = operands(case)
    grad = torch.randn(1, 3, 1, 150)
    beyond = [torch.cat((t, torch.full_like(t, math.nan))) for t in (grad, maps[0])]
    rest = (weight, *case[6:9], case[10])
    assert kernels._splits(5, 3, 60) == (2, 3)
    inside = kernels.grouped_conv_backward(grad, maps, *rest, block=32, programs=60)
    agree(kernels.grouped_conv_backward(beyond[0][:1], [beyond[1][:1]], *rest, block=32, programs=60), inside, 0)


def test_what_is_not_a_number_stays_where_it_is_read():
    case = CASES["acmix"]
    maps, weight = operands(case)
    maps[1][1, 0, 1, 2, 2] = math.nan
    y, *d_maps, d_weight = found(maps, weight, case)
    lost = y.isnan()
    assert lost[1, :, 0, 1:4, 1:4].all() and lost.sum() == 27
    assert all(d.isfinite().all() for d in d_maps) and d_weight[0, :, 3].isnan().all() and d_weight.isnan().sum() == 27


@pytest.mark.parametrize("where", ["batch", "outputs"])
def test_empty(where):
    case = CASES["acmix"]
    maps, weight = operands(case)
    maps, weight = ([m[:0] for m in maps], weight) if where == "batch" else (maps, weight[:, :0])
    y, *d_maps, d_weight = found(maps, weight, case)
    assert y.numel() == 0 and not d_weight.any() and not any(d.any() for d in d_maps)


def test_it_says_what_it_does_not_serve():
    case = CASES["acmix"]
    maps, weight = operands(case)
    rest = case[6:10]
    assert kernels.refusal(maps, weight, *rest) == "" == kernels.refusal([m.half() for m in maps], weight.half(), *rest)
    assert "torch.float64" in kernels.refusal([m.double() for m in maps], weight.double(), *rest)
    assert "torch.float16" in kernels.refusal([maps[0].half(), *maps[1:]], weight, *rest)
    assert "meta" in kernels.refusal([m.to("meta") for m in maps], weight.to("meta"), *rest)
    wide = [torch.empty(1).expand(1, 2, 3, 2**14, 2**14)] * 3
    assert "32 bits" in kernels.refusal(wide, weight, *rest[:3], [2**14, 2**14])
    wide = [m.double() for m in maps]
    with pytest.raises(NotImplementedError, match="float64"):
        kernels.grouped_conv(wide, weight, *case[6:])
    with pytest.raises(NotImplementedError, match="float64"):
        kernels.grouped_conv_backward(torch.zeros(2, 3, 2, 4, 5), wide, weight, *case[6:9], case[10])
    with cuda.interpreted():  # and PyTorch does
        assert operator.grouped_conv(wide, weight.double(), *case[6:]).dtype == torch.float64
