"""Every operator of the field against an implementation of its own: torch's, torchvision's, or the paper's formula.

Nothing here goes through the oracle: these tests say that the words mean what the field means by them.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nearfold import nn as near
from nearfold.nn import Mixer

CLOSE = {"rtol": 1e-10, "atol": 1e-11}


@pytest.fixture(autouse=True)
def double():
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def scrambled(layer):
    """The layer with no parameter left at a special value."""
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return layer


def close(a, b):
    torch.testing.assert_close(a, b, **CLOSE)


def project(layer, x, letters="query key value"):
    """Projections by hand: (B, H, N, d) of every one asked for."""
    heads = layer.operation.parts[0].heads
    flat = x.flatten(2).transpose(1, 2)
    made = []
    for name in letters.split():
        y = F.linear(flat, layer.get_parameter(f"{name}_weight"), layer.get_parameter(f"{name}_bias"))
        made.append(y.unflatten(2, (heads, -1)).transpose(1, 2))
    return made


def masked_attention(layer, x, mask, bias=0.0):
    """Attention with a mask (N, N) over all positions, the plain way."""
    q, k, v = project(layer, x)
    score = q @ k.mT / math.sqrt(q.shape[-1]) + bias
    y = torch.softmax(score.masked_fill(~mask, -math.inf), -1) @ v
    y = y.transpose(1, 2).flatten(2)
    y = F.linear(y, layer.out_weight, layer.out_bias)
    return y.transpose(1, 2).unflatten(2, x.shape[2:])


def positions(grid):
    return list(itertools.product(*(range(n) for n in grid)))


def mask_of(grid, reads):
    """mask[i, j]: whether reads(i, j) says that position i reads position j."""
    at = positions(grid)
    return torch.tensor([[reads(i, j) for j in at] for i in at])


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


# --- positions


def test_alibi_of_a_power_of_two():
    layer = near.SelfAttention(8, 4, positions="alibi", causal=True)
    x = torch.randn(2, 9, 8)
    far = (torch.arange(9)[:, None] - torch.arange(9)).double()
    slopes = torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256])  # the paper's, for four heads
    close(layer(x), masked_attention(layer, x.mT, far >= 0, -slopes[:, None, None] * far).mT)


def test_alibi_on_an_image_is_the_distance():
    layer = Mixer("all(scaled(bias=alibi)) | row | softmax(heads=2)", 4)
    x = torch.randn(2, 4, 3, 4)
    far = torch.tensor([[math.dist(i, j) for j in positions((3, 4))] for i in positions((3, 4))])
    slopes = torch.tensor([2.0**-4, 2.0**-8])
    everywhere = torch.ones(12, 12, dtype=torch.bool)
    close(layer(x), masked_attention(layer, x, everywhere, -slopes[:, None, None] * far))


def test_rotary_positions_are_turns_of_complex_numbers():
    layer = near.SelfAttention(8, 2, positions="rotary")
    x = torch.randn(1, 9, 8)
    q, k, v = project(layer, x.mT)
    turn = torch.polar(torch.ones(9, 2), torch.arange(9.0)[:, None] * torch.tensor([1.0, 0.01]))
    q, k = (
        torch.view_as_real(torch.complex(t[..., :2], t[..., 2:]) * turn).transpose(-1, -2).flatten(-2) for t in (q, k)
    )
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    close(layer(x), F.linear(y, layer.out_weight, layer.out_bias))


def test_rotary_positions_know_offsets_only():
    """On an image: scores of a constant map depend on the offset, and differ along both axes."""
    from nearfold.grammar.similarity import Place, Scaled

    place = Place((5, 6), torch.device("cpu"), torch.float64)
    vector = torch.randn(1, 1, 1, 8).expand(1, 1, 30, 8)
    q, k = Scaled(rotary=True).embed(vector, vector, place, {})
    score = (q @ k.mT)[0, 0].reshape(5, 6, 5, 6)
    close(score[1, 1, 3, 4], score[2, 2, 4, 5])
    assert (score[1, 1, 3, 4] - score[1, 1, 4, 3]).abs() > 1e-3


def test_encodings_are_what_they_say():
    from nearfold.grammar.similarity import Place, encode

    place = Place((4, 5), torch.device("cpu"), torch.float64)
    at = torch.tensor(positions((4, 5)), dtype=torch.float64)
    unit = at / torch.tensor([3.0, 4.0]) * 2 - 1
    close(encode(True, place, None), unit.flip(1))
    for kind, angle, frequency in (
        ("sinusoidal", at, [10000 ** (-j / 4) for j in range(4)]),
        ("fourier", unit.flip(1), [math.pi * 2**j for j in range(4)]),
    ):
        turns = [angle[:, a] * f for a in range(2) for f in frequency]
        truth = torch.stack([t.sin() for t in turns] + [t.cos() for t in turns], 1)
        close(encode(kind, place, None), truth)
    weight = torch.randn(8, 16)
    close(encode("learned", place, weight), encode("fourier", place, None) @ weight.T)


@pytest.mark.parametrize("kind", ["raw", "sinusoidal", "fourier", "learned"])
def test_encodings_of_values_are_more_channels(kind):
    from nearfold.grammar.similarity import Place, encode

    layer = Mixer(f"window(3) | box | kernel(coordinates={kind})", 3, 5)
    x = torch.randn(2, 3, 4, 6)
    code = encode(kind, Place((4, 6), x.device, x.dtype), layer.tensors().get("value_encoding_weight"))
    both = torch.cat([x, code.T.unflatten(1, (4, 6)).expand(2, -1, -1, -1)], 1)
    close(layer(x), F.conv2d(both, layer.weight, layer.bias, padding=1))


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


# --- attention over tokens


def test_table_is_a_matrix_over_positions():
    layer = Mixer("all | row | table(20)", 3)
    x = torch.randn(2, 3, 4, 5)
    truth = torch.einsum("mn,bcn->bcm", layer.table_weight, x.flatten(2)) + layer.table_bias
    close(layer(x), truth.unflatten(2, (4, 5)))


@pytest.mark.parametrize("causal", [False, True])
def test_linear_attention_is_the_papers_formula(causal):
    layer = near.LinearAttention(6, 2, causal=causal)
    x = torch.randn(2, 9, 6)
    q, k, v = project(layer, x.mT)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    rows = []
    for i in range(9):
        seen = slice(0, i + 1) if causal else slice(None)
        top = torch.einsum("bhe,bhje,bhjd->bhd", q[:, :, i], k[:, :, seen], v[:, :, seen])
        rows.append(top / torch.einsum("bhe,bhje->bh", q[:, :, i], k[:, :, seen])[..., None])
    y = torch.stack(rows, 2).transpose(1, 2).flatten(2)
    close(layer(x), F.linear(y, layer.out_weight, layer.out_bias))


@pytest.mark.parametrize("kv", [1, 2, 4])
def test_grouped_queries_are_torchs(kv):
    layer = near.SelfAttention(16, 4, kv_heads=kv)
    x = torch.randn(2, 7, 16)
    q = F.linear(x, layer.query_weight, layer.query_bias).unflatten(2, (4, 4)).transpose(1, 2)
    k, v = (
        F.linear(x, layer.get_parameter(f"{n}_weight"), layer.get_parameter(f"{n}_bias")).unflatten(2, (kv, 4))
        for n in ("key", "value")
    )
    assert layer.key_weight.shape == (4 * kv, 16)
    y = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True)
    close(layer(x), F.linear(y.transpose(1, 2).flatten(2), layer.out_weight, layer.out_bias))


def test_cross_attention_is_torchs():
    layer = near.CrossAttention(12, 3, context_dim=8)
    twin = nn.MultiheadAttention(12, 3, kdim=8, vdim=8, batch_first=True)
    with torch.no_grad():
        twin.q_proj_weight.copy_(layer.query_weight)
        twin.k_proj_weight.copy_(layer.key_weight)
        twin.v_proj_weight.copy_(layer.value_weight)
        twin.in_proj_bias.copy_(torch.cat([layer.query_bias, layer.key_bias, layer.value_bias]))
        twin.out_proj.weight.copy_(layer.out_weight)
        twin.out_proj.bias.copy_(layer.out_bias)
    x, context = torch.randn(2, 7, 12), torch.randn(2, 5, 8)
    close(layer(x, context), twin(x, context, context, need_weights=False)[0])


def test_cross_nearest_reads_the_best_of_the_context():
    layer = Mixer("nearest(3, scaled, cross) | ranked | softmax(heads=2)", 4, ndim=2, context_channels=6)
    x, context = torch.randn(2, 4, 3, 4), torch.randn(2, 6, 5, 2)
    q = project(layer, x, "query")[0]
    k, v = project(layer, context, "key value")
    score = q @ k.mT / math.sqrt(2)
    kept = score.masked_fill(score < score.topk(3, -1).values[..., -1:], -math.inf)
    y = (torch.softmax(kept, -1) @ v).transpose(1, 2).flatten(2)
    close(layer(x, context).flatten(2).mT, F.linear(y, layer.out_weight, layer.out_bias))


def test_convnn_on_volumes():
    layer = near.ConvNN3d(3, 5, k=4)
    x = torch.randn(2, 3, 2, 3, 4)
    flat = F.normalize(x.flatten(2), dim=1)
    score = flat.mT @ flat
    score.diagonal(dim1=1, dim2=2).fill_(math.inf)
    near_by = score.topk(4, -1).indices
    read = x.flatten(2)[torch.arange(2)[:, None, None], :, near_by]  # (B, N, k, C)
    truth = torch.einsum("bnkc,ock->bon", read, layer.weight) + layer.bias[:, None]
    close(layer(x).flatten(2), truth)


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
    from nearfold.lower.orders import scan_order

    for grid in ((4, 5), (3, 4, 2), (2, 3, 3)):
        order = scan_order(Scan(1, "snake"), grid, torch.device("cpu"))
        at = torch.stack(torch.unravel_index(order, grid), 1)
        assert (at.diff(dim=0).abs().sum(1) == 1).all()
        assert sorted(order.tolist()) == list(range(math.prod(grid)))
