"""The compiled kernels that read windows equal PyTorch's implementation of the operators, on every instruction set.

Geometries are drawn at random: one to three axes, strides, dilations, both paddings, windows larger than the grid,
layouts with channels first and last, both dtypes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from nearfold.kernels import engine
from nearfold.kernels.grouped_conv import grouped_conv
from nearfold.kernels.local_attention import local_attention
from nearfold.nn import ACmix2d
from nearfold.study.measure import peak_bytes
from nearfold.testing import CASES, GRIDS, conform, poisoned_empties

SETS = [name for name in engine.names() if name != engine.OFF]
pytestmark = pytest.mark.skipif(not SETS, reason="nearfold was installed without its compiled engine")
BUDGET = {torch.float64: 1e-12, torch.float32: 2e-5}


@dataclass(frozen=True)
class Geometry:
    """A window on a grid, as the operators take it."""

    grid: list[int]
    out: list[int]
    size: list[int]
    stride: list[int]
    dilation: list[int]
    before: list[int]
    reflect: bool

    @staticmethod
    def draw(rng: random.Random) -> Geometry:
        axes = rng.choice([1, 2, 2, 2, 3])
        wide = 50 if axes < 3 else 12
        grid = [rng.randint(1, 9) if rng.random() < 0.6 else rng.randint(10, wide) for _ in range(axes)]
        size = [rng.choice([1, 2, 3, 5, 7]) for _ in range(axes)]
        stride = [rng.choice([1, 1, 2, 3]) for _ in range(axes)]
        dilation = [rng.choice([1, 1, 2, 3]) for _ in range(axes)]
        before = [rng.randint(0, d * (s - 1)) for s, d in zip(size, dilation, strict=True)]
        room = [n + 2 * b - d * (s - 1) - 1 for n, b, s, d in zip(grid, before, size, dilation, strict=True)]
        out = [max(r // t + 1, 1) for r, t in zip(room, stride, strict=True)]
        return Geometry(grid, out, size, stride, dilation, before, rng.random() < 0.5)

    def attention(self) -> tuple[object, ...]:
        return self.size, self.stride, self.dilation, self.before, self.reflect


def leaf(rng: random.Random, *shape: int, dtype: torch.dtype) -> Tensor:
    """Random numbers (B, H, c, *grid), channels first or last."""
    B, H, c, *grid = shape
    if rng.random() < 0.6:
        return torch.randn(shape, dtype=dtype, requires_grad=True)
    return torch.randn(B, *grid, H, c, dtype=dtype).movedim((-2, -1), (1, 2)).requires_grad_()


def outcome(call, leaves: list[Tensor], name: str) -> list[Tensor]:
    """Output and every gradient on one instruction set."""
    with engine.forced(name), poisoned_empties():
        y = call(*leaves)
        upstream = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).to(y).view_as(y)
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


def compare(call, leaves: list[Tensor], budget: float, what: object) -> None:
    truth = outcome(call, leaves, engine.OFF)
    for name in SETS:
        for i, (mine, wanted) in enumerate(zip(outcome(call, leaves, name), truth, strict=True)):
            error = ((mine - wanted).abs().max() / wanted.abs().max().clamp(min=1)).item()
            assert error <= budget, f"{name}, tensor {i}: off by {error:.1e} (budget {budget:.0e}) for {what}"


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("seed", range(40))
def test_attention_equals_pytorch(seed, dtype):
    torch.manual_seed(seed)
    rng = random.Random(seed)
    g = Geometry.draw(rng)
    B, H, e, d = rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, 19), rng.randint(1, 19)
    leaves = [leaf(rng, B, H, c, *n, dtype=dtype) for c, n in ((e, g.out), (e, g.grid), (d, g.grid))]
    metric = rng.choice([("dot", False), ("dot", False), ("euclidean", False), ("euclidean", True)])
    scale = rng.choice([1.0, -0.5, 0.3])
    compare(lambda *t: local_attention(*t, *g.attention(), *metric, scale)[0], leaves, BUDGET[dtype], (g, metric))


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("seed", range(40))
def test_grouped_conv_equals_pytorch(seed, dtype):
    torch.manual_seed(seed)
    rng = random.Random(seed)
    g = Geometry.draw(rng)
    B, G, O = rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, 7)
    maps = [leaf(rng, B, G, rng.randint(1, 6), *g.grid, dtype=dtype) for _ in range(rng.randint(1, 4))]
    weight = torch.randn(G, O, sum(m.shape[2] for m in maps), *g.size, dtype=dtype, requires_grad=True)

    def call(*leaves: Tensor) -> Tensor:
        y: Tensor = grouped_conv(leaves[:-1], leaves[-1], g.stride, g.dilation, g.before, g.out, g.reflect)
        return y

    compare(call, [*maps, weight], BUDGET[dtype], g)


@pytest.mark.parametrize("shape", [(1, 1, 6, 70, 70), (1, 2, 5, 300), (2, 1, 4, 6, 9, 40)], ids=str)
def test_few_problems_and_large_maps(shape):
    """Fewer problems than threads share every step; scores that no cache holds are computed again in the backward."""
    grid = shape[3:]
    torch.manual_seed(0)
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    n = len(grid)
    size, before = [(9, 7, 3)[n - 1]] * n, [(4, 3, 1)[n - 1]] * n
    args = (size, [1] * n, [1] * n, before, n == 2, "dot", False, 0.5)
    compare(lambda *t: local_attention(*t, *args)[0], leaves, 1e-12, shape)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("text", [t for n, t in CASES.items() if n in ("acmix", "attention_local", "window_position")])
@pytest.mark.parametrize("grid", [*GRIDS, (17, 33)], ids=str)
def test_layers_conform(text, grid, name):
    with engine.forced(name), poisoned_empties():
        conform(text, grid)
        conform(text, grid, torch.float32)


@pytest.mark.parametrize("name", [*SETS, engine.OFF])
@pytest.mark.parametrize("reflect", [False, True])
@pytest.mark.parametrize("metric", [("dot", False), ("euclidean", False), ("euclidean", True)], ids=str)
def test_gradients_are_derivatives(metric, reflect, name):
    torch.manual_seed(0)
    q = torch.randn(1, 2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 2, 3, 4, 7, dtype=torch.float64, requires_grad=True)
    v = torch.randn(1, 2, 2, 4, 7, dtype=torch.float64, requires_grad=True)
    args = ([3, 3], [2, 2], [1, 1], [1, 1], reflect, *metric, 0.7)
    with engine.forced(name):
        assert torch.autograd.gradcheck(lambda *t: local_attention(*t, *args)[0], (q, k, v), fast_mode=True)
        w = torch.randn(2, 3, 5, 3, 3, dtype=torch.float64, requires_grad=True)
        conv = ([2, 2], [1, 1], [1, 1], [2, 4], reflect)
        assert torch.autograd.gradcheck(lambda k, v, w: grouped_conv([k, v], w, *conv), (k, v, w), fast_mode=True)


@pytest.mark.parametrize("name", [*SETS[:1], engine.OFF])
def test_operators_pass_opcheck(name):
    q, k, v = (torch.randn(2, 2, c, 5, 6, requires_grad=True) for c in (3, 3, 4))
    with engine.forced(name):
        torch.library.opcheck(
            local_attention.registered, (q, k, v, [3, 3], [1, 1], [1, 1], [1, 1], False, "euclidean", False, 1.0)
        )
        w = torch.randn(2, 3, 7, 3, 3, requires_grad=True)
        torch.library.opcheck(grouped_conv.registered, ([k, v], w, [2, 1], [1, 1], [1, 1], [3, 6], True))


@pytest.mark.parametrize("shape", [(3, 2, 5, 9, 20), (1, 1, 4, 40), (1, 2, 3, 3, 5, 18)], ids=str)
def test_any_number_of_threads_gives_the_same_bits(shape):
    torch.manual_seed(0)
    leaves = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    n = len(shape) - 3
    args = ([3] * n, [1] * n, [2] * n, [2] * n, True, "dot", False, 1.0)
    w = torch.randn(shape[1], 2, 2 * shape[2], *[3] * n, requires_grad=True)
    conv = ([1] * n, [2] * n, [2] * n, list(shape[3:]), True)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(
                [
                    *outcome(lambda *t: local_attention(*t, *args)[0], leaves, SETS[0]),
                    *outcome(lambda a, b, w: grouped_conv([a, b], w, *conv), [leaves[0], leaves[1], w], SETS[0]),
                ]
            )
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(("dtype", "ulp"), [(torch.float32, 1.2e-7), (torch.float64, 2.3e-16)], ids=str)
def test_the_exponential_is_accurate(dtype, ulp, name):
    """Weights of single slots, read off with one-hot values, against softmax in higher precision."""
    slots, M = 40, 50
    torch.manual_seed(0)
    k = torch.randn(1, 1, 1, M + slots - 1, dtype=dtype) * 8
    v = torch.eye(M + slots - 1, dtype=dtype)[None, None]
    args = ([slots], [1], [1], [0], False, "dot", False, 1.0)
    with engine.forced(name):
        y, _ = local_attention(torch.ones(1, 1, 1, M, dtype=dtype), k, v, *args)
    if dtype == torch.float32:
        truth = k.double()[0, 0, 0].unfold(0, slots, 1).softmax(-1)
    else:
        import numpy as np

        wide = np.exp(k[0, 0, 0].unfold(0, slots, 1).numpy().astype(np.longdouble))
        truth = torch.from_numpy((wide / wide.sum(-1, keepdims=True)).astype(np.float64))
    mine = y[0, 0].T.double().contiguous().as_strided((M, slots), (M + slots, 1))
    # a score's distance from the largest is itself rounded, and the exponential carries that on
    assert ((mine - truth).abs() / truth <= ulp * (4 - truth.log())).all()


@pytest.mark.parametrize("name", [*SETS, engine.OFF])
def test_what_is_not_a_number_stays_in_its_place(name):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 2, 6, 9) for _ in range(3))
    args = ([3, 3], [1, 1], [1, 1], [1, 1], False, "dot", False, 1.0)
    with engine.forced(name):
        clean, _ = local_attention(q, k, v, *args)
        asked = q.clone()
        asked[0, 0, 0, 2, 3] = float("nan")
        y, _ = local_attention(asked, k, v, *args)
        assert y[0, 0, :, 2, 3].isnan().all() and y.isnan().sum() == 2
        torch.testing.assert_close(y.nan_to_num(), clean.where(~y.isnan(), 0))
        read = k.clone()
        read[0, 0, 1, 0, 8] = float("nan")
        y, _ = local_attention(q, read, v, *args)
        lost = torch.zeros(6, 9, dtype=torch.bool)
        lost[:2, 7:] = True
        assert torch.equal(y[0, 0, 0].isnan(), lost)
        far = k.clone() * 0
        far[0, 0, :, 3, 4] = 1e30  # one slot takes all, the others have weight exactly zero
        y, _ = local_attention(torch.ones_like(q), far, v, *args)
        assert torch.equal(y[0, 0, :, 3, 4], v[0, 0, :, 3, 4])


@pytest.mark.parametrize("name", [*SETS, engine.OFF])
def test_an_output_without_slots_is_zero(name):
    q, k, v = (torch.randn(1, 1, 3, 1, dtype=torch.float64, requires_grad=True) for _ in range(3))
    with engine.forced(name):
        y, _ = local_attention(q, k, v, [2], [1], [2], [1], False, "dot", False, 1.0)
        assert y.eq(0).all()
        assert all(g.eq(0).all() for g in torch.autograd.grad(y.sum(), (q, k, v)))


@pytest.mark.parametrize("name", [*SETS, engine.OFF])
def test_empty_batches(name):
    q, k, v = (torch.randn(0, 2, 3, 4, 5, requires_grad=True) for _ in range(3))
    with engine.forced(name):
        y, _ = local_attention(q, k, v, [3, 3], [1, 1], [1, 1], [1, 1], True, "dot", False, 1.0)
        assert y.shape == (0, 2, 3, 4, 5)
        y.sum().backward()
        w = torch.randn(2, 4, 3, 3, 3, requires_grad=True)
        y = grouped_conv([k], w, [1, 1], [1, 1], [1, 1], [4, 5], False)
        assert y.shape == (0, 4, 2, 4, 5)
        y.sum().backward()
        assert w.grad.eq(0).all()


def test_operands_that_do_not_fit_are_refused():
    q, k, v = (torch.randn(1, 2, 3, 4, 5) for _ in range(3))
    good = ([3, 3], [1, 1], [1, 1], [1, 1], False, "dot", False, 1.0)
    bad = [
        (q[:, :1], k, v, *good),
        (q, k[..., :4], v, *good),
        (q, k, v.double(), *good),
        (q[0], k[0], v[0], *good),
        (q, k, v, [3], *good[1:]),
        (q, k, v, [3, 0], *good[1:]),
        (q, k, v, *good[:3], [-1, 0], *good[4:]),
        (q, k, v, *good[:5], "cosine", *good[6:]),
    ]
    for args in bad:
        with pytest.raises(ValueError, match=r"must|do not fit"):
            local_attention(*args)
    w, conv = torch.randn(2, 4, 3, 3, 3), ([1, 1], [1, 1], [1, 1], [4, 5], False)
    for maps, weight in (([q, k], w), ([q] * 5, w), ([q.double()], w), ([q[:, :1]], w), ([], w), ([q[0]], w)):
        with pytest.raises(ValueError, match="grouped_conv"):
            grouped_conv(maps, weight, *conv)


def test_the_engine_itself_refuses_what_does_not_fit():
    """It reads raw memory: a wrong shape or number must not get that far."""
    module = engine.get()
    assert module is not None
    q, k, v, y = (torch.randn(1, 2, 3, 4, 5) for _ in range(4))
    stats, w = torch.randn(1, 2, 2, 4, 5), torch.randn(2, 4, 3, 3, 3)
    good = [q, k, v, [3, 3], [1, 1], [1, 1], [1, 1], False, 0, False, 1.0, y, stats, 1]
    module.local(*good)
    wrong = [
        (0, q[:, :1]), (0, q[0]), (1, k[..., 1:]), (2, v[:, :1]), (3, [3]), (3, [3, 0]), (3, [1 << 20, 1 << 20]),
        (4, [0, 1]), (5, [1, -1]), (6, [1, -1]), (8, 1), (8, 7), (11, y[..., 1:]), (12, stats[:, :, :1]), (13, 0),
    ]  # fmt: skip
    for i, other in wrong:
        with pytest.raises(ValueError, match=r"local|window"):
            module.local(*good[:i], other, *good[i + 1 :])
    with pytest.raises(TypeError):
        module.local(q.double(), *good[1:])
    out = torch.randn(1, 4, 2, 4, 5)
    fits = [[q], w, [1, 1], [1, 1], [1, 1], False, out, 1]
    module.grouped(*fits)
    for i, other in [(0, []), (0, [q, k]), (0, [q] * 5), (1, w.mT), (1, w[:1]), (2, [1]), (6, out[:, :3]), (7, 0)]:
        with pytest.raises(ValueError, match=r"grouped|window"):
            module.grouped(*fits[:i], other, *fits[i + 1 :])


def test_nothing_of_window_size_is_held():
    """The peak of a training step stays near that of its few maps; scores alone would take 49 planes a head."""
    x = torch.randn(4, 16, 32, 32, requires_grad=True)
    layer = ACmix2d(16, 16)
    scores = 4 * 4 * 49 * 32 * 32 * 4
    assert peak_bytes(lambda: layer(x).sum().backward(), x.device) < scores
