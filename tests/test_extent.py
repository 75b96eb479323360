"""Cost follows what is there, not what was asked for; what cannot be filled is said, and changes no number."""

import dataclasses
import random
import warnings

import pytest
import torch

from nearfold.lower import execute, explain
from nearfold.lower.frame import frame
from nearfold.nn import ConvNN2d, KVTAttention, Mixer, SlidingWindowAttention, StridedAttention, knn_attention

HUGE = 2**31 - 1


def drawn(seed):
    """An operation that asks for more than a small grid holds, and the grid."""
    rng = random.Random(seed)
    ndim = rng.choice([1, 2, 2, 3])
    grid = tuple(rng.randint(1, (9, 4, 3)[ndim - 1]) for _ in range(ndim))
    sizes = tuple(rng.randint(1, (24, 12, 7)[ndim - 1]) for _ in range(ndim))
    dilation, heads = rng.randint(1, 3), rng.choice([1, 2])
    rho = rng.choice([f"softmax(heads={heads})", f"identity(heads={heads})", f"mean(heads={heads})", "max"])
    table = "scaled(bias=table), " if rho.startswith("softmax") and rng.random() < 0.6 else ""
    kind = rng.choice(["nearest", "nearest", "inside", "zeros", "block", "strided"])
    if kind == "nearest":
        near = rng.choice(["dot", "cosine", "euclidean", "position", "blend(0.4)"])
        among = rng.choice(["all", "all", "grid(2)", "grid(9, inset=1)", "window(3)", "window(5)", "random(3)"])
        own = rng.choice(["", ", self", ", self=0.7", ", self, again=-1.0"])
        border = rng.choice(["", ", padding=1", ", stride=2"])
        weight = rng.choice(
            [f"softmax(heads={heads})", "kernel", "depthwise", "softmax*separable", "experts(2)", "mean"]
        )
        shape = rng.choice(["ranked", "box", "causal"])
        return f"nearest({rng.randint(1, 60)}, {near}, {among}{own}{border}) | {shape} | {weight}", grid
    causal = tuple(a for a in range(ndim) if rng.random() < 0.3)
    shape = f"causal(axes=({', '.join(map(str, causal))},))" if causal else "box"
    if kind == "inside":
        rho = "softmax" if rho == "max" else rho
        step = tuple(rng.randint(1, 5) for _ in range(ndim))
        return f"window({sizes}, {table}mode=inside, dilation={dilation}, step={step}) | {shape} | {rho}", grid
    if kind == "zeros":
        shape = "box" if rho == "max" else shape
        return f"window({sizes}, {table}dilation={dilation}, stride={rng.randint(1, 2)}) | {shape} | {rho}", grid
    if kind == "block":
        rho = "softmax" if rho == "max" else rho
        shift = tuple(rng.randint(0, n - 1) for n in sizes)
        return f"block({sizes}, {table}shift={shift}) | box | {rho}", grid
    return f"all | strided({rng.choice([1, 2, 5, 60])}) | softmax(heads={heads})", grid


def results(layer, x):
    """Output and every gradient, those of unread parameters included."""
    x = x.clone().requires_grad_()
    y = layer(x)
    parameters = list(layer.parameters())
    slopes = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), [x, *parameters],
                                 allow_unused=True)  # fmt: skip
    return [y, *(torch.zeros_like(p) if g is None else g for g, p in zip(slopes, [x, *parameters], strict=True))]


@pytest.mark.filterwarnings("ignore:.*slots can be filled")
@pytest.mark.parametrize("seed", range(60))
def test_what_is_left_out_changes_nothing(seed, monkeypatch):
    text, grid = drawn(seed)
    torch.manual_seed(seed)
    layer = Mixer(text, 4, ndim=len(grid)).double()
    x = torch.randn(2, 4, *grid, dtype=torch.double)
    for backend in ("auto", "oracle"):
        layer.backend, start = backend, None if layer.sampler is None else layer.sampler.clone()
        fitted = results(layer, x)
        with monkeypatch.context() as whole:
            whole.setattr(execute, "frame", lambda op, *sizes: dataclasses.replace(frame(op, *sizes), op=op))
            if start is not None:
                layer.sampler.copy_(start)
                layer._draws = type(layer._draws)()
            asked = results(layer, x)
        for got, want in zip(fitted, asked, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10, msg=f"{backend}: {text} on {grid}")


@pytest.mark.filterwarnings("ignore:.*slots can be filled")
@pytest.mark.parametrize(
    "operation",
    [
        f"nearest({HUGE}) | ranked | softmax",
        f"nearest({HUGE}, dot, random({HUGE}), self) | box | mean",
        f"nearest(5, dot, window({HUGE})) | ranked | softmax",
        f"nearest(5, dot, grid({HUGE}, inset={HUGE})) | ranked | softmax",
        f"nearest(5, position(dilation={HUGE})) | ranked | softmax",
        f"nearest(5, stride={HUGE}) | ranked | softmax",
        f"all(stride={HUGE}) | row | softmax",
        "all | strided(4611686018427387904) | softmax",
        "all | strided(4611686018427387904) | identity",
        f"window({HUGE}) | box | softmax",
        f"window({HUGE}, mode=inside, step={HUGE}) | box | softmax",
        f"window({HUGE}) | box | max",
        f"block({HUGE}, shift={HUGE - 1}) | box | softmax",
    ],
)
def test_whatever_is_asked_for_costs_what_is_there(operation):
    layer = Mixer(operation, 4)
    y = layer(torch.randn(1, 4, 5, 7, requires_grad=True))
    y.sum().backward()
    assert y.isfinite().all()


def test_functions_and_token_layers_cost_what_is_there():
    q, k, v = torch.randn(2, 2, 15, 8), torch.randn(2, 2, 35, 8), torch.randn(2, 2, 35, 4)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(knn_attention(q, k, v, HUGE), dense)
    x = torch.randn(1, 16, 8)
    assert StridedAttention(8, 2, 10**12)(x).shape == SlidingWindowAttention(8, 2, HUGE)(x).shape == x.shape


def test_what_cannot_be_filled_is_said_once():
    layer, x = ConvNN2d(4, 4, k=9), torch.randn(1, 4, 2, 2)
    with pytest.warns(UserWarning, match=r"k=9, but only 4 slots can be filled on a grid of 2 x 2"):
        layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x), layer(x[..., :1])
        ConvNN2d(4, 4, k=4)(x)
        KVTAttention(8, 2, k=3)(torch.randn(1, 3, 8))
    notes = explain("nearest(9, self) | ranked | kernel", (1, 4, 2, 2)).notes
    assert [note.split(";")[0] for note in notes] == [
        "nearest(9, cosine, self): k=9, but only 4 slots can be filled on a grid of 2 x 2"
    ]
    assert explain("nearest(4, self) | ranked | kernel", (1, 4, 2, 2)).notes == ()
    assert "note: nearest(9" in str(explain("nearest(9) | ranked | kernel", (1, 4, 2, 2)))


def test_a_window_too_large_to_count_is_refused():
    with pytest.raises(ValueError, match="slots on this map; at most 16777215"):
        Mixer(f"window({HUGE}, mode=reflect) | box | softmax", 4)(torch.randn(1, 4, 3, 3))
    with pytest.raises(ValueError, match="numbers; at most"):
        Mixer(f"window({HUGE}) | box | kernel", 4)
