"""What a foreign layer is said to be runs as that operation, with its weights, to the same output."""

from __future__ import annotations

import argparse
import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nearfold.nn import Mixer, TokenMixer
from nearfold.recognise import complexity, describe
from nearfold.recognise.command import arguments, import_library, load_model, text
from nearfold.recognise.walk import walk

BOUND = 1e-12


def library(module: str):
    """A module of torchvision or timm, or a visible skip."""
    try:
        import_library("torchvision", "torchvision")
        return importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"{module}: {error}")


def said(layer: nn.Module):
    """The one operation that a layer is said to be."""
    (row,) = [known for known in walk(layer) if known.match]
    return row.match.operation


def close(mine: Tensor, truth: Tensor) -> None:
    assert mine.shape == truth.shape, f"{tuple(mine.shape)} instead of {tuple(truth.shape)}"
    off = (mine - truth).abs().max().item()
    assert off <= BOUND, f"off by {off:.1e}"


@pytest.fixture
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


# --- round trips


CONVOLUTIONS = [
    ("window(3) | box | kernel", {"kernel_size": 3, "padding": 1}),
    ("window(3, padding=0) | box | kernel", {"kernel_size": 3}),
    ("window(3, padding=0) | box | kernel", {"kernel_size": 3, "padding": "valid"}),
    ("window(4, dilation=3) | box | kernel", {"kernel_size": 4, "dilation": 3, "padding": "same"}),
    ("window(4, padding=2) | box | kernel", {"kernel_size": 4, "padding": 2}),
    ("window(3, stride=2) | box | kernel(groups=2)", {"kernel_size": 3, "padding": 1, "stride": 2, "groups": 2}),
    ("window(3, dilation=2) | box | kernel", {"kernel_size": 3, "padding": 2, "dilation": 2}),
    ("window(3, mode=reflect) | box | kernel", {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}),
    ("window(5) | box | depthwise", {"kernel_size": 5, "padding": 2, "groups": 4, "out_channels": 4}),
    ("window(3) | box | kernel(groups=4)", {"kernel_size": 3, "padding": 1, "groups": 4, "out_channels": 8}),
    ("window(1, stride=2) | box | kernel", {"kernel_size": 1, "stride": 2}),
    ("window(1, padding=1) | box | kernel", {"kernel_size": 1, "padding": 1, "bias": False}),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("notation", "arguments"), CONVOLUTIONS)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_convolutions(notation, arguments, ndim, float64):
    arguments = {"out_channels": 6} | arguments
    layer = getattr(nn, f"Conv{ndim}d")(4, **arguments)
    op = said(layer)
    assert str(op) == notation
    ours = Mixer(op, 4, layer.out_channels, ndim=ndim, bias=layer.bias is not None)
    ours.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, *(7, 9, 6)[:ndim])
    close(ours(x), layer(x))


def test_each_axis_of_a_convolution_on_its_own(float64):
    layer = nn.Conv2d(4, 6, (3, 5), stride=(2, 1), dilation=(1, 2), padding=(0, 4))
    assert str(said(layer)) == "window((3, 5), stride=(2, 1), dilation=(1, 2), padding=(0, 4)) | box | kernel"
    ours = Mixer(said(layer), 4, 6)
    ours.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 8, 9)
    close(ours(x), layer(x))


POOLS = [
    ("window(2, stride=2, padding=0) | box | mean", nn.AvgPool2d(2)),
    ("window(3) | box | mean", nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
    ("window(3, stride=2, padding=0) | box | max", nn.MaxPool2d(3, 2)),
    ("window(3, stride=2) | box | max", nn.MaxPool2d(3, 2, 1)),
    ("window((3, 1), stride=(2, 1), dilation=(2, 1), padding=(1, 0)) | box | max",
     nn.MaxPool2d((3, 1), (2, 1), (1, 0), (2, 1))),
    ("window(3, stride=2) | box | max", nn.MaxPool1d(3, 2, 1)),
    ("window(2, stride=2, padding=0) | box | mean", nn.AvgPool3d(2)),
    ("all | row | mean", nn.AdaptiveAvgPool2d(1)),
    ("all | row | mean", nn.AdaptiveAvgPool1d(1)),
]  # fmt: skip


@pytest.mark.parametrize(("notation", "layer"), POOLS)
def test_pooling(notation, layer, float64):
    ndim = int(type(layer).__name__[-2])
    assert str(said(layer)) == notation
    x = torch.randn(2, 4, *(9, 8, 7)[:ndim]) - 2  # negative: a padded zero must not win
    truth, mine = layer(x), Mixer(said(layer), 4, ndim=ndim)(x)
    close(mine, truth if truth.shape == mine.shape else truth.expand_as(mine))


NOTED = [
    ("window(3) | box | ones", nn.AvgPool2d(3, 1, 1), 9, "divided by 9"),
    ("window(3, stride=3, padding=0) | box | ones", nn.AvgPool2d(3, divisor_override=2), 2, "divided by 2"),
    ("window(3, stride=2) | box | ones", nn.AvgPool2d(3, 2, 1, ceil_mode=True, divisor_override=5), 5, "divided by 5"),
    ("window(3) | box | ones", nn.AvgPool1d(3, 1, 1), 3, "divided by 3"),
    ("window(3, stride=2, padding=0) | box | max", nn.MaxPool2d(3, 2, ceil_mode=True), 1, "(ceil_mode)"),
    ("window(2, stride=2, padding=0) | box | mean", nn.AvgPool1d(2, ceil_mode=True), 1, "(ceil_mode)"),
    ("window(3, stride=2) | box | mean", nn.AvgPool2d(3, 2, 1, True, count_include_pad=False), 1, "(ceil_mode)"),
]


@pytest.mark.parametrize(("notation", "layer", "divisor", "note"), NOTED)
def test_pooling_of_which_a_note_says_more(notation, layer, divisor, note, float64):
    (row,) = describe(layer).rows
    assert row.notation == notation and note in row.note
    x = torch.randn(2, 4, *(9, 8)[: int(type(layer).__name__[-2])]) - 2
    mine = Mixer(said(layer), 4, ndim=x.dim() - 2)(x) / divisor
    truth = layer(x)
    assert (truth.shape == mine.shape) or "(ceil_mode)" in row.note
    close(mine, truth[tuple(slice(n) for n in mine.shape)])  # but for one more window at the end


@pytest.mark.parametrize("layer", [nn.InstanceNorm2d(4), nn.GroupNorm(2, 4), nn.GroupNorm(4, 16, affine=False)])
def test_norms_over_positions_are_means_of_them(layer):
    (row,) = describe(layer).rows
    assert row.notation == "all | row | mean" and row.c_d == 0 and "of its square" in row.note


@pytest.mark.parametrize("bias", [True, False])
def test_multihead_attention(bias, float64):
    layer = nn.MultiheadAttention(12, 3, bias=bias, batch_first=True)
    if bias:
        nn.init.normal_(layer.in_proj_bias)
    ours = TokenMixer(said(layer), 12, bias=bias)
    assert str(ours.operation) == "all | row | softmax(heads=3)"
    packed(ours, layer.in_proj_weight, layer.in_proj_bias, layer.out_proj.weight, layer.out_proj.bias)
    x = torch.randn(2, 10, 12)
    close(ours(x), layer(x, x, x)[0])


def test_cross_attention(float64):
    layer = nn.MultiheadAttention(12, 3, kdim=8, vdim=8, batch_first=True)
    ours = TokenMixer(said(layer), 12, context_dim=8)
    assert str(ours.operation) == "all(cross) | row | softmax(heads=3)"
    weights = {"query": layer.q_proj_weight, "key": layer.k_proj_weight, "value": layer.v_proj_weight}
    state = {f"{name}_weight": w for name, w in weights.items()} | {"out_weight": layer.out_proj.weight}
    state |= {f"{n}_bias": b for n, b in zip(weights, layer.in_proj_bias.chunk(3), strict=True)}
    ours.load_state_dict(state | {"out_bias": layer.out_proj.bias})
    x, context = torch.randn(2, 10, 12), torch.randn(2, 7, 8)
    close(ours(x, context), layer(x, context, context)[0])


def packed(
    ours: Mixer, weight: Tensor, bias: Tensor | None, out: Tensor, out_bias: Tensor | None, **more: Tensor
) -> None:
    """Load query, key and value that lie in one matrix."""
    names = ("query", "key", "value")
    state = {f"{name}_weight": w for name, w in zip(names, weight.chunk(3), strict=True)} | {"out_weight": out} | more
    if bias is not None and out_bias is not None:
        state |= {f"{name}_bias": b for name, b in zip(names, bias.chunk(3), strict=True)} | {"out_bias": out_bias}
    ours.load_state_dict(state)


def test_timm_attention(float64):
    layer = library("timm.layers.attention").Attention(12, 3, qkv_bias=True)
    ours = TokenMixer(said(layer), 12)
    packed(ours, layer.qkv.weight, layer.qkv.bias, layer.proj.weight, layer.proj.bias)
    x = torch.randn(2, 10, 12)
    close(ours(x), layer(x))


def swin_bias(table: Tensor, size: int, heads: int) -> Tensor:
    return table.T.reshape(heads, 2 * size - 1, 2 * size - 1)


@pytest.mark.parametrize("shift", [0, 2])
def test_torchvision_swin_attention(shift, float64):
    layer = library("torchvision.models.swin_transformer").ShiftedWindowAttention(12, [4, 4], [shift, shift], 3)
    nn.init.normal_(layer.relative_position_bias_table)
    nn.init.normal_(layer.qkv.bias)
    ours = Mixer(said(layer), 12)
    written = f", shift={shift}" if shift else ""
    assert str(ours.operation) == f"block(4, scaled(bias=table){written}, padded) | box | softmax(heads=3)"
    bias = swin_bias(layer.relative_position_bias_table, 4, 3)
    packed(ours, layer.qkv.weight, layer.qkv.bias, layer.proj.weight, layer.proj.bias, relative_bias=bias)
    for grid in ((8, 12), (7, 10), (3, 9)):
        x = torch.randn(2, 12, *grid)
        truth = layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        assert (ours(x) - truth).abs().max().item() < 1e-12


def test_timm_swin_block_gives_its_attention_the_shift(float64):
    swin = library("timm.models.swin_transformer")
    block = swin.SwinTransformerBlock(12, (8, 8), 3, window_size=4, shift_size=2)
    nn.init.normal_(block.attn.relative_position_bias_table)
    ours = Mixer(said(block), 12)
    bias = swin_bias(block.attn.relative_position_bias_table, 4, 3)
    packed(
        ours,
        block.attn.qkv.weight,
        block.attn.qkv.bias,
        block.attn.proj.weight,
        block.attn.proj.bias,
        relative_bias=bias,
    )
    x = torch.randn(2, 12, 8, 8)
    close(ours(x), block._attn(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def test_patch_merging_is_a_strided_convolution(float64):
    layer = library("torchvision.models.swin_transformer").PatchMergingV2(4)
    layer.norm = nn.Identity()
    layer.norm.normalized_shape = (8,)
    ours = Mixer(said(layer), 4, 8, bias=False)
    ours.load_state_dict({"weight": layer.reduction.weight.view(8, 2, 2, 4).permute(0, 3, 2, 1)})
    x = torch.randn(2, 4, 6, 8)
    close(ours(x), layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class Tokens(nn.Module):
    """One nn.Linear over positions."""

    def __init__(self, tokens: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(tokens, out)

    def forward(self, x):
        return self.linear(x)  # (B, C, N): the last axis is positions'


def test_a_linear_over_positions_is_a_table(float64):
    layer = Tokens(6, 5)
    (row,) = describe(layer, (4, 6)).rows
    assert row.notation == "all | row | table(6, 5)"
    ours = Mixer(row.operation, 4, ndim=1)
    ours.load_state_dict({"table_weight": layer.linear.weight, "table_bias": layer.linear.bias})
    x = torch.randn(2, 4, 6)
    close(ours(x), layer(x))


def test_our_own_layers_are_what_they_are():
    layer = Mixer("nearest(9, blend(0.5)) | ranked | kernel", 4)
    assert said(nn.Sequential(layer)) == layer.operation


# --- which axis an nn.Linear acts on


class Wired(nn.Module):
    """A layer between two rearrangements."""

    def __init__(self, before, layer: nn.Module, after=lambda x: x) -> None:
        super().__init__()
        self.before, self.layer, self.after = before, layer, after

    def forward(self, x):
        return self.after(self.layer(self.before(x)))


CHANNELS = {
    "last": Wired(lambda x: x.permute(0, 2, 3, 1), nn.Linear(8, 3)),
    "tokens": Wired(lambda x: x.flatten(2).transpose(1, 2), nn.Linear(8, 3)),
    "there and back": Wired(lambda x: x.transpose(1, 2).transpose(1, 2).permute(0, 2, 3, 1) + 1, nn.Linear(8, 3)),
    "with a class token": Wired(
        lambda x: torch.cat([torch.zeros(1, 1, 8, device=x.device), x.flatten(2).transpose(1, 2)], 1), nn.Linear(8, 3)
    ),
}
POSITIONS = {
    "tokens": (Wired(lambda x: x.flatten(2), nn.Linear(24, 24)), "table(24)"),
    "one axis": (Wired(lambda x: x, nn.Linear(6, 5)), "table(6, 5)"),
    "after a norm": (Wired(lambda x: F.layer_norm(x.flatten(2).mT, (8,)).mT, nn.Linear(24, 24)), "table(24)"),
    "transposed twice": (Wired(lambda x: x.permute(0, 2, 3, 1).reshape(1, 24, 8).permute(0, 2, 1) * 2,
                               nn.Linear(24, 24)), "table(24)"),
    "an MLP": (Wired(lambda x: x.flatten(2), nn.Sequential(nn.Linear(24, 7), nn.GELU(), nn.Dropout(),
                                                            nn.Linear(7, 24))), "table(24)"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANNELS)
def test_a_linear_over_channels(name):
    found = describe(CHANNELS[name], (8, 4, 6))
    assert (found.rows, found.unknown, found.notes) == ((), (), ())
    assert found.pointwise == {"Linear": 1}


@pytest.mark.parametrize("name", POSITIONS)
def test_a_linear_over_positions(name):
    model, weight = POSITIONS[name]
    found = describe(model, (8, 4, 6))
    assert [row.words for row in found.rows] == [("all", "row", weight)]
    assert found.unknown == () and found.complexity.c_d == 3


def test_two_tables_with_a_channel_map_between_are_two():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(24, 24), nn.Linear(8, 8), nn.Linear(24, 24)

        def forward(self, x):
            return self.c(self.b(self.a(x.flatten(2)).mT).mT)

    assert [row.name for row in describe(Both(), (8, 4, 6)).rows] == ["a", "c"]


def test_a_classifier_on_the_flattened_map_is_said_to_be_one():
    found = describe(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 10)), (3, 8, 8))
    assert any("2 reads the whole flattened map" in note for note in found.notes)
    assert found.complexity.c_d == 3


def test_positions_that_a_container_gathers_are_unknown():
    def gather(x):
        return torch.cat([x[:, :, 0::2], x[:, :, 1::2]], 1).permute(0, 2, 3, 1)

    found = describe(Wired(gather, nn.Linear(16, 4)), (8, 4, 6))
    assert [(s.name, s.reason) for s in found.unknown] == [
        ("layer", "reads positions that its container gathered"),
        ("", "its own forward calls slice; its parts are listed"),
    ]


def test_without_an_input_it_is_an_assumption_and_says_so():
    assert "assumed" in str(describe(POSITIONS["tokens"][0]))


# --- unknown, on purpose


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.scale


class Scaled(nn.Module):
    """A container with a parameter of its own, of which only a run shows what it does."""

    def __init__(self):
        super().__init__()
        self.scale, self.act = nn.Parameter(torch.ones(())), nn.ReLU()

    def forward(self, x):
        return self.act(x) * self.scale


class Handmade(nn.Module):
    """Attention of three nn.Linear, which alone would look pointwise."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = x.mT
        return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)).mT


class HandmadeAttention(Handmade):
    pass


class Odd(nn.Conv2d):
    """A convolution that is not: it looks at its input's sign."""

    def forward(self, x):
        return self._conv_forward(x.sign(), self.weight, self.bias)


UNKNOWN = {
    "LSTM": nn.LSTM(4, 4),
    "GRU": nn.GRU(4, 4),
    "own parameter of a container": Scaled(),
    "positions become channels": nn.PixelUnshuffle(2),
    "transposed": nn.ConvTranspose2d(4, 4, 3),
    "circular": nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
    "replicate": nn.Conv2d(4, 4, 3, padding=1, padding_mode="replicate"),
    "bins": nn.AdaptiveAvgPool2d(7),
    "largest of all": nn.AdaptiveMaxPool2d(1),
    "upsampling between values": nn.Upsample(scale_factor=2, mode="bilinear"),
    "padding and a rest": nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "another forward": Odd(4, 4, 3),
    "softmax over the last axis": nn.Softmax(dim=-1),
    "lazy": nn.LazyConv2d(4, 3),
    "extra keys": nn.MultiheadAttention(8, 2, add_bias_kv=True),
    "by its name": HandmadeAttention(),
    "fold": nn.Unfold(3),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_cannot_be_said_is_unknown(name):
    found = describe(UNKNOWN[name])
    assert len(found.unknown) == 1
    assert found.unknown[0].reason
    assert "unknown:" in str(found) and found.unknown[0].reason in str(found)
    assert not any(row.mixes for row in found.rows)


def test_a_replaced_forward_is_not_trusted():
    layer = nn.Conv2d(4, 4, 3)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    assert [s.kind for s in describe(layer).unknown] == ["Conv2d"]


def test_a_subclass_that_keeps_the_forward_is_its_base():
    class Named(nn.Conv2d):
        pass

    assert str(said(Named(4, 4, 3, padding=1))) == "window(3) | box | kernel"


def test_a_run_sees_functions_that_mix():
    found = describe(Handmade(), (8, 6))
    assert [row.notation for row in found.rows] == ["all | row | softmax"] and found.unknown == ()
    assert found.rows[0].parameters == 3 * 8 * 9 and found.pointwise == {}  # its maps are its own


def test_a_run_sees_a_softmax_over_positions_but_not_one_over_channels():
    class Softmaxed(nn.Module):
        def __init__(self, axis):
            super().__init__()
            self.axis, self.conv = axis, nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.conv(x).softmax(self.axis)

    assert describe(Softmaxed(1), (4, 6, 6)).unknown == ()
    assert len(describe(Softmaxed(2), (4, 6, 6)).unknown) == 1


def test_a_mean_in_a_forward_is_pooling():
    model = Wired(lambda x: x, nn.Conv2d(4, 4, 3), lambda x: x.mean((2, 3)))
    pooled = describe(model, (4, 6, 6)).rows[-1]
    assert (pooled.notation, pooled.c_d, pooled.field) == ("all | row | mean", 0, "all")


def test_how_attention_is_called_decides():
    class Calls(nn.Module):
        def __init__(self, **how):
            super().__init__()
            self.attention, self.how = nn.MultiheadAttention(8, 2, batch_first=True), how

        def forward(self, x):
            x = x.mT
            other = x[:, 1:] if "other" in self.how else x
            mask = torch.zeros(6, other.shape[1], device=x.device) if "mask" in self.how else None
            return self.attention(x, key=other, value=other, attn_mask=mask)[0]

    assert describe(Calls(), (8, 6)).rows[0].notation == "all | row | softmax(heads=2)"
    assert describe(Calls(other=1), (8, 6)).rows[0].notation == "all(cross) | row | softmax(heads=2)"
    assert [s.reason for s in describe(Calls(mask=1), (8, 6)).unknown] == ["it is called with a mask"]


def test_attention_on_parts_of_the_map_does_not_look_everywhere():
    """Windows made by hand: their positions are folded into the batch."""

    class Windows(nn.Module):
        def __init__(self, batch_first):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)

        def forward(self, x):
            x = x.reshape(1, 8, 2, 4, 2, 4).permute(0, 2, 4, 3, 5, 1).reshape(4, 16, 8)
            x = x if self.attention.batch_first else x.transpose(0, 1)
            return self.attention(x, x, x)[0]

    for batch_first in (True, False):
        (row,) = describe(Windows(batch_first), (8, 8, 8)).rows
        assert "folded" in row.note and row.field == "?"


def test_the_larger_of_two_tensors_and_a_norm_over_channels_mix_nothing():
    model = Wired(lambda x: torch.maximum(x, 2 * x), nn.Conv2d(4, 4, 1), lambda x: x / x.norm(dim=1, keepdim=True))
    assert describe(model, (4, 6, 6)).unknown == ()
    over = Wired(lambda x: x, nn.Conv2d(4, 4, 1), lambda x: x / x.norm(dim=(2, 3), keepdim=True))
    assert [s.kind for s in describe(over, (4, 6, 6)).unknown] == ["Wired"]


# --- whole models

TORCHVISION = {
    # C_D, layers that mix (pooling among them), what the last one sees
    "resnet18": (60, 19, "all"),
    "resnet50": (159, 19, "all"),
    "vit_b_16": (51, 13, "all"),
    "swin_t": (60, 17, "all"),
    "convnext_tiny": (66, 23, "all"),
    "mobilenet_v2": (122, 19, "all"),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_models(name):
    models = library("torchvision.models")
    with torch.device("meta"):
        model = getattr(models, name)()
    found = describe(model, (3, 224, 224))
    assert found.unknown == ()
    assert (found.complexity.c_d, len(found.rows), found.rows[-1].field) == TORCHVISION[name]
    assert complexity(model).omega == found.complexity.omega
    assert str(found.complexity) in str(found)


def test_the_receptive_field_of_resnet50_is_the_known_one():
    models = library("torchvision.models")
    with torch.device("meta"):
        rows = describe(models.resnet50(), (3, 224, 224)).rows
    assert next(row.field for row in rows if row.name == "layer4.2.conv2") == "427"
    assert (
        max(int(row.field) for row in rows if row.field.isdigit()) == 427
    )  # Araujo et al., 2019 count 483: stride in 1x1


TIMM = {
    "resnet50": (159, 19),
    "vit_tiny_patch16_224": (51, 13),
    "mixer_s32_224": (27, 10),
    "swin_tiny_patch4_window7_224": (60, 17),
    "convnext_atto": (96, 17),  # its channel MLP is made of 1x1 convolutions
}


@pytest.mark.parametrize("name", TIMM)
def test_timm_models(name):
    timm = library("timm")
    model = timm.create_model(name)
    found = describe(model, (3, 224, 224))
    assert found.unknown == ()
    assert (found.complexity.c_d, len(found.rows)) == TIMM[name]
    assert complexity(model).omega == found.complexity.omega


def test_swin_does_not_shift_a_block_that_covers_the_map():
    with torch.device("meta"):
        model = library("torchvision.models").swin_t()
    last = [row.notation for row in describe(model, (3, 224, 224)).rows if row.name.startswith("features.7")]
    assert last == ["block(7, scaled(bias=table), padded) | box | softmax(heads=24)"] * 2


def test_transformers_attention_is_not_believed_by_its_name():
    """A class with the name and the members of BERT's that computes something else is unknown."""
    named = type(
        "BertSelfAttention",
        (nn.Module,),
        {"__module__": "transformers.models.bert.modeling_bert", "forward": lambda s, x: x},
    )
    inner = named()
    inner.num_attention_heads = 2
    for name in ("query", "key", "value"):
        setattr(inner, name, nn.Linear(8, 8))
    (unknown,) = complexity(inner).unknown
    assert "checked on a random input, it is not all | row | softmax(heads=2, project=qkv)" in unknown.reason


def test_torch_transformer_layers():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    found = describe(Wired(lambda x: x.mT, layer), (8, 6))
    assert [row.name for row in found.rows] == ["layer.self_attn"] and found.unknown == ()
    assert found.pointwise == {"Linear": 2, "Dropout": 3, "LayerNorm": 2}


def test_a_layer_used_twice_counts_once():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    found = describe(nn.Sequential(conv, nn.ReLU(), conv), (4, 8, 8))
    assert found.complexity.c_d == 3
    assert found.rows[0].flops == 2 * (2 * 64 * 4 * 4 * 9)


# --- FLOPs and receptive fields


class Residual(nn.Module):
    def __init__(self, body: nn.Module, side: nn.Module) -> None:
        super().__init__()
        self.body, self.side = body, side

    def forward(self, x):
        return self.body(x) + self.side(x)


def test_flops_are_those_of_torch():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, 2), Mixer("all | row | softmax(heads=2)", 4)
    )
    with FlopCounterMode(display=False) as counter:
        model.to("meta")(torch.zeros(1, 3, 12, 12, device="meta"))
    assert sum(row.flops for row in describe(model, (3, 12, 12)).rows) == counter.get_total_flops() > 0


WINDOWS = {
    "chain": nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), nn.Conv2d(2, 2, 3, 1, 2, 2), nn.AvgPool2d(2), nn.Conv2d(2, 1, 3)),
    "residual": nn.Sequential(
        Residual(nn.Sequential(nn.Conv2d(1, 2, 5, 2, 2), nn.Conv2d(2, 2, 3, 1, 1)), nn.Conv2d(1, 2, 1, 2)),
        nn.Conv2d(2, 1, 3, 1, 1),
    ),
    "axes": nn.Sequential(nn.Conv2d(1, 2, (3, 1), padding=(1, 0)), nn.Conv2d(2, 1, (1, 5), padding=(0, 2))),
}
BLOCKS = {
    "once": nn.Sequential(Mixer("block(4) | box | mean", 1)),
    "shifted": nn.Sequential(Mixer("block(4) | box | mean", 1), Mixer("block(4, shift=2) | box | mean", 1)),
    "after a window": nn.Sequential(Mixer("window(3) | box | mean", 1), Mixer("block(4) | box | mean", 1)),
}


def measured(model: nn.Module, size: int = 64) -> tuple[int, ...]:
    """The largest extent, per axis, of what any output position depends on: by gradients, all weights positive."""
    for p in model.parameters():
        nn.init.constant_(p, 1.0)
    x = torch.ones(1, 1, size, size, dtype=torch.float64, requires_grad=True)
    y = model.double()(x)[0, 0]
    best = [0, 0]
    centre = y.shape[0] // 2
    for offset in range(8):
        (grad,) = torch.autograd.grad(y[centre - offset // 2, centre - offset], x, retain_graph=True)
        for axis, at in enumerate(grad[0, 0].nonzero(as_tuple=True)):
            best[axis] = max(best[axis], int(at.max() - at.min()) + 1)
    return tuple(best)


def shown(text: str) -> tuple[int, ...]:
    sizes = [int(n) for n in text.removeprefix("<=").split("x")]
    return tuple(sizes) if len(sizes) > 1 else (sizes[0], sizes[0])


@pytest.mark.parametrize("name", WINDOWS)
def test_receptive_fields_are_the_measured_ones(name):
    field = describe(WINDOWS[name], (1, 64, 64)).rows[-1].field
    assert shown(field) == measured(WINDOWS[name])


@pytest.mark.parametrize("name", BLOCKS)
def test_behind_blocks_a_receptive_field_is_exact_or_a_bound(name):
    field = describe(BLOCKS[name], (1, 64, 64)).rows[-1].field
    truth = measured(BLOCKS[name])
    assert all(t <= f for t, f in zip(truth, shown(field), strict=True))
    assert field.startswith("<=") or shown(field) == truth


@pytest.mark.parametrize(
    ("notations", "field"),
    [
        (["nearest(4, cosine) | ranked | kernel"], "any"),
        (["deformable(3) | box | kernel"], "any"),
        (["nearest(4, position) | ranked | kernel"], "?"),
        (["all | row | softmax"], "all"),
        (["all | row | softmax", "nearest(4, cosine) | ranked | kernel"], "all"),
        (["nearest(4, cosine) | ranked | kernel", "window(3) | box | kernel"], "any"),
        (["nearest(4, cosine) | ranked | kernel", "all | row | mean"], "all"),
        (["branch(0.5, window(3) | box | kernel, window(5) | box | kernel)"], "5"),
        (["a*(window(3) | box | kernel) + b*(nearest(4, cosine) | ranked | kernel)"], "any"),
        (["scan(state=4) | causal | selective"], "all"),
    ],
)
def test_receptive_fields_of_operations(notations, field):
    model = nn.Sequential(*(Mixer(notation, 4) for notation in notations))
    assert describe(model, (4, 8, 8)).rows[-1].field == field


def test_behind_something_unknown_only_what_is_known_is_claimed():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1))
    assert [row.field for row in describe(model, (4, 8, 8)).rows] == ["3", "4", "all"]
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1))
    assert [row.field for row in describe(model, (4, 8, 8)).rows] == ["3", "?", "?"]


def test_without_an_input_nothing_is_measured():
    (row,) = describe(nn.Conv2d(3, 4, 3)).rows
    assert (row.flops, row.field) == (None, "")


def test_a_model_that_looks_at_values_runs_on_its_own_device():
    model = Wired(lambda x: x if x.sum().item() == 0 else x[:0], nn.Conv2d(3, 4, 3))
    assert describe(model, (3, 8, 8)).rows[0].flops == 2 * 36 * 4 * 3 * 9


@pytest.mark.parametrize("size", [(3,), (3, 0, 8), (3, 8.0, 8)])
def test_an_input_size_is_channels_and_grid(size):
    with pytest.raises(ValueError, match="input_size must be channels and grid"):
        describe(nn.Conv2d(3, 4, 3), size)


def test_a_size_that_does_not_fit_is_said():
    with pytest.raises(ValueError, match="Conv2d does not run on an input of size"):
        describe(nn.Conv2d(3, 4, 3), (5, 8, 8))


def test_a_failed_run_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    with pytest.raises(ValueError, match="does not run"):
        describe(model, (5, 8, 8))
    assert model.training and model[1].training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


# --- the command

FILE = """
import neighbour
import torch.nn as nn

SIZE = 3

def net():
    return nn.Sequential(nn.Conv2d(3, 8, neighbour.SIZE, padding=1), nn.ReLU())

def broken():
    raise KeyError("width")

def text():
    return "not a model"

def needs(width):
    return nn.Linear(width, width)
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "neighbour.py").write_text("SIZE = 3")
    (tmp_path / "model.py").write_text(FILE)
    return tmp_path / "model.py"


def test_a_model_from_a_file(file):
    assert isinstance(load_model(f"{file}:net"), nn.Sequential)
    told = text(f"{file}:net", (3, 8, 8))
    assert "window(3)" in told and "C_D 3" in told and "1 ReLU" in told


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other", "has no 'other'; it has: net, broken, text, needs"),
        ("SIZE", "must be a callable without arguments"),
        ("broken", "KeyError: 'width'"),
        ("text", "must return an nn.Module, got str"),
        ("needs", "TypeError"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(file, name, message):
    with pytest.raises(ValueError, match=r"model\.py") as caught:
        load_model(f"{file}:{name}")
    assert message in str(caught.value)


def test_other_wrong_specs(tmp_path):
    for spec in ("resnet50", ":net", "timm:", ""):
        with pytest.raises(ValueError, match="a model is given as"):
            load_model(spec)
    with pytest.raises(ValueError, match="there is no file"):
        load_model(f"{tmp_path}/none.py:net")
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(ValueError, match="not a Python file"):
        load_model(f"{tmp_path}/text.txt:net")
    (tmp_path / "bad.py").write_text("def f(:")
    with pytest.raises(ValueError, match="SyntaxError"):
        load_model(f"{tmp_path}/bad.py:f")


@pytest.mark.parametrize("source", ["timm", "torchvision"])
def test_models_by_name(source):
    library(source)
    assert isinstance(load_model(f"{source}:resnet18"), nn.Module)
    with pytest.raises(ValueError, match=r"no model of this name; did you mean .*resnet18"):
        load_model(f"{source}:resnet_18")


def test_timm_models_run_on_the_size_they_were_made_for():
    library("timm")
    assert "on 3x224x224" in text("timm:resnet18")


@pytest.mark.parametrize("size", ["", "3", "3,0,4", "3,a,4", "3,4,", "-3,4,4"])
def test_sizes_are_checked(size, capsys):
    parser = argparse.ArgumentParser()
    arguments(parser)
    assert parser.parse_args(["timm:x", "--input", "3x224,100"]).input == (3, 224, 100)
    with pytest.raises(SystemExit):
        parser.parse_args(["timm:x", f"--input={size}"])
    assert "wanted channels and grid" in capsys.readouterr().err


def test_importing_the_package_needs_neither_torchvision_nor_timm():
    import subprocess
    import sys

    code = "import sys, nearfold.recognise.command; print(*{m.partition('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert {"torchvision", "timm", "transformers"}.isdisjoint(done.stdout.split())


def test_numbers_in_the_table_are_right():
    found = describe(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 4, 1)), (3, 8, 8))
    assert found.parameters == 3 * 8 * 9 + 8 * 4 + 4
    assert math.isclose(found.complexity.c_d, 6)
    assert found.pointwise == {"Conv2d 1x1 (C_D 3 each)": 1}
