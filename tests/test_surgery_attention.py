"""Converted attention of torch, timm and transformers: what carries over exactly, and what does not."""

from __future__ import annotations

import pytest
import torch
from helpers.surgery import BOUND, NEAR, Tokens, multihead, off, shaken
from torch import nn

from nearfold import Rule, _torchvision, convert
from nearfold.nn import BlockAttention2d, Mixer, SelfAttention

pytestmark = pytest.mark.usefixtures("float64")

ATTENTION = [
    ("{self}", "exact"),
    ("nearest(10, scaled) | ranked | softmax(heads={heads})", "exact"),
    ("nearest(16, scaled) | ranked | softmax(heads={heads})*depthwise", "exact"),
    ("nearest(10, scaled) | ranked | softmax(heads={heads})*kernel(groups={heads})", "exact"),
    ("nearest(10, scaled) | ranked | softmax(heads={heads})*separable", "exact"),
    ("({self}) + new*(window(3) | box | depthwise)", "exact"),
    ("branch(0, window(3) | box | kernel, {self}, mix)", "exact"),
    ("nearest(9, scaled) | ranked | softmax(heads={heads})", "approximate"),
    ("nearest(10, cosine) | ranked | softmax(heads={heads})", "approximate"),
    ("nearest(10, scaled, window(5)) | ranked | softmax(heads={heads})", "approximate"),
    ("all | causal | softmax(heads={heads})", "approximate"),
    ("all | row | softmax(heads=1)", "approximate"),
    ("all | row | softmax(heads={heads}, scale=0.5)", "approximate"),
    ("all(elu) | row | normalized(heads={heads})", "approximate"),
    ("window(5) | box | softmax(heads={heads})", "approximate"),
    ("all(scaled(rotary)) | row | softmax(heads={heads})", "approximate"),
    ("scan | causal | selective", "new weights"),
    ("all | row | softmax(heads={heads}, kv=1)", "new weights"),
    ("all | row | softmax(heads={heads}, project=qkv)", "new weights"),
    ("window(5) | box | kernel", "new weights"),
]


def timm_attention(bias: bool):
    try:
        _torchvision.load("torchvision")
        from timm.layers.attention import Attention
    except ImportError as error:
        pytest.skip(f"timm: {error}")
    return Tokens(Attention(12, 3, qkv_bias=bias, proj_drop=0.1), lambda attn, x: attn(x))


def hugging_face():
    transformers = pytest.importorskip("transformers")
    from transformers.models.vit.modeling_vit import ViTAttention

    config = transformers.ViTConfig(hidden_size=12, num_attention_heads=3, attn_implementation="sdpa")
    return Tokens(ViTAttention(config), lambda attn, x: attn(x)[0])


LAYERS = {
    "torch": multihead,
    "torch, no bias": lambda: multihead(bias=False),
    "torch, batch second": lambda: multihead(batch_first=False),
    "timm": lambda: timm_attention(True),
    "timm, no bias": lambda: timm_attention(False),
    "transformers": hugging_face,
    "own": lambda: Tokens(SelfAttention(12, 3), lambda attn, x: attn(x)),
}


def pairs():
    """Every layer and what it becomes; quick: one layer to everything, and every layer to an end of each grade."""
    ends = {grade: to for to, grade in ATTENTION}
    return [
        pytest.param(to, grade, layer, marks=[] if layer == "torch" or ends[grade] == to else [pytest.mark.slow])
        for to, grade in ATTENTION
        for layer in LAYERS
    ]


@pytest.mark.parametrize(("to", "grade", "layer"), pairs())
def test_attention(layer, to, grade):
    model = shaken(LAYERS[layer]()).eval()
    x = torch.randn(2, 10, 12)
    y = model(x)
    report = convert(model, Rule(to, kind="attention"), input_size=(10, 12))
    (row,) = report.rows
    assert (row.status, row.grade) == ("replaced", grade), row
    mine = model(x)
    if grade == "exact":
        assert off(mine, y) <= BOUND
    else:
        assert off(mine, y) > 1e-3
    mine.square().sum().backward()
    mine = [p for n, p in model.named_parameters() if p.requires_grad and "rates" not in n and "new" not in to]
    assert all(p.grad is not None for p in mine)


def test_k_best_of_unknown_many_is_not_called_exact():
    model = multihead()
    (row,) = convert(model, Rule("nearest(100, scaled) | ranked | softmax(heads={heads})")).rows
    assert (row.grade, row.reason) == ("approximate", "exact only up to 100 positions")


@pytest.mark.parametrize("shift", [0, 2])
def test_swins_blocks(shift):
    try:
        _torchvision.load("torchvision")
        from torchvision.models.swin_transformer import ShiftedWindowAttention
    except ImportError as error:
        pytest.skip(f"torchvision: {error}")
    model = nn.Sequential(shaken(ShiftedWindowAttention(12, [4, 4], [shift, shift], 3))).eval()
    x = torch.randn(2, 8, 12, 12)
    y = model(x)
    mix = Rule("a*({self}) + b*(window(3) | box | shift({heads}))")
    report = convert(model, mix, input_size=(8, 12, 12))
    assert report.exact and off(model(x), y) <= BOUND
    report.undo()
    whole = torch.randn(1, 4, 4, 12)  # a block that covers the map is not shifted
    y = model(whole)
    report = convert(model, Rule("{self}"), input_size=(4, 4, 12))
    assert report.exact and off(model(whole), y) <= BOUND
    report.undo()
    for grid in ((9, 8), (3, 9), (5, 2)):  # not divided by the blocks
        x = torch.randn(2, *grid, 12)
        y = model(x)
        for size in (None, (*grid, 12)):
            report = convert(model, Rule("{self}"), input_size=size)
            assert report.rows[0].grade == "exact" and off(model(x), y) <= BOUND
            report.undo()
    cut = f"block(4, scaled(bias=table), shift={shift}) | box | softmax(heads=3)"
    (row,) = convert(model, Rule(cut)).rows
    assert row.grade == "approximate" and "padded" in row.reason


@pytest.mark.parametrize(
    ("grid", "shift", "exact"),
    [((8, 12), 2, True), ((4, 4), 2, True), ((9, 12), 2, False), ((9, 12), 0, True), ((7, 10), 0, True)],
)
def test_timms_swin_blocks(grid, shift, exact):
    """The block cuts and masks the map for its attention; both are exchanged, the block's other parts stay.

    It shifts the map before it fills it up with zeros, which are then inside the map.
    """
    try:
        _torchvision.load("torchvision")
        from timm.models.swin_transformer import SwinTransformerBlock
    except ImportError as error:
        pytest.skip(f"timm: {error}")
    block = shaken(SwinTransformerBlock(12, grid, 3, window_size=4, shift_size=shift))
    model = nn.Sequential(block).eval()
    x = torch.randn(2, *grid, 12)
    y = model(x)
    report = convert(model, Rule("a*({self}) + b*(window(3) | box | shift({heads}))"), input_size=(*grid, 12))
    (row,) = report.rows
    assert (row.name, row.layer, row.grade) == ("0.attn", "WindowAttention", "exact" if exact else "approximate")
    assert row.parameters == sum(p.numel() for p in block.attn.parameters())
    assert row.flops and row.flops_after > row.flops
    assert (off(model(x), y) <= BOUND) == exact
    assert model[0].mlp is block.mlp and model[0].norm1 is block.norm1
    model.train()
    report.undo()
    assert model[0] is block and block.training and torch.equal(model.eval()(x), y)


def test_our_own_layers_can_be_converted():
    model = nn.Sequential(Mixer("window(3) | box | kernel", 4, 6), BlockAttention2d(6, 2, 4))
    x = torch.randn(1, 4, 8, 8)
    y = model(x)
    rules = [Rule(f"({{self}}) + n*({NEAR})", kind="conv"), Rule("({self}) + n*(window(3) | box | shift(2))")]
    assert convert(model, rules).exact and off(model(x), y) <= BOUND
    assert convert(model, Rule("window(3) | box | kernel", name="0")).replaced[0].grade == "new weights"  # a sum


def test_few_neighbours_under_padding_are_each_sequence_alone():
    """A padded batch through a converted encoder: what is there is what it is without padding, and nothing is slow."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    convert(layer, Rule("nearest(3, scaled) | ranked | softmax(heads=2)", kind="attention"))
    x, gone = torch.randn(2, 7, 16), torch.arange(7) >= torch.tensor([[7], [4]])
    y = layer(x, src_key_padding_mask=gone)
    torch.testing.assert_close(y[1:, :4], layer(x[1:, :4]))
