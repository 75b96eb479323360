"""Which neighbours are read, exactly: ties, NaN, and maps smaller than the neighbourhood.

Everything in float64, outputs and gradients within 1e-12 (absolute) of the reference.
Shape legend: B batch, C channels, O output channels, H heads, d channels of a head, N positions, S slots.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.equivalence import BACKENDS, agree, close, set_
from torch import Tensor

from nearfold.nn import ConvNN1d, ConvNN2d, KVTAttention, Mixer

pytestmark = pytest.mark.usefixtures("float64")

# --- ties, NaN, and maps smaller than the neighbourhood


def neighbours(notation: str, features: Tensor, backend: str) -> Tensor:
    """Which positions (B, M, S) an operation reads: features to compare, and one-hot positions as values."""
    B, C, *grid = features.shape
    n = math.prod(grid)
    x = torch.cat([features, torch.eye(n, dtype=features.dtype).view(1, n, *grid).expand(B, -1, *grid)], 1)
    layer = Mixer(notation, C + n, ndim=len(grid), bias=False, backend=backend).to(features.dtype)
    slots = layer.weight.shape[-1]
    read = []
    compare = torch.zeros(C + n, C + n).to(features.dtype)
    compare[:C, :C] = torch.eye(C)
    for s in range(slots):
        with torch.no_grad():
            layer.query_weight.copy_(compare)
            layer.key_weight.copy_(compare)
            layer.weight.zero_()
            layer.weight[..., s] = 1
        y = layer(x)[:, C:].flatten(2)  # (B, N, M): one-hot over N, or zeros where nothing is read
        read.append(torch.where(y.sum(1) > 0.5, y.argmax(1), -1))
    return torch.stack(read, -1)


def by_definition(score_BMN: Tensor, k: int) -> Tensor:
    """The k best, ties by the lowest index, one at a time."""
    found = []
    score_BMN = score_BMN.clone()
    for _ in range(k):
        best = score_BMN.max(-1, keepdim=True).values
        first = (score_BMN == best).int().argmax(-1, keepdim=True)
        found.append(torch.where(best == float("-inf"), -1, first))
        score_BMN.scatter_(-1, first, float("-inf"))
    return torch.cat(found, -1)


SCORES = {
    "dot": lambda x: x.transpose(1, 2) @ x,
    "euclidean": lambda x: -(x[:, :, :, None] - x[:, :, None]).square().sum(1),  # same order as the distance
    "euclidean(squared)": lambda x: -(x[:, :, :, None] - x[:, :, None]).square().sum(1),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("similarity", ["dot", "cosine", "scaled", "euclidean", "euclidean(squared)", "blend(1)"])
def test_constant_inputs_read_the_lowest_indices(similarity, dtype, backend):
    for value in (0.0, 1.0, -0.0):
        features = torch.full((2, 3, 4, 5), value, dtype=dtype)
        found = neighbours(f"nearest(6, {similarity}) | ranked | ones(project=qk)*depthwise", features, backend)
        assert bool((found == torch.arange(6)).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("k", [1, 4, 20, 23])
@pytest.mark.parametrize("similarity", SCORES)
def test_ties_go_to_the_lowest_index(similarity, k, dtype, backend):
    features = torch.randint(-1, 2, (3, 2, 4, 5)).to(dtype)  # integers: many exact ties
    score = SCORES[similarity](features.flatten(2))
    found = neighbours(f"nearest({k}, {similarity}) | ranked | ones(project=qk)*depthwise", features, backend)
    assert torch.equal(found, by_definition(score, k))
    raster = neighbours(f"nearest({k}, {similarity}) | box | ones(project=qk)*depthwise", features, backend)
    expected = by_definition(score, k)
    expected = expected.masked_fill(expected < 0, 99).sort(-1).values
    assert torch.equal(raster, expected.masked_fill(expected == 99, -1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["self", "self=0.5", "self=0.5, again=1", "again"])
def test_the_position_itself_is_slot_0(rule, backend):
    features = torch.randint(-1, 2, (3, 2, 4, 5)).double()
    score = SCORES["dot"](features.flatten(2))
    own = torch.eye(20, dtype=torch.bool)
    if rule == "again":
        rule, score = "self, again=-2", score.masked_fill(own, -2.0)
    else:
        score = score.masked_fill(own, 1.0 if "again" in rule else float("-inf"))
    found = neighbours(f"nearest(5, dot, {rule}) | ranked | ones(project=qk)*depthwise", features, backend)
    assert bool((found[..., 0] == torch.arange(20)).all())
    assert torch.equal(found[..., 1:], by_definition(score, 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_candidates_on_a_grid_and_in_a_window(backend):
    features = torch.randint(-1, 2, (2, 2, 5, 6)).double()
    score = SCORES["dot"](features.flatten(2))
    rows, columns = torch.meshgrid(torch.arange(5), torch.arange(6), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    on_grid = torch.isin(rows, torch.tensor([0, 2, 4])) & torch.isin(columns, torch.tensor([0, 2, 5]))
    apart = torch.maximum((rows[:, None] - rows).abs(), (columns[:, None] - columns).abs())
    inner = (rows >= 1) & (rows <= 3) & (columns >= 1) & (columns <= 4)
    for candidates, allowed in (
        ("grid(3)", on_grid.expand(30, -1)),
        ("grid(9, inset=1)", inner.expand(30, -1)),
        ("window(3)", apart <= 1),
    ):
        spelled = f"nearest(7, dot, {candidates}) | ranked | ones(project=qk)*depthwise"
        expected = by_definition(score.masked_fill(~allowed, float("-inf")), 7)
        assert torch.equal(neighbours(spelled, features, backend), expected)


NAN_LAYERS = [
    *[
        f"nearest(5, {s}{own}) | ranked | kernel"
        for s in ("cosine", "euclidean", "blend(0.5)", "dot")
        for own in ("", ", self")
    ],
    "nearest(5, blend(1, cosine)) | box | depthwise",
    "nearest(99, cosine) | ranked | kernel",
    "nearest(5, euclidean, self=-1.0) | ranked | inverse*kernel",
    "nearest(5, scaled) | ranked | softmax(heads=2)",
    "nearest(5, cosine) | ranked | softmax(heads=2)*depthwise",
    "nearest(5, dot, grid(3)) | ranked | identity*kernel",
    "nearest(5, cosine) | ranked | ones(heads=2)*kernel",
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("notation", NAN_LAYERS)
def test_nan_stays_at_its_position(notation, backend):
    layer = Mixer(notation, 4, backend=backend)
    clean = torch.randn(2, 4, 5, 6)
    x = clean.clone()
    x[0, 1, 2, 3] = float("nan")
    x[1, :, 0, 0] = float("nan")
    lost = x.isnan().any(1, keepdim=True).expand(-1, 4, -1, -1)
    assert torch.equal(layer(x).isnan(), lost)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight", ["ones(heads=2)", "ones(heads=2)*depthwise", "softmax(heads=2, project=none)"])
def test_nan_stays_in_its_head(weight, backend):
    """Heads are queries of their own: without projections or a kernel that mixes them, so are their NaN."""
    layer = Mixer(f"nearest(5, cosine) | ranked | {weight}", 4, backend=backend)
    x = torch.randn(2, 4, 5, 6)
    x[0, 1, 2, 3] = float("nan")
    lost = torch.zeros_like(x, dtype=torch.bool)
    lost[0, :2, 2, 3] = True
    assert torch.equal(layer(x).isnan(), lost)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_is_as_if_the_position_were_not_there(backend):
    layer = ConvNN1d(3, 5, 4, backend=backend)
    x = torch.randn(2, 3, 9)
    without = layer(torch.cat([x[..., :4], x[..., 5:]], -1))
    x[:, :, 4] = float("nan")
    y = layer(x)
    close(torch.cat([y[..., :4], y[..., 5:]], -1), without, "output elsewhere")


def test_nan_in_kvt():
    layer = KVTAttention(12, 3, 4)
    x = torch.randn(2, 9, 12)
    x[1, 6, 2] = float("nan")
    y = layer(x)
    assert bool(y[1, 6].isnan().all())
    assert int(y.isnan().sum()) == 12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grid", [(1, 1), (2, 1), (3, 2)])
def test_more_neighbours_than_positions(grid, backend):
    """Slots beyond the positions there are read nothing, like zero padding."""
    n, x = math.prod(grid), torch.randn(2, 4, *grid)
    large, small = ConvNN2d(4, 6, 9, backend=backend), ConvNN2d(4, 6, n)
    set_(small.weight, large.weight[..., :n])
    set_(small.bias, large.bias)
    pairs = [(large.weight, lambda: F.pad(small.weight.grad, (0, 9 - n)))]
    agree(large, small, x, pairs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_position_is_a_linear_map(backend):
    x = torch.randn(3, 4, 1, 1)
    for notation, centre in (
        ("nearest(9, cosine, self) | ranked | kernel", (0,)),
        ("nearest(9, position) | box | kernel", (0,)),
        ("window(3) | box | kernel", (1, 1)),
    ):
        layer = Mixer(notation, 4, 6, backend=backend)
        weight = layer.weight.detach()[(..., *centre)]
        bias = layer.bias.detach()
        agree(layer, lambda x, w=weight, b=bias: F.conv2d(x, w[..., None, None], b), x)
    layer = Mixer("all | row | softmax(heads=2)", 4, backend=backend)
    value = layer.value_weight.detach(), layer.value_bias.detach()
    out = layer.out_weight.detach(), layer.out_bias.detach()
    agree(layer, lambda x: F.linear(F.linear(x.flatten(1), *value), *out).view_as(x), x)


def test_the_inverse_of_no_distance_is_finite():
    layer = Mixer("window(1, euclidean) | box | inverse(project=none)", 1, ndim=1)
    torch.testing.assert_close(layer(torch.ones(1, 1, 3)), torch.full((1, 1, 3), 1e8))
