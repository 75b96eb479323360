"""Whole layers in one call of the engine: the truth is what the operators that torch knows give in their place."""

import random

import pytest
import torch
from helpers.engine_draws import assert_near, every_set
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from nearfold.grammar import parse
from nearfold.kernels import engine, whole
from nearfold.nn import ACmix2d, ConvNN2d, DeformConv2d, Mixer
from nearfold.testing import poisoned_empties

ENTRIES = {"neighbors": ("neighbors",), "windows": ("window_attention", "shift_conv"), "deformed": ("deformed",)}
SIMILARITIES = ["cosine", "dot", "scaled", "euclidean", "euclidean(squared)"]


def neighbors(rng, dtype):
    """A layer, an input and a context: heads, groups, borders, strides."""
    C, heads = rng.choice([(4, 1), (6, 2), (12, 3), (20, 4), (64, 1)])
    grid = rng.choice([(1, 1), (7,), (5, 6), (9, 8), (3, 4, 2), (130,)])
    weighs, kernel = rng.random() < 0.5, rng.choice(["", "kernel", "kernel(groups=2)", "depthwise"])
    cross, k = rng.random() < 0.2, rng.randint(2, 6)
    options = [str(k), rng.choice(SIMILARITIES)]
    if not cross:
        options += ["self"] * (rng.random() < 0.5)
        options += [f"padding={rng.randint(1, 2)}"] * (rng.random() < 0.2)
        options += [f"stride={rng.randint(2, 3)}"] * (rng.random() < 0.2)
    weighs = weighs or cross
    projections = "qkv" if cross else rng.choice(["none", "none", "v", "qk", "qkv"])
    rho = f"softmax(heads={heads}, project={projections})" if weighs else "ones"
    text = f"nearest({', '.join(options)}{', cross' * cross}) | ranked | {rho}{f'*{kernel}' * bool(kernel)}"
    layer = Mixer(parse(text), C, ndim=len(grid)).to(dtype)
    x = torch.randn(rng.randint(1, 3), C, *grid, dtype=dtype)
    if rng.random() < 0.5:  # positions that are alike, and one that is zero
        x[..., -1] = x[..., 0]
        x[..., 0, :] = 0 if len(grid) > 1 else x[..., 0, :]
    context = torch.randn(x.shape[0], C, 11, dtype=dtype) if cross else None
    return layer, x, context


def windows(rng, dtype):
    """The same of attention in a window, and of ACmix's convolution: positions, mirrored borders, causal axes."""
    C, heads = rng.choice([(4, 1), (6, 2), (12, 3), (24, 2)])
    grid = rng.choice([(7,), (5, 6), (9, 8), (3, 4, 2), (40, 3)])
    size = tuple(rng.randint(1, 4) for _ in grid)
    options = [str(size if len(size) > 1 else size[0])]
    attends, relative, reflect = rng.random() < 0.6, rng.random() < 0.5, rng.random() < 0.4
    options += ["scaled(relative)"] * (attends and relative)
    options += [f"stride={rng.randint(2, 3)}"] * (rng.random() < 0.4)
    options += ["dilation=2"] * (rng.random() < 0.2)
    options += ["mode=reflect"] * reflect
    shape = "causal(axes=(0,))" if attends and not reflect and rng.random() < 0.3 else "box"
    rho = f"softmax(heads={heads}, project={rng.choice(['none', 'qkv', 'v'])})"
    shift = f"shift(heads={heads}{', interleaved' * (rng.random() < 0.5)})"
    text = f"window({', '.join(options)}) | {shape} | {rho if attends else shift}"
    layer = Mixer(parse(text), C, ndim=len(grid)).to(dtype)
    return layer, torch.randn(rng.randint(1, 3), C, *grid, dtype=dtype), None


def deformed(rng, dtype):
    """The same of windows whose slots are moved: by much, by nothing, beyond the map, by NaN."""
    C, heads = rng.choice([(4, 1), (6, 2), (12, 3), (24, 2)])
    grid = rng.choice([(7,), (5, 6), (9, 8), (3, 4, 2), (20, 3)])
    size = tuple(rng.randint(1, 3) for _ in grid)
    options = [str(size if len(size) > 1 else size[0])]
    options += [f"stride={rng.randint(2, 3)}"] * (rng.random() < 0.3)
    options += ["dilation=2"] * (rng.random() < 0.2)
    options += [f"padding={rng.randint(1, 2)}"] * (rng.random() < 0.3 and min(grid) > 2)
    options += [f"groups={heads}"] * (rng.random() < 0.5)
    rho, kernel = rng.choice(["ones", "modulated"]), rng.choice(["", "kernel", "kernel(groups=2)", "depthwise"])
    weight = rng.choice([kernel or "ones", f"ones(project=v){f'*{kernel}' * bool(kernel)}"])
    weight = f"modulated{f'*{kernel}' * bool(kernel)}" if rho == "modulated" else weight
    layer = Mixer(parse(f"deformable({', '.join(options)}) | box | {weight}"), C, ndim=len(grid)).to(dtype)
    scale = rng.choice([0, 0.1, 0.5, 0.5, 5])
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name.startswith(("offset", "mask")):
                p.copy_(scale * torch.randn_like(p))
        if rng.random() < 0.2:
            layer.offset_bias[0] = rng.choice([float("nan"), float("inf"), -1e30, 1e10])
    return layer, torch.randn(rng.randint(1, 3), C, *grid, dtype=dtype), None


def otherwise(rng, x, unknown):
    """The same numbers, some NaN where those may be, at other strides."""
    grid = x.shape[2:]
    if rng.random() < 0.2 and unknown:
        x[0, 0, ..., 0] = float("nan")
    way = rng.choice(["plain", "last", "sliced", "turned"])
    if way == "last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    elif way == "sliced":
        x = torch.cat([x, x], 1)[:, : x.shape[1]]
    elif way == "turned" and len(grid) > 1:  # a grid that is not one axis
        x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    return x


def results(layer, x, context, grad):
    given = [x.detach().requires_grad_(), *layer.parameters()]
    y = layer(given[0], context)
    slopes = torch.autograd.grad(y, given, grad, allow_unused=True) if grad is not None else []
    return [y, *(torch.zeros(()) if g is None else g for g in slopes)]


@pytest.mark.filterwarnings("ignore:.*slots can be filled")
@every_set
@pytest.mark.parametrize("draw", [neighbors, windows, deformed])
@pytest.mark.parametrize("seed", range(2))
def test_it_is_what_the_operators_give(isa, draw, seed, monkeypatch):
    rng, ran = random.Random(seed), []
    monkeypatch.setattr(engine, "run", lambda name, *a, run=engine.run: (ran.append(name), run(name, *a))[1])
    for case in range(40):
        torch.manual_seed(100 * seed + case)
        dtype = rng.choice([torch.float64, torch.float64, torch.float32])
        layer, x, context = draw(rng, dtype)
        # torch's own convolutions multiply a gradient that is NaN with the padding, or leave it out: by the dtype
        x = otherwise(rng, x, unknown=draw is not deformed or dtype == torch.float64)
        torch.set_num_threads(rng.randint(1, 2))
        with engine.forced(isa), poisoned_empties():
            with torch.no_grad():
                quiet = layer(x, context)
            grad = torch.randn_like(quiet)
            found = results(layer, x, context, grad)
            with monkeypatch.context() as slow:
                slow.setattr(whole, "_serves", lambda *_: False)
                wanted = results(layer, x, context, grad)
        what = f"case {case}: {layer.operation} on {tuple(x.shape)} {x.stride()} {dtype}"
        assert_near(quiet, wanted[0], what)
        for f, w in zip(found, wanted, strict=True):
            assert_near(f, w, what)
    torch.set_num_threads(2)
    for name in ENTRIES[draw.__name__]:
        assert ran.count(name) > 15 and ran.count(f"{name}_backward") > 8


@pytest.mark.skipif(engine.get() is None, reason="needs the compiled engine")
@pytest.mark.parametrize(
    "operation",
    [
        "nearest(4, cosine, self) | ranked | kernel",
        "nearest(3, scaled) | ranked | softmax(heads=2)*depthwise",
        "window(3, scaled(relative), mode=reflect) | box | softmax(heads=2)",
        "window((1, 3)) | box | shift(2)",
        "deformable((1, 2), groups=2) | box | modulated*kernel",
        "deformable(2) | box | ones(project=v)",
    ],
)
def test_gradients_of_gradients(operation, monkeypatch):
    """By the operators that torch knows, from the same operands."""
    ran = []
    monkeypatch.setattr(engine, "run", lambda name, *a, run=engine.run: (ran.append(name), run(name, *a))[1])
    layer = Mixer(operation, 4).double()
    with torch.no_grad():  # off whole positions, where a deformable window has a kink
        for name, p in layer.named_parameters():
            if name.startswith("offset"):
                p.copy_(0.3 + 0.02 * torch.randn_like(p))
    x = torch.randn(1, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))
    assert torch.autograd.gradgradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))
    names = {name for names in ENTRIES.values() for name in names} & set(ran)
    assert len(names) == 1 and f"{names.pop()}_backward" in ran


@pytest.mark.skipif(engine.get() is None, reason="needs the compiled engine")
def test_the_gradient_of_many_rows_is_exact():
    """The bias's gradient adds 20,000 numbers; in float32 one after another it would be off by 1e-4."""
    layer, x = ConvNN2d(3, 2, 3), torch.randn(2, 3, 100, 100)
    y = layer(x)
    grad = torch.rand_like(y)
    (found,) = torch.autograd.grad(y, [layer.bias], grad)
    torch.testing.assert_close(found.double(), grad.double().sum((0, 2, 3)), rtol=1e-6, atol=0)


CHECKPOINTED = [ConvNN2d(4, 4, 3), ACmix2d(4, 4), DeformConv2d(4, 4, modulated=True)]


@pytest.mark.parametrize("layer", CHECKPOINTED, ids=lambda layer: type(layer).__name__)
def test_a_checkpointed_layer_has_the_same_gradients(layer):
    x = torch.randn(1, 4, 5, 5, requires_grad=True)
    wanted = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    for reentrant in (False, True):
        y = checkpoint(layer, x, use_reentrant=reentrant)
        y.square().sum().backward()
        found = [x.grad, *(p.grad for p in layer.parameters())]
        for f, w in zip(found, wanted, strict=True):
            torch.testing.assert_close(f, w, rtol=1e-5, atol=1e-6)
        x.grad = None
        layer.zero_grad()


def test_who_watches_sees_the_operators():
    layer, x = ConvNN2d(4, 4, 3), torch.randn(1, 4, 5, 5)
    with profile() as seen:
        layer(x)
    names = {event.name for event in seen.events()}
    assert {"nearfold::select", "nearfold::aggregate"} <= names
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 25 * (25 * 4 + 3 * 4 * 4)
    graph = str(make_fx(layer)(x).graph)
    assert "nearfold.select" in graph and "nearfold.aggregate" in graph
    graph = str(make_fx(ACmix2d(4, 4))(x).graph)
    assert "nearfold.local_attention" in graph and "nearfold.grouped_conv" in graph
    graph = str(make_fx(DeformConv2d(4, 4))(x).graph)
    assert "convolution" in graph and "nearfold.corners" in graph and "nearfold.aggregate" in graph


@pytest.mark.parametrize("layer", CHECKPOINTED, ids=lambda layer: type(layer).__name__)
def test_a_batch_of_nothing(layer):
    x = torch.randn(0, 4, 5, 5, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    assert all(not g.any() for g in torch.autograd.grad(y.sum(), [x, *layer.parameters()]))


@pytest.mark.skipif(engine.get() is None, reason="needs the compiled engine")
@pytest.mark.parametrize("layer", [ConvNN2d, ACmix2d, DeformConv2d])
def test_another_thread_is_woken_for_work_only(layer, monkeypatch):
    threads = []
    monkeypatch.setattr(engine, "run", lambda name, *a, run=engine.run: (threads.append(a[-1]), run(name, *a))[1])
    torch.set_num_threads(2)
    for grid in ((4, 4), (30, 30)):
        x = torch.randn(4, 16, *grid, requires_grad=True)
        layer(16, 16)(x).sum().backward()
    half = len(threads) // 2
    assert threads == [1] * half + [2] * half and half >= 2


@pytest.mark.skipif(engine.get() is None, reason="needs the compiled engine")
def test_offsets_of_a_large_map_are_torchs_convolution(monkeypatch):
    ran = []
    monkeypatch.setattr(engine, "run", lambda name, *a, run=engine.run: (ran.append(name), run(name, *a))[1])
    layer = DeformConv2d(4, 4)
    layer(torch.randn(1, 4, 32, 32))
    layer(torch.randn(1, 4, 33, 32))
    assert ran == ["deformed", "corners", "aggregate"]


@pytest.mark.parametrize(
    "layer",
    [
        ConvNN2d(4, 4, 3),
        DeformConv2d(4, 4),
        Mixer("window(3) | box | softmax(heads=2, project=none)", 4),
        Mixer("window(3) | box | shift(2)", 4),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_autocast_changes_what_it_changes_in_the_operators(layer, monkeypatch):
    x = torch.randn(1, 4, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
        monkeypatch.setattr(whole, "_serves", lambda *_: False)
        wanted = layer(x)
    assert found.dtype == wanted.dtype and torch.equal(found, wanted)


@pytest.mark.skipif(engine.get() is None, reason="needs the compiled engine")
def test_what_is_kept_for_the_gradient_is_not_changed_in_between():
    layer, x = ConvNN2d(4, 4, 3), torch.randn(1, 4, 5, 5, requires_grad=True)
    inner = x * 1
    y = layer(inner)
    with torch.no_grad():
        inner.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
