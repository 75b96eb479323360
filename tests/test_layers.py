"""What every named layer promises as an nn.Module: shapes, dtypes and memory layouts."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from helpers.layers import APART, IMAGES, LAYERS, SEQUENCES, TOKENS, every_layer

import nearfold.nn
from nearfold.grammar import CATALOGUE, Branch, Sum, parse, preset
from nearfold.grammar.similarity import Blend
from nearfold.grammar.words import Grid
from nearfold.lower import explain
from nearfold.nn import (
    ACmix2d,
    BranchingAttention,
    BranchingConv2d,
    ConvNN2d,
    ConvNNAttention,
    CrossAttention,
    KVTAttention,
    Mixer,
    SelfAttention,
    TokenMLP,
)
from nearfold.testing import context_for, fitted

pytestmark = pytest.mark.usefixtures("seeded")


def test_every_named_layer_is_tested():
    built = {type(make()).__name__ for make, _ in LAYERS.values()}
    named = {name for name in nearfold.nn.__all__ if isinstance(getattr(nearfold.nn, name), type)}
    assert built | APART == named


# --- shapes


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("stride", [1, 2, 3, (1, 2)])
def test_images_of_any_size_in_turn(name, stride):
    layer = IMAGES[name](stride=stride)
    rows, columns = (stride, stride) if isinstance(stride, int) else stride
    for grid in ((7, 9), (1, 1), (2, 5), (6, 6), (1, 8), (7, 9)):
        y = layer(torch.randn(2, 4, *grid))
        assert y.shape == (2, layer.out_channels, -(-grid[0] // rows), -(-grid[1] // columns))
        assert bool(y.isfinite().all())


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("stride", [1, 2, 5])
def test_sequences_of_any_length_in_turn(name, stride):
    layer = SEQUENCES[name](stride=stride)
    for n in (9, 1, 4, 17, 9):
        y = layer(torch.randn(2, 4, n))
        assert y.shape == (2, 6, -(-n // stride))
        assert bool(y.isfinite().all())


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_of_any_number_in_turn(name):
    layer = TOKENS[name]()
    for n in (9, 1, 4, 17, 9):
        y = layer(torch.randn(3, n, 12))
        assert y.shape == (3, n, 12)
        assert bool(y.isfinite().all())


FLAT = ("as_mlp", "acnet", "slak", "inceptionnext", "cross_shaped")
"""Rows for images alone."""
STRIDES = {"conv_transposed": 0.5} | dict.fromkeys(
    ("conv_strided", "pool_mean", "pool_max", "pool_soft", "pool_importance"), 2
)


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_catalogue_entry_is_a_layer_over_sequences_images_and_volumes(name):
    for ndim, grid in ((1, (9,)), (2, (5, 6)), (3, (3, 4, 2))):
        x = torch.randn(2, 24, *grid)
        if preset(name).for_sequences and ndim > 1:
            with pytest.raises(ValueError, match=r"name the axes of the . that are causal|those of a sequence"):
                Mixer(CATALOGUE[name].notation, 24, ndim=ndim)(x)
            continue
        if name in FLAT and ndim != 2:
            with pytest.raises(ValueError, match=rf"has 2 entries, but the input has {ndim} grid axes"):
                Mixer(CATALOGUE[name].notation, 24, ndim=ndim)
            continue
        if name in ("criss_cross", "strip_pooling") and ndim == 1:
            with pytest.raises(ValueError, match=r"axis=1 is beyond the input's 1 grid axes"):
                Mixer(CATALOGUE[name].notation, 24, ndim=ndim)(x)
            continue
        if name == "s2_mlp" and ndim == 3:
            with pytest.raises(ValueError, match="share must be at most 1 / 6"):
                Mixer(CATALOGUE[name].notation, 24, ndim=ndim)
            continue
        layer = Mixer(fitted(preset(name), grid), 24, ndim=ndim)
        stride = STRIDES.get(name, 1)
        context = context_for(layer, x)
        y = layer(x) if context is None else layer(x, context)
        rounded_down = name in ("pool_mean", "pool_max", "pool_soft")
        sizes = (n // stride for n in grid) if rounded_down else (-(-n // stride) for n in grid)
        if name in ("attention_pooling", "slot_attention"):  # a row of learned queries' answers
            sizes = (1,) * (ndim - 1) + (8,)
        assert y.shape == (2, 24, *sizes)


@every_layer
def test_a_sample_does_not_depend_on_its_batch(make, shape):
    layer, x = make().eval(), torch.randn(shape())
    torch.testing.assert_close(layer(x)[1:], layer(x[1:]))


@every_layer
def test_gradients_reach_the_input_and_every_parameter(make, shape):
    layer, x = make(), torch.randn(shape(), requires_grad=True)
    layer(x).square().sum().backward()
    for name, tensor in [("x", x), *layer.named_parameters()]:
        assert tensor.grad is not None, name
        assert bool(tensor.grad.isfinite().all()), name
        if not name.endswith(("key_bias", "position_bias")):  # softmax does not see what all keys have in common
            assert tensor.grad.abs().max() > 0, name


# --- what the layers are


@pytest.mark.parametrize("name", nearfold.nn.__all__)
def test_no_layer_takes_more_than_twelve_arguments(name):
    """What is rarer is said to `Mixer` by an operation."""
    assert len(inspect.signature(getattr(nearfold.nn, name)).parameters) <= 12


def test_convnn2d_defaults():
    layer = ConvNN2d(4, 6)
    assert layer.operation == parse("nearest(9, cosine, self) | ranked | kernel")
    assert {n: tuple(p.shape) for n, p in layer.named_parameters()} == {"weight": (6, 4, 9), "bias": (6,)}
    assert [n for n, _ in ConvNN2d(4, 6, bias=False).named_parameters()] == ["weight"]
    # self in slot 0: with only that slot's weights it is a pointwise map
    with torch.no_grad():
        layer.weight[..., 1:] = 0
    x = torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight[..., :1, None], layer.bias))


def test_arguments_become_the_operation():
    layer = ConvNN2d(
        4,
        8,
        7,
        stride=(1, 2),
        padding=1,
        similarity=Blend(0.25, "cosine"),
        candidates=Grid(4),
        groups=2,
        backend="knn",
    )
    assert str(layer.operation) == (
        "nearest(7, blend(0.25, cosine), grid(4), self, stride=(1, 2), padding=1) | ranked | kernel(groups=2)"
    )
    assert layer.backend == "knn"
    near, window = BranchingConv2d(4, 8, 5, 7, 0.25, stride=2, groups=2).operation.parts
    assert str(near) == "nearest(7, cosine, self, stride=2) | ranked | kernel(groups=2)"
    assert str(window) == "window(5, stride=2) | box | kernel(groups=2)"
    assert isinstance(BranchingConv2d(4, 8).operation, Branch) and BranchingConv2d(4, 8).operation.mix
    assert isinstance(ACmix2d(4, 8).operation, Sum)
    assert str(KVTAttention(12, 3, 5).operation) == "nearest(5, scaled) | ranked | softmax(heads=3)"
    assert ConvNNAttention(12, 3, 5, include_self=0.5).operation.path.include_self == 0.5
    assert ConvNNAttention(12, 3, 5, kernel="kernel").operation.weight.kernel.groups == 3
    assert len(BranchingAttention(12, 3).operation.parts) == 2


def test_acmix_shares_its_projections_and_starts_with_equal_rates():
    layer = ACmix2d(4, 8, 5, 3, 2)
    shapes = {n: tuple(p.shape) for n, p in layer.named_parameters()}
    assert shapes == {
        "rates": (2,),
        **{f"{c}_weight": (8, 4) for c in ("query", "key", "value")},
        **{f"{c}_bias": (8,) for c in ("query", "key", "value")},
        "0.position_weight": (4, 2),
        "0.position_bias": (4,),
        "1.weight": (9, 6),
        "1.shift_weight": (8, 9, 3, 3),
    }
    assert bool((layer.rates == 0.5).all())
    shifts = layer.get_parameter("1.shift_weight")
    assert bool((shifts == torch.eye(9).view(9, 3, 3)).all()), "starts as pure shifts"


def test_text_of_a_layer_shows_its_operation():
    assert repr(ConvNN2d(4, 6, 5)) == "ConvNN2d(nearest(5, cosine, self) | ranked | kernel, 4, 6, ndim=2)"
    assert "backend=oracle" in repr(Mixer("window(3) | box | kernel", 4, backend="oracle"))


# --- dtypes and memory layouts


@every_layer
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_follows(make, shape, dtype):
    """Low precision stays near float32; selection may differ where two neighbours are almost alike."""
    layer, x = make().eval(), torch.randn(shape())
    wide = layer(x)
    assert wide.dtype == torch.float32
    layer, x = layer.to(dtype), x.to(dtype).requires_grad_()
    y = layer(x)
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad.dtype == dtype
    assert {p.grad.dtype for p in layer.parameters()} <= {dtype}
    off = (y.double() - wide.double()).abs()
    assert off.median() <= {torch.float64: 1e-6, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]


@every_layer
def test_an_empty_batch(make, shape):
    layer, x = make(), torch.randn(0, *shape()[1:], requires_grad=True)
    y = layer(x)
    assert y.shape == (0, *layer(torch.randn(shape())).shape[1:])
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is None or bool((p.grad == 0).all()) for p in layer.parameters())


def strided_view(x):
    """The same values, every other element of a larger tensor."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
    wide[..., ::2] = x
    return wide[..., ::2]


@every_layer
def test_memory_layout_does_not_matter(make, shape):
    layer, x = make().eval(), torch.randn(shape())
    layouts = [
        strided_view(x),
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x.transpose(-1, -2).contiguous().transpose(-1, -2),
        x[:1].expand_as(x),
    ]
    if x.dim() == 4:
        layouts.append(x.contiguous(memory_format=torch.channels_last))
    for other in layouts:
        kept, a, b = other.clone(), other.detach().requires_grad_(), other.detach().clone().requires_grad_()
        y, truth = layer(a), layer(b.contiguous())
        torch.testing.assert_close(y, truth)
        y.square().sum().backward()
        truth.square().sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
        assert torch.equal(other, kept), "the input is left alone"


# --- layers of two inputs, and of one size


def test_cross_attention_reads_the_context():
    layer = CrossAttention(12, 3, context_dim=8, kv_heads=1)
    x, context = torch.randn(2, 7, 12), torch.randn(2, 5, 8, requires_grad=True)
    y = layer(x, context)
    assert y.shape == (2, 7, 12)
    y.square().sum().backward()
    assert context.grad.abs().max() > 0
    order = torch.randperm(5)
    torch.testing.assert_close(layer(x, context[:, order]), y)  # the order of the context does not matter
    for bad, message in (
        (None, r"second input; call it with context="),
        (torch.randn(2, 5, 12), r"context must be \(B, N, 8\)"),
        (torch.randn(3, 5, 8), r"with the batch and dtype of x"),
        (context.double(), r"with the batch and dtype of x"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(x, bad)
    with pytest.raises(ValueError, match="reads one input; leave context out"):
        SelfAttention(12, 3)(x, x)


def test_token_mlp_is_for_one_number_of_tokens():
    layer = TokenMLP(7, 9)
    x = torch.randn(2, 7, 5)
    first, second = layer.expand, layer.contract
    hidden = F.gelu(F.linear(x.transpose(1, 2), first.table_weight, first.table_bias))
    truth = F.linear(hidden, second.table_weight, second.table_bias).transpose(1, 2)
    torch.testing.assert_close(layer(x), truth)
    with pytest.raises(ValueError, match=r"the table is for 7 positions, got a grid of \(6,\)"):
        layer(x[:, :6])


@pytest.mark.parametrize(
    ("candidates", "keys"), [("", 400), (", window(5)", 25), (", window(99)", 400), (", grid(4)", 16)]
)
def test_a_search_costs_as_many_products_as_there_are_candidates(candidates, keys):
    plain = explain("nearest(9, cosine, window(3)) | ranked | kernel", (2, 8, 20, 20))
    searched = explain(f"nearest(9, cosine{candidates}) | ranked | kernel", (2, 8, 20, 20))
    assert searched.forward_flops - plain.forward_flops == 2 * 2 * 400 * 8 * (keys - 9)
