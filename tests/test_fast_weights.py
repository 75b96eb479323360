"""Fast weights equal a loop over time, on every instruction set and in PyTorch by chunks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nearfold.kernels import engine, fast_weights_torch
from nearfold.kernels.fast_weights import NAMES as OPERANDS
from nearfold.kernels.fast_weights import fast_weights, fast_weights_backward
from nearfold.study.measure import peak_bytes
from nearfold.testing import poisoned_empties

NAMES = engine.names()
BUDGET = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}
every_path = pytest.mark.parametrize("name", NAMES)
both_paths = pytest.mark.parametrize("name", dict.fromkeys((NAMES[0], engine.OFF)))
compiled = pytest.mark.skipif(NAMES == (engine.OFF,), reason="needs the compiled engine")
RULES, DECAYS = ("plain", "delta", "any"), (None, "head", "channel")
each_rule = pytest.mark.parametrize("rule", RULES)
KINDS = list(itertools.product(RULES, DECAYS))
each_kind = pytest.mark.parametrize(("rule", "decay"), KINDS)

# batch, positions, heads, features of query and key, of value: chunks and vectors that are full, cut, and single
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 70, 3, 5, 7),
    (1, 64, 1, 16, 16),
    (1, 3, 2, 2, 33),
    (2, 200, 2, 16, 40),
    (1, 130, 1, 70, 90),
    (17, 20, 2, 4, 3),
    (1, 65, 2, 8, 130),
]


def naive(q, k, v, decay=None, beta=None, left=None, right=None):
    """S_t = (D + left right^T) S_{t-1} + k v^T, or the delta rule, one position after the other."""
    S, out = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[3]), []
    for t in range(q.shape[1]):
        D = torch.ones_like(S) if decay is None else decay[:, t, ..., None].exp().expand_as(S)
        if beta is not None:
            S = D * S
            held = torch.einsum("bhsp,bhs->bhp", S, k[:, t])
            S = S + torch.einsum("bh,bhs,bhp->bhsp", beta[:, t], k[:, t], v[:, t] - held)
        else:
            before, S = S, D * S + torch.einsum("bhs,bhp->bhsp", k[:, t], v[:, t])
            if left is not None:
                S = S + torch.einsum("bhs,bhr,bhrp->bhsp", left[:, t], right[:, t], before)
        out.append(torch.einsum("bhsp,bhs->bhp", S, q[:, t]))
    return torch.stack(out, 1) if out else torch.zeros_like(v)


def operands(b, n, h, s, p, rule="delta", decay="head", dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    q, k, left, right = (F.normalize(torch.randn(b, n, h, s), dim=-1) for _ in range(4))
    log = None if decay is None else -F.softplus(torch.randn(b, n, h, 1 if decay == "head" else s))
    found = [q, k, torch.randn(b, n, h, p), log, torch.rand(b, n, h) if rule == "delta" else None]
    found += [-0.5 * left, right] if rule == "any" else [None, None]
    return [None if x is None else x.to(dtype).requires_grad_() for x in found]


def results(call, leaves):
    """Output, and the gradient at every leaf that is there."""
    y = call(*leaves)
    upstream = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).to(y.dtype).view_as(y)
    return [y.detach(), *torch.autograd.grad(y, [x for x in leaves if x is not None], upstream)]


def run(leaves):
    return results(lambda *t: fast_weights(*t)[0], leaves)


def wide(leaves):
    return [None if x is None else x.detach().double().requires_grad_() for x in leaves]


def plain(leaves):
    return [None if x is None else x.detach() for x in leaves]


def agree(mine: list[Tensor], wanted: list[Tensor], budget: float) -> None:
    for i, (a, b) in enumerate(zip(mine, wanted, strict=True)):
        assert a.shape == b.shape, f"tensor {i}: {tuple(a.shape)}, not {tuple(b.shape)}"
        error = ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1)).item()
        assert error <= budget, f"tensor {i}: off by {error:.1e} (budget {budget:.0e})"


@every_path
@each_kind
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_a_loop_over_time(shape, rule, decay, name):
    leaves = operands(*shape, rule, decay)
    truth = results(naive, leaves)
    with engine.forced(name), poisoned_empties():
        agree(run(leaves), truth, 1e-12)


@every_path
@each_kind
@pytest.mark.parametrize("dtype", [d for d in BUDGET if d != torch.float64], ids=str)
def test_low_precision(dtype, rule, decay, name):
    leaves = operands(2, 150, 3, 20, 24, rule, decay, dtype)
    truth = results(naive, wide(leaves))
    with engine.forced(name), poisoned_empties():
        mine = run(leaves)
    assert all(x.dtype == dtype for x in mine)
    agree(mine, truth, BUDGET[dtype])


@both_paths
@each_rule
def test_any_strides(name, rule):
    leaves = operands(2, 70, 3, 6, 9, rule, "channel")
    truth = run(leaves)
    turned = [None if x is None else x.detach().mT.contiguous().mT.requires_grad_() for x in leaves]
    one = [None if x is None else x.detach()[:1].expand_as(x) for x in leaves]
    with engine.forced(name), poisoned_empties():
        agree(run(turned), truth, 1e-12)
        same = fast_weights(*(None if x is None else x.contiguous() for x in one))[0]
        agree([fast_weights(*one)[0]], [same], 1e-12)


@compiled
@each_rule
@pytest.mark.parametrize("name", [n for n in NAMES if n != engine.OFF])
@pytest.mark.parametrize("shape", [(1, 130, 2, 20, 100), (3, 70, 7, 5, 9)], ids=str)
def test_threads_change_no_bit(name, shape, rule):
    leaves = operands(*shape, rule, "channel", torch.float32)
    before = torch.get_num_threads()
    try:
        with engine.forced(name):
            torch.set_num_threads(1)
            one = run(leaves)
            for threads in (2, 5):
                torch.set_num_threads(threads)
                assert all(torch.equal(a, b) for a, b in zip(run(leaves), one, strict=True))
    finally:
        torch.set_num_threads(before)


@every_path
@each_kind
@pytest.mark.parametrize("rate", [-50.0, -1e5, -math.inf])
def test_strong_decay_forgets(name, rule, decay, rate):
    leaves = operands(1, 300, 2, 5, 6, rule, decay or "channel", torch.float32)
    leaves[3] = torch.full_like(leaves[3], rate).requires_grad_()
    with torch.no_grad():
        if rule == "any":
            leaves[5].zero_()
    with engine.forced(name):
        mine = run(leaves)
    assert all(x.isfinite().all() for x in mine)
    q, k, v, _, beta = plain(leaves)[:5]
    own = (q * k).sum(-1, keepdim=True) * v * (1 if beta is None else beta[..., None])
    agree(mine[:1], [own], 5e-6)


@every_path
@pytest.mark.parametrize("rule", ["plain", "delta"])
def test_states_that_only_decay_stay_small(name, rule):
    """No number below the smallest normal one is left to slow the engine down, and nothing overflows behind it."""
    leaves = operands(1, 4096, 1, 4, 4, rule, "head", torch.float32)
    with torch.no_grad():
        for x in leaves[1], leaves[2]:
            x[:, 1:] = 0
    with engine.forced(name):
        mine = run(leaves)
    assert all(x.isfinite().all() for x in mine) and not mine[0][:, -1].any()


@both_paths
@each_rule
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_a_number_stays_in_its_batch_element(name, bad, which, rule):
    leaves = plain(operands(3, 70, 2, 5, 6, rule, "head"))
    leaves[which][1, 40] = bad
    leaves = [None if x is None else x.requires_grad_() for x in leaves]
    with engine.forced(name):
        y, *grads = run(leaves)
    assert not y[1, 40].isfinite().all()
    if name != engine.OFF:  # by chunks it reaches what came before it in its own chunk
        assert y[1, :40].isfinite().all()
    for x in (y, *grads):
        assert x[[0, 2]].isfinite().all()


@every_path
@each_kind
def test_gradcheck(name, rule, decay):
    leaves = operands(2, 9, 2, 3, 4, rule, decay)
    there = [i for i, x in enumerate(leaves) if x is not None]

    def call(*given):
        whole = [None] * 7
        for i, x in zip(there, given, strict=True):
            whole[i] = x
        return fast_weights(*whole)[0]

    with engine.forced(name):
        inputs = [leaves[i] for i in there]
        assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@both_paths
@each_rule
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_operators_pass_opcheck(name, dtype, rule):
    leaves = operands(2, 70, 2, 3, 4, rule, "head", dtype)
    with engine.forced(name):
        torch.library.opcheck(fast_weights.registered, tuple(leaves))
        y, *kept = fast_weights(*plain(leaves))
        torch.library.opcheck(fast_weights_backward.registered, (torch.ones_like(y), *plain(leaves), *kept))


@every_path
@each_kind
@pytest.mark.parametrize("shape", [(0, 5, 2, 3, 2), (2, 0, 2, 3, 2)], ids=str)
def test_empty(name, shape, rule, decay):
    leaves = operands(*shape, rule, decay)
    with engine.forced(name):
        y, states, _ = fast_weights(*leaves)
        assert y.shape == (*shape[:3], 2) and states.shape == (shape[0], 2, min(shape[1], 1), 3, 2)
        found = torch.autograd.grad(y.sum(), [x for x in leaves if x is not None])
    assert all(not g.any() for g in found)


@every_path
@each_kind
def test_the_paths_read_what_the_others_kept(name, rule, decay):
    leaves = plain(operands(2, 150, 2, 20, 7, rule, decay))
    with engine.forced(engine.OFF):
        y, *kept = fast_weights(*leaves)
        truth = fast_weights_backward(y, *leaves, *kept)
    with engine.forced(name):
        for mine, wanted in zip(fast_weights(*leaves)[1:], kept, strict=True):
            assert mine.shape == wanted.shape and torch.allclose(mine, wanted, 1e-12, 1e-12)
        agree(fast_weights_backward(y, *leaves, *kept), truth, 1e-12)


@both_paths
@each_rule
def test_nothing_is_kept_that_nobody_asks_for(name, rule):
    leaves = operands(2, 70, 2, 3, 4, rule)
    with engine.forced(name):
        y, states, reads = fast_weights(*leaves, False)
        assert not states.numel() and not reads.numel()
        without = torch.autograd.grad(y.sum(), leaves[0])[0]
        agree([without], [torch.autograd.grad(fast_weights(*leaves)[0].sum(), leaves[0])[0]], 1e-13)


def test_shapes_that_do_not_fit():
    q, k, v, log, beta, left, right = plain(operands(2, 10, 3, 4, 5, "any")[:4] + operands(2, 10, 3, 4, 5)[4:])
    left, right = plain(operands(2, 10, 3, 4, 5, "any"))[5:]
    for bad, said in (
        ((q[0], k, v), r"query must be \(B, N, H, s\)"),
        ((q, k[:, :9], v), "key must be"),
        ((q, k, v[:, :9]), r"value \(B, N, H, p\)"),
        ((q, k, v, log.expand(2, 10, 3, 2)), "log_decay must be"),
        ((q, k, v, log, beta[..., None]), "beta must be"),
        ((q, k, v, log, beta, left, right), "not with beta"),
        ((q, k, v, log, None, left), "go together"),
        ((q, k, v, log, None, left, right[..., :2]), "right must be"),
        ((q[..., :0], k[..., :0], v), "there must be heads and features"),
        ((q, k, v.float()), "one floating dtype"),
        ((q, None, v), "key must be a torch.Tensor"),
    ):
        with pytest.raises(ValueError, match=said):
            fast_weights(*bad)
    y, states, reads = fast_weights(q, k, v, log, beta)
    rest = (q, k, v, log, beta, None, None)
    with pytest.raises(ValueError, match=r"grad must be \(2, 10, 3, 5\).*got \(2, 9, 3, 5\)"):
        fast_weights_backward(y[:, :9], *rest, states, reads)
    with pytest.raises(ValueError, match=r"states must be \(2, 3, 1, 4, 5\)"):
        fast_weights_backward(y, *rest, states[:, :, :0], reads)
    with pytest.raises(ValueError, match=r"reads must be \(2, 10, 3, 5\)"):
        fast_weights_backward(y, *rest, states, reads[:, :0])


def test_compiles_as_one_graph():
    leaves = operands(2, 70, 2, 5, 3)[:5]
    graph = torch.compile(lambda *t: fast_weights(*t)[0] * 2, backend="aot_eager", fullgraph=True)
    agree(results(graph, leaves), results(lambda *t: naive(*t) * 2, leaves), 1e-12)


@every_path
def test_autocast_leaves_it_alone(name):
    leaves = operands(2, 70, 2, 5, 3, dtype=torch.float32)
    truth = results(naive, wide(leaves))
    with engine.forced(name), torch.autocast("cpu", torch.bfloat16):
        agree(run(leaves), truth, 5e-6)


@every_path
def test_memory_grows_with_positions_alone(name):
    """A training step of four times as many positions takes four times as much: nothing has N x N numbers."""
    cpu = torch.device("cpu")
    with engine.forced(name):
        leaves = [operands(1, n, 2, 16, 16, dtype=torch.float32) for n in (2048, 8192)]
        few, many = (peak_bytes(lambda given=given: run(given), cpu) for given in leaves)
    assert many < 5 * few


@pytest.mark.parametrize(("rule", "factor"), [("plain", 5), ("delta", 7), ("any", 9)])
def test_counted_operations(rule, factor):
    leaves = operands(2, 70, 3, 4, 5, rule)
    with FlopCounterMode(display=False) as counted:
        y = fast_weights(*leaves)[0]
    numbers = 2 * 70 * 3 * 4 * 5
    assert counted.get_total_flops() == factor * numbers
    with FlopCounterMode(display=False) as counted:
        y.sum().backward()
    assert counted.get_total_flops() == {"plain": 14, "delta": 18, "any": 24}[rule] * numbers


def test_the_operands_have_the_names_of_the_arguments():
    assert tuple(list(fast_weights.__wrapped__.__annotations__)[:7]) == OPERANDS
    assert fast_weights_torch.CHUNK & (fast_weights_torch.CHUNK - 1) == 0
