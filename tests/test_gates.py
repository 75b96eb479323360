"""Sums whose rates the input makes: native sparse attention, one position at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nearfold import convert, parse
from nearfold.grammar import CATALOGUE
from nearfold.look import looks, mixing_matrix
from nearfold.nn import Mixer
from nearfold.surgery import Rule
from nearfold.testing import BUDGET, conform

GATED = (
    "gate*(window(3) | box | kernel) + 0.5*(all | row | mean) + gate*(all | row | softmax(heads=2)) "
    "+ a*(window(1) | box | kernel)"
)
BLOCK, CHOSEN, NEAR = 4, 2, 5
NSA = (
    f"gate*(pooled({BLOCK}) | causal | softmax(heads=2)) + "
    f"gate*(nearest_blocks({CHOSEN}, {BLOCK}, self) | causal | softmax(heads=2)) + "
    f"gate*(window({NEAR}) | causal | softmax(heads=2))"
)


def gates(layer: Mixer, x: torch.Tensor) -> torch.Tensor:
    """Equation 5's numbers (gates, N), from one image (C, N)."""
    return torch.sigmoid(layer.gate_weight @ x + layer.gate_bias[:, None])


def test_rates_are_the_sigmoid_of_a_map_position_by_position():
    torch.manual_seed(0)
    layer = Mixer(GATED, 4).double()
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    alone = [
        Mixer(op, 4).double()
        for op in ("window(3)|box|kernel", "all|row|mean", "all|row|softmax(heads=2)", "window(1)|box|kernel")
    ]
    for i, part in enumerate(alone):
        own = {n.removeprefix(f"{i}."): p for n, p in layer.named_parameters() if n.startswith(f"{i}.")}
        shared = {n: p for n, p in layer.named_parameters() if "." not in n}
        part.load_state_dict({n: own.get(n, shared.get(n)) for n in part.state_dict()})
    assert layer.gate_weight.shape == (2, 4) and layer.rates.shape == (1,)
    for b in range(2):
        g = gates(layer, x[b].flatten(1)).unflatten(1, (3, 5))
        each = [part(x[b : b + 1])[0] for part in alone]
        wanted = g[0] * each[0] + 0.5 * each[1] + g[1] * each[2] + layer.rates * each[3]
        torch.testing.assert_close(layer(x)[b], wanted, rtol=1e-12, atol=1e-12)


def attention(q, keys, values):
    """Softmax attention of one query (d,) to rows (S, d)."""
    return torch.softmax(keys @ q / q.shape[0] ** 0.5, 0) @ values


@pytest.mark.parametrize("n", [1, 7, 21])
def test_native_sparse_attention_is_equation_5_one_query_at_a_time(n):
    torch.manual_seed(n)
    C, H = 6, 2
    layer = Mixer(NSA, C, ndim=1).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p) * 0.7)
    x = torch.randn(1, C, n, dtype=torch.float64, requires_grad=True)
    named = dict(layer.named_parameters())

    def linear(name, y):
        return named[f"{name}_weight"] @ y + named[f"{name}_bias"][:, None]

    q, k, v = (linear(name, x[0]) for name in ("query", "key", "value"))
    g = gates(layer, x[0])
    columns = []
    for t in range(n):
        branches: list[list[torch.Tensor]] = [[], [], []]
        for h in range(H):
            rows = slice(h * C // H, (h + 1) * C // H)
            query, key, value = q[rows, t], k[rows].T, v[rows].T
            blocks = [slice(b * BLOCK, (b + 1) * BLOCK) for b in range(-(-n // BLOCK))]
            past = [b for b in blocks if b.stop <= t + 1]  # whole blocks that have ended
            means = torch.stack([key[b].mean(0) for b in past]) if past else key[:0]
            shown = torch.stack([value[b].mean(0) for b in past]) if past else value[:0]
            branches[0].append(attention(query, means, shown) if past else torch.zeros_like(query))
            own = t // BLOCK
            before = [b for b in range(own) if blocks[b].stop <= t + 1]
            best = sorted(before, key=lambda b: -float((key[blocks[b]].mean(0) @ query).detach()))[: CHOSEN - 1]
            at = [i for b in [*best, own] for i in range(blocks[b].start, min(blocks[b].stop, t + 1))]
            branches[1].append(attention(query, key[at], value[at]))
            near = list(range(max(0, t - NEAR + 1), t + 1))
            branches[2].append(attention(query, key[near], value[near]))
        out = 0
        for i, parts in enumerate(branches):
            y = torch.cat(parts)
            out = out + g[i, t] * (named[f"{i}.out_weight"] @ y + named[f"{i}.out_bias"])
        columns.append(out)
    wanted, got = torch.stack(columns, 1)[None], layer(x)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    given = torch.randn_like(got)
    tensors = [x, *layer.parameters()]
    theirs = torch.autograd.grad((wanted * given).sum(), tensors, allow_unused=True)
    ours = torch.autograd.grad((got * given).sum(), tensors, allow_unused=True)
    for mine, other in zip(ours, theirs, strict=True):
        if other is not None:
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("text", [GATED, NSA])
def test_every_backend_is_the_oracle(text, dtype):
    conform(text, (7, 6), dtype)


def test_a_gate_belongs_to_positions():
    with pytest.raises(ValueError, match=r"a gate is made at every position of the input, \(4, 4\).*strides out"):
        Mixer("gate*(window(3, stride=2) | box | kernel) + (window(3, stride=2) | box | kernel)", 4)(
            torch.ones(1, 4, 4, 4)
        )
    assert str(parse(NSA)) == NSA
    assert CATALOGUE["nsa"].operation.gates == 3


def test_what_it_reads_is_drawn_with_the_gates():
    torch.manual_seed(0)
    layer = Mixer("gate*(window(3) | box | ones) + gate*(all | row | mean)", 4, ndim=1).double()
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    matrix = mixing_matrix(layer, x)
    out = layer(x)
    torch.testing.assert_close(torch.einsum("bgmn,bcn->bcm", matrix, x), out, rtol=1e-10, atol=1e-10)
    row = looks(layer, x, (2,))
    assert row.shape == (2, 6) and row.sum(1).allclose(torch.ones(2, dtype=row.dtype)) and (row > 0).all()


def test_surgery_says_that_a_gate_is_no_rate():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    report = convert(model, Rule("gate*({self}) + near*(nearest(4, cosine) | ranked | kernel)"), input_size=(4, 6, 6))
    assert report.replaced[0].grade == "approximate" and "gate" in str(report)


def test_it_is_compiled_into_one_graph():
    layer = Mixer(NSA, 6, ndim=1)
    x = torch.randn(2, 6, 13)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))
