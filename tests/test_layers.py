"""What every named layer promises as an nn.Module: shapes, dtypes, copies, state, and clear refusals."""

from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import torch
import torch.nn.functional as F

import nearfold.nn
from nearfold.grammar import CATALOGUE, Branch, Sum, parse, preset
from nearfold.grammar.similarity import Blend
from nearfold.grammar.words import Grid
from nearfold.lower import explain
from nearfold.nn import (
    ACmix2d,
    BlockAttention2d,
    BranchingAttention,
    BranchingConv2d,
    ConvNN1d,
    ConvNN2d,
    ConvNN3d,
    ConvNNAttention,
    CrossAttention,
    DeformConv2d,
    DynamicConv2d,
    Involution2d,
    KVTAttention,
    LargeKernelConv2d,
    LinearAttention,
    Mixer,
    NeighborhoodAttention1d,
    NeighborhoodAttention2d,
    NeighborhoodAttention3d,
    Pool2d,
    SelectiveScan,
    SelectiveScan2d,
    SelfAttention,
    SlidingWindowAttention,
    StridedAttention,
    TokenMixer,
    TokenMLP,
)
from nearfold.testing import context_for, fitted


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


IMAGES = {
    "ConvNN2d": lambda **k: ConvNN2d(4, 6, 5, **k),
    "ConvNN2d random": lambda **k: ConvNN2d(4, 6, 5, candidates="random(8)", **k),
    "ConvNN2d blend": lambda **k: ConvNN2d(4, 6, 5, similarity="blend(0.3)", candidates="grid(3)", **k),
    "ConvNN2d window": lambda **k: ConvNN2d(4, 6, 5, similarity="euclidean", candidates="window(3)", **k),
    "BranchingConv2d": lambda **k: BranchingConv2d(4, 6, 3, 5, 0.5, **k),
    "BranchingConv2d groups": lambda **k: BranchingConv2d(4, 8, (3, 1), 5, 0.25, groups=2, dilation=2, mix=False, **k),
    "ACmix2d": lambda **k: ACmix2d(4, 8, 7, 3, 2, **k),
    "ACmix2d dilated": lambda **k: ACmix2d(4, 8, (3, 5), 5, 4, dilation=2, **k),
    "DeformConv2d": lambda **k: DeformConv2d(4, 6, **k),
    "DeformConv2d groups": lambda **k: DeformConv2d(4, 6, (3, 5), groups=2, offset_groups=2, modulated=True, **k),
    "Involution2d": lambda **k: Involution2d(4, 5, groups=2, reduction=2, **k),
    "DynamicConv2d": lambda **k: DynamicConv2d(4, 6, 5, experts=3, reduction=1, dilation=2, **k),
    "LargeKernelConv2d": lambda **k: LargeKernelConv2d(4, (13, 7), **k),
}
SEQUENCES = {
    "ConvNN1d": lambda **k: ConvNN1d(4, 6, 5, **k),
    "ConvNN1d padded": lambda **k: ConvNN1d(4, 6, 5, padding=1, candidates="grid(5)", **k),
}
TOKENS = {
    "ConvNNAttention": lambda **k: ConvNNAttention(12, 3, 5, **k),
    "ConvNNAttention separable": lambda **k: ConvNNAttention(12, 3, 5, kernel="separable", include_self=True, **k),
    "ConvNNAttention kernel": lambda **k: ConvNNAttention(12, 3, 5, kernel="kernel", rho="identity", **k),
    "ConvNNAttention plain": lambda **k: ConvNNAttention(
        12, 3, 5, kernel="none", similarity="cosine(coordinates)", **k
    ),
    "ConvNNAttention random": lambda **k: ConvNNAttention(12, 3, 5, candidates="random(6)", kernel=None, **k),
    "KVTAttention": lambda **k: KVTAttention(12, 3, 5, **k),
    "BranchingAttention": lambda **k: BranchingAttention(12, 3, 5, 0.5, **k),
    "TokenMixer": lambda **k: TokenMixer("all | causal | softmax(heads=3)", 12, **k),
    "SelfAttention": lambda **k: SelfAttention(12, 6, kv_heads=2, positions="rotary", causal=True, **k),
    "SelfAttention alibi": lambda **k: SelfAttention(12, 3, kv_heads=1, positions="alibi", **k),
    "SlidingWindowAttention": lambda **k: SlidingWindowAttention(12, 3, 4, **k),
    "StridedAttention": lambda **k: StridedAttention(12, 3, 3, **k),
    "LinearAttention": lambda **k: LinearAttention(12, 3, **k),
    "SelectiveScan": lambda **k: SelectiveScan(12, 5, rank=2, **k),
    "SelectiveScan heads": lambda **k: SelectiveScan(12, 5, num_heads=3, reverse=True, **k),
}
OTHERS = {
    "ConvNN3d": (lambda: ConvNN3d(4, 6, 5), lambda n=4: (2, 4, n, 3, n + 1)),
    "ConvNN3d shuffled": (lambda: ConvNN3d(4, 6, 5, shuffle="both"), lambda n=4: (2, 4, 2 * n, 2, 4)),
    "NeighborhoodAttention1d": (
        lambda: NeighborhoodAttention1d(4, 2, 5, causal_axes=(0,), step=2),
        lambda n=7: (2, 4, n),
    ),
    "NeighborhoodAttention2d": (
        lambda: NeighborhoodAttention2d(4, 2, 3, dilation=2, relative_bias=True),
        lambda n=7: (2, 4, n, n + 2),
    ),
    "NeighborhoodAttention3d": (
        lambda: NeighborhoodAttention3d(4, 2, (1, 3, 3), causal_axes=(0,)),
        lambda n=4: (2, 4, n, 3, n + 1),
    ),
    "BlockAttention2d": (lambda: BlockAttention2d(4, 2, 3, shift=1), lambda n=7: (2, 4, n, n + 2)),
    "Pool2d": (lambda: Pool2d(4, 3, "max", stride=2, padding=1), lambda n=7: (2, 4, n, n + 2)),
    "SelectiveScan2d": (lambda: SelectiveScan2d(4, 3), lambda n=7: (2, 4, n, n + 2)),
    "SelectiveScan2d snake": (lambda: SelectiveScan2d(4, 3, order="snake"), lambda n=7: (2, 4, n, n + 2)),
}
# name -> (constructor, an input of it at size n)
LAYERS = (
    {name: (make, lambda n=7: (2, 4, n, n + 2)) for name, make in IMAGES.items()}
    | {name: (make, lambda n=7: (2, 4, n)) for name, make in SEQUENCES.items()}
    | {name: (make, lambda n=7: (2, n, 12)) for name, make in TOKENS.items()}
    | OTHERS
)
APART = {"Mixer", "CrossAttention", "TokenMLP"}  # the general layer, one of two inputs, one of a fixed size
every_layer = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=list(LAYERS))


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


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_catalogue_entry_is_a_layer_over_sequences_images_and_volumes(name):
    for ndim, grid in ((1, (9,)), (2, (5, 6)), (3, (3, 4, 2))):
        x = torch.randn(2, 24, *grid)
        if name in ("conv_causal", "sliding_window") and ndim > 1:
            with pytest.raises(ValueError, match=r"name the axes of the . that are causal"):
                Mixer(CATALOGUE[name].notation, 24, ndim=ndim)(x)
            continue
        layer = Mixer(fitted(preset(name), grid), 24, ndim=ndim)
        stride = {"conv_strided": 2, "pool_mean": 2, "pool_max": 2}.get(name, 1)
        context = context_for(layer, x)
        y = layer(x) if context is None else layer(x, context)
        sizes = (n // stride for n in grid) if name.startswith("pool") else (-(-n // stride) for n in grid)
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
        rho="softmax(heads=2, project=qk)",
        kernel="separable(groups=2)",
        shape="box",
        include_self=False,
        backend="knn",
    )
    assert str(layer.operation) == (
        "nearest(7, blend(0.25, cosine), grid(4), stride=(1, 2), padding=1) | box"
        " | softmax(heads=2, project=qk)*separable(groups=2)"
    )
    assert layer.backend == "knn"
    near, window = BranchingConv2d(4, 8, 5, 7, 0.25, stride=2, dilation=3, groups=2).operation.parts
    assert str(near) == "nearest(7, cosine, self, stride=2) | ranked | kernel(groups=2)"
    assert str(window) == "window(5, stride=2, dilation=3) | box | kernel(groups=2)"
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


# --- copies and state


@every_layer
def test_copies_compute_the_same(make, shape):
    layer, x = make().train(), torch.randn(shape())
    layer(x)  # draws of random candidates are part of what is copied
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    torch.manual_seed(1)
    loaded = make()
    assert loaded.load_state_dict(torch.load(file, weights_only=True)).missing_keys == []
    others = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded]
    y = layer(x)
    for other in others:
        assert torch.equal(other(x), y)
        assert str(other.operation) == str(layer.operation)


@every_layer
def test_a_copy_is_on_its_own(make, shape):
    layer, x = make().eval(), torch.randn(shape())
    y = layer(x)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1)
    assert torch.equal(layer(x), y)
    assert not torch.equal(twin(x), y) or not list(twin.parameters())  # pooling has none


@every_layer
def test_there_is_no_state_besides_parameters_and_the_sampler(make, shape):
    layer = make()
    draws = any("random" in str(p.path) for p in layer.operation.parts)
    assert [name for name, _ in layer.named_buffers()] == (["sampler"] if draws else [])
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    before = {name: t.clone() for name, t in tensors.items()}
    layer(torch.randn(shape()))
    layer(torch.randn(shape(4)))
    assert set(layer.state_dict()) == set(before)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name != "sampler"), name


@every_layer
def test_reset_parameters_draws_anew(make, shape):
    layer = make()
    before = {n: p.clone() for n, p in layer.named_parameters()}
    layer.reset_parameters()
    drawn = {n for n, p in layer.named_parameters() if not torch.equal(p, before[n])}
    fixed = {
        n for n, p in before.items() if n.endswith(("rates", "shift_weight", "A_log")) or bool((p == p.max()).all())
    }
    assert drawn == before.keys() - fixed


def test_the_backend_is_only_a_choice_of_how():
    x = torch.randn(2, 4, 5, 6)
    for make, others in ((ConvNN2d, ("knn", "oracle")), (ACmix2d, ("oracle",))):
        layer = make(4, 8)
        y = layer(x)
        for backend in others:
            layer.backend = backend
            torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-5)


# --- shuffling


@pytest.mark.parametrize("scale", [1, 2, 3])
@pytest.mark.parametrize("shuffle", ["none", "before", "after", "both"])
def test_shuffles_of_images(shuffle, scale):
    many = scale**2
    before, after = shuffle in ("before", "both"), shuffle in ("after", "both")
    layer = ConvNN2d(4, 6, 5, shuffle=shuffle, shuffle_scale=scale)
    plain = ConvNN2d(4 * (many if before else 1), 6 * (many if after else 1), 5)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 6, 12)
    y = F.pixel_unshuffle(x, scale) if before else x
    y = plain(y)
    y = F.pixel_shuffle(y, scale) if after else y
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("shuffle", ["before", "after", "both"])
def test_shuffles_of_sequences(shuffle):
    """The public ConvNN code reshapes: c * r + i channels take the i-th of r stretches of channel c."""
    before, after = shuffle in ("before", "both"), shuffle in ("after", "both")
    layer = ConvNN1d(4, 6, 3, shuffle=shuffle)
    plain = ConvNN1d(4 * (2 if before else 1), 6 * (2 if after else 1), 3)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 12)
    y = torch.stack([x[:, c, i * 6 : i * 6 + 6] for c in range(4) for i in range(2)], 1) if before else x
    y = plain(y)
    if after:
        y = torch.stack([torch.cat([y[:, 2 * c], y[:, 2 * c + 1]], -1) for c in range(6)], 1)
    assert torch.equal(layer(x), y)


# --- bad input: ValueError with the argument, the value and the way out

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
    (lambda: ConvNN2d(4, 6, rho="softmx"), "'softmx' is not a rho (did you mean softmax?)"),
    (lambda: ConvNN2d(4, 6, kernel="dense"), "'dense' is not a kernel"),
    (lambda: ConvNN2d(4, 6, kernel="kernel(groups=3)"), "groups=3 must divide the 4 value channels"),
    (lambda: ConvNN2d(4, 6, kernel="depthwise"), "makes 4 channels, but out_channels=6"),
    (lambda: ConvNN2d(4, 6, shape="row"), "shape row does not go with path nearest"),
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
    with pytest.raises(
        ValueError, match=r"backend='fast' is not one of: auto, conv, block, sdpa, linear, scan, knn, local, gather"
    ):
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
    with pytest.raises(ValueError, match="groups=2 goes with"):
        ConvNN2d(8, 8, groups=2, kernel="depthwise")
    with pytest.raises(ValueError, match="groups=3 must divide"):
        ConvNN2d(8, 8, groups=3)


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
