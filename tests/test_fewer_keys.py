"""Grids of positions far apart, pooled keys, channels as slots: against timm, torch and sums written by hand.

Nothing here goes through the oracle: these tests say that the words mean what the field means by them.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.formulas import agree, close, mask_of, masked_attention, project, scrambled

from nearfold._torchvision import load
from nearfold.nn import Mixer

pytestmark = pytest.mark.usefixtures("float64")
BACKENDS = ("auto", "oracle")


def timm(name):
    """A module of timm, or a visible skip."""
    try:
        load("torchvision")
        return load(f"timm.{name}")
    except ModuleNotFoundError:
        pytest.skip("timm is not installed")


def out(layer, x, y):
    """The output projection, and (B, N, C) to a map."""
    y = F.linear(y, layer.out_weight, layer.out_bias)
    return y.transpose(1, 2).unflatten(2, x.shape[2:])


@pytest.mark.parametrize("bias", [False, True])
def test_grid_attention_is_maxvits(bias):
    """Cut and put together by timm's own functions; a bias counts steps of the grid, as its table does."""
    maxxvit, size, heads = timm("models.maxxvit"), (3, 2), 2
    layer = scrambled(
        Mixer(f"block((3, 2){', scaled(bias=table)' if bias else ''}, spread) | box | softmax(heads=2)", 6)
    )
    x = torch.randn(2, 6, 6, 8, requires_grad=True)

    def truth(x):
        rows = [t.transpose(1, 2).flatten(2).unflatten(1, x.shape[2:]) for t in project(layer, x)]  # (B, H, W, C)
        q, k, v = (
            maxxvit.grid_partition(t, size).flatten(1, 2).unflatten(2, (heads, -1)).transpose(1, 2) for t in rows
        )
        score = q @ k.mT / math.sqrt(q.shape[-1])
        if bias:
            at = [(a, b) for a in range(3) for b in range(2)]
            table = layer.get_parameter("relative_bias")
            score = score + torch.stack(
                [torch.stack([table[:, p[0] - r[0] + 2, p[1] - r[1] + 1] for r in at], -1) for p in at], 1
            )
        y = (torch.softmax(score, -1) @ v).transpose(1, 2).flatten(2).unflatten(1, size)
        return out(layer, x, maxxvit.grid_reverse(y, size, x.shape[2:]).flatten(1, 2))

    agree(layer, x, truth)


@pytest.mark.parametrize("grid", [(7,), (5, 4), (2, 3, 5)])
def test_grids_that_do_not_divide_are_spread_as_far(grid):
    layer = scrambled(Mixer("block(3, spread) | box | softmax(heads=2)", 4, ndim=len(grid)))
    mask = mask_of(grid, lambda i, j: all((p - q) % -(-n // 3) == 0 for p, q, n in zip(i, j, grid, strict=True)))
    x = torch.randn(2, 4, *grid, requires_grad=True)
    agree(layer, x, lambda x: masked_attention(layer, x, mask))


def test_spread_does_not_go_with_a_shift():
    with pytest.raises(ValueError, match="left out next to spread"):
        Mixer("block(4, shift=2, spread) | box | softmax", 4)


ADAPTIVE = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


@pytest.mark.parametrize("grid", [(11,), (9, 7), (4, 5, 3)])
def test_pooled_bins_are_pvts_linear_attention(grid):
    """PVT v2 pools the map adaptively and projects keys and values of what is left."""
    layer, x = scrambled(Mixer("pooled(3, bins) | row | softmax(heads=2)", 6, ndim=len(grid))), torch.randn(2, 6, *grid)

    def truth(x):
        (q,), (_, k, v) = project(layer, x, "query"), project(layer, ADAPTIVE[len(grid)](x, 3))
        return out(layer, x, F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    agree(layer, x.requires_grad_(), truth)


def pools(layer, x, blocks):
    """Attention to the means of blocks, each a list of positions, one query at a time; reads(i, block) says which."""
    q, k, v = project(layer, x)
    rows = []
    for i in range(q.shape[2]):
        read = [at for at in blocks(i) if at]
        if not read:
            rows.append(torch.zeros_like(v[:, :, 0]))
            continue
        mean_k, mean_v = (torch.stack([sum(t[:, :, j] for j in at) / len(at) for at in read], 2) for t in (k, v))
        weight = torch.softmax((q[:, :, i, None] * mean_k).sum(-1) / math.sqrt(q.shape[-1]), -1)
        rows.append((weight[..., None] * mean_v).sum(2))
    return out(layer, x, torch.stack(rows, 2).transpose(1, 2).flatten(2))


def test_pooled_blocks_at_the_end_are_cut_short():
    layer, x = scrambled(Mixer("pooled((2, 3)) | row | softmax(heads=2)", 4)), torch.randn(2, 4, 5, 7)
    cut = [
        [a * 7 + b for a in range(p, min(p + 2, 5)) for b in range(r, min(r + 3, 7))]
        for p in range(0, 5, 2)
        for r in range(0, 7, 3)
    ]
    agree(layer, x.requires_grad_(), lambda x: pools(layer, x, lambda i: cut))


def test_compressed_keys_are_the_whole_blocks_up_to_the_query():
    """And so what comes later changes nothing."""
    layer = scrambled(Mixer("pooled(3) | causal | softmax(heads=2)", 4, ndim=1))
    x = torch.randn(2, 4, 11, requires_grad=True)
    agree(layer, x, lambda x: pools(layer, x, lambda i: [[p, p + 1, p + 2] for p in range(0, 9, 3) if p + 2 <= i]))
    close(layer(x)[..., :7], layer(x[..., :7]))


@pytest.mark.parametrize("causal", [False, True])
def test_a_mean_is_one_of_the_keys_that_are_there(causal):
    layer = scrambled(Mixer(f"pooled(3) | {'causal' if causal else 'row'} | softmax(heads=2)", 4, ndim=1))
    x, keep = torch.randn(1, 4, 10, requires_grad=True), torch.tensor([[1, 0, 1, 0, 0, 0, 1, 1, 1, 0]]).bool()
    # a query that is absent itself asks with the bias of its projection alone, as the layer says
    there = [at for at in range(10) if keep[0, at]]
    cut = [[p for p in range(first, min(first + 3, 10)) if keep[0, p]] for first in range(0, 10, 3)]
    wanted = pools(layer, x, lambda i: [at for n, at in enumerate(cut) if not causal or 3 * n + 2 <= i])
    for backend in BACKENDS:
        layer.backend = backend
        close(layer(x, mask=keep)[..., there], wanted[..., there])


@pytest.mark.parametrize("fused", [False, True])
def test_cross_covariance_is_timms_xca(fused):
    layer, x = scrambled(Mixer("window(1) | box | cross_covariance(2)", 6)), torch.randn(2, 6, 3, 5)
    theirs = timm("models.xcit").XCA(6, 2, qkv_bias=True)
    theirs.fused_attn = fused
    named = dict(theirs.named_parameters())

    def truth(x):
        own = dict(layer.named_parameters())
        given = {
            "qkv.weight": torch.cat([own[f"{name}_weight"] for name in ("query", "key", "value")]),
            "qkv.bias": torch.cat([own[f"{name}_bias"] for name in ("query", "key", "value")]),
            "proj.weight": own["out_weight"],
            "proj.bias": own["out_bias"],
            "temperature": own["temperature"].view(2, 1, 1),
        }
        assert given.keys() == named.keys()
        y = torch.func.functional_call(theirs, given, (x.flatten(2).mT,))
        return y.mT.unflatten(2, x.shape[2:])

    agree(layer, x.requires_grad_(), truth)


def test_a_mask_of_the_keys_takes_positions_out_of_the_covariance():
    layer, x = scrambled(Mixer("window(1) | box | cross_covariance(2)", 6, ndim=1)), torch.randn(2, 6, 7)
    keep = torch.arange(7) < torch.tensor([[4], [4]])
    for backend in BACKENDS:
        layer.backend = backend
        close(layer(x, mask=keep)[..., :4], layer(x[..., :4]))


def test_the_temporal_shift_is_the_papers_code():
    """An eighth of the channels from the next frame, an eighth from the one before."""
    layer, x = Mixer("tsm", 17, ndim=1), torch.randn(2, 17, 6)

    def truth(x):
        y = torch.zeros_like(x)
        y[:, :2, :-1] = x[:, :2, 1:]
        y[:, 2:4, 1:] = x[:, 2:4, :-1]
        y[:, 4:] = x[:, 4:]
        return y

    agree(layer, x.requires_grad_(), truth)


@pytest.mark.parametrize(("size", "axis"), [("(1, 5)", 3), ("(5, 1)", 2)])
@pytest.mark.parametrize("channels", [5, 7, 12])
def test_the_axial_shift_is_the_papers_code(size, axis, channels):
    """The map padded by zeros, chunks of the channels rolled by -2 to 2, and cut out again."""
    layer, x = Mixer(f"window({size}) | box | channel_shift", channels), torch.randn(2, channels, 6, 7)

    def truth(x):
        chunks = F.pad(x, (2, 2, 2, 2)).chunk(5, 1)
        rolled = [torch.roll(chunk, way, axis) for chunk, way in zip(chunks, range(-2, 3), strict=False)]
        return torch.cat(rolled, 1)[:, :, 2:-2, 2:-2]

    agree(layer, x.requires_grad_(), truth)


def test_shares_of_both_axes_are_four_directions():
    """As S2-MLP shifts, but for zeros at the border: down, up, right, left, a quarter of the channels each."""
    layer, x = Mixer("window(3) | box | channel_shift(share=0.25)", 8), torch.randn(2, 8, 4, 5)

    def truth(x):
        y = torch.zeros_like(x)
        y[:, :2, :-1] = x[:, :2, 1:]
        y[:, 2:4, 1:] = x[:, 2:4, :-1]
        y[:, 4:6, :, :-1] = x[:, 4:6, :, 1:]
        y[:, 6:, :, 1:] = x[:, 6:, :, :-1]
        return y

    agree(layer, x.requires_grad_(), truth)
    with pytest.raises(ValueError, match="at most 1 / 4"):
        Mixer("window(3) | box | channel_shift(share=0.3)", 8)


@pytest.mark.parametrize("grid", [(11,), (9, 7), (4, 5, 3)])
def test_agents_ask_and_are_asked(grid):
    """softmax(Q A^T) (softmax(A K^T) V), the agents pooled from the queries as the public code does."""
    layer, x = scrambled(Mixer("all | row | agent(3, heads=2)", 6, ndim=len(grid))), torch.randn(2, 6, *grid)

    def truth(x):
        q, k, v = project(layer, x)
        a = ADAPTIVE[len(grid)](q.mT.flatten(1, 2).unflatten(2, grid), 3).flatten(2).unflatten(1, (2, 3)).mT
        heard = torch.softmax(a @ k.mT * 3**-0.5, -1) @ v
        return out(layer, x, (torch.softmax(q @ a.mT * 3**-0.5, -1) @ heard).transpose(1, 2).flatten(2))

    agree(layer, x.requires_grad_(), truth)


def test_agents_are_the_means_of_what_is_there():
    layer, x = scrambled(Mixer("all | row | agent(2, heads=2)", 4, ndim=1)), torch.randn(1, 4, 8)
    keep = torch.tensor([[1, 0, 1, 0, 0, 1, 1, 1]]).bool()
    q, k, v = (t[:, :, keep[0]] for t in project(layer, x))
    a = torch.stack([q[:, :, :2].mean(2), q[:, :, 2:].mean(2)], 2)
    heard = torch.softmax(a @ k.mT * 2**-0.5, -1) @ v
    y = (torch.softmax(q @ a.mT * 2**-0.5, -1) @ heard).transpose(1, 2).flatten(2)
    wanted = F.linear(y, layer.out_weight, layer.out_bias).mT
    for backend in BACKENDS:
        layer.backend = backend
        close(layer(x, mask=keep)[..., keep[0]], wanted)


UP = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def wide(layer, channels, groups):
    """The kernel as torch has it: (in, out / groups, *slots), not (out, in / groups, *slots)."""
    parts = [part.transpose(0, 1) for part in layer.get_parameter("weight").chunk(groups)]
    return torch.cat(parts)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("transposed(2, up=2)", {"stride": 2}),
        ("transposed(3, up=2)", {"stride": 2, "padding": 1, "output_padding": 1}),
        ("transposed(4, up=2)", {"stride": 2, "padding": 1}),
        ("transposed(2, up=3)", {"stride": 3, "output_padding": 1}),
        ("transposed(5, up=3, padding=0)", {"stride": 3}),
        ("transposed(3, up=2, dilation=2, padding=1)", {"stride": 2, "padding": 1, "dilation": 2}),
    ],
)
def test_transposed_convolution_is_torchs(text, given, ndim):
    layer = scrambled(Mixer(f"{text} | box | kernel(groups=2)", 4, 6, ndim=ndim))
    x = torch.randn(2, 4, *(4, 3, 2)[:ndim], requires_grad=True)
    agree(layer, x, lambda x: UP[ndim](x, wide(layer, 4, 2), layer.bias, groups=2, **given))


def test_transposed_at_step_one_cuts_before():
    """Where torch's function has no name for one more at the end than at the start."""
    layer, x = scrambled(Mixer("transposed(2) | box | depthwise", 3, ndim=1)), torch.randn(2, 3, 5, requires_grad=True)
    agree(layer, x, lambda x: F.conv_transpose1d(x, layer.weight, layer.bias, groups=3)[..., 1:])


def test_transposed_axes_and_no_output():
    layer = scrambled(Mixer("transposed((3, 2), up=(1, 2), padding=(0, 1)) | box | kernel", 2, 3))
    x = torch.randn(1, 2, 4, 3, requires_grad=True)
    agree(layer, x, lambda x: F.conv_transpose2d(x, wide(layer, 2, 1), layer.bias, (1, 2), (0, 1)))
    with pytest.raises(ValueError, match="padding leaves no output"):
        Mixer("transposed(2, padding=3) | box | kernel", 2)(torch.ones(1, 2, 4, 4))
