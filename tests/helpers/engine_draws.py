"""Random arguments of the operators, and an instruction set held against the PyTorch path."""

import math

import pytest
import torch
import torch.nn.functional as F

from nearfold.kernels import engine
from nearfold.testing import poisoned_empties

SETS = [name for name in engine.names() if name != engine.OFF]

every_set = pytest.mark.parametrize("isa", SETS)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
CASES_PER_TEST = 30


def both(isa, op, *args):
    """What an operator gives on an instruction set, and on the PyTorch path."""
    with poisoned_empties():
        with engine.forced(isa):
            found = op(*args)
        with engine.forced(engine.OFF):
            truth = op(*args)
    return (found, truth) if isinstance(found, tuple) else ((found,), (truth,))


def assert_near(found, truth, what, tolerance=None):
    """Equal up to rounding, relative to the largest number; NaN and infinities in the same places."""
    assert found.shape == truth.shape and found.dtype == truth.dtype, what
    found, truth, tolerance = found.double(), truth.double(), tolerance or TOLERANCE[truth.dtype]
    odd = ~truth.isfinite()
    same = torch.equal(found.nan_to_num(3.0, 5.0, 7.0)[odd], truth.nan_to_num(3.0, 5.0, 7.0)[odd])
    assert same and found[~odd].isfinite().all(), f"{what}: NaN or infinity in other places"
    if truth.numel():
        gap = (found - truth).masked_fill(odd, 0).abs().max().item()
        scale = max(1.0, truth.masked_fill(odd, 0).abs().max().item())
        assert gap <= tolerance * scale, f"{what}: off by {gap:.2e} at a scale of {scale:.2e}"


def laid_out(rng, x):
    """The same numbers at other strides."""
    way = rng.choice(["plain", "plain", "turned", "inner", "stepped", "backwards"])
    if way == "turned":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if way == "inner":  # a slice of something larger: rows lie further apart than they are long
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 7), float("nan") if x.is_floating_point() else 99)
        wide[..., 3 : 3 + x.shape[-1]] = x
        return wide[..., 3 : 3 + x.shape[-1]]
    if way == "stepped":
        wide = x.new_full((*x.shape[:-2], 2 * x.shape[-2], x.shape[-1]), float("nan") if x.is_floating_point() else 99)
        wide[..., ::2, :] = x
        return wide[..., ::2, :]
    if way == "backwards":
        order = list(range(x.dim()))[::-1]
        return x.permute(order).contiguous().permute(order)
    return x


def draw_select(rng):
    """Arguments of `select`, and whether their arithmetic is exact."""
    B, H = rng.choice([(1, 1), (2, 1), (1, 3), (2, 2)])
    axes = rng.choice([1, 1, 2, 3])
    longest = 2500 if rng.random() < 0.25 else 700
    grid = [rng.randint(1, {1: longest, 2: 24, 3: 8}[axes]) for _ in range(axes)]
    positions = math.prod(grid)
    near = rng.random() < 0.3 and positions <= 700
    key_index = torch.arange(positions)
    if not near and rng.random() < 0.4:
        key_index = torch.randperm(positions)[: rng.randint(1, positions)].sort().values
    query_index = torch.randperm(positions)[: rng.randint(1, min(positions, 90))]  # in no order
    R, M = len(key_index), len(query_index)
    e, k = rng.choice([1, 2, 3, 5, 8, 16, 17, 33, 64, 130]), rng.choice([1, 2, 3, 9, 16, 17, 36, 79, 80, 100, 256])
    dtype = rng.choice([torch.float32, torch.float32, torch.float64])
    metric = rng.choice(["dot", "dot", "cosine", "euclidean", "chebyshev"])
    exact = rng.random() < 0.5

    def features(n):
        if exact:
            return torch.randint(-2, 3, (B, H, n, e)).to(dtype) * (0.5 if metric == "cosine" else 1)
        x = torch.randn(B, H, n, e, dtype=dtype) * rng.choice([1.0, 1.0, 1e-3, 1e3])
        if rng.random() < 0.2:  # all near one another: what is rounded coarsely ties
            x = x[:, :, :1] + 1e-5 * x
        return F.normalize(x, dim=-1) if metric == "cosine" else x

    query, key = features(M), features(R)
    if metric != "chebyshev":  # torch.cdist, which the truth is made of there, loses some of them
        for x in (query, key):
            for odd in ("nan",) if metric == "cosine" else ("nan", "inf", "-inf"):  # unit vectors hold no infinity
                if rng.random() < 0.1:
                    x[rng.randrange(B), rng.randrange(H), rng.randrange(x.shape[2]), rng.randrange(e)] = float(odd)
        if rng.random() < 0.1:
            key[:, :, torch.rand(R) < rng.choice([0.5, 0.98, 1.0])] = float(rng.choice(["nan", "nan", "-inf"]))
            if metric == "cosine":
                key.masked_fill_(key.isinf(), float("nan"))
    causal = int(rng.random() < 0.3)
    rule = [causal, rng.randint(0, 4) if rng.random() < 0.8 else -1, rng.randint(1, 3)] if near else [causal, -1, 1]
    own = rng.random() < 0.4
    again = rng.choice([1.1, 0.0, float("-inf"), 1.0, 5.0, -2.0])
    squared = metric == "euclidean" and rng.random() < 0.5
    query, key = laid_out(rng, query), laid_out(rng, key)
    return (query, key, k, metric, squared, query_index, key_index, grid, rule, own, again), exact


def scores_at(index, query, key, k, metric, squared, query_index, key_index, grid, rule, own, again):
    """The scores of chosen keys, in float64."""
    rows = key.double().gather(2, index.clamp(min=0).flatten(2)[..., None].expand(-1, -1, -1, key.shape[3]))
    rows, query = rows.unflatten(2, index.shape[2:]), query.double()[:, :, :, None]
    apart = query - rows
    score = {
        "dot": lambda: (query * rows).sum(-1),
        "cosine": lambda: (query * rows).sum(-1).clamp(-1, 1),
        "euclidean": lambda: -apart.square().sum(-1) if squared else -apart.square().sum(-1).sqrt(),
        "chebyshev": lambda: -apart.abs().amax(-1),
    }[metric]()
    if own:
        score[key_index[index.clamp(min=0)] == query_index[:, None]] = again
    lost = query.isnan().any(-1).expand(score.shape)
    return score.masked_fill(index < 0, float("-inf")).masked_fill(lost, float("nan"))


def expanded(rng, x):
    """The same numbers along one axis, at a stride of zero."""
    axis = rng.randrange(x.dim())
    return x.narrow(axis, 0, 1).expand_as(x)


def draw_aggregate(rng, kind):
    """value, index, alpha, weight, groups; heads and groups cut across one another."""
    dtype = rng.choice([torch.float32, torch.float64, torch.float64, torch.bfloat16])
    C = rng.choice([1, 2, 3, 4, 6, 12, 17, 20, 24, 36, 60, 100])
    divisors = [n for n in range(1, C + 1) if C % n == 0]
    H, G = rng.choice(divisors), rng.choice(divisors)
    B, N, M, S = rng.randint(1, 3), rng.randint(1, 70), rng.randint(1, 140), rng.randint(1, 10)
    index = torch.randint(rng.choice([-2, -1, 0, 0]), N, (B, M, S, H))
    index = expanded(rng, index) if rng.random() < 0.3 else laid_out(rng, index)
    alpha = weight = None
    if rng.random() < (0.5 if kind == "dense" else 0.7):
        alpha = torch.randn(B, M, S, H, dtype=dtype)
        alpha = expanded(rng, alpha) if rng.random() < 0.4 else laid_out(rng, alpha)
    if kind == "dense":
        O = G * rng.randint(1, max(1, 130 // G))
        weight = torch.randn(O, C // G, S, dtype=dtype)
    elif kind == "depthwise":
        G = C
        weight = torch.randn(C, 1, S, dtype=dtype)
    else:
        G = 1
    if weight is not None:
        weight = laid_out(rng, weight)
    return laid_out(rng, torch.randn(B, N, C, dtype=dtype)), index, alpha, weight, G


def described(value, index, alpha, weight, groups):
    shapes = [t if t is None else (*t.shape, t.stride()) for t in (value, index, alpha, weight)]
    return f"{value.dtype} {shapes} groups={groups}"


def bits(x):
    return x.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()])
