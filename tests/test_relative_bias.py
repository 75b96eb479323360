"""The learned table of a window or a block: every offset that occurs has its own entry, forward and in the gradient.

The expected numbers come from a formula written here, one query and one key at a time.
"""

import itertools
import random

import pytest
import torch

from nearfold import mixing_matrix
from nearfold.nn import Mixer, NeighborhoodAttention1d


def inside_keys(p, n, size, dilation, step, causal):
    """(position, steps from the key to the query) on one axis of a window that stays inside the grid."""
    place, phase = divmod(p, dilation)
    line = list(range(phase, n, dilation))  # the positions that this query can see at all
    first = place // step * step  # of the queries that share a window
    if causal:
        start = min(first + step, len(line)) - size
    else:
        middle = min(first + step // 2, len(line) - 1)
        start = max(min(middle - size // 2, len(line) - size), 0)
    keys = [j for j in range(start, start + size) if 0 <= j < len(line) and (not causal or j <= place)]
    return [(line[j], place - j) for j in keys]


def zeros_keys(p, n, size, dilation, causal):
    """The same of a window around the query; an even size with an even dilation looks further back than ahead."""
    reach = (size - 1) * dilation
    back = reach if causal else reach // 2
    at = [p - back + slot * dilation for slot in range(size)]
    return [(j, (p - j) // dilation) for j in at if 0 <= j < n]


def block_keys(p, n, size, shift):
    """The same of a block; where one covers the axis nothing is shifted."""
    shift = shift if n > size else 0
    return [(j, p - j) for j in range(n) if (j - shift) // size == (p - shift) // size]


def expected(layer, x, queries, keys_of):
    """Output (C, queries) of softmax attention, with scores and sums made of single numbers."""
    q, k, v = (
        torch.einsum("oc,c...->o...", getattr(layer, f"{n}_weight"), x[0])
        + getattr(layer, f"{n}_bias").view(-1, *[1] * (x.dim() - 2))
        for n in ("query", "key", "value")
    )
    table, out = layer.relative_bias, []
    heads, centre = table.shape[0], [n // 2 for n in table.shape[1:]]
    d = q.shape[0] // heads
    for p in queries:
        per_axis = [keys_of(axis, p[axis]) for axis in range(len(p))]
        rows = []
        for h in range(heads):
            mine = slice(h * d, (h + 1) * d)
            scores, values = [], []
            for pairs in itertools.product(*per_axis):
                at = tuple(j for j, _ in pairs)
                entry = tuple(c + behind for c, (_, behind) in zip(centre, pairs, strict=True))
                assert all(0 <= e < n for e, n in zip(entry, table.shape[1:], strict=True)), (entry, table.shape)
                scores.append((q[(mine, *p)] * k[(mine, *at)]).sum() / d**0.5 + table[(h, *entry)])
                values.append(v[(mine, *at)])
            rows.append(torch.stack(scores).softmax(0) @ torch.stack(values) if scores else v.new_zeros(d))
        out.append(torch.cat(rows))
    made = torch.stack(out, 1)
    return layer.out_weight @ made + layer.out_bias[:, None] + 0 * table.sum()  # some windows hold no key at all


def drawn(seed):
    """A layer, its grid, its queries and what they see, from a seed."""
    rng = random.Random(seed)
    ndim = rng.choice([1, 1, 2, 2, 3])
    grid = tuple(rng.randint(1, (14, 6, 3)[ndim - 1]) for _ in range(ndim))
    size = tuple(rng.randint(1, (6, 4, 3)[ndim - 1]) for _ in range(ndim))
    dilation = tuple(rng.randint(1, 3) for _ in range(ndim))
    kind = rng.choice(["inside", "inside", "zeros", "block"])
    causal = tuple(a for a in range(ndim) if rng.random() < 0.3) if kind != "block" else ()
    shape = f"causal(axes=({', '.join(map(str, causal))},))" if causal else "box"
    stride = (1,) * ndim
    if kind == "inside":
        step = tuple(rng.randint(1, 9) for _ in range(ndim))
        path = f"window({size}, scaled(bias=table), mode=inside, dilation={dilation}, step={step})"

        def keys_of(axis, p):
            return inside_keys(p, grid[axis], size[axis], dilation[axis], step[axis], axis in causal)
    elif kind == "zeros":
        stride = tuple(rng.randint(1, 2) for _ in range(ndim))
        path = f"window({size}, scaled(bias=table), dilation={dilation}, stride={stride})"

        def keys_of(axis, p):
            return zeros_keys(p, grid[axis], size[axis], dilation[axis], axis in causal)
    else:
        shift = tuple(rng.randint(0, s - 1) for s in size)
        path = f"block({size}, scaled(bias=table), shift={shift})"

        def keys_of(axis, p):
            return block_keys(p, grid[axis], size[axis], shift[axis])

    torch.manual_seed(seed)
    text = f"{path} | {shape} | softmax(heads=2)"
    queries = list(itertools.product(*(range(0, n, s) for n, s in zip(grid, stride, strict=True))))
    return text, grid, queries, keys_of


@pytest.mark.parametrize("seed", range(40))
def test_every_offset_reads_its_own_entry(seed):
    text, grid, queries, keys_of = drawn(seed)
    layer = Mixer(text, 4, ndim=len(grid)).double()
    with torch.no_grad():
        layer.relative_bias.normal_(0, 2)
    x = torch.randn(1, 4, *grid, dtype=torch.double)
    want = expected(layer, x, queries, keys_of)
    (wanted_slope,) = torch.autograd.grad(want.square().sum(), layer.relative_bias)
    for backend in ("auto", "oracle"):
        layer.backend = backend
        y = layer(x).flatten(2)[0]
        (slope,) = torch.autograd.grad(y.square().sum(), layer.relative_bias)
        torch.testing.assert_close(y, want, rtol=0, atol=1e-10, msg=f"{backend}: {text} on {grid}")
        torch.testing.assert_close(slope, wanted_slope, rtol=1e-9, atol=1e-9, msg=f"{backend}: {text} on {grid}")


def test_a_step_larger_than_the_window_has_a_larger_table():
    assert NeighborhoodAttention1d(4, 2, 3, step=3, relative_bias=True).relative_bias.shape == (2, 5)
    layer = NeighborhoodAttention1d(4, 2, 3, step=4, relative_bias=True).double()
    assert layer.relative_bias.shape == (2, 7)
    with torch.no_grad():
        layer.query_weight.zero_(), layer.query_bias.zero_(), layer.relative_bias.zero_()
        layer.relative_bias[:, 3 - 2] = 50.0  # of keys two ahead of their query
    x = torch.randn(1, 4, 12, dtype=torch.double)
    row = mixing_matrix(layer, x)[0, 0, 4]
    assert (
        row.nonzero().flatten().tolist() == [5, 6, 7] and row[6] > 0.99
    )  # the key at 6 is two ahead of the query at 4


def test_become_keeps_the_entry_of_every_offset():
    """A smaller window reads the middle of a larger one's table, as each offset is the same there."""
    layer = Mixer("window(5, scaled(bias=table), mode=inside) | box | softmax(heads=2)", 4)
    with torch.no_grad():
        layer.relative_bias.copy_(torch.arange(162.0).view(2, 9, 9))
    layer.become("window(3, scaled(bias=table), mode=inside) | box | softmax(heads=2)")
    assert torch.equal(layer.tensors()["relative_bias"], layer.relative_bias[:, 2:7, 2:7])
