"""Convolution is exactly torch's, from `window` and from `nearest`.

Everything in float64, outputs and gradients within 1e-12 (absolute) of the reference.
Shape legend: B batch, C channels, O output channels, H heads, d channels of a head, N positions, S slots.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.equivalence import BACKENDS, agree, set_
from torch import nn

from nearfold.nn import Mixer

pytestmark = pytest.mark.usefixtures("float64")

# --- convolution, from `window`

CONV2D = [
    # notation of the path and kernel, arguments of nn.Conv2d
    ("window(3) | box | kernel", {"kernel_size": 3, "padding": 1}),
    ("window(1) | box | kernel", {"kernel_size": 1}),
    ("window(3, stride=2) | box | kernel", {"kernel_size": 3, "padding": 1, "stride": 2}),
    (
        "window(3, stride=3) | box | kernel(groups=2)",
        {"kernel_size": 3, "padding": 1, "stride": 3, "groups": 2},
    ),
    ("window(3, dilation=2) | box | kernel", {"kernel_size": 3, "padding": 2, "dilation": 2}),
    (
        "window((3, 5), stride=(2, 1), dilation=(1, 2)) | box | kernel(groups=2)",
        {"kernel_size": (3, 5), "stride": (2, 1), "dilation": (1, 2), "padding": (1, 4), "groups": 2},
    ),
    ("window(3, padding=0) | box | kernel", {"kernel_size": 3}),
    ("window(3, padding=2, stride=2) | box | kernel", {"kernel_size": 3, "padding": 2, "stride": 2}),
    ("window((2, 3), padding=(1, 0)) | box | kernel", {"kernel_size": (2, 3), "padding": (1, 0)}),
    ("window(2) | box | kernel", {"kernel_size": 2, "padding": "same"}),
    ("window(4, dilation=3) | box | kernel", {"kernel_size": 4, "dilation": 3, "padding": "same"}),
    ("window((5, 2)) | box | kernel(groups=2)", {"kernel_size": (5, 2), "padding": "same", "groups": 2}),
    ("window(3, mode=reflect) | box | kernel", {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}),
    (
        "window(5, stride=2, dilation=2, mode=reflect) | box | kernel",
        {"kernel_size": 5, "padding": 4, "dilation": 2, "stride": 2, "padding_mode": "reflect"},
    ),
    (
        "window(3, padding=(3, 0), mode=reflect) | box | kernel",
        {"kernel_size": 3, "padding": (3, 0), "padding_mode": "reflect"},
    ),
    ("window(3) | box | depthwise", {"kernel_size": 3, "padding": 1, "groups": 4}),
    (
        "window(5, stride=2, dilation=2) | box | depthwise",
        {"kernel_size": 5, "padding": 4, "dilation": 2, "stride": 2, "groups": 4},
    ),
    ("window(4) | box | depthwise", {"kernel_size": 4, "padding": "same", "groups": 4}),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("notation", "arguments"), CONV2D, ids=[notation for notation, _ in CONV2D])
def test_window_is_conv2d(notation, arguments, bias, backend):
    out = 4 if "depthwise" in notation else 6
    theirs = nn.Conv2d(4, out, bias=bias, **arguments)
    ours = Mixer(notation, 4, out, bias=bias, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    for grid in ((7, 9), (8, 5)):
        ours.zero_grad(), theirs.zero_grad()
        pairs = [(ours.weight, lambda: theirs.weight.grad)]
        if bias:
            pairs.append((ours.bias, lambda: theirs.bias.grad))
        agree(ours, theirs, torch.randn(2, 4, *grid), pairs)


@pytest.mark.parametrize(
    ("notation", "arguments"),
    [
        ("window(3) | box | kernel", {"kernel_size": 3, "padding": 1}),
        (
            "window(5, stride=3, dilation=2) | box | kernel",
            {"kernel_size": 5, "padding": 4, "dilation": 2, "stride": 3},
        ),
        ("window(4) | box | kernel(groups=2)", {"kernel_size": 4, "padding": "same", "groups": 2}),
        ("window(3, padding=0) | box | kernel", {"kernel_size": 3}),
        (
            "window(7, mode=reflect) | box | depthwise",
            {"kernel_size": 7, "padding": 3, "padding_mode": "reflect", "groups": 4},
        ),
    ],
)
def test_window_is_conv1d(notation, arguments):
    out = 4 if "depthwise" in notation else 6
    theirs = nn.Conv1d(4, out, **arguments)
    ours = Mixer(notation, 4, out, ndim=1)
    ours.load_state_dict(theirs.state_dict())
    pairs = [(ours.weight, lambda: theirs.weight.grad), (ours.bias, lambda: theirs.bias.grad)]
    agree(ours, theirs, torch.randn(3, 4, 17), pairs)


def test_window_is_conv3d():
    theirs = nn.Conv3d(2, 3, (3, 2, 1), padding="same")
    ours = Mixer("window((3, 2, 1)) | box | kernel", 2, 3, ndim=3)
    ours.load_state_dict(theirs.state_dict())
    agree(ours, theirs, torch.randn(2, 2, 3, 4, 5), [(ours.weight, lambda: theirs.weight.grad)])


@pytest.mark.parametrize(("size", "dilation", "stride"), [(3, 1, 1), (3, 2, 2), (4, 3, 1)])
def test_causal_window_is_conv1d_padded_on_the_left(size, dilation, stride):
    theirs = nn.Conv1d(3, 5, size, dilation=dilation, stride=stride)
    ours = Mixer(f"window({size}, dilation={dilation}, stride={stride}) | causal | kernel", 3, 5, ndim=1)
    ours.load_state_dict(theirs.state_dict())

    def reference(x):
        return theirs(F.pad(x, (dilation * (size - 1), 0)))

    agree(ours, reference, torch.randn(2, 3, 13), [(ours.weight, lambda: theirs.weight.grad)])


@pytest.mark.parametrize("dilation", [1, 2])
def test_separable_is_depthwise_then_pointwise(dilation):
    depthwise = nn.Conv2d(4, 4, 3, padding=dilation, dilation=dilation, groups=4, bias=False)
    pointwise = nn.Conv2d(4, 6, 1, groups=2)
    ours = Mixer(f"window(3, dilation={dilation}) | box | separable(groups=2)", 4, 6)
    set_(ours.weight, depthwise.weight)
    set_(ours.pointwise_weight, pointwise.weight)
    set_(ours.bias, pointwise.bias)
    pairs = [
        (ours.weight, lambda: depthwise.weight.grad),
        (ours.pointwise_weight, lambda: pointwise.weight.grad),
        (ours.bias, lambda: pointwise.bias.grad),
    ]
    agree(ours, lambda x: pointwise(depthwise(x)), torch.randn(2, 4, 5, 6), pairs)


def test_without_padding_it_is_the_inside():
    same = Mixer("window((3, 5)) | box | kernel", 3, 4)
    inside = Mixer("window((3, 5), padding=0) | box | kernel", 3, 4)
    inside.load_state_dict(same.state_dict())
    agree(inside, lambda x: same(x)[:, :, 1:-1, 2:-2], torch.randn(2, 3, 6, 9))


@pytest.mark.parametrize("grid", [(1, 1), (2, 1), (3, 2)])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_a_window_larger_than_the_map(grid, mode):
    ours = Mixer(f"window(7, mode={mode}) | box | kernel", 2, 3)

    def reference(x):
        if mode == "reflect":  # by mirroring one position at a time, as often as it takes
            for axis, n in ((2, grid[0]), (3, grid[1])):
                back_and_forth = [*range(n), *range(n - 2, 0, -1)]
                x = x.index_select(
                    axis, torch.tensor([back_and_forth[i % len(back_and_forth)] for i in range(-3, n + 3)])
                )
            return F.conv2d(x, ours.weight.detach(), ours.bias.detach())
        return F.conv2d(x, ours.weight.detach(), ours.bias.detach(), padding=3)

    agree(ours, reference, torch.randn(2, 2, *grid))


# --- convolution, from `nearest`

NEAREST = [
    # notation of position, kernel size, dilation
    ("position", 3, 1),
    ("position(chebyshev)", 3, 1),
    ("position(chebyshev)", 5, 1),
    ("position(chebyshev, dilation=2)", 3, 2),
    ("position(dilation=3)", 3, 3),
    ("position(chebyshev, dilation=2)", 5, 2),
    ("blend(0)", 3, 1),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kernel", "groups"), [("kernel", 1), ("kernel(groups=2)", 2), ("depthwise", 4)])
@pytest.mark.parametrize("stride", [1, (2, 3)])
@pytest.mark.parametrize(("similarity", "size", "dilation"), NEAREST)
def test_nearest_in_space_is_conv2d(similarity, size, dilation, stride, kernel, groups, backend):
    padding, out = (size - 1) // 2 * dilation, 4 if kernel == "depthwise" else 6
    theirs = nn.Conv2d(4, out, size, stride, padding, dilation, groups)
    spelled = f"nearest({size**2}, {similarity}, padding={padding}, stride={stride}) | box | {kernel}"
    ours = Mixer(spelled, 4, out, backend=backend)
    set_(ours.weight, theirs.weight.flatten(2))
    set_(ours.bias, theirs.bias)
    pairs = [(ours.weight, lambda: theirs.weight.grad.flatten(2)), (ours.bias, lambda: theirs.bias.grad)]
    agree(ours, theirs, torch.randn(2, 4, 5, 7), pairs)


@pytest.mark.parametrize(("size", "dilation", "stride"), [(3, 1, 1), (5, 1, 2), (7, 1, 1), (3, 4, 1), (5, 2, 3)])
def test_nearest_in_space_is_conv1d(size, dilation, stride):
    padding = (size - 1) // 2 * dilation
    theirs = nn.Conv1d(3, 5, size, stride, padding, dilation)
    spelled = f"nearest({size}, position(dilation={dilation}), padding={padding}, stride={stride}) | box | kernel"
    ours = Mixer(spelled, 3, 5, ndim=1)
    ours.load_state_dict(theirs.state_dict())  # in one dimension even the shapes are the same
    agree(ours, theirs, torch.randn(2, 3, 11), [(ours.weight, lambda: theirs.weight.grad)])


def test_nearest_in_space_is_conv3d():
    theirs = nn.Conv3d(2, 3, 3, padding=1)
    ours = Mixer("nearest(27, position(chebyshev), padding=1) | box | kernel", 2, 3, ndim=3)
    set_(ours.weight, theirs.weight.flatten(2))
    set_(ours.bias, theirs.bias)
    agree(ours, theirs, torch.randn(1, 2, 3, 4, 3), [(ours.weight, lambda: theirs.weight.grad.flatten(2))])


@pytest.mark.parametrize(("similarity", "size"), [("position", 3), ("position(chebyshev)", 5)])
def test_nearest_in_space_is_conv2d_on_a_larger_map_in_float32(similarity, size):
    """Distances are compared exactly: one rounding in the coordinates would break ties the wrong way."""
    theirs = nn.Conv2d(2, 3, size, padding=size // 2).float()
    ours = Mixer(f"nearest({size**2}, {similarity}, padding={size // 2}) | box | kernel", 2, 3).float()
    set_(ours.weight, theirs.weight.flatten(2))
    set_(ours.bias, theirs.bias)
    x = torch.randn(1, 2, 37, 29, dtype=torch.float32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-5)
