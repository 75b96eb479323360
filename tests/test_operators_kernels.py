"""Kernels made from the input, pooling and state spaces against torch, or the paper's formula.

Nothing here goes through the oracle: these tests say that the words mean what the field means by them.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.formulas import close, scrambled

from nearfold import nn as near
from nearfold.nn import Mixer

pytestmark = pytest.mark.usefixtures("float64")

# --- kernels made from the input


def unfolded(x, size, stride=1):
    """(B, C, S, out_h, out_w): what every slot of a square window reads."""
    B, C, H, W = x.shape
    out = (-(-H // stride), -(-W // stride))
    return F.unfold(x, size, padding=size // 2, stride=stride).reshape(B, C, size * size, *out)


@pytest.mark.parametrize("stride", [1, 2])
def test_involution(stride):
    layer = near.Involution2d(6, 3, groups=2, reduction=3, stride=stride)
    x = torch.randn(2, 6, 5, 7)
    at = x[:, :, ::stride, ::stride]
    hidden = F.relu(F.conv2d(at, layer.reduce_weight[..., None, None], layer.reduce_bias))
    kernel = F.conv2d(hidden, layer.span_weight[..., None, None], layer.span_bias).unflatten(1, (2, 1, 9))
    truth = (kernel * unfolded(x, 3, stride).unflatten(1, (2, 3))).sum(3).flatten(1, 2)
    close(layer(x), truth)


def test_lightweight_dynamic_convolution():
    layer = Mixer("window(3) | causal | generated(groups=2, reduction=0, activation=softmax)", 4, ndim=1)
    x = torch.randn(2, 4, 7)
    weight = (layer.span_weight @ x + layer.span_bias[:, None]).unflatten(1, (2, 3))
    # the softmax is over all slots, those before the start included, which read nothing
    weight = torch.softmax(weight, 2)
    padded = F.pad(x, [2, 0])
    truth = sum(weight[:, :, s].repeat_interleave(2, 1) * padded[:, :, s : s + 7] for s in range(3))
    close(layer(x), truth)


def test_dynamic_convolution_mixes_kernels():
    layer = near.DynamicConv2d(4, 6, 3, experts=3, reduction=2, temperature=2.0, stride=2)
    x = torch.randn(3, 4, 6, 5)
    hidden = F.relu(x.mean((2, 3)) @ layer.router_reduce_weight.T)
    share = torch.softmax((hidden @ layer.router_weight.T + layer.router_bias) / 2, 1)
    kernels = layer.weight.unflatten(0, (3, 6))
    own = [F.conv2d(x[b : b + 1], torch.einsum("e,eocij->ocij", share[b], kernels), layer.bias, 2, 1) for b in range(3)]
    close(layer(x), torch.cat(own))
    assert share.std(0).max() > 0, "inputs differ in their shares"


def test_large_kernels_and_pooling_are_torchs():
    x = torch.randn(2, 4, 9, 8)
    layer = near.LargeKernelConv2d(4, 13)
    close(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=6, groups=4))
    close(near.Pool2d(4, 2)(x), F.avg_pool2d(x, 2))
    close(near.Pool2d(4, 3, stride=2, padding=1)(x), F.avg_pool2d(x, 3, 2, 1, count_include_pad=False))
    close(near.Pool2d(4, (3, 2), "max", stride=2, padding=1)(x), F.max_pool2d(x, (3, 2), 2, 1))
    close(Mixer("all | row | mean", 4)(x), x.mean((2, 3), keepdim=True).expand_as(x))


# --- state spaces


def mamba(layer, prefix, x, heads=None):
    """The recurrence of arXiv 2312.00752 (algorithm 2) or 2405.21060, one token at a time: x (B, N, C)."""
    p = {name.removeprefix(prefix): t for name, t in layer.named_parameters() if name.startswith(prefix)}
    state = (p["x_proj_weight"].shape[0] - (heads or p["dt_proj_weight"].shape[1])) // 2
    made = x @ p["x_proj_weight"].T
    step, write, read = made.split([made.shape[-1] - 2 * state, state, state], -1)
    if heads is None:
        step = F.softplus(step @ p["dt_proj_weight"].T + p["dt_proj_bias"])
        rate, skip = -p["A_log"].exp(), p["D"]
    else:
        each = x.shape[2] // heads
        step = F.softplus(step + p["dt_bias"]).repeat_interleave(each, -1)
        rate = -p["A_log"].exp().repeat_interleave(each)[:, None].expand(-1, state)
        skip = p["D"].repeat_interleave(each)
    h = x.new_zeros(x.shape[0], x.shape[2], state)
    rows = []
    for t in range(x.shape[1]):
        h = torch.exp(step[:, t, :, None] * rate) * h + (step[:, t] * x[:, t])[..., None] * write[:, t, None]
        rows.append((h * read[:, t, None]).sum(-1) + skip * x[:, t])
    return torch.stack(rows, 1)


@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 200])
def test_selective_scan_is_the_recurrence(heads, reverse, tokens):
    layer = scrambled(near.SelectiveScan(6, 5, num_heads=heads, reverse=reverse))
    x = torch.randn(2, tokens, 6)
    turned = x.flip(1) if reverse else x
    truth = mamba(layer, "", turned, heads)
    close(layer(x), truth.flip(1) if reverse else truth)


def snake(h, w):
    return [(r, c if r % 2 == 0 else w - 1 - c) for r in range(h) for c in range(w)]


ORDERS = {
    "raster": lambda h, w: [(r, c) for r in range(h) for c in range(w)],
    "columns": lambda h, w: [(r, c) for c in range(w) for r in range(h)],
    "snake": snake,
}


def scanned(layer, prefix, x, order):
    rows = torch.stack([x[:, :, r, c] for r, c in order], 1)
    y = torch.zeros_like(x)
    for value, (r, c) in zip(mamba(layer, prefix, rows).unbind(1), order, strict=True):
        y[:, :, r, c] = value
    return y


@pytest.mark.parametrize("order", ORDERS)
def test_scan_orders_over_an_image(order):
    layer = scrambled(near.SelectiveScan2d(4, 3, order=order))
    x = torch.randn(2, 4, 5, 3)
    close(layer(x), scanned(layer, "", x, ORDERS[order](5, 3)))


def test_cross_scan_is_the_sum_of_four():
    layer = scrambled(near.SelectiveScan2d(4, 3))
    x = torch.randn(2, 4, 3, 5)
    rows, columns = ORDERS["raster"](3, 5), ORDERS["columns"](3, 5)
    orders = [rows, columns, rows[::-1], columns[::-1]]
    close(layer(x), sum(scanned(layer, f"{i}.", x, order) for i, order in enumerate(orders)))


def test_a_snake_never_jumps():
    from nearfold.grammar.words import Scan
    from nearfold.lower.words.scan import scan_order

    for grid in ((4, 5), (3, 4, 2), (2, 3, 3)):
        order = scan_order(Scan(1, "snake"), grid, torch.device("cpu"))
        at = torch.stack(torch.unravel_index(order, grid), 1)
        assert (at.diff(dim=0).abs().sum(1) == 1).all()
        assert sorted(order.tolist()) == list(range(math.prod(grid)))


def test_a_new_state_space_starts_as_mambas():
    """arXiv 2312.00752: A = -1 .. -state in every channel, a skip of one, steps between 0.001 and 0.1."""
    layer = Mixer("scan(state=4) | causal | selective", 8, ndim=1)
    close(layer.A_log.exp(), torch.arange(1.0, 5.0).expand(8, 4))
    one = Mixer("scan(state=4) | causal | selective(heads=2)", 8, ndim=1)
    close(one.A_log.exp(), torch.arange(1.0, 3.0))
    for made, bias in ((layer, layer.dt_proj_bias), (one, one.dt_bias)):
        assert (made.D == 1).all()
        assert F.softplus(bias).min() >= 0.001 and F.softplus(bias).max() <= 0.1
