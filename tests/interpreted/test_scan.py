"""The selective scan's kernels equal loops over time and the PyTorch path; tiles are small, so there are several."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from nearfold.kernels import scan_torch
from nearfold.kernels.triton.scan import _after, refusal, scan, scan_backward
from nearfold.testing import poisoned_empties

# what numpy says of infinities, in the interpreter
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

# of the largest number; measured: float32 6e-7, bfloat16 4e-3, float16 4e-4
BUDGET = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
# batch, positions, channels, states; chunk, channels and states of a program
CASES = [
    (2, 1, 1, 1, 8, 4, 4),
    (1, 2, 3, 3, 8, 2, 2),
    (2, 7, 5, 1, 8, 4, 4),
    (1, 8, 2, 2, 8, 2, 2),
    (2, 9, 2, 3, 8, 4, 2),
    (1, 33, 5, 3, 8, 4, 2),
    (1, 33, 3, 3, 1, 4, 4),
    (1, 70, 1, 16, 16, 1, 16),
    (1, 301, 3, 2, 8, 4, 2),
]


def naive(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    h = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    out = []
    for t in range(u.shape[1]):
        h = torch.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        out.append((h * C[:, t, None]).sum(-1))
    return torch.stack(out, 1)


def operands(b: int, n: int, c: int, s: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    u, delta, A = torch.randn(b, n, c), torch.rand(b, n, c) * 0.5 + 0.01, 0.1 - 2 * torch.rand(c, s)
    return [x.to(dtype) for x in (u, delta, A, torch.randn(b, n, s), torch.randn(b, n, s))]


def upstream(y: Tensor) -> Tensor:
    return torch.cos(torch.arange(y.numel(), dtype=torch.float64)).to(y.dtype).view_as(y)


def wanted(values: list[Tensor]) -> list[Tensor]:
    """Output and gradients in float64."""
    leaves = [x.double().requires_grad_() for x in values]
    y = naive(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream(y.to(values[0].dtype)).double())]


def found(values: list[Tensor], *, chunk: int = 8, block_c: int = 4, block_s: int = 4) -> list[Tensor]:
    sizes = {"chunk": chunk, "block_c": block_c, "block_s": block_s}
    with poisoned_empties():
        y, states = scan(*values, **sizes)
        made = [y, *scan_backward(upstream(y), *values, states, **sizes)]
    assert all(x.is_contiguous() and x.dtype == y.dtype for x in made)
    return made


def error(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape, f"{tuple(a.shape)}, not {tuple(b.shape)}"
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-300)).item()


def agree(mine: list[Tensor], truth: list[Tensor], budget: float) -> None:
    for i, (a, b) in enumerate(zip(mine, truth, strict=True)):
        off = error(a, b)
        assert off <= budget, f"tensor {i}: off by {off:.1e} (budget {budget:.0e})"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_a_loop_over_time(case):
    values = operands(*case[:4])
    mine = found(values, chunk=case[4], block_c=case[5], block_s=case[6])
    assert mine[0].dtype == torch.float32
    agree(mine, wanted(values), BUDGET[torch.float32])


def test_a_long_sequence_of_many_chunks():
    """32 chunks as a device has them; nothing grows, for the error would, too."""
    u, delta, A, B, C = operands(1, 999, 4, 1)
    values = [u, delta, -A.abs(), B, C]
    mine, truth = found(values, chunk=32), wanted(values)
    agree(mine[:3] + mine[4:], truth[:3] + truth[4:], BUDGET[torch.float32])
    agree(mine[3:4], truth[3:4], 3e-6)  # the gradient at A is a sum over positions, whose terms cancel here


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_computed_in_float32(dtype):
    values = operands(1, 19, 3, 3, dtype)
    mine = found(values, block_s=2)
    assert all(x.dtype == dtype for x in mine)
    agree(mine, wanted(values), BUDGET[dtype])
    # rounded once, at the end
    widened = found([x.float() for x in values], block_s=2)
    agree(mine[:1], [widened[0].to(dtype)], 0)


def test_the_paths_read_one_anothers_states():
    values = operands(1, 40, 2, 2)
    grad = torch.randn(1, 40, 2)
    y, states = scan(*values)
    y_torch, states_torch = scan_torch.forward(*values)
    agree([y, states[:, 1:]], [y_torch, states_torch[:, 1:]], BUDGET[torch.float32])
    assert states.shape == states_torch.shape and not states[:, 0].any()
    wide = [x.double() for x in values]
    truth = scan_torch.backward(grad.double(), *wide, scan_torch.forward(*wide)[1])
    # the gradient at A is a sum whose terms cancel here
    agree(list(scan_backward(grad, *values, states_torch)), list(truth), 3e-6)
    agree(list(scan_torch.backward(grad, *values, states)), list(truth), 3e-6)
    without, none = scan(*values, keep=False)
    assert torch.equal(without, y) and none.shape == (1, 0, 2, 2) and none.dtype == torch.float32


def test_any_strides():
    values = operands(2, 9, 3, 2)
    truth = found(values)
    turned = [x.mT.contiguous().mT for x in values]
    cut = [torch.cat((x, x), -1)[..., : x.shape[-1]] for x in values]
    agree(found(turned), truth, 0)
    agree(found(cut), truth, 0)
    one = [x[:1].expand_as(x) if x.dim() == 3 else x for x in values]
    agree(found(one), found([x.contiguous() for x in one]), 0)
    y, states = scan(*values, chunk=8)
    summed = scan_backward(torch.ones(()).expand_as(y), *values, states, chunk=8, block_c=4)
    agree(list(summed), list(scan_backward(torch.ones_like(y), *values, states, chunk=8, block_c=4)), 0)


def test_equal_inputs_have_equal_results_whatever_the_tiles():
    values = operands(1, 17, 5, 3)
    one = found(values)
    assert all(torch.equal(a, b) for a, b in zip(found(values), one, strict=True))
    other = found(values, block_c=2)
    assert all(torch.equal(a, b) for a, b in zip(other[:4], one[:4], strict=True))  # no sum over channels
    agree(other[4:], one[4:], BUDGET[torch.float32])


def test_large_and_small_numbers():
    u, delta, A, B, C = operands(1, 17, 3, 2)
    for values in (
        [u * 1e30, delta, A, B * 1e6, C * 1e-3],
        [u * 1e-30, delta, A, B * 1e-6, C * 1e6],
        [u, delta * 1e-20, A * 1e20, B * 1e18, C],
        [u * 1e-40, delta, A, B, C],  # u is denormal
    ):
        truth = wanted(values)
        mine = found(values)
        by_torch = scan_torch.forward(*values)[0]
        assert mine[0].isfinite().all() and by_torch.isfinite().all()
        for a, b in zip(mine, truth, strict=True):
            if b.abs().max() < 1e38:
                assert (a.double() - b).abs().max() <= b.abs().max() * 2e-6 + 1e-44


def test_strong_decay_stays_finite():
    u, delta, A, B, C = operands(1, 33, 3, 2)
    values = [u, torch.ones_like(delta), torch.full_like(A, -50), B, C]
    agree(found(values), wanted(values), BUDGET[torch.float32])


@pytest.mark.parametrize("rate", [-math.inf, -1e30])
def test_infinite_decay_forgets(rate):
    u, delta, A, B, C = operands(1, 17, 3, 2)
    mine = found([u, delta, torch.full_like(A, rate), B, C])
    agree(mine[:1], [u * delta * (B * C).sum(-1, keepdim=True)], BUDGET[torch.float32])
    g = upstream(mine[0])
    agree(mine[1:2], [g * delta * (B * C).sum(-1, keepdim=True)], BUDGET[torch.float32])
    agree(mine[4:], [C * (u * delta * g).sum(-1, keepdim=True), B * (u * delta * g).sum(-1, keepdim=True)], 1e-6)


def test_growth_beyond_float32_leaves_zeros():
    u, delta, A, B, C = operands(1, 8, 3, 2)
    u[:, :7] = 0
    values = [u, torch.ones_like(delta), torch.full_like(A, 20), B, C]
    states = torch.zeros(1, 1, 2, 3)
    grad = torch.zeros_like(u)
    grad[:, 0] = 1
    mine = [scan(*values, chunk=8, block_c=4)[0], *scan_backward(grad, *values, states, chunk=8, block_c=4)]
    truth = [scan_torch.forward(*values)[0], *scan_torch.backward(grad, *values, states)]
    assert all(x.isfinite().all() for x in truth)
    agree(mine, truth, BUDGET[torch.float32])


@triton.jit
def _two_steps(given, made):
    first_decay, first_end = tl.load(given), tl.load(given + 1)
    decay, end = _after(first_decay, first_end, tl.load(given + 2), tl.load(given + 3))
    tl.store(made, decay)
    tl.store(made + 1, end)


@pytest.mark.parametrize(
    "given, wanted",
    [((2, 3, 5, 7), (10, 22)), ((2, 0, math.inf, 7), (math.inf, 7)), ((2, 3, math.nan, 7), (math.nan, math.nan))],
)
def test_steps_as_a_device_groups_them(given, wanted):
    # the interpreter goes one position at a time, a device multiplies decays first: they may be infinite
    made = torch.empty(2)
    _two_steps[(1,)](torch.tensor(given, dtype=torch.float32), made)
    torch.testing.assert_close(made, torch.tensor(wanted, dtype=torch.float32), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1, 3, 4])
def test_what_is_not_a_number_stays_in_its_batch_element(bad, which):
    values = operands(2, 9, 3, 3)
    values[which][1, 6] = bad
    y, du, ddelta, _, dB, dC = found(values)
    assert y[1, :6].isfinite().all() and not y[1, 6].isfinite().any()
    assert all(x[0].isfinite().all() for x in (y, du, ddelta, dB, dC))


def test_the_last_input_reaches_no_rate():
    values = operands(1, 9, 3, 3)
    values[0][0, 8] = math.nan
    y, _, _, dA, _, _ = found(values)
    assert y[0, 8].isnan().all() and dA.isfinite().all()


def test_infinite_input_is_infinite_where_states_are_padded():
    values = operands(1, 2, 1, 3)
    values[0][0, 0] = math.inf
    values[3].abs_()
    values[4].abs_()
    assert scan(*values, chunk=8, block_c=4, block_s=4)[0].eq(math.inf).all()


def test_a_rate_that_is_not_a_number_shows():
    values = operands(1, 9, 6, 2)
    values[2][4, 1] = math.nan
    y, _, _, dA, _, _ = found(values)
    others = [0, 1, 2, 3, 5]
    assert y[:, 1:, 4].isnan().all() and y[..., others].isfinite().all()
    assert dA[4, 1].isnan() and dA[others].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5, 3, 2), (2, 0, 3, 2)], ids=str)
def test_empty(shape):
    values = operands(*shape)
    with poisoned_empties():
        y, states = scan(*values)
        grads = scan_backward(y, *values, states)
    assert y.shape == shape[:3] and states.shape == (shape[0], min(shape[1], 1), 2, 3)
    assert all(g.shape == x.shape and not g.any() for g, x in zip(grads, values, strict=True))
    assert scan(*values, keep=False)[1].shape == (shape[0], 0, 2, 3)


def test_it_says_what_it_does_not_serve():
    values = operands(1, 2, 3, 3)
    assert refusal(*values) == "" == refusal(*(x.bfloat16() for x in values))
    wide = [x.double() for x in values]
    assert "torch.float64" in refusal(*wide)
    assert "torch.float16" in refusal(values[0], values[1].half(), *values[2:])
    for positions in (2**31, 2**31 - 1):  # the last chunk goes on past the end
        long = torch.empty(1, device="meta").expand(1, positions, 1)
        assert "32 bits" in refusal(long, long, values[2], long, long)
    with pytest.raises(NotImplementedError, match="not float32, bfloat16 or float16 alike"):
        scan(*wide)
    with pytest.raises(NotImplementedError, match="not float32, bfloat16 or float16 alike"):
        scan_backward(wide[0], *wide, torch.zeros(1, 1, 3, 3))
