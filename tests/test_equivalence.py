"""The ends of the spectrum are exactly what they claim: torch's own layers, and formulas written out here.

Everything in float64, outputs and gradients within 1e-12 (absolute) of the reference.
Shape legend: B batch, C channels, O output channels, H heads, d channels of a head, N positions, S slots.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

BOUND = 1e-12


@pytest.fixture(autouse=True)
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def close(mine: Tensor, truth: Tensor, what: str) -> None:
    assert mine.shape == truth.shape, f"{what}: {tuple(mine.shape)} instead of {tuple(truth.shape)}"
    assert mine.dtype == truth.dtype == torch.float64
    off = (mine - truth).abs().max().item() if mine.numel() else 0.0
    assert off <= BOUND, f"{what} is off by {off:.1e}"


def agree(layer, reference, x: Tensor, pairs=()) -> Tensor:
    """Outputs, gradients at x, and the gradients of (our parameter, theirs as a function of its gradient)."""
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, truth = layer(x1), reference(x2)
    close(y, truth, "output")
    gy = torch.randn_like(truth)
    y.backward(gy)
    truth.backward(gy)
    close(x1.grad, x2.grad, "gradient at x")
    assert x1.grad.abs().max() > 0
    for mine, theirs in pairs:
        close(mine.grad, theirs(), f"gradient of a parameter {tuple(mine.shape)}")
    return y


def set_(parameter: Tensor, value: Tensor) -> None:
    assert parameter.shape == value.shape
    with torch.no_grad():
        parameter.copy_(value)


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
BACKENDS = ["auto", "oracle"]


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


# --- attention

LETTERS = ("query", "key", "value")


def attention_pair(ours, dim: int, heads: int, bias: bool) -> tuple[nn.MultiheadAttention, list]:
    """nn.MultiheadAttention with our weights, and the pairs of gradients."""
    theirs = nn.MultiheadAttention(dim, heads, bias=bias, batch_first=True)
    pairs = []
    parts = zip(LETTERS, theirs.in_proj_weight.chunk(3), strict=True)
    for i, (letter, weight) in enumerate(parts):
        set_(getattr(ours, f"{letter}_weight"), weight)
        pairs.append((getattr(ours, f"{letter}_weight"), lambda i=i: theirs.in_proj_weight.grad.chunk(3)[i]))
    set_(ours.out_weight, theirs.out_proj.weight)
    pairs.append((ours.out_weight, lambda: theirs.out_proj.weight.grad))
    if bias:
        with torch.no_grad():  # they start at zero
            theirs.in_proj_bias.normal_()
            theirs.out_proj.bias.normal_()
        for i, (letter, part) in enumerate(zip(LETTERS, theirs.in_proj_bias.chunk(3), strict=True)):
            set_(getattr(ours, f"{letter}_bias"), part)
            pairs.append((getattr(ours, f"{letter}_bias"), lambda i=i: theirs.in_proj_bias.grad.chunk(3)[i]))
        set_(ours.out_bias, theirs.out_proj.bias)
        pairs.append((ours.out_bias, lambda: theirs.out_proj.bias.grad))
    return theirs, pairs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("heads", [1, 3, 6])
@pytest.mark.parametrize(
    "notation",
    [
        "all | row | softmax(heads={heads})",
        "nearest({n}, scaled) | ranked | softmax(heads={heads})",
        "nearest({n}, scaled) | ranked | softmax(heads={heads})*depthwise",
        "nearest({n}, scaled) | box | softmax(heads={heads})*depthwise",
        "nearest(100, scaled) | ranked | softmax(heads={heads})*depthwise",  # more than there are
        "nearest({n}, scaled, self) | ranked | softmax(heads={heads})",
    ],
)
def test_attention_is_multihead_attention(notation, heads, bias, backend):
    n = 11
    ours = TokenMixer(notation.format(n=n, heads=heads), 12, bias=bias, backend=backend)
    if "depthwise" in notation:
        assert bool((ours.weight == 1).all()), "the kernel starts as ones: exactly attention"
    theirs, pairs = attention_pair(ours, 12, heads, bias)
    agree(ours, lambda x: theirs(x, x, x, need_weights=False)[0], torch.randn(2, n, 12), pairs)


def projected(ours, x: Tensor, heads: int) -> list[Tensor]:
    """Query, key and value (B, H, N, d) of tokens (B, N, D)."""
    weights = [(getattr(ours, f"{c}_weight"), getattr(ours, f"{c}_bias")) for c in LETTERS]
    return [F.linear(x, w, b).unflatten(2, (heads, -1)).transpose(1, 2) for w, b in weights]


def joined(ours, y_BHNd: Tensor) -> Tensor:
    return F.linear(y_BHNd.transpose(1, 2).flatten(2), ours.out_weight, ours.out_bias)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", ["all | causal | softmax(heads=3)", "nearest(9, scaled) | causal | softmax(heads=3)"])
def test_causal_attention(path, backend):
    ours = TokenMixer(path, 12, backend=backend)
    x = torch.randn(2, 9, 12)

    def reference(x):
        return joined(ours, F.scaled_dot_product_attention(*projected(ours, x, 3), is_causal=True))

    y = agree(ours, reference, x)
    later = x.clone()
    later[:, 5:] += 1
    close(ours(later)[:, :5], y[:, :5], "outputs before a change")


def test_strided_attention_reads_a_class_of_positions():
    ours = TokenMixer("all | strided(3) | softmax(heads=2)", 8)
    at = torch.arange(10)

    def reference(x):
        mask = (at[:, None] - at[None, :]) % 3 == 0
        return joined(ours, F.scaled_dot_product_attention(*projected(ours, x, 2), attn_mask=mask))

    agree(ours, reference, torch.randn(2, 10, 8))


def test_local_attention_is_a_banded_mask():
    ours = Mixer("window(5) | box | softmax(heads=2)", 8, ndim=1)
    at = torch.arange(13)
    band = (at[:, None] - at[None, :]).abs() <= 2

    def reference(x):
        q, k, v = projected(ours, x.transpose(1, 2), 2)
        return joined(ours, F.scaled_dot_product_attention(q, k, v, attn_mask=band)).transpose(1, 2)

    agree(ours, reference, torch.randn(2, 8, 13))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("k", "heads"), [(1, 1), (4, 3), (10, 2), (50, 3)])
def test_kvt_is_attention_masked_to_the_best_keys(k, heads, backend):
    ours = KVTAttention(12, heads, k, backend=backend)

    def reference(x):
        q, key, v = projected(ours, x, heads)
        score = q @ key.transpose(2, 3) / math.sqrt(12 // heads)
        smallest_kept = score.sort(-1, descending=True).values[..., : min(k, x.shape[1])][..., -1:]
        return joined(ours, torch.softmax(score.masked_fill(score < smallest_kept, float("-inf")), -1) @ v)

    agree(ours, reference, torch.randn(2, 11, 12))


def test_convnn_attention_starts_as_kvt():
    kvt, convnn = KVTAttention(12, 3, 5), ConvNNAttention(12, 3, 5)
    missing = convnn.load_state_dict(kvt.state_dict(), strict=False)
    assert missing.missing_keys == ["weight"] and not missing.unexpected_keys
    pairs = [(p, lambda n=n: kvt.get_parameter(n).grad) for n, p in convnn.named_parameters() if n != "weight"]
    agree(convnn, kvt, torch.randn(2, 11, 12), pairs)


def test_convnn_attention_weights_ranks():
    """The kernel multiplies the j-th best neighbour by its own weight, per channel."""
    ours = ConvNNAttention(12, 3, 5)
    with torch.no_grad():
        ours.weight.normal_()

    def reference(x):
        q, key, v = projected(ours, x, 3)
        score, index = (q @ key.transpose(2, 3) / 2).sort(-1, descending=True)
        alpha, index = torch.softmax(score[..., :5], -1), index[..., :5]
        near = torch.take_along_dim(v.unsqueeze(2), index.unsqueeze(-1), 3)  # (B, H, N, S, d)
        weight = ours.weight[:, 0].unflatten(0, (3, 4))  # (H, d, S)
        return joined(ours, torch.einsum("bhns,bhnsd,hds->bhnd", alpha, near, weight))

    agree(ours, reference, torch.randn(2, 11, 12))


# --- ConvNN


@pytest.mark.parametrize("stride", [1, (2, 3)])
def test_convnn_is_a_strided_conv_over_sorted_neighbours(stride):
    """The published formulation: k columns for every position, then a 1-D convolution of stride k."""
    ours = ConvNN2d(4, 6, k=5, stride=stride)

    def reference(x):
        flat = x.flatten(2)
        unit = F.normalize(flat, dim=1)
        similarity = unit.transpose(1, 2) @ unit
        similarity.diagonal(dim1=1, dim2=2).fill_(2)  # the position itself comes first
        index = similarity.sort(-1, descending=True).indices[..., :5]
        columns = flat.gather(2, index.flatten(1)[:, None].expand(-1, 4, -1))
        y = F.conv1d(columns, ours.weight, ours.bias, stride=5).unflatten(2, x.shape[2:])
        row, column = (stride, stride) if isinstance(stride, int) else stride
        return y[:, :, ::row, ::column]

    agree(ours, reference, torch.randn(2, 4, 5, 7))


@pytest.mark.parametrize("kernel", ["kernel", "depthwise", "separable"])
def test_blend_at_its_ends(kernel):
    """At lam = 0 it is position, at lam = 1 the features' own metric (their scale does not change a rank)."""
    x = torch.randn(2, 4, 6, 5)
    for blend, end in (
        ("blend(0)", "position"),
        ("blend(1)", "euclidean"),
        ("blend(1, cosine)", "cosine"),
        ("blend(1, unit)", "euclidean"),
    ):
        for rest in ("", ", self", ", padding=1", ", stride=2"):
            mine, theirs = (Mixer(f"nearest(7, {s}{rest}) | ranked | {kernel}", 4) for s in (blend, end))
            mine.load_state_dict(theirs.state_dict())
            pairs = [(mine.get_parameter(n), lambda p=p: p.grad) for n, p in theirs.named_parameters()]
            agree(mine, theirs, x, pairs)


def test_blend_between_its_ends_is_neither():
    x = torch.randn(2, 4, 6, 5)
    layers = [Mixer(f"nearest(7, blend({lam})) | ranked | kernel", 4) for lam in (0, 0.4, 1)]
    for other in layers[1:]:
        other.load_state_dict(layers[0].state_dict())
    outputs = [layer(x) for layer in layers]
    assert not torch.equal(outputs[1], outputs[0]) and not torch.equal(outputs[1], outputs[2])


# --- ACmix


def stacked(ours, x: Tensor, heads: int) -> Tensor:
    """Query, key and value maps, (B, 3 * heads, d, rows, columns)."""
    weights = [(getattr(ours, f"{c}_weight"), getattr(ours, f"{c}_bias")) for c in LETTERS]
    maps = [F.conv2d(x, w[..., None, None], b).unflatten(1, (heads, -1)) for w, b in weights]
    return torch.cat(maps, 1)


def shift_and_sum(maps_BtdRC: Tensor, size: int, stride: int) -> Tensor:
    """Map t moved by the offset of slot t, all added: (B, d, rows, columns)."""
    rows, columns = maps_BtdRC.shape[-2:]
    reach = size // 2
    padded = F.pad(maps_BtdRC, [reach] * 4)
    total = 0
    for t in range(size**2):
        i, j = divmod(t, size)
        total = total + padded[:, t, :, i : i + rows, j : j + columns]
    return total[..., ::stride, ::stride]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("size", "stride", "heads"), [(3, 1, 2), (3, 2, 4), (5, 1, 1), (1, 1, 2)])
def test_acmix_convolution_is_pointwise_maps_shifted_and_summed(size, stride, heads, backend):
    ours = Mixer(f"window({size}, stride={stride}) | box | shift({heads})", 6, 8, backend=backend)
    assert ours.shift_weight.shape == (8, size**2, size, size)

    def reference(x):
        maps = torch.einsum("tm,bmdrc->btdrc", ours.weight, stacked(ours, x, heads))
        y = shift_and_sum(maps, size, stride)
        return y.repeat(1, heads, 1, 1)  # as it starts, every head shifts alike

    agree(ours, reference, torch.randn(2, 6, 7, 6))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_acmix_convolution_is_one_grouped_convolution(interleaved, backend):
    heads, d, size = 2, 4, 3
    spelled = f"window(3, dilation=2) | box | shift(2{', interleaved' if interleaved else ''})"
    ours = Mixer(spelled, 6, heads * d, backend=backend)
    with torch.no_grad():
        ours.shift_weight.normal_()
    twin = {n: p.detach().clone().requires_grad_() for n, p in ours.named_parameters()}

    def reference(x):
        weights = [(twin[f"{c}_weight"], twin[f"{c}_bias"]) for c in LETTERS]
        maps = [F.conv2d(x, w[..., None, None], b).unflatten(1, (heads, d)) for w, b in weights]
        read = torch.cat(maps, 1).transpose(1, 2).flatten(1, 2)  # group by head dimension
        merged = torch.einsum("otij,tm->omij", twin["shift_weight"], twin["weight"])
        y = F.conv2d(read, merged, padding=2, dilation=2, groups=d)
        return y if interleaved else y.unflatten(1, (d, heads)).transpose(1, 2).flatten(1, 2)

    assert twin["shift_weight"].shape == (heads * d, size**2, size, size)
    pairs = [(p, lambda n=n: twin[n].grad) for n, p in ours.named_parameters()]
    agree(ours, reference, torch.randn(2, 6, 6, 7), pairs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 0)])
def test_acmix_convolution_with_a_bias_on_its_maps(stride, padding, backend):
    heads, d = 2, 4
    ours = Mixer(f"window(3, stride={stride}, padding={padding}) | box | shift(2, bias)", 6, 8, backend=backend)
    with torch.no_grad():
        ours.shift_weight.normal_()
    twin = {n: p.detach().clone().requires_grad_() for n, p in ours.named_parameters()}

    def reference(x):  # the bias is added inside the grid, and the border stays zero
        weights = [(twin[f"{c}_weight"], twin[f"{c}_bias"]) for c in LETTERS]
        maps = torch.cat([F.conv2d(x, w[..., None, None], b).unflatten(1, (heads, d)) for w, b in weights], 1)
        made = torch.einsum("tm,bmdrc->bdtrc", twin["weight"], maps) + twin["slot_bias"][:, None, None]
        y = F.conv2d(made.flatten(1, 2), twin["shift_weight"], padding=padding, stride=stride, groups=d)
        return y.unflatten(1, (d, heads)).transpose(1, 2).flatten(1, 2)

    pairs = [(p, lambda n=n: twin[n].grad) for n, p in ours.named_parameters()]
    agree(ours, reference, torch.randn(2, 6, 6, 7), pairs)


@pytest.mark.parametrize(
    ("window", "conv", "stride", "dilation"), [(7, 3, 1, 1), (3, 3, 2, 1), (5, 5, 1, 1), (3, 3, 1, 2)]
)
def test_acmix_is_its_unfolded_formulation(window, conv, stride, dilation):
    heads, d, rows, columns = 2, 4, 8, 9
    ours = ACmix2d(6, 8, window, conv, heads, stride=stride, dilation=dilation)
    with torch.no_grad():
        ours.rates.copy_(torch.tensor([0.3, -1.7]))
    twin = {n: p.detach().clone().requires_grad_() for n, p in ours.named_parameters()}
    reach = window // 2 * dilation

    def unfolded(t: Tensor) -> Tensor:  # (B*H, d, rows, columns) -> (B*H, d, S, M)
        t = F.pad(t, [reach] * 4, mode="reflect")
        return F.unfold(t, window, dilation=dilation, stride=stride).unflatten(1, (d, window**2))

    def reference(x):
        q, k, v = (
            F.conv2d(x, twin[f"{c}_weight"][..., None, None], twin[f"{c}_bias"]).unflatten(1, (heads, d)).flatten(0, 1)
            for c in LETTERS
        )
        y, x_ = torch.meshgrid(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns), indexing="ij")
        place = torch.stack([x_, y])[None]  # columns first
        p = F.conv2d(place, twin["0.position_weight"][..., None, None], twin["0.position_bias"])
        at = (..., slice(None, None, stride), slice(None, None, stride))
        q_M, p_M = q[at].flatten(2)[:, :, None] / math.sqrt(d), p[at].flatten(2)[:, :, None]
        score = (q_M * (unfolded(k) + p_M - unfolded(p))).sum(1, keepdim=True)
        out = (torch.softmax(score, 2) * unfolded(v)).sum(2)
        out = out.unflatten(0, (-1, heads)).flatten(1, 2)
        half = Mixer(f"window({conv}, stride={stride}, dilation={dilation}) | box | shift(2)", 6, 8)
        names = {n: twin.get(f"1.{n}", twin.get(n)) for n, _ in half.named_parameters()}
        convolution = torch.func.functional_call(half, names, x)
        return twin["rates"][0] * out.view_as(convolution) + twin["rates"][1] * convolution

    pairs = [(p, lambda n=n: twin[n].grad) for n, p in ours.named_parameters()]
    agree(ours, reference, torch.randn(2, 6, rows, columns), pairs)


# --- sum and branch

A, B = "nearest(5, cosine, self) | ranked | kernel", "window(3) | box | kernel"


def part(layer, name: str, notation: str, out: int, read: int | None = None, **kwargs):
    """One operand of a combinator as a layer of its own, weights shared."""
    alone = Mixer(notation, read or layer.in_channels, out, **kwargs)
    alone.load_state_dict({n.removeprefix(name): p for n, p in layer.state_dict().items() if n.startswith(name)})
    return alone


def test_a_sum_is_the_sum_of_its_terms():
    ours = Mixer(f"0.5*({A}) + b*({B}) + ({B})", 4, 6)
    assert ours.rates.shape == (1,)
    with torch.no_grad():
        ours.rates.fill_(-1.5)
    terms = [part(ours, f"{i}.", notation, 6) for i, notation in enumerate((A, B, B))]

    def reference(x):
        return 0.5 * terms[0](x) - 1.5 * terms[1](x) + terms[2](x)

    pairs = [
        (ours.get_parameter("0.weight"), lambda: terms[0].weight.grad),
        (ours.get_parameter("1.weight"), lambda: terms[1].weight.grad),
    ]
    x = torch.randn(2, 4, 5, 6)
    agree(ours, reference, x, pairs)
    assert ours.rates.grad.abs().item() > 0


@pytest.mark.parametrize("mix", [False, True])
@pytest.mark.parametrize(("ratio", "first"), [(0.0, 0), (0.3, 1), (0.5, 3), (1.0, 6)])
def test_branch_splits_the_outputs_and_both_read_all_inputs(ratio, first, mix):
    ours = Mixer(f"branch({ratio}, {A}, {B}{', mix' if mix else ''})", 4, 6)
    halves = [part(ours, f"{i}.", n, o) for i, n, o in ((0, A, first), (1, B, 6 - first)) if o]
    shapes = [tuple(half.weight.shape[:2]) for half in halves]
    assert shapes == [(o, 4) for o in (first, 6 - first) if o]
    twin = {n: p.detach().clone().requires_grad_() for n, p in ours.named_parameters() if n.startswith("mix")}

    def reference(x):
        y = torch.cat([half(x) for half in halves], 1)
        return F.conv2d(y, twin["mix_weight"][..., None, None], twin["mix_bias"]) if mix else y

    pairs = [(ours.get_parameter(n), lambda n=n: twin[n].grad) for n in twin]
    for i, half in zip([i for i, o in ((0, first), (1, 6 - first)) if o], halves, strict=True):
        pairs.append((ours.get_parameter(f"{i}.weight"), lambda half=half: half.weight.grad))
    agree(ours, reference, torch.randn(2, 4, 5, 6), pairs)


def test_branch_with_split_inputs_is_two_layers_on_two_shares():
    ours = Mixer(f"branch(0.3, {A}, {B}, split)", 5, 8)
    halves = [part(ours, f"{i}.", n, o, read) for i, n, o, read in ((0, A, 2, 1), (1, B, 6, 4))]
    pairs = [(ours.get_parameter(f"{i}.weight"), lambda half=half: half.weight.grad) for i, half in enumerate(halves)]
    agree(ours, lambda x: torch.cat([halves[0](x[:, :1]), halves[1](x[:, 1:])], 1), torch.randn(2, 5, 5, 6), pairs)
    with pytest.raises(ValueError, match="in_channels=1 leave none for an operand of branch"):
        Mixer(f"branch(0.3, {A}, {B}, split)", 1, 8)


def test_branching_layers_at_their_ends():
    x = torch.randn(2, 4, 5, 6)
    convolution, convnn = nn.Conv2d(4, 6, 3, padding=1), ConvNN2d(4, 6, k=5)
    for ratio, end, at in ((0.0, convolution, "1"), (1.0, convnn, "0")):
        ours = BranchingConv2d(4, 6, 3, 5, ratio, mix=False)
        ours.load_state_dict({f"{at}.{n}": p for n, p in end.state_dict().items()})
        agree(ours, end, x)
    tokens = torch.randn(2, 7, 12)
    ours = BranchingAttention(12, 3, 5, 0.0, mix=False)
    theirs, pairs = attention_pair(ours.get_submodule("1"), 12, 3, True)
    agree(ours, lambda t: theirs(t, t, t, need_weights=False)[0], tokens, pairs)
    near = ConvNNAttention(12, 3, 5)
    ours = BranchingAttention(12, 3, 5, 1.0, mix=False)
    ours.load_state_dict({f"0.{n}": p for n, p in near.state_dict().items()})
    agree(ours, near, tokens)


# --- ties, NaN, and maps smaller than the neighbourhood


def neighbours(notation: str, features: Tensor, backend: str) -> Tensor:
    """Which positions (B, M, S) an operation reads: features to compare, and one-hot positions as values."""
    B, C, *grid = features.shape
    n = math.prod(grid)
    x = torch.cat([features, torch.eye(n, dtype=features.dtype).view(1, n, *grid).expand(B, -1, *grid)], 1)
    layer = Mixer(notation, C + n, ndim=len(grid), bias=False, backend=backend).to(features.dtype)
    slots = layer.weight.shape[-1]
    read = []
    compare = torch.zeros(C + n, C + n).to(features.dtype)
    compare[:C, :C] = torch.eye(C)
    for s in range(slots):
        with torch.no_grad():
            layer.query_weight.copy_(compare)
            layer.key_weight.copy_(compare)
            layer.weight.zero_()
            layer.weight[..., s] = 1
        y = layer(x)[:, C:].flatten(2)  # (B, N, M): one-hot over N, or zeros where nothing is read
        read.append(torch.where(y.sum(1) > 0.5, y.argmax(1), -1))
    return torch.stack(read, -1)


def by_definition(score_BMN: Tensor, k: int) -> Tensor:
    """The k best, ties by the lowest index, one at a time."""
    found = []
    score_BMN = score_BMN.clone()
    for _ in range(k):
        best = score_BMN.max(-1, keepdim=True).values
        first = (score_BMN == best).int().argmax(-1, keepdim=True)
        found.append(torch.where(best == float("-inf"), -1, first))
        score_BMN.scatter_(-1, first, float("-inf"))
    return torch.cat(found, -1)


SCORES = {
    "dot": lambda x: x.transpose(1, 2) @ x,
    "euclidean": lambda x: -(x[:, :, :, None] - x[:, :, None]).square().sum(1),  # same order as the distance
    "euclidean(squared)": lambda x: -(x[:, :, :, None] - x[:, :, None]).square().sum(1),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("similarity", ["dot", "cosine", "scaled", "euclidean", "euclidean(squared)", "blend(1)"])
def test_constant_inputs_read_the_lowest_indices(similarity, dtype, backend):
    for value in (0.0, 1.0, -0.0):
        features = torch.full((2, 3, 4, 5), value, dtype=dtype)
        found = neighbours(f"nearest(6, {similarity}) | ranked | ones(project=qk)*depthwise", features, backend)
        assert bool((found == torch.arange(6)).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("k", [1, 4, 20, 23])
@pytest.mark.parametrize("similarity", SCORES)
def test_ties_go_to_the_lowest_index(similarity, k, dtype, backend):
    features = torch.randint(-1, 2, (3, 2, 4, 5)).to(dtype)  # integers: many exact ties
    score = SCORES[similarity](features.flatten(2))
    found = neighbours(f"nearest({k}, {similarity}) | ranked | ones(project=qk)*depthwise", features, backend)
    assert torch.equal(found, by_definition(score, k))
    raster = neighbours(f"nearest({k}, {similarity}) | box | ones(project=qk)*depthwise", features, backend)
    expected = by_definition(score, k)
    expected = expected.masked_fill(expected < 0, 99).sort(-1).values
    assert torch.equal(raster, expected.masked_fill(expected == 99, -1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["self", "self=0.5", "self=0.5, again=1", "again"])
def test_the_position_itself_is_slot_0(rule, backend):
    features = torch.randint(-1, 2, (3, 2, 4, 5)).double()
    score = SCORES["dot"](features.flatten(2))
    own = torch.eye(20, dtype=torch.bool)
    if rule == "again":
        rule, score = "self, again=-2", score.masked_fill(own, -2.0)
    else:
        score = score.masked_fill(own, 1.0 if "again" in rule else float("-inf"))
    found = neighbours(f"nearest(5, dot, {rule}) | ranked | ones(project=qk)*depthwise", features, backend)
    assert bool((found[..., 0] == torch.arange(20)).all())
    assert torch.equal(found[..., 1:], by_definition(score, 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_candidates_on_a_grid_and_in_a_window(backend):
    features = torch.randint(-1, 2, (2, 2, 5, 6)).double()
    score = SCORES["dot"](features.flatten(2))
    rows, columns = torch.meshgrid(torch.arange(5), torch.arange(6), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    on_grid = torch.isin(rows, torch.tensor([0, 2, 4])) & torch.isin(columns, torch.tensor([0, 2, 5]))
    apart = torch.maximum((rows[:, None] - rows).abs(), (columns[:, None] - columns).abs())
    inner = (rows >= 1) & (rows <= 3) & (columns >= 1) & (columns <= 4)
    for candidates, allowed in (
        ("grid(3)", on_grid.expand(30, -1)),
        ("grid(9, inset=1)", inner.expand(30, -1)),
        ("window(3)", apart <= 1),
    ):
        spelled = f"nearest(7, dot, {candidates}) | ranked | ones(project=qk)*depthwise"
        expected = by_definition(score.masked_fill(~allowed, float("-inf")), 7)
        assert torch.equal(neighbours(spelled, features, backend), expected)


NAN_LAYERS = [
    *[
        f"nearest(5, {s}{own}) | ranked | kernel"
        for s in ("cosine", "euclidean", "blend(0.5)", "dot")
        for own in ("", ", self")
    ],
    "nearest(5, blend(1, cosine)) | box | depthwise",
    "nearest(99, cosine) | ranked | kernel",
    "nearest(5, euclidean, self=-1.0) | ranked | inverse*kernel",
    "nearest(5, scaled) | ranked | softmax(heads=2)",
    "nearest(5, cosine) | ranked | softmax(heads=2)*depthwise",
    "nearest(5, dot, grid(3)) | ranked | identity*kernel",
    "nearest(5, cosine) | ranked | ones(heads=2)*kernel",
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("notation", NAN_LAYERS)
def test_nan_stays_at_its_position(notation, backend):
    layer = Mixer(notation, 4, backend=backend)
    clean = torch.randn(2, 4, 5, 6)
    x = clean.clone()
    x[0, 1, 2, 3] = float("nan")
    x[1, :, 0, 0] = float("nan")
    lost = x.isnan().any(1, keepdim=True).expand(-1, 4, -1, -1)
    assert torch.equal(layer(x).isnan(), lost)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight", ["ones(heads=2)", "ones(heads=2)*depthwise", "softmax(heads=2, project=none)"])
def test_nan_stays_in_its_head(weight, backend):
    """Heads are queries of their own: without projections or a kernel that mixes them, so are their NaN."""
    layer = Mixer(f"nearest(5, cosine) | ranked | {weight}", 4, backend=backend)
    x = torch.randn(2, 4, 5, 6)
    x[0, 1, 2, 3] = float("nan")
    lost = torch.zeros_like(x, dtype=torch.bool)
    lost[0, :2, 2, 3] = True
    assert torch.equal(layer(x).isnan(), lost)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_is_as_if_the_position_were_not_there(backend):
    layer = ConvNN1d(3, 5, 4, backend=backend)
    x = torch.randn(2, 3, 9)
    without = layer(torch.cat([x[..., :4], x[..., 5:]], -1))
    x[:, :, 4] = float("nan")
    y = layer(x)
    close(torch.cat([y[..., :4], y[..., 5:]], -1), without, "output elsewhere")


def test_nan_in_kvt():
    layer = KVTAttention(12, 3, 4)
    x = torch.randn(2, 9, 12)
    x[1, 6, 2] = float("nan")
    y = layer(x)
    assert bool(y[1, 6].isnan().all())
    assert int(y.isnan().sum()) == 12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grid", [(1, 1), (2, 1), (3, 2)])
def test_more_neighbours_than_positions(grid, backend):
    """Slots beyond the positions there are read nothing, like zero padding."""
    n, x = math.prod(grid), torch.randn(2, 4, *grid)
    large, small = ConvNN2d(4, 6, 9, backend=backend), ConvNN2d(4, 6, n)
    set_(small.weight, large.weight[..., :n])
    set_(small.bias, large.bias)
    pairs = [(large.weight, lambda: F.pad(small.weight.grad, (0, 9 - n)))]
    agree(large, small, x, pairs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_position_is_a_linear_map(backend):
    x = torch.randn(3, 4, 1, 1)
    for notation, centre in (
        ("nearest(9, cosine, self) | ranked | kernel", (0,)),
        ("nearest(9, position) | box | kernel", (0,)),
        ("window(3) | box | kernel", (1, 1)),
    ):
        layer = Mixer(notation, 4, 6, backend=backend)
        weight = layer.weight.detach()[(..., *centre)]
        bias = layer.bias.detach()
        agree(layer, lambda x, w=weight, b=bias: F.conv2d(x, w[..., None, None], b), x)
    layer = Mixer("all | row | softmax(heads=2)", 4, backend=backend)
    value = layer.value_weight.detach(), layer.value_bias.detach()
    out = layer.out_weight.detach(), layer.out_bias.detach()
    agree(layer, lambda x: F.linear(F.linear(x.flatten(1), *value), *out).view_as(x), x)


# --- random candidates


def random_layer(seed: int = 0, r: int = 6) -> ConvNN2d:
    torch.manual_seed(seed)
    return ConvNN2d(4, 6, 4, candidates=f"random({r})")


def test_random_candidates_are_drawn_in_training_only():
    layer, x = random_layer().eval(), torch.randn(2, 4, 5, 6)
    everything = ConvNN2d(4, 6, 4)
    everything.load_state_dict({n: p for n, p in layer.state_dict().items() if n != "sampler"})
    before = layer.sampler.clone()
    close(layer(x), everything(x), "evaluation")
    assert torch.equal(layer.sampler, before), "evaluation draws nothing"
    layer.train()
    drawn = [layer(x) for _ in range(4)]
    assert layer.sampler[1] == before[1] + 4
    for i, y in enumerate(drawn):
        assert (y - everything(x)).abs().max() > 1e-3
        for other in drawn[:i]:
            assert not torch.equal(y, other), "every step draws anew"


@pytest.mark.parametrize("backend", BACKENDS)
def test_r_candidates_are_drawn_the_same_for_the_whole_batch(backend):
    layer = Mixer("nearest(9, euclidean, random(7)) | ranked | depthwise", 30, bias=False, backend=backend)
    x = torch.eye(30).view(1, 30, 5, 6).expand(3, -1, -1, -1)
    set_(layer.weight, torch.ones_like(layer.weight))
    read = layer(x).flatten(2)  # (B, N, M): which positions each output reads
    assert bool((read == read[:1, :, :1]).all()), "all samples and positions search the same candidates"
    assert int(read[0, :, 0].sum()) == 7


def test_enough_random_candidates_are_all_of_them():
    layer, x = random_layer(r=30).train(), torch.randn(2, 4, 5, 6)
    y = layer(x)
    close(y, layer.eval()(x), "training with as many candidates as positions")


def test_the_state_dict_reproduces_the_draws():
    layer, x = random_layer().train(), torch.randn(2, 4, 5, 6)
    layer(x)
    state = {n: t.clone() for n, t in layer.state_dict().items()}
    assert "sampler" in state
    first = [layer(x) for _ in range(3)]
    other = random_layer(seed=5).train()
    other.load_state_dict(state)
    torch.manual_seed(99)  # the layer's generator is its own
    for y in first:
        assert torch.equal(other(x), y)


def test_equal_seeds_draw_alike():
    x = torch.randn(2, 4, 5, 6)
    a, b, c = random_layer(1).train(), random_layer(1).train(), random_layer(2).train()
    c.load_state_dict({n: p for n, p in a.state_dict().items() if n != "sampler"}, strict=False)
    for _ in range(3):
        y = a(x)
        assert torch.equal(y, b(x))
        assert not torch.equal(y, c(x)), "another seed, other draws"


def test_draws_cover_all_positions_evenly():
    from nearfold.kernels.sample import draw_positions

    count = torch.zeros(20)
    for step in range(2000):
        drawn = draw_positions(torch.tensor([7, step]), 20, 5)
        assert len(drawn.unique()) == 5
        assert torch.equal(drawn, drawn.sort().values)
        count[drawn] += 1
    # 2000 draws of 5 among 20: 500 each, standard deviation 19
    assert (count - 500).abs().max() < 5 * 20
