"""The selective scan and its structured dual equal loops over time, on every instruction set and in PyTorch."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nearfold.kernels import engine, scan_torch
from nearfold.kernels.scan import selective_scan, selective_scan_backward
from nearfold.kernels.ssd import decayed_attention
from nearfold.study.measure import peak_bytes
from nearfold.testing import poisoned_empties

NAMES = engine.names()
BUDGET = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}
every_path = pytest.mark.parametrize("name", NAMES)
compiled = pytest.mark.skipif(NAMES == (engine.OFF,), reason="needs the compiled engine")

# batch, positions, channels, states: chunks and vectors that are full, cut, and single
SHAPES = [
    (1, 1, 1, 1),
    (2, 31, 3, 2),
    (1, 32, 16, 16),
    (3, 33, 17, 5),
    (2, 129, 70, 7),
    (17, 40, 9, 4),
    (1, 65, 300, 3),
    (1, 70, 8, 130),
]


def naive(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    h = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    out = []
    for t in range(u.shape[1]):
        h = torch.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        out.append((h * C[:, t, None]).sum(-1))
    return torch.stack(out, 1)


def operands(b: int, n: int, c: int, s: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    u, delta, A = torch.randn(b, n, c), torch.rand(b, n, c) * 0.5 + 0.01, 0.1 - 2 * torch.rand(c, s)
    return [x.to(dtype).requires_grad_() for x in (u, delta, A, torch.randn(b, n, s), torch.randn(b, n, s))]


def results(call, leaves: list[Tensor]) -> list[Tensor]:
    """Output, and the gradient at every leaf."""
    y = call(*leaves)
    upstream = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).to(y.dtype).view_as(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


def scanned(leaves: list[Tensor]) -> list[Tensor]:
    return results(lambda *t: selective_scan(*t)[0], leaves)


def agree(mine: list[Tensor], wanted: list[Tensor], budget: float) -> None:
    for i, (a, b) in enumerate(zip(mine, wanted, strict=True)):
        assert a.shape == b.shape, f"tensor {i}: {tuple(a.shape)}, not {tuple(b.shape)}"
        error = ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1)).item()
        assert error <= budget, f"tensor {i}: off by {error:.1e} (budget {budget:.0e})"


@every_path
@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_a_loop_over_time(shape, dtype, name):
    leaves = operands(*shape, dtype=dtype)
    truth = results(naive, [x.detach().double().requires_grad_() for x in leaves])
    with engine.forced(name), poisoned_empties():
        mine = scanned(leaves)
    assert all(x.dtype == dtype for x in mine)
    agree(mine, truth, BUDGET[dtype])


@every_path
def test_any_strides(name):
    leaves = operands(2, 40, 19, 6)
    truth = scanned(leaves)
    turned = [x.detach().mT.contiguous().mT.requires_grad_() for x in leaves]
    cut = [torch.cat((x.detach(), x.detach()), -1)[..., : x.shape[-1]].requires_grad_() for x in leaves]
    with engine.forced(name), poisoned_empties():
        agree(scanned(turned), truth, 1e-12)
        agree(scanned(cut), truth, 1e-12)
        one = [x.detach()[:1].expand_as(x) if x.dim() == 3 else x.detach() for x in leaves]
        agree([selective_scan(*one)[0]], [selective_scan(*(x.contiguous() for x in one))[0]], 1e-12)


@compiled
@pytest.mark.parametrize("name", [n for n in NAMES if n != engine.OFF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_threads_change_no_bit(name, dtype):
    leaves = operands(2, 100, 150, 6, dtype=dtype)
    before = torch.get_num_threads()
    try:
        with engine.forced(name):
            torch.set_num_threads(1)
            one = scanned(leaves)
            for threads in (2, 5):
                torch.set_num_threads(threads)
                assert all(torch.equal(a, b) for a, b in zip(scanned(leaves), one, strict=True))
    finally:
        torch.set_num_threads(before)


@every_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_strong_decay_stays_finite(name, dtype):
    u, delta, A, B, C = (x.detach() for x in operands(1, 4096, 5, 3, dtype=dtype))
    leaves = [x.requires_grad_() for x in (u, torch.ones_like(delta), torch.full_like(A, -50), B, C)]
    with engine.forced(name):
        mine = scanned(leaves)
    assert all(x.isfinite().all() for x in mine)
    # nothing is left of one position at the next
    agree(mine[:1], [(u * (B * C).sum(-1, keepdim=True)).detach()], BUDGET[dtype])


@every_path
@pytest.mark.parametrize("rate", [-math.inf, -1e30, -1e5])
def test_infinite_decay_forgets(name, rate):
    u, delta, A, B, C = (x.detach() for x in operands(1, 40, 5, 3, dtype=torch.float32))
    with engine.forced(name):
        y = selective_scan(u, delta, torch.full_like(A, rate), B, C)[0]
    agree([y], [u * delta * (B * C).sum(-1, keepdim=True)], 5e-6)


@every_path
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1, 3, 4])
def test_what_is_not_a_number_stays_in_its_batch_element(name, bad, which):
    leaves = [x.detach() for x in operands(3, 70, 20, 5)]
    leaves[which][1, 40] = bad
    leaves = [x.requires_grad_() for x in leaves]
    with engine.forced(name):
        y, du, ddelta, _, dB, dC = scanned(leaves)
    assert y[1, :40].isfinite().all() and not y[1, 40].isfinite().all()
    for x in (y, du, ddelta, dB, dC):
        assert x[[0, 2]].isfinite().all()


@every_path
def test_a_rate_that_is_not_a_number_shows(name):
    u, delta, A, B, C = (x.detach() for x in operands(2, 40, 20, 5))
    A[7, 2] = math.nan
    with engine.forced(name):
        y = selective_scan(u, delta, A, B, C)[0]
    assert y[:, 1:, 7].isnan().all() and y[:, :, :7].isfinite().all() and y[:, :, 8:].isfinite().all()


@every_path
def test_backward_in_slabs(name, monkeypatch):
    leaves = operands(2, 200, 5, 3)
    truth = scanned(leaves)
    monkeypatch.setattr(scan_torch, "SLAB", 2 * 5 * 3 * 32 * 2)
    with engine.forced(name):
        agree(scanned(leaves), truth, 1e-12)


@every_path
def test_gradcheck(name):
    leaves = operands(2, 35, 3, 2)
    with engine.forced(name):
        assert torch.autograd.gradcheck(lambda *t: selective_scan(*t)[0], leaves, fast_mode=True)


@pytest.mark.parametrize("name", dict.fromkeys((NAMES[0], engine.OFF)))
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_operators_pass_opcheck(name, dtype):
    leaves = operands(2, 35, 3, 2, dtype=dtype)
    with engine.forced(name):
        torch.library.opcheck(selective_scan.registered, tuple(leaves))
        plain = [x.detach() for x in leaves]
        y, states = selective_scan(*plain)
        torch.library.opcheck(selective_scan_backward.registered, (torch.ones_like(y), *plain, states))


@every_path
@pytest.mark.parametrize("shape", [(0, 5, 3, 2), (2, 0, 3, 2)], ids=str)
def test_empty(name, shape):
    leaves = operands(*shape)
    with engine.forced(name):
        y, states = selective_scan(*leaves)
        assert y.shape == shape[:3] and states.shape == (shape[0], min(shape[1], 1), 2, 3)
        found = torch.autograd.grad(y.sum(), leaves)
    assert all(g.shape == x.shape and not g.any() for g, x in zip(found, leaves, strict=True))


@every_path
def test_the_paths_read_one_anothers_states(name):
    leaves = [x.detach() for x in operands(2, 100, 20, 5)]
    with engine.forced(engine.OFF):
        y, states = selective_scan(*leaves)
        truth = selective_scan_backward(y, *leaves, states)
    with engine.forced(name):
        agree([selective_scan(*leaves)[1]], [states], 1e-12)
        agree(list(selective_scan_backward(y, *leaves, states)), list(truth), 1e-12)


def test_shapes_that_do_not_fit():
    u, delta, A, B, C = (x.detach() for x in operands(2, 10, 4, 3))
    for bad in (
        (u[0], delta[0], A, B, C),
        (u, delta[:, :9], A, B, C),
        (u, delta, A[:3], B, C),
        (u, delta, A[0], B, C),
        (u, delta, A, B[:, :, :2], C),
        (u, delta, A, B, C[:1]),
        (u, delta, A[:, :0], B[:, :, :0], C[:, :, :0]),
        (u, delta, A.float(), B, C),
    ):
        with pytest.raises(ValueError, match=r"got u \("):
            selective_scan(*bad)
    y, states = selective_scan(u, delta, A, B, C)
    with pytest.raises(ValueError, match=r"grad must be \(2, 10, 4\).*got \(2, 9, 4\)"):
        selective_scan_backward(y[:, :9], u, delta, A, B, C, states)
    with pytest.raises(ValueError, match=r"states must be \(2, 1, 3, 4\).*got \(2, 0, 3, 4\)"):
        selective_scan_backward(y, u, delta, A, B, C, states[:, :0])


def test_compiles_as_one_graph():
    leaves = operands(2, 40, 5, 3)
    compiled_scan = torch.compile(lambda *t: selective_scan(*t)[0] * 2, backend="aot_eager", fullgraph=True)
    agree(results(compiled_scan, leaves), results(lambda *t: naive(*t) * 2, leaves), 1e-12)


@every_path
def test_autocast_leaves_the_scan_alone(name):
    leaves = operands(2, 40, 5, 3, dtype=torch.float32)
    with engine.forced(name):
        truth = scanned(leaves)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            agree(scanned(leaves), truth, 0)


@compiled
def test_memory_is_bounded():
    b, n, c, s = 1, 2048, 64, 64
    leaves = operands(b, n, c, s, dtype=torch.float32)
    held = peak_bytes(lambda: scanned(leaves), torch.device("cpu"))
    assert held < 4 * b * n * c * s / 4


def test_operations_are_counted():
    leaves = operands(2, 40, 5, 3)
    with FlopCounterMode(display=False) as counter:
        scanned(leaves)
    assert counter.get_total_flops() == (7 + 18) * 2 * 40 * 5 * 3


# ---- the structured dual ---------------------------------------------------------------------------------------------


def dense(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None) -> Tensor:
    rows = []
    for i in range(value.shape[2]):
        total = torch.zeros_like(value[:, :, 0])
        for j in range(i + 1):
            weight = (query[:, :, i] * key[:, :, j]).sum(-1)
            if log_decay is not None:
                weight = weight * log_decay[:, :, j + 1 : i + 1].sum(-1).exp()
            total = total + weight[..., None] * value[:, :, j]
        rows.append(total)
    return torch.stack(rows, 2)


def attended(b: int, h: int, n: int, s: int, p: int, shared: str = "", decay: bool = True) -> list[Tensor]:
    torch.manual_seed(0)
    heads = {name: 1 if name in shared else h for name in "qk"}
    found = [torch.randn(b, heads["q"], n, s), torch.randn(b, heads["k"], n, s), torch.randn(b, h, n, p)]
    if decay:
        found.append(-torch.rand(b, h, n))
    return [x.double().requires_grad_() for x in found]


@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("shared", ["", "q", "k", "qk"])
@pytest.mark.parametrize("n, chunk", [(1, 64), (7, 64), (8, 4), (23, 5), (6, 1)])
def test_dual_equals_the_dense_formula(n, chunk, shared, decay):
    leaves = attended(2, 3, n, 4, 5, shared, decay)
    mine = results(lambda q, k, v, d=None: decayed_attention(q, k, v, d, chunk=chunk), leaves)
    agree(mine, results(lambda q, k, v, d=None: dense(q, k, v, d), leaves), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("lowest", [-50.0, -math.inf])
def test_dual_strong_decay_stays_finite(dtype, lowest):
    q, k, v, d = (x.detach().to(dtype) for x in attended(1, 2, 300, 4, 5))
    d[:, :, ::3] = lowest
    mine = results(decayed_attention, [x.requires_grad_() for x in (q, k, v, d)])
    assert all(x.isfinite().all() for x in mine)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v, d)]
    agree(mine[:1], results(lambda *t: decayed_attention(*t, chunk=7), wide)[:1], BUDGET[dtype])


def test_dual_is_the_scan_of_equal_rates():
    u, delta, _, B, C = operands(2, 50, 3, 4)
    A = torch.tensor([-0.5, -1.0, -2.0], dtype=torch.float64)
    y = selective_scan(u, delta, A[:, None].expand(3, 4), B, C)[0]
    log_decay = (delta * A).transpose(1, 2)
    value = (delta * u).transpose(1, 2)[..., None]
    mine = decayed_attention(C[:, None], B[:, None], value, log_decay, chunk=16)
    agree([mine[..., 0].transpose(1, 2)], [y], 1e-12)


def test_dual_gradcheck():
    leaves = attended(1, 2, 7, 2, 3)
    assert torch.autograd.gradcheck(lambda *t: decayed_attention(*t, chunk=3), leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dual_in_low_precision(dtype):
    leaves = [x.detach().to(dtype) for x in attended(2, 3, 70, 8, 8)]
    mine = decayed_attention(*leaves, chunk=16)
    assert mine.dtype == dtype
    agree([mine], [decayed_attention(*(x.double() for x in leaves))], BUDGET[dtype])


def test_dual_compiles_as_one_graph():
    leaves = attended(2, 3, 23, 4, 5)
    compiled_dual = torch.compile(
        lambda *t: decayed_attention(*t, chunk=8), backend="aot_eager", fullgraph=True, dynamic=False
    )
    agree(results(compiled_dual, leaves), results(dense, leaves), 1e-12)


@pytest.mark.parametrize("shape", [(0, 2, 5, 3, 4), (2, 2, 0, 3, 4)], ids=str)
def test_dual_empty(shape):
    leaves = attended(*shape)
    mine = results(decayed_attention, leaves)
    assert [x.shape for x in mine] == [leaves[2].shape, *(x.shape for x in leaves)]


def test_dual_shapes_that_do_not_fit():
    q, k, v, d = (x.detach() for x in attended(2, 3, 7, 4, 5))
    for bad in ((q[0], k, v, d), (q[:, :2], k, v, d), (q, k[..., :3], v, d), (q, k, v[:, :, :6], d), (q, k, v, d[0])):
        with pytest.raises(ValueError, match=r"got query \("):
            decayed_attention(*bad)
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        decayed_attention(q, k, v, d, chunk=0)


def test_tiny_numbers_are_flushed_inside_only():
    u, delta, A, B, C = (torch.rand(shape) for shape in ((2, 50, 33), (2, 50, 33), (33, 5), (2, 50, 5), (2, 50, 5)))
    selective_scan(u * 1e-38, delta, -A, B, C)
    tiny = torch.full((4096,), 1e-40)
    assert (tiny * 1.0 == tiny).all() and tiny.sum() > 0


@pytest.mark.parametrize("which", ["auto", engine.OFF])
def test_states_are_kept_only_where_there_is_a_backward(which):
    u, delta, A, B, C = (torch.rand(shape) for shape in ((2, 70, 9), (2, 70, 9), (9, 5), (2, 70, 5), (2, 70, 5)))
    with engine.forced(which) if which != "auto" else contextlib.nullcontext():
        y, states = selective_scan(u, delta, -A, B, C)
        bare, none = selective_scan(u, delta, -A, B, C, False)
    assert torch.equal(y, bare) and states.shape == (2, 3, 5, 9) and none.shape == (2, 0, 5, 9)
    u.requires_grad_()
    kept, again = (
        torch.autograd.grad(selective_scan(u, delta, -A, B, C, keep)[0].sum(), u)[0] for keep in (True, False)
    )
    assert torch.equal(kept, again) and kept.abs().sum() > 0  # what was not kept is computed again
