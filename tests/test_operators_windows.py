"""Deformable convolution, neighbourhoods and blocks against torchvision, or the paper's formula.

Nothing here goes through the oracle: these tests say that the words mean what the field means by them.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers.formulas import close, mask_of, masked_attention, positions, scrambled
from torch import nn

from nearfold import nn as near
from nearfold.nn import Mixer

pytestmark = pytest.mark.usefixtures("float64")

# --- deformable convolution


def deformed(x, offset, mask, weight, bias, stride, padding, dilation, groups, offset_groups):
    """One output number at a time, from eq. 2 to 4 of arXiv 1703.06211 and eq. 1 of 1811.11168."""
    B, C, H, W = x.shape
    O, per_group, kh, kw = weight.shape
    y = x.new_zeros(B, O, *offset.shape[2:])
    of_group = C // offset_groups
    for b, o, i, j, c, r, s in itertools.product(*map(range, (B, O, *offset.shape[2:], per_group, kh, kw))):
        channel = o // (O // groups) * per_group + c
        slot = (channel // of_group * kh + r) * kw + s
        py = i * stride[0] - padding[0] + r * dilation[0] + offset[b, 2 * slot, i, j].item()
        px = j * stride[1] - padding[1] + s * dilation[1] + offset[b, 2 * slot + 1, i, j].item()
        turned = 1 if mask is None else mask[b, slot, i, j]
        for at_y, at_x in itertools.product(range(H), range(W)):
            share = max(0.0, 1 - abs(py - at_y)) * max(0.0, 1 - abs(px - at_x))
            if share:
                y[b, o, i, j] += (weight[o, c, r, s] * share * turned * x[b, channel, at_y, at_x]).item()
    return y + bias.detach().view(-1, 1, 1)


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize(("stride", "dilation", "groups", "offset_groups"), [(1, 1, 1, 1), (2, 1, 2, 1), (1, 2, 1, 2)])
def test_deformable_convolution(modulated, stride, dilation, groups, offset_groups):
    layer = scrambled(
        near.DeformConv2d(
            4,
            2,
            3,
            stride=stride,
            padding=1,
            dilation=dilation,
            groups=groups,
            offset_groups=offset_groups,
            modulated=modulated,
        )
    )
    x = torch.randn(1, 4, 5, 4)
    how = {"stride": (stride, stride), "padding": (1, 1), "dilation": (dilation, dilation)}
    offset = F.conv2d(x, layer.offset_weight, layer.offset_bias, **how)
    assert offset.abs().max() > 1, "far enough to leave the cell and the grid"
    mask = torch.sigmoid(F.conv2d(x, layer.mask_weight, layer.mask_bias, **how)) if modulated else None
    truth = deformed(x, offset, mask, layer.weight, layer.bias, **how, groups=groups, offset_groups=offset_groups)
    close(layer(x), truth)
    other = near.deform_conv(x, offset, layer.weight, layer.bias, **how, mask=mask)
    close(other, truth)


def test_the_function_of_deformable_convolution():
    x, weight = torch.randn(2, 4, 5, 6, requires_grad=True), torch.randn(6, 2, 3, 2, requires_grad=True)
    offset, mask = torch.randn(2, 24, 3, 3, requires_grad=True), torch.rand(2, 12, 3, 3, requires_grad=True)
    bias = torch.randn(6, requires_grad=True)
    how = {"stride": (2, 2), "padding": (1, 1), "dilation": (1, 2)}

    def run(x, offset, weight, bias, mask):
        return near.deform_conv(x, offset, weight, bias, **how, mask=mask)

    truth = deformed(x, offset, mask, weight, bias, **how, groups=2, offset_groups=2)
    close(run(x, offset, weight, bias, mask), truth)
    assert torch.autograd.gradcheck(run, (x, offset, weight, bias, mask))
    for change, message in (
        ({"offset": offset[:, :23]}, r"offset must be \(B, G \* 12, \*out\)"),
        ({"offset": offset[:, :, :2]}, "offset must be"),
        ({"mask": mask[:, :6]}, r"mask must be \(2, 12, 3, 3\)"),
        ({"weight": weight[:5]}, "does not fit 4 channels"),
        ({"bias": bias.float()}, "one floating dtype"),
        ({"x": x[0]}, "one to three grid axes"),
    ):
        arguments = {"x": x, "offset": offset, "weight": weight, "bias": bias, "mask": mask} | change
        with pytest.raises(ValueError, match=message):
            run(**arguments)
    with pytest.raises(ValueError, match="stride must be an integer of at least 1"):
        near.deform_conv(x, offset, weight, stride=0)


def test_deformable_convolution_starts_as_the_convolution():
    layer, twin = near.DeformConv2d(4, 6, 3, stride=2, padding=1), nn.Conv2d(4, 6, 3, stride=2, padding=1)
    layer.load_state_dict(twin.state_dict(), strict=False)
    x = torch.randn(2, 4, 7, 6)
    close(layer(x), twin(x))
    modulated = near.DeformConv2d(4, 6, 3, stride=2, padding=1, modulated=True)
    modulated.load_state_dict(twin.state_dict(), strict=False)
    close(modulated(x), twin(x) / 2 + twin.bias.view(-1, 1, 1) / 2)


def test_deformable_convolution_is_torchvisions():
    from nearfold._torchvision import load

    try:
        ops = load("torchvision.ops")
        ops.deform_conv2d(torch.zeros(1, 1, 3, 3), torch.zeros(1, 2, 3, 3), torch.zeros(1, 1, 1, 1))
    except (ImportError, RuntimeError, AttributeError) as missing:
        pytest.skip(f"torchvision.ops.deform_conv2d does not load here: {missing}")
    layer = scrambled(near.DeformConv2d(8, 6, 3, padding=1, groups=2, offset_groups=4, modulated=True))
    x = torch.randn(2, 8, 9, 7)
    offset = F.conv2d(x, layer.offset_weight, layer.offset_bias, padding=1)
    mask = torch.sigmoid(F.conv2d(x, layer.mask_weight, layer.mask_bias, padding=1))
    close(layer(x), ops.deform_conv2d(x, offset, layer.weight, layer.bias, padding=1, mask=mask))


@pytest.mark.parametrize("ndim", [1, 3])
def test_deformable_convolution_on_other_grids(ndim):
    """By interpolation with torch's own means: whole offsets are rolls of a padded map."""
    layer = Mixer("deformable(3, padding=1) | box | kernel", 3, 2, ndim=ndim)
    grid = (5, 4, 6)[:ndim]
    with torch.no_grad():
        layer.offset_bias.view(-1, ndim)[:, 0] = 0.5
    x = torch.randn(2, 3, *grid)
    padded = F.pad(x, [2, 2] * ndim)
    conv = {1: F.conv1d, 3: F.conv3d}[ndim]
    here, next_row = padded, padded.roll(-1, 2)
    moved = conv((here + next_row) / 2, layer.weight, layer.bias)
    inside = [slice(1, -1)] * ndim
    close(layer(x), moved[(..., *inside)])


# --- windows that stay inside the grid


def inside_line(n, size, i, step, causal):
    """Positions a query i reads on a line of n: the nearest to its leader, by distance, the lower of two first."""
    if causal:
        leader = min(i // step * step + step - 1, n - 1)
        return [j for j in range(n) if leader - size < j <= i]
    leader = min(i // step * step + step // 2, n - 1)
    return sorted(sorted(range(n), key=lambda j: (abs(j - leader), j))[:size])


def inside_reads(grid, size, dilation, step, causal):
    def reads(i, j):
        for axis, n in enumerate(grid):
            d = dilation[axis]
            if (i[axis] - j[axis]) % d:
                return False
            line = len(range(i[axis] % d, n, d))
            seen = inside_line(line, size[axis], i[axis] // d, step[axis], axis in causal)
            if j[axis] // d not in seen:
                return False
        return True

    return reads


NEIGHBOURHOODS = [
    ((9,), (5,), (1,), (1,), ()),
    ((9,), (4,), (1,), (1,), ()),
    ((11,), (3,), (2,), (1,), ()),
    ((11,), (3,), (3,), (2,), (0,)),
    ((12,), (4,), (1,), (4,), ()),
    ((7, 6), (3, 5), (1, 1), (1, 1), ()),
    ((7, 6), (3, 3), (2, 1), (1, 2), ()),
    ((7, 6), (3, 2), (1, 2), (3, 1), (1,)),
    ((4, 5, 3), (3, 3, 2), (1, 1, 1), (1, 1, 1), (0,)),
    ((4, 5, 6), (2, 3, 3), (1, 1, 2), (2, 1, 1), ()),
    ((2, 3), (5, 5), (1, 1), (1, 1), ()),
]


@pytest.mark.parametrize(("grid", "size", "dilation", "step", "causal"), NEIGHBOURHOODS)
def test_neighbourhood_attention(grid, size, dilation, step, causal):
    kind = {1: near.NeighborhoodAttention1d, 2: near.NeighborhoodAttention2d, 3: near.NeighborhoodAttention3d}
    layer = kind[len(grid)](4, 2, size, dilation=dilation, step=step, causal_axes=causal)
    x = torch.randn(2, 4, *grid)
    mask = mask_of(grid, inside_reads(grid, size, dilation, step, causal))
    close(layer(x), masked_attention(layer, x, mask))


def test_neighbourhood_bias_counts_offsets():
    layer = scrambled(near.NeighborhoodAttention2d(4, 2, 3, dilation=2, relative_bias=True))
    grid = (7, 6)
    x, at = torch.randn(2, 4, *grid), positions(grid)
    bias = torch.zeros(2, len(at), len(at))
    for (a, i), (b, j) in itertools.product(enumerate(at), enumerate(at)):
        steps = [(p - q) // 2 + 2 for p, q in zip(i, j, strict=True)]
        if all(0 <= s < 5 for s in steps):
            bias[:, a, b] = layer.relative_bias[:, steps[0], steps[1]]
    mask = mask_of(grid, inside_reads(grid, (3, 3), (2, 2), (1, 1), ()))
    close(layer(x), masked_attention(layer, x, mask, bias))


def test_attention_in_blocks_is_a_neighbourhood_whose_step_is_its_size():
    a, b = near.NeighborhoodAttention2d(4, 2, 3, step=3), near.BlockAttention2d(4, 2, 3, relative_bias=False)
    b.load_state_dict(a.state_dict())
    x = torch.randn(2, 4, 9, 6)
    close(a(x), b(x))


# --- blocks


@pytest.mark.parametrize("grid", [(8, 12), (4, 12), (12, 4), (4, 4)])  # a block that covers an axis is not shifted
@pytest.mark.parametrize("shift", [0, 2])
def test_shifted_windows_are_torchvisions(shift, grid):
    from nearfold._torchvision import load

    swin = load("torchvision.models.swin_transformer")
    layer = scrambled(near.BlockAttention2d(8, 2, 4, shift=shift))
    x = torch.randn(2, 8, *grid)
    twin = swin.ShiftedWindowAttention(8, [4, 4], [shift, shift], 2)
    with torch.no_grad():
        names = ("query", "key", "value")
        twin.qkv.weight.copy_(torch.cat([layer.get_parameter(f"{n}_weight") for n in names]))
        twin.qkv.bias.copy_(torch.cat([layer.get_parameter(f"{n}_bias") for n in names]))
        twin.proj.weight.copy_(layer.out_weight)
        twin.proj.bias.copy_(layer.out_bias)
        twin.relative_position_bias_table.copy_(layer.relative_bias.flatten(1).T)
    close(layer(x), twin(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


@pytest.mark.parametrize(("grid", "size", "shift"), [((7, 8), 3, 0), ((7, 8), 3, 2), ((11,), 4, 1), ((3, 5, 4), 2, 1)])
def test_blocks_that_do_not_fit(grid, size, shift):
    layer = Mixer(f"block({size}, shift={shift}) | box | softmax(heads=2)", 4, ndim=len(grid))
    x = torch.randn(2, 4, *grid)
    block = [[(p + size - shift) // size for p in at] for at in positions(grid)]
    mask = torch.tensor([[a == b for b in block] for a in block])
    close(layer(x), masked_attention(layer, x, mask))


@pytest.mark.parametrize("step", [1, 3, 4, 20])
def test_strided_attention(step):
    layer = near.StridedAttention(6, 2, step)
    x = torch.randn(2, 11, 6)
    at = torch.arange(11)
    mask = (at[:, None] - at) % step == 0
    close(layer(x), masked_attention(layer, x.mT, mask).mT)


@pytest.mark.parametrize("causal", [True, False])
def test_sliding_window_attention(causal):
    layer = near.SlidingWindowAttention(6, 2, 5, causal=causal)
    x = torch.randn(2, 11, 6)
    far = torch.arange(11)[:, None] - torch.arange(11)
    mask = (far >= 0) & (far < 5) if causal else far.abs() <= 2
    close(layer(x), masked_attention(layer, x.mT, mask).mT)
