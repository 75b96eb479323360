"""Bad arguments and inputs of layers: a ValueError with the argument, the value and the way out."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.layers import every_layer

from nearfold.grammar.words import Grid
from nearfold.nn import (
    ACmix2d,
    BranchingAttention,
    BranchingConv2d,
    ConvNN1d,
    ConvNN2d,
    ConvNNAttention,
    KVTAttention,
    Mixer,
    TokenMixer,
)

pytestmark = pytest.mark.usefixtures("seeded")

CONV = "window(3) | box | kernel"
BAD_ARGUMENTS = [
    (lambda: ConvNN2d(0, 6), "in_channels must be a positive integer, got 0"),
    (lambda: ConvNN2d(4, -1), "out_channels must be a positive integer, got -1"),
    (lambda: ConvNN2d(4, 6.0), "out_channels must be a positive integer, got 6.0"),
    (lambda: ConvNN2d(4, 6, k=0), "k must be a positive integer, got k=0"),
    (lambda: ConvNN2d(4, 6, k=2.5), "k must be a positive integer, got k=2.5"),
    (lambda: ConvNN2d(4, 6, stride=0), "got stride=0"),
    (lambda: ConvNN2d(4, 6, padding=-1), "got padding=-1"),
    (
        lambda: ConvNN2d(4, 6, similarity="cosin"),
        "'cosin' is not a similarity (did you mean cosine?); choose from: dot",
    ),
    (lambda: ConvNN2d(4, 6, similarity="cosine(3)"), "cosine takes no such argument: '3'"),
    (lambda: ConvNN2d(4, 6, similarity=0.5), "similarity must be notation or a word, got 0.5"),
    (lambda: ConvNN2d(4, 6, similarity=Grid(3)), "similarity must be one of dot"),
    (lambda: ConvNN2d(4, 6, candidates="random(0)"), "r must be a positive integer, got r=0"),
    (
        lambda: ConvNN2d(4, 6, candidates="some"),
        "'some' is not a candidates; choose from: all, random, grid, window",
    ),
    (lambda: Mixer("nearest(9) | ranked | softmx", 4, 6), "'softmx' is not a rho or kernel"),
    (lambda: Mixer("nearest(9) | ranked | dense", 4, 6), "'dense' is not a rho or kernel"),
    (lambda: ConvNN2d(4, 6, groups=3), "groups=3 must divide the 4 value channels"),
    (lambda: Mixer("nearest(9) | ranked | depthwise", 4, 6), "makes 4 channels, but out_channels=6"),
    (lambda: Mixer("nearest(9) | row | kernel", 4, 6), "shape row does not go with path nearest"),
    (lambda: ConvNN2d(4, 6, shuffle="B"), "shuffle must be one of none, before, after, both, got 'B'"),
    (
        lambda: ConvNN2d(4, 6, shuffle="both", shuffle_scale=0),
        "shuffle_scale must be a positive integer, got 0",
    ),
    (lambda: ConvNNAttention(12, 5), "heads=5 must divide the 12"),
    (lambda: ConvNNAttention(12, 0), "heads must be a positive integer, got heads=0"),
    (
        lambda: ConvNNAttention(12, 3, rho="softmax(heads=3)"),
        "rho must be one of softmax, identity, inverse, mean, ones, got",
    ),
    (lambda: ConvNNAttention(0, 3), "in_channels must be a positive integer, got 0"),
    (lambda: KVTAttention(12, 3, k=0), "k must be a positive integer, got k=0"),
    (lambda: KVTAttention(12, 7), "heads=7 must divide the 12"),
    (
        lambda: BranchingConv2d(4, 6, ratio=1.5),
        "ratio must be between 0 (all second) and 1 (all first), got 1.5",
    ),
    (lambda: BranchingConv2d(4, 6, ratio="half"), "ratio must be a number, got 'half'"),
    (lambda: BranchingConv2d(4, 6, kernel_size=0), "got size=0"),
    (lambda: BranchingConv2d(4, 6, groups=4), "groups=4 must divide the 3 out_channels"),
    (lambda: BranchingAttention(12, 4), "heads=4 must divide the 6"),
    (lambda: BranchingAttention(12, 3, ratio=-0.1), "ratio must be between"),
    (lambda: ACmix2d(4, 6, num_heads=4), "heads=4 must divide the 6"),
    (
        lambda: ACmix2d(4, 8, attention_kernel=(3, 3, 3)),
        "size=(3, 3, 3) has 3 entries, but the input has 2 grid axes",
    ),
    (lambda: ACmix2d(4, 8, dilation=0), "got dilation=0"),
    (lambda: Mixer(CONV, 4, ndim=0), "ndim must be a positive integer, got 0"),
    (
        lambda: Mixer("window((3, 3)) | box | kernel", 4, ndim=1),
        "size=(3, 3) has 2 entries, but the input has 1 grid axes",
    ),
    (lambda: Mixer(3, 4), "operation must be an Operation or its notation, got 3"),
    (lambda: Mixer("windw(3) | box | kernel", 4), "'windw' is not a path"),
    (lambda: Mixer("window(3) | box | softmax(heads=3)", 4), "heads=3 must divide the 4"),
    (lambda: TokenMixer("window(3) | box | softmax(heads=4)", 6), "heads=4 must divide the 6"),
]


@pytest.mark.parametrize(("make", "fragment"), BAD_ARGUMENTS, ids=[f[:50] for _, f in BAD_ARGUMENTS])
def test_bad_arguments(make, fragment):
    with pytest.raises(ValueError, match=re.escape(fragment)):
        make()


@every_layer
def test_bad_inputs(make, shape):
    layer, size = make(), shape()
    channels = 2 if isinstance(layer, TokenMixer) else 1
    wrong_channels = [*size]
    wrong_channels[channels] += 1
    for bad in (
        torch.randn(wrong_channels),
        torch.randn(size)[0],
        torch.randn(*size, 1),
        torch.randn(size).flatten(),
    ):
        with pytest.raises(ValueError, match=rf"x must be \(B, .*{layer.in_channels}.*got shape") as caught:
            layer(bad)
        assert str(tuple(bad.shape)) in str(caught.value)
    for dtype in (torch.int64, torch.bool, torch.uint8):
        with pytest.raises(ValueError, match=rf"x must be floating point, got {dtype}; convert it with x.float\(\)"):
            layer(torch.ones(size, dtype=dtype))
    nowhere = [*size]
    nowhere[1 if channels == 2 else 2] = 0
    with pytest.raises(ValueError, match="x must have channels and positions"):
        layer(torch.randn(nowhere))


def test_an_image_that_does_not_divide_is_refused_before_it_is_shuffled():
    with pytest.raises(ValueError, match=r"divisible by shuffle_scale=2, got \(5, 6\); pad the input first"):
        ConvNN2d(4, 6, shuffle="before")(torch.randn(1, 4, 5, 6))
    with pytest.raises(ValueError, match=r"divisible by shuffle_scale=2, got \(9,\)"):
        ConvNN1d(4, 6, shuffle="both")(torch.randn(1, 4, 9))
    for layer, x in (
        (ConvNN2d(4, 6, shuffle="before"), torch.randn(1, 3, 4, 4)),
        (ConvNN2d(4, 6), torch.randn(4, 4)),
    ):
        with pytest.raises(ValueError, match=r"x must be \(B, 4, H, W\)"):
            layer(x)


def test_a_backend_asked_for_never_falls_back():
    x = torch.randn(1, 4, 5, 6)
    with pytest.raises(
        ValueError, match=r"backend='conv' cannot run nearest.*path is nearest, not window.*knn, oracle"
    ):
        ConvNN2d(4, 6, backend="conv")(x)
    with pytest.raises(ValueError, match=r"backend='fast' is not one of: auto, conv, transposed, block, sdpa"):
        ConvNN2d(4, 6, backend="fast")(x)


def test_a_window_that_does_not_fit_is_explained():
    with pytest.raises(
        ValueError, match=r"window of size 3 with dilation 1 does not fit into 2 positions.*padding=same"
    ):
        Mixer("window(3, padding=0) | box | kernel", 4)(torch.randn(1, 4, 5, 2))


def test_terms_of_a_sum_must_have_one_size():
    layer = Mixer(f"({CONV}) + (window(3, stride=2) | box | kernel)", 4)
    with pytest.raises(ValueError, match=r"one output grid, got \(5, 6\) and \(3, 3\)"):
        layer(torch.randn(1, 4, 5, 6))


def test_convnn_groups_are_conv2ds():
    layer = ConvNN2d(8, 12, k=5, groups=4).double()
    assert layer.weight.shape == (12, 2, 5)
    x = torch.randn(2, 8, 5, 4, dtype=torch.float64)
    pieces = []
    for g in range(4):  # the neighbours come from all channels, the kernel reads its own
        zeros = torch.zeros(12, 8, 5, dtype=torch.float64)
        zeros[3 * g : 3 * g + 3, 2 * g : 2 * g + 2] = layer.weight.detach()[3 * g : 3 * g + 3]
        dense = ConvNN2d(8, 12, k=5).double()
        dense.load_state_dict({"weight": zeros, "bias": layer.bias.detach()})
        pieces.append(dense(x)[:, 3 * g : 3 * g + 3])
    torch.testing.assert_close(layer(x), torch.cat(pieces, 1), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="groups=3 must divide"):
        ConvNN2d(8, 8, groups=3)
