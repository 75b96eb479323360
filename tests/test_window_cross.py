"""Windows on the grid of another input: against attention written out, one query at a time, and SAPA's formula."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.formulas import close, positions, project, scrambled

from nearfold.nn import LocalCrossAttention2d, Mixer
from nearfold.testing import conform

pytestmark = pytest.mark.usefixtures("float64")


def seen(i, grid, source, size, dilation=1):
    """Raster positions of the other grid in the window around where position i of the one lies."""
    middle = [math.floor((p + 0.5) / m * n) for p, m, n in zip(i, grid, source, strict=True)]
    reach = dilation * (size - 1)
    lines = [[c - reach // 2 + s * dilation for s in range(size)] for c in middle]
    at = [[]]
    for line, n in zip(lines, source, strict=True):
        at = [[*one, p] for one in at for p in line if 0 <= p < n]
    return [sum(p * math.prod(source[a + 1 :]) for a, p in enumerate(one)) for one in at]


def truth(layer, x, context, size, dilation=1, projected_value=True):
    (q,), (k,) = project(layer, x, "query"), project(layer, context, "key")
    v = project(layer, context, "value")[0] if projected_value else context.flatten(2).mT[:, None]
    grid, source, rows = tuple(x.shape[2:]), tuple(context.shape[2:]), []
    for n, i in enumerate(positions(grid)):
        at = seen(i, grid, source, size, dilation)
        share = torch.softmax((q[:, :, n, None] * k[:, :, at]).sum(-1) / math.sqrt(q.shape[-1]), -1)
        rows.append((share[..., None] * v[:, :, at]).sum(2))
    y = torch.stack(rows, 2).transpose(1, 2).flatten(2)
    if projected_value:
        y = F.linear(y, layer.out_weight, layer.out_bias)
    return y.mT.unflatten(2, grid)


def agree(layer, x, context, wanted):
    operands, probe = [x, context, *layer.parameters()], torch.randn_like(wanted)
    grads = torch.autograd.grad((wanted * probe).sum(), operands)
    for layer.backend in ("auto", "gather", "oracle"):
        y = layer(x, context)
        close(y, wanted)
        for one, other in zip(torch.autograd.grad((y * probe).sum(), operands), grads, strict=True):
            close(one, other)


@pytest.mark.parametrize(
    ("grid", "source"),
    [((8, 6), (4, 3)), ((3, 4), (7, 9)), ((5, 5), (5, 5)), ((1, 1), (4, 2)), ((6, 2), (1, 1)), ((9,), (4,)),
     ((2, 3, 2), (3, 2, 4))],
)  # fmt: skip
@pytest.mark.parametrize("dilation", [1, 2])
def test_a_window_around_the_same_place(grid, source, dilation):
    step = f", dilation={dilation}" if dilation > 1 else ""
    layer = Mixer(f"window(3{step}, cross) | box | softmax(heads=2)", 4, 6, ndim=len(grid), context_channels=3)
    layer = scrambled(layer)
    x, context = torch.randn(2, 4, *grid, requires_grad=True), torch.randn(2, 3, *source, requires_grad=True)
    agree(layer, x, context, truth(layer, x, context, 3, dilation))


def test_on_one_grid_it_is_the_window_itself():
    layer = scrambled(Mixer("window(5, cross) | box | softmax(heads=2)", 4))
    plain = Mixer("window(5) | box | softmax(heads=2)", 4)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 6, 7)
    close(layer(x, x), plain(x))


@pytest.mark.parametrize("up", [2, 3])
def test_guided_upsampling_is_sapas(up):
    """Each fine position weighs the 5 x 5 coarse ones around its own; the coarse values are not mapped."""
    layer = scrambled(Mixer("sapa", 4))
    x = torch.randn(2, 4, 4 * up, 3 * up, requires_grad=True)
    context = torch.randn(2, 4, 4, 3, requires_grad=True)
    agree(layer, x, context, truth(layer, x, context, 5, projected_value=False))
    # the window of a fine position is the unfolded one of the coarse position that holds it
    q, k = project(layer, x, "query")[0][:, 0], project(layer, context, "key")[0][:, 0]
    fine = q.mT.unflatten(2, x.shape[2:])
    padded = [F.unfold(t, 5, padding=2).unflatten(1, (-1, 25)) for t in (k.mT.unflatten(2, (4, 3)), context)]
    keys, values = (t.unflatten(3, (4, 3)).repeat_interleave(up, 3).repeat_interleave(up, 4) for t in padded)
    there = F.unfold(torch.ones(1, 1, 4, 3), 5, padding=2).view(1, 25, 4, 3) > 0
    there = there.repeat_interleave(up, 2).repeat_interleave(up, 3)
    share = torch.softmax((fine[:, :, None] * keys).sum(1).div(2).masked_fill(~there, -math.inf), 1)
    close(layer(x, context), (share[:, None] * values).sum(2))


def test_absent_positions_of_the_context_are_not_read():
    layer = scrambled(Mixer("window(3, cross) | box | softmax(heads=2)", 4, ndim=1))
    x, context = torch.randn(1, 4, 9), torch.randn(1, 4, 6)
    keep = torch.tensor([[1, 1, 0, 1, 0, 1]]).bool()
    spoilt = context.masked_fill(~keep, math.nan)
    wanted = layer.backend = "oracle"
    wanted = layer(x, context, keep)
    for layer.backend in ("auto", "oracle"):
        close(layer(x, spoilt, keep), wanted)


def test_the_layer_that_people_type():
    layer = LocalCrossAttention2d(4, 2, 3, context_channels=6)
    x, context = torch.randn(2, 4, 6, 8), torch.randn(2, 6, 3, 4)
    close(layer(x, context), truth(layer, x, context, 3))


def test_what_a_window_on_another_grid_cannot_have():
    for text, said in (
        ("window(3, stride=2, cross) | box | softmax", "given without stride, padding and mode"),
        ("window(3, mode=reflect, cross) | box | softmax", "given without stride, padding and mode"),
        ("window(3, scaled(bias=table), cross) | box | softmax", "no position can be compared"),
        ("window(3, cross) | causal | softmax", "no position can be compared"),
        ("window(3, cross) | box | kernel", "a rho that compares query and key"),
    ):
        with pytest.raises(ValueError, match=said):
            Mixer(text, 4, ndim=1)
    with pytest.raises(ValueError, match="call it with context="):
        Mixer("sapa", 4)(torch.randn(1, 4, 5, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision(dtype):
    conform("window(3, dot, cross) | box | identity(heads=2)*kernel", (6, 7), dtype)
