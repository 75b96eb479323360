"""Rows of the catalogue over windows, lines and blocks, against torch, timm, or the paper's formula.

Nothing here goes through the oracle but to be compared: these tests say that a row means what its paper means.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.formulas import agree, close, mask_of, masked_attention, positions, project, scrambled
from torch import nn

from nearfold._torchvision import load
from nearfold.nn import Mixer

pytestmark = pytest.mark.usefixtures("float64")
SIZES = [(7, 6), (1, 1), (2, 5)]


def timm(name):
    """A module of timm, or a visible skip."""
    try:
        load("torchvision")
        return load(f"timm.{name}")
    except ModuleNotFoundError:
        pytest.skip("timm is not installed")


def drawn(name, channels, grid, **named):
    """A layer without special values, and an input."""
    return scrambled(Mixer(name, channels, ndim=len(grid), **named)), torch.randn(
        2, channels, *grid, requires_grad=True
    )


def conv(x, layer, prefix="", dilation=1):
    """torch's own, with the window in the middle."""
    named = dict(layer.named_parameters())
    weight, bias = named[f"{prefix}weight"], named.get(f"{prefix}bias")
    padding = [dilation * (n - 1) // 2 for n in weight.shape[2:]]
    return F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=x.shape[1] // weight.shape[1])


@pytest.mark.parametrize("grid", SIZES)
@pytest.mark.parametrize("name", ["conv_grouped", "pointwise", "convnext"])
def test_torchs_convolutions(name, grid):
    layer, x = drawn(name, 8, grid)
    agree(layer, x, lambda x: conv(x, layer))


@pytest.mark.parametrize("grid", SIZES)
def test_blueprint_is_pointwise_then_depthwise(grid):
    layer, x = drawn("blueprint", 6, grid)

    def truth(x):
        y = F.conv2d(x, layer.value_weight[..., None, None], layer.value_bias)
        # the border is zero behind the pointwise map, whose bias it therefore has not
        return F.conv2d(y, layer.weight, layer.bias, padding=1, groups=6)

    agree(layer, x, truth)


@pytest.mark.parametrize("grid", SIZES)
def test_shift_convolution(grid):
    """A ninth of the channels from every neighbour, the last slot first, then a pointwise map."""
    layer, x = drawn("shift", 9, grid)

    def truth(x):
        padded, (H, W) = F.pad(x, (1, 1, 1, 1)), grid
        slots = list(itertools.product(range(3), range(3)))[::-1]
        parts = [padded[:, c : c + 1, a : a + H, b : b + W] for c, (a, b) in enumerate(slots)]
        return F.conv2d(torch.cat(parts, 1), layer.out_weight[..., None, None], layer.out_bias)

    agree(layer, x, truth)


def test_spatial_shift_inside_is_s2mlps():
    """What the public code moves; at the border it leaves the own value, and here there is zero."""
    layer, x = Mixer("s2_mlp", 8), torch.randn(2, 8, 6, 5, requires_grad=True)

    def theirs(x):
        y = x.clone()
        y[:, 4:6, :, 1:], y[:, 6:8, :, :-1] = x[:, 4:6, :, :-1], x[:, 6:8, :, 1:]
        y[:, 0:2, 1:], y[:, 2:4, :-1] = x[:, 0:2, :-1], x[:, 2:4, 1:]
        return y

    # ours deals the same four ways to the groups of channels in another order
    order = [2, 3, 0, 1, 6, 7, 4, 5]
    mine = layer(x[:, order])[:, order][..., 1:-1, 1:-1]
    close(mine, theirs(x)[..., 1:-1, 1:-1])
    probe = torch.randn_like(mine)
    grads = [torch.autograd.grad((y * probe).sum(), x)[0] for y in (mine, theirs(x)[..., 1:-1, 1:-1])]
    close(*grads)


@pytest.mark.parametrize("grid", SIZES)
def test_the_atrous_pyramid_is_a_sum_of_four(grid):
    layer, x = drawn("aspp", 4, grid)
    agree(layer, x, lambda x: sum(conv(x, layer, f"{i}.", 6 * (i + 1)) for i in range(4)))


def test_the_atrous_pyramid_reaches():
    layer, x = drawn("aspp", 2, (15, 14))
    agree(layer, x, lambda x: sum(conv(x, layer, f"{i}.", 6 * (i + 1)) for i in range(4)))


@pytest.mark.parametrize("grid", SIZES)
def test_repvgg_is_one_convolution(grid):
    """The block, and the one kernel that it becomes: the paper's reparametrisation."""
    layer, x = drawn("repvgg", 4, grid)
    agree(layer, x, lambda x: conv(x, layer, "0.") + conv(x, layer, "1.") + x)
    named = dict(layer.named_parameters())
    merged = named["0.weight"].clone()
    merged[:, :, 1, 1] += named["1.weight"][:, :, 0, 0] + torch.eye(4)
    close(layer(x), F.conv2d(x, merged, named["0.bias"] + named["1.bias"], padding=1))


@pytest.mark.parametrize("grid", SIZES)
@pytest.mark.parametrize("name", ["acnet", "slak"])
def test_sums_of_three_windows(name, grid):
    layer, x = drawn(name, 4, grid)
    agree(layer, x, lambda x: sum(conv(x, layer, f"{i}.") for i in range(3)))


@pytest.mark.parametrize("grid", SIZES)
def test_mixconv_parts_the_channels(grid):
    layer, x = drawn("mixconv", 6, grid)
    agree(layer, x, lambda x: torch.cat([conv(x[:, :3], layer, "0."), conv(x[:, 3:], layer, "1.")], 1))


@pytest.mark.parametrize("channels", [8, 24])
@pytest.mark.parametrize("grid", SIZES)
def test_inceptionnext_is_timms(grid, channels):
    layer, x = drawn("inceptionnext", channels, grid)
    theirs = timm("models.inception_next").InceptionDWConv2d(channels)
    named = dict(theirs.named_parameters())

    def truth(x):
        own = dict(layer.named_parameters())
        prefixes = {"dwconv_hw": "1.0.", "dwconv_w": "1.1.0.", "dwconv_h": "1.1.1."}
        given = {f"{n}.{p}": own[prefix + p] for n, prefix in prefixes.items() for p in ("weight", "bias")}
        assert given.keys() == named.keys()
        return torch.func.functional_call(theirs, given, (x,))

    agree(layer, x, truth)


@pytest.mark.parametrize("grid", SIZES)
def test_poolformer_is_timms(grid):
    layer, x = drawn("poolformer", 4, grid)
    agree(layer, x, timm("models.metaformer").Pooling(3))


@pytest.mark.parametrize("grid", SIZES)
def test_strip_pooling(grid):
    layer, x = drawn("strip_pooling", 4, grid)
    agree(layer, x, lambda x: x.mean(2, keepdim=True) + x.mean(3, keepdim=True))


@pytest.mark.parametrize("grid", SIZES)
def test_global_pooling(grid):
    layer, x = drawn("pool_global", 4, grid)
    agree(layer, x, lambda x: F.adaptive_avg_pool2d(x, 1).expand_as(x))


class Part(nn.Module):
    """One side of a layer, by the names that `project` reads."""

    def __init__(self, layer, prefix, operation):
        super().__init__()
        self.named, self.prefix, self.operation = dict(layer.named_parameters()), prefix, operation

    def get_parameter(self, target):
        return self.named.get(self.prefix + target, self.named.get(target))  # or one that a sum shares


def heads_out(y):
    """(B, H, N, d) -> (B, N, C)."""
    return y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("grid", [(6, 5), (1, 1), (3, 2)])
def test_cross_shaped_windows(grid):
    """Stripes two wide, of rows for the first half of the heads, of columns for the others; then one map."""
    layer, x = drawn("cross_shaped", 8, grid)

    def truth(x):
        made = []
        for side, axis in enumerate((0, 1)):
            part = Part(layer, f"{side}.", layer.operation.operands[side])
            q, k, v = project(part, x)
            mask = mask_of(grid, lambda i, j, axis=axis: i[axis] // 2 == j[axis] // 2)
            score = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
            made.append(heads_out(torch.softmax(score, -1) @ v))
        y = F.linear(torch.cat(made, -1), layer.mix_weight, layer.mix_bias)
        return y.mT.unflatten(2, grid)

    agree(layer, x, truth)


@pytest.mark.parametrize("grid", [(6, 4), (2, 2)])
def test_hilo_attention(grid):
    """High frequencies inside of 2 x 2 windows, low ones to the map pooled by two, as the paper's code has them."""
    layer, x = drawn("hilo", 8, grid)

    def truth(x):
        high, low = (Part(layer, f"{i}.", layer.operation.operands[i]) for i in (0, 1))
        q, k, v = project(high, x)
        mask = mask_of(grid, lambda i, j: all(p // 2 == r // 2 for p, r in zip(i, j, strict=True)))
        score = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
        one = F.linear(heads_out(torch.softmax(score, -1) @ v), high.named["0.out_weight"], high.named["0.out_bias"])
        (q,), (k, v) = project(low, x, "query"), project(low, F.avg_pool2d(x, 2), "key value")
        two = heads_out(F.scaled_dot_product_attention(q, k, v))
        two = F.linear(two, low.named["1.out_weight"], low.named["1.out_bias"])
        return torch.cat([one, two], -1).mT.unflatten(2, grid)

    agree(layer, x, truth)


@pytest.mark.parametrize("grid", [(6, 8), (2, 2)])
def test_bilevel_routing(grid):
    """Regions of 2 x 2 choose four by their mean queries and keys; the window of the same values is added."""
    layer, x = drawn("biformer", 8, grid)
    regions = [[r * grid[1] + c for r in (a, a + 1) for c in (b, b + 1)] for a in range(0, grid[0], 2)
               for b in range(0, grid[1], 2)]  # fmt: skip

    def truth(x):
        q, k, v = project(Part(layer, "0.", layer.operation), x)
        mean_q, mean_k = (torch.stack([t[:, :, r].mean(2) for r in regions], 2) for t in (q, k))
        chosen = (mean_q @ mean_k.mT).topk(min(4, len(regions)), -1).indices
        mask = torch.zeros(*q.shape[:2], q.shape[2], q.shape[2], dtype=torch.bool)
        for b, h, r in itertools.product(*map(range, chosen.shape[:3])):
            read = [j for other in chosen[b, h, r].tolist() for j in regions[other]]
            for i in regions[r]:
                mask[b, h, i, read] = True
        y = heads_out(F.scaled_dot_product_attention(q, k, v, mask)).mT.unflatten(2, grid)
        value = heads_out(v).mT.unflatten(2, grid)
        return y + conv(value, layer, "1.")

    agree(layer, x, truth)


def pairs(x, reach, weigh):
    """One query at a time: sum over the window of weigh(own, other, offset), normalised."""
    grid, rows = x.shape[2:], []
    for i in positions(grid):
        at = [j for j in positions(grid) if max(abs(a - b) for a, b in zip(i, j, strict=True)) <= reach]
        score = torch.stack([weigh(x[(..., *i)], x[(..., *j)], i, j) for j in at], -1)
        values = torch.stack([x[(..., *j)] for j in at], -1)
        rows.append((torch.softmax(score, -1)[:, None] * values).sum(-1))
    return torch.stack(rows, -1).unflatten(2, grid)


@pytest.mark.parametrize("grid", [(4, 3), (1, 1), (2, 5)])
def test_bilateral_filter(grid):
    """exp(-|I_i - I_j|^2 - |p_i - p_j|^2), normalised: p as `coordinates` has them, every axis from -1 to 1."""
    layer, x = drawn("bilateral", 3, grid)
    steps = [2 / max(n - 1, 1) for n in grid]

    def weigh(own, other, i, j):
        far = sum(((a - b) * step) ** 2 for a, b, step in zip(i, j, steps, strict=True))
        return -(own - other).square().sum(1) - far

    agree(layer, x, lambda x: pairs(x, 2, weigh))


def halo_mask(grid, size, halo):
    def reads(i, j):
        return all(-halo <= b - a // size * size < size + halo for a, b in zip(i, j, strict=True))

    return mask_of(grid, reads)


@pytest.mark.parametrize("grid", [(9, 6), (1, 1), (3, 8)])
def test_halo_attention(grid):
    """Positions outside the map are not read; timm's code reads zeros there, which inside is the same."""
    layer, x = drawn("halo", 8, grid)
    agree(layer, x, lambda x: masked_attention(layer, x, halo_mask(grid, 4, 2)))


@pytest.mark.parametrize("grid", [(11,), (2, 3, 5)])
def test_halo_attention_on_other_grids(grid):
    layer, x = drawn("block(3, halo=1) | box | softmax(heads=2)", 4, grid)
    agree(layer, x, lambda x: masked_attention(layer, x, halo_mask(grid, 3, 1)))


def test_halo_with_a_table_of_offsets():
    layer, x = drawn("block(3, scaled(bias=table), halo=2) | box | softmax(heads=2)", 4, (7,))
    table = layer.get_parameter("relative_bias")
    assert table.shape == (2, 9), "a query is at most four from a key"

    def truth(x):
        offset = torch.arange(7)[:, None] - torch.arange(7)
        return masked_attention(layer, x, halo_mask((7,), 3, 2), table[:, (offset + 4).clamp(0, 8)])

    agree(layer, x, truth)


def test_halo_is_no_negative_number_and_has_no_holes():
    with pytest.raises(ValueError, match="halo must be an integer >= 0"):
        Mixer("block(4, halo=-1) | box | softmax", 4)
    with pytest.raises(ValueError, match="left out next to spread"):
        Mixer("block(4, spread, halo=1) | box | softmax", 4)
    with pytest.raises(ValueError, match="has 2 entries"):
        Mixer("block(4, halo=(1, 2)) | box | softmax", 4, ndim=1)


@pytest.mark.parametrize("grid", [(6, 4), (7, 5), (2, 2)])
def test_soft_pooling(grid):
    """Every channel by its own values' softmax: exp(x) x over exp(x)."""
    layer, x = drawn("pool_soft", 8, grid)

    def truth(x):
        return F.avg_pool2d(x.exp() * x, 2) / F.avg_pool2d(x.exp(), 2)

    agree(layer, x, truth)


@pytest.mark.parametrize("grid", SIZES)
def test_local_importance_pooling(grid):
    """As the paper's code: avg_pool(x * exp(logit)) / avg_pool(exp(logit)), logits by a pointwise map."""
    layer, x = drawn("pool_importance", 8, grid)

    def truth(x):
        weight = F.conv2d(x, layer.key_weight[..., None, None], layer.key_bias).exp()
        return F.avg_pool2d(x * weight, 3, 2, 1) / F.avg_pool2d(weight, 3, 2, 1)

    agree(layer, x, truth)
