"""Masks of pairs of query and key: numbers that are added to the scores, and bools for fixed positions.

Nothing here goes through the oracle but to be compared with torch's attention, or sums written out.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.formulas import close, mask_of, project, scrambled

from nearfold.grammar.vocabulary import cases
from nearfold.lower import lower
from nearfold.lower.verdict import Facts
from nearfold.nn import Mixer, SelfAttention
from nearfold.testing import make

pytestmark = pytest.mark.usefixtures("float64")


def out(layer, y, grid):
    y = F.linear(y.transpose(1, 2).flatten(2), layer.out_weight, layer.out_bias)
    return y.mT.unflatten(2, grid)


def plain(layer, x, plus):
    """Attention of all positions with numbers added to the scores, by torch; zero where nothing is read."""
    q, k, v = project(layer, x)
    y = F.scaled_dot_product_attention(q, k, v, plus.expand(len(x), q.shape[1], -1, -1))
    return out(layer, y.masked_fill((plus == -math.inf).all(-1, True), 0), x.shape[2:])


def agree(layer, x, plus, truth, backends):
    """Output and every gradient, that of the numbers too."""
    operands = [x, plus, *layer.parameters()]
    probe = torch.randn_like(truth)
    wanted = torch.autograd.grad((truth * probe).sum(), operands)
    for layer.backend in backends:
        y = layer(x, mask=plus)
        close(y, truth)
        for one, other in zip(torch.autograd.grad((y * probe).sum(), operands), wanted, strict=True):
            close(one, other)


def numbers(*shape, holes=True):
    """What is added, some of it -inf; one query reads nothing."""
    plus = torch.randn(*shape) * 2
    if holes:
        plus = plus.masked_fill(torch.rand(*shape) < 0.3, -math.inf)
        plus[..., 1, :] = -math.inf
    return plus.requires_grad_()


@pytest.mark.parametrize("grid", [(9,), (3, 4), (2, 2, 3)])
@pytest.mark.parametrize("shape", [(2, 2), (1, 1), (2, 1), (1, 2)], ids=str)
def test_numbers_are_added_as_torch_adds_them(grid, shape):
    layer = scrambled(Mixer("all | row | softmax(heads=2)", 6, ndim=len(grid)))
    x, N = torch.randn(2, 6, *grid, requires_grad=True), math.prod(grid)
    plus = numbers(*shape, N, N)
    agree(layer, x, plus, plain(layer, x, plus), ("auto", "sdpa", "dense", "oracle"))


@pytest.mark.parametrize("shape", ["causal", "strided(2)"])
def test_numbers_beside_a_shape_and_a_bias(shape):
    layer = scrambled(Mixer(f"all(scaled(bias=alibi)) | {shape} | softmax(heads=2)", 4, ndim=1))
    x, plus = torch.randn(2, 4, 7, requires_grad=True), numbers(2, 1, 7, 7, holes=False)
    i, j = torch.arange(7)[:, None], torch.arange(7)
    may = i >= j if shape == "causal" else (i - j) % 2 == 0
    slopes = torch.tensor([2.0**-4, 2.0**-8])[:, None, None]
    whole = (plus - slopes * (i - j).abs()).masked_fill(~may, -math.inf)
    agree(layer, x, plus, plain(layer, x, whole), ("auto", "oracle"))


def test_a_window_is_all_positions_under_its_mask():
    """Windows, blocks, first positions and unions of them: numbers and bools, by rows of a table."""
    grid = (4, 5)
    paths = {
        "window(3)": lambda i, j: max(abs(a - b) for a, b in zip(i, j, strict=True)) <= 1,
        "block((2, 3))": lambda i, j: i[0] // 2 == j[0] // 2 and i[1] // 3 == j[1] // 3,
        "window(3) & first(2)": lambda i, j: (
            max(abs(a - b) for a, b in zip(i, j, strict=True)) <= 1 or j in ((0, 0), (0, 1))
        ),
        "axial(0)": lambda i, j: i[1] == j[1],
    }
    for path, reads in paths.items():
        layer, may = scrambled(Mixer(f"{path} | box | softmax(heads=2)", 6)), mask_of(grid, reads)
        x, plus = torch.randn(2, 6, *grid, requires_grad=True), numbers(2, 2, 20, 20)
        truth = plain(layer, x, plus.masked_fill(~may, -math.inf))
        agree(layer, x, plus, truth, ("auto", "gather", "oracle"))
        pairs = torch.rand(2, 1, 20, 20) < 0.6
        truth = plain(layer, x, torch.zeros(2, 1, 20, 20).masked_fill(~(may & pairs), -math.inf))
        for layer.backend in ("auto", "oracle"):
            close(layer(x, mask=pairs), truth)


@pytest.mark.parametrize(
    "text", ["window(3) | box | kernel", "window(3, mode=inside) | box | mean", "axial(0) | box | max"]
)
def test_bools_leave_slots_out_whatever_weighs_them(text):
    """One query at a time: what it may not read is absent for it, as a mask of keys says it for all."""
    layer, x = scrambled(Mixer(text, 4, ndim=1)), torch.randn(1, 4, 6)
    pairs = torch.rand(1, 1, 6, 6) < 0.6
    y = layer(x, mask=pairs)
    for i in range(6):
        close(y[..., i], layer(x, mask=pairs[:, 0, i])[..., i])


@pytest.mark.parametrize("similarity", ["scaled", "euclidean", "euclidean(squared)", "cosine"])
def test_neighbours_are_chosen_by_the_sums(similarity):
    layer = scrambled(Mixer(f"nearest(3, {similarity}) | ranked | softmax(heads=2)", 4, ndim=1))
    x, plus = torch.randn(2, 4, 8, requires_grad=True), numbers(2, 2, 8, 8, holes=False)
    q, k, v = project(layer, x)
    if "euclidean" in similarity:
        far = (q[:, :, :, None] - k[:, :, None]).square().sum(-1)
        score = -far if "squared" in similarity else -far.sqrt()
    else:
        q, k = (F.normalize(q, dim=-1), F.normalize(k, dim=-1)) if similarity == "cosine" else (q / math.sqrt(2), k)
        score = q @ k.mT
    total = score + plus
    chosen = total >= total.topk(3, -1).values[..., -1:]
    truth = out(layer, torch.softmax(total.masked_fill(~chosen, -math.inf), -1) @ v, (8,))
    agree(layer, x, plus, truth, ("auto", "oracle"))


def test_numbers_are_in_the_unit_of_the_score():
    """Positions are ranked in steps of the grid and weighed in shares of the map: numbers are added to the latter."""
    layer = Mixer("nearest(3, position) | ranked | softmax(project=none)", 4, ndim=1)
    x, plus = torch.randn(2, 4, 9, requires_grad=True), numbers(2, 1, 9, 9, holes=False)
    far = (torch.arange(9.0)[:, None] - torch.arange(9.0)).abs() * 2 / 8
    total = plus - far
    chosen = total >= total.topk(3, -1).values[..., -1:]
    truth = (torch.softmax(total.masked_fill(~chosen, -math.inf), -1)[:, 0] @ x.mT).mT
    agree(layer, x, plus, truth, ("auto", "oracle"))


@pytest.mark.parametrize("rho", ["sparsemax", "entmax", "sigmoid", "relu", "identity"])
@pytest.mark.parametrize("path", ["all | row", "window(3) | box"])
def test_every_rho_that_weighs_by_scores_takes_numbers(rho, path):
    layer = scrambled(Mixer(f"{path} | {rho}(heads=2)", 4, ndim=1))
    x, plus = torch.randn(2, 4, 7, requires_grad=True), numbers(1, 2, 7, 7)
    layer.backend = "oracle"
    agree(layer, x, plus, layer(x, mask=plus), ("auto",))
    moved = layer(x, mask=plus + 1)
    assert not torch.allclose(moved, layer(x, mask=plus)) or rho in ("sparsemax", "entmax"), (
        "shares see differences only"
    )


def test_tokens_and_a_second_input():
    layer = scrambled(SelfAttention(6, 2))
    x, plus = torch.randn(2, 5, 6), numbers(2, 2, 5, 5)
    close(layer(x, mask=plus), plain(layer, x.mT, plus).mT)
    cross = scrambled(Mixer("all(cross) | row | softmax(heads=2)", 4, ndim=1))
    x, context, plus = torch.randn(2, 4, 5), torch.randn(2, 4, 3), numbers(1, 2, 5, 3)
    (q,), (k, v) = project(cross, x, "query"), project(cross, context, "key value")
    y = F.scaled_dot_product_attention(q, k, v, plus.expand(2, -1, -1, -1))
    truth = out(cross, y.masked_fill((plus == -math.inf).all(-1, True), 0), (5,))
    for cross.backend in ("auto", "oracle"):
        close(cross(x, context, plus), truth)


def test_a_query_of_numbers_only_that_forbid_reads_nothing():
    layer = Mixer("all | row | softmax(heads=2, project=none)", 4, ndim=1)
    assert not layer(torch.randn(1, 4, 5), mask=torch.full((1, 1, 5, 5), -math.inf)).any()


def test_what_takes_a_mask_of_pairs_runs_without_the_oracle():
    for name in ("attention", "attention_local", "swin", "halo", "criss_cross", "sinks", "sigmoid_attention"):
        layer, x = make(cases()[name], (4, 4))
        (part,) = layer.operation.parts
        N = x[0, 0].numel()
        facts = Facts(part, x.dim() - 2, x.dtype, "cpu", True)
        assert any(lower(facts, backend) for backend in ("sdpa", "dense", "gather") if _runs(facts, backend)), name
        layer(x, mask=torch.zeros(1, 1, N, N))


def _runs(facts, backend):
    try:
        return bool(lower(facts, backend))
    except ValueError:
        return False


@pytest.mark.parametrize(
    ("text", "mask", "said"),
    [
        ("all(elu) | row | normalized", torch.zeros(1, 1, 5, 5), "which rho normalized does not weigh by"),
        ("window(3) | box | kernel", torch.zeros(1, 1, 5, 5), "which rho ones does not weigh by"),
        ("nearest(3, scaled, by=cosine) | ranked | softmax", torch.zeros(1, 1, 5, 5), "leave by out"),
        ("block(3, padded) | box | softmax", torch.zeros(1, 1, 5, 5), "a mask of pairs goes with"),
        ("window(3, padding=1) | box | ones", torch.ones(1, 1, 5, 5).bool(), "a mask of pairs goes with"),
        ("all | row | agent(2)", torch.zeros(1, 1, 5, 5), "a mask of pairs goes with"),
        ("all | row | softmax", torch.zeros(1, 1, 5, 4), "or floating point, added to the scores, got"),
        ("all | row | softmax", torch.zeros(5, 5), "bool or numbers; got torch.float32"),
        (
            "all | row | softmax",
            torch.zeros(1, 1, 5, 5, dtype=torch.int),
            "or floating point, added to the scores, got",
        ),
    ],
)
def test_what_takes_no_numbers_says_so(text, mask, said):
    with pytest.raises(ValueError, match=said):
        Mixer(text, 4, ndim=1)(torch.randn(2, 4, 5), mask=mask)


def test_numbers_compile():
    layer = Mixer("window(3) | box | softmax(heads=2)", 4, ndim=1)
    x, plus = torch.randn(2, 4, 7), numbers(1, 1, 7, 7)
    close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x, mask=plus), layer(x, mask=plus))
