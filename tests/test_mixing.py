"""The mixing matrix is the layer: applied to the values it gives the output, and differentiation finds the same one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from nearfold.grammar import Basic, parse
from nearfold.grammar.words import (
    S4D,
    ContinuousDepthwise,
    CrossCovariance,
    Depthwise,
    Excite,
    Experts,
    GlobalFilter,
    Hyena,
    Separable,
)
from nearfold.look import looks, mixing_matrix
from nearfold.lower import oracle
from nearfold.lower.call import pointwise
from nearfold.lower.execute import execute
from nearfold.lower.geometry import padding_of
from nearfold.lower.kernel import brought, values
from nearfold.lower.meaning import meaning
from nearfold.lower.selection import select
from nearfold.lower.words.experts import expert_shares
from nearfold.nn import ConvNN2d, KVTAttention, Mixer
from nearfold.testing import CASES, context_for, forward, make

GRID = (5, 4)


def calls_of(layer, x, context):
    """What the oracle is called with for every part."""
    calls = []

    def spy(call):
        calls.append(call)
        return oracle.run(call)

    with torch.no_grad():
        execute(layer.operation, layer.tensors(), x, lambda *_: spy, out_channels=layer.made_channels, context=context)
    return calls


def made(name):
    """A layer in evaluation mode, its input, its context and its matrix."""
    layer, x = make(CASES[name], GRID)
    layer.eval()
    context = context_for(layer, x)
    return layer, x, context, mixing_matrix(layer, x, context=context)


EACH_ALONE = Depthwise | Separable | ContinuousDepthwise | GlobalFilter | Hyena | S4D


def without_block(name):
    """Zeros that `block(padded)` adds take part, and have no column: tests/test_block_padding.py."""
    op = parse(CASES[name])
    return (
        isinstance(op, Basic)
        and not getattr(op.path, "padded", False)
        and isinstance(op.weight.kernel, EACH_ALONE | None)
    )


def of_pairs(name):
    """What a slot brings is made of two values: tests below say what its matrix is."""
    kernel = parse(CASES[name]).parts[0].weight.kernel
    return kernel is not None and kernel.edges


EXACT = [name for name in CASES if without_block(name)]
BLOCKS = [
    name
    for name in CASES
    if isinstance(op := parse(CASES[name]), Basic)
    and name not in EXACT
    and not getattr(op.path, "padded", False)
    and not of_pairs(name)
]


@pytest.mark.parametrize("name", EXACT)
def test_matrix_times_values_is_the_layer(name):
    layer, x, context, matrix = made(name)
    (call,) = calls_of(layer, x, context)
    value = values(call).unflatten(1, (matrix.shape[1], -1))
    y = torch.einsum("bgmn,bgcn->bgcm", matrix, value).flatten(1, 2).unflatten(2, call.out_grid)
    y = oracle.finish(call, y)
    if "o" in call.op.weight.projections:
        y = pointwise(y, call.params["out_weight"], call.params.get("out_bias"))
    torch.testing.assert_close(y, forward(layer, x))


class Frozen(nn.Module):
    """The aggregation of one image with its selection and alpha held fast: linear in the values."""

    def __init__(self, call, b):
        super().__init__()
        self.call, self.b = call, b
        chosen = select(call)
        parts = {
            f: one(getattr(chosen, f), b)
            for f in ("index", "valid", "score", "coefficient")
        }  # fmt: skip
        self.alpha, self.chosen = one(oracle.weights(call, chosen), b), dataclasses.replace(chosen, **parts)

    def forward(self, value):
        kernel = self.call.op.weight.kernel
        heads = max(self.call.heads, self.alpha.shape[1])
        if isinstance(kernel, CrossCovariance | Excite):  # a map of the channels, made by the input
            blocks = meaning(kernel).blocks(self.call)[self.b, ..., 0]
            return torch.einsum("hde,bhem->bhdm", blocks, value.unflatten(1, (len(blocks), -1))).flatten(1, 2)
        read = brought(self.call, self.chosen.index, value)
        y = oracle.aggregate(read, self.chosen, self.alpha, oracle.kernel_weight(self.call), heads)
        if isinstance(kernel, Experts):
            shares = expert_shares(self.call)[self.b]
            y = torch.einsum("beom,e->bom", y.unflatten(1, (kernel.count, -1)), shares)
        return y


def one(x, b):
    return x if x is None or len(x) == 1 else x[b : b + 1]


@pytest.mark.parametrize("name", [n for n in CASES if isinstance(parse(CASES[n]), Basic) and of_pairs(n)])
def test_a_kernel_of_pairs_has_the_matrix_of_what_it_reads(name):
    layer, x, context, matrix = made(name)
    (call,) = calls_of(layer, x, context)
    chosen = select(call)
    alpha = oracle.weights(call, chosen)
    B, H, M, _ = matrix.shape
    index = chosen.index.expand(B, H, M, -1)
    wanted = torch.zeros(B, H, M, chosen.positions, dtype=alpha.dtype).scatter_add(3, index, alpha.expand_as(index))
    if border := padding_of(call.op):
        wanted = wanted.unflatten(-1, call.padded)[(..., *(slice(border, border + n) for n in call.grid))].flatten(3)
    torch.testing.assert_close(matrix, wanted)


@pytest.mark.parametrize("name", BLOCKS)
def test_dense_kernels_are_the_size_of_the_jacobian_by_the_values(name):
    layer, x, context, matrix = made(name)
    (call,) = calls_of(layer, x, context)
    border = padding_of(call.op)
    for b in range(len(x)):
        found = mixing_matrix(Frozen(call, b), values(call)[b : b + 1], groups=matrix.shape[1], tokens=False)[0]
        if border:
            inside = (..., *(slice(border, border + n) for n in call.grid))
            found = found.unflatten(-1, call.padded)[inside].flatten(2)
        torch.testing.assert_close(matrix[b], found.detach())
    assert matrix.min() >= 0


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("window(3) | box | depthwise", 8),
        ("window(3, mode=reflect) | box | kernel", 1),
        ("window(3, stride=2) | box | kernel(groups=4)", 4),
        ("window(2, stride=2, padding=0) | box | max", 8),
        ("all | row | table(20)", 8),
        ("nearest(4, position) | ranked | softmax(project=none)*depthwise", 8),
        ("nearest(9, position, padding=1) | box | kernel", 1),
        ("0.5*(window(3) | box | depthwise) + (all | row | mean)", 8),
    ],
)
def test_weights_that_do_not_follow_the_input_are_the_jacobian(text, groups):
    layer, x = make(text, GRID)
    own = mixing_matrix(layer, x)
    asked = mixing_matrix(nn.Sequential(layer), x, groups=groups)
    torch.testing.assert_close(own.expand_as(asked), asked)


def test_a_foreign_convolution_is_ours():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 4, 5).double()
    for groups in (1, 2, 6):
        conv = nn.Conv2d(6, 6, 3, padding=1, groups=groups).double()
        word = "depthwise" if groups == 6 else f"kernel(groups={groups})"
        ours = Mixer(f"window(3) | box | {word}", 6).double()
        ours.load_state_dict(conv.state_dict())
        torch.testing.assert_close(mixing_matrix(conv, x, groups=groups), mixing_matrix(ours, x))


def test_a_foreign_attention_without_gradients_through_its_weights_is_alpha():
    class Attention(nn.Module):
        def forward(self, x, context):
            alpha = torch.softmax(x @ context.mT, -1).detach()
            return alpha @ context

    x, context = torch.randn(2, 5, 3), torch.randn(2, 7, 3)
    matrix = mixing_matrix(Attention(), x, context=context, tokens=True)
    torch.testing.assert_close(matrix[:, 0], torch.softmax(x @ context.mT, -1))


def test_tokens_channels_last_and_many_blocks(monkeypatch):
    class Roll(nn.Module):
        def forward(self, x):
            assert not self.training
            return 2 * x.roll(1, 1)

    layer = Roll().train()
    x = torch.randn(1, 3, 2, 4)
    expected = 2 * torch.eye(6).reshape(3, 2, 6).roll(1, 0).reshape(6, 6)
    torch.testing.assert_close(mixing_matrix(layer, x, tokens=True)[0, 0], expected)
    monkeypatch.setattr("nearfold.look.derivative.BLOCK", 1)
    torch.testing.assert_close(mixing_matrix(layer, x, tokens=True, groups=2)[0, 1], expected)
    assert layer.training


def test_sums_and_branches():
    x = torch.randn(2, 8, 4, 4).double()
    scan, _ = make(CASES["scan_cross"], (4, 4))
    y = torch.einsum("bcmn,bcn->bcm", mixing_matrix(scan, x), x.flatten(2)).unflatten(2, (4, 4))
    torch.testing.assert_close(y, scan(x))
    halves = make("branch(0.25, all | row | softmax(heads=2), window(3) | box | kernel(groups=2))", (4, 4))[0]
    matrix = mixing_matrix(halves, x)
    assert matrix.shape == (2, 4, 16, 16)
    torch.testing.assert_close(matrix[:, :2].sum(-1), torch.ones(2, 2, 16).double())
    empty = make("branch(0.0, all | row | softmax(heads=2), window(3) | box | kernel(groups=2))", (4, 4))[0]
    assert mixing_matrix(empty, x).shape == (2, 2, 16, 16)
    mixed, _ = make("a*(window(3) | box | kernel) + -2.0*(window(3) | box | depthwise)", (4, 4))
    bound = mixing_matrix(mixed, x)
    assert bound.shape == (2, 8, 16, 16) and bound.min() >= 0
    acmix, _ = make(CASES["acmix"], (4, 4))
    assert mixing_matrix(acmix, x).shape == (2, 4, 16, 16)
    dense, _ = make("0.5*(window(3) | box | kernel) + -2.0*(window(5) | box | kernel)", (4, 4))
    bound, true = mixing_matrix(dense, x), mixing_matrix(nn.Sequential(dense), x)
    assert (bound >= true - 1e-9).all()
    torch.testing.assert_close(bound[0, 0, 0] == 0, true[0, 0, 0] == 0)


def test_random_candidates_are_not_drawn_and_layers_prepare():
    layer, x = make("nearest(2, cosine, random(2)) | ranked | mean", GRID)
    before = layer.sampler.clone()
    torch.testing.assert_close(mixing_matrix(layer.train(), x), mixing_matrix(layer.eval(), x))
    assert torch.equal(layer.sampler, before)
    assert mixing_matrix(ConvNN2d(2, 2, shuffle="both"), torch.randn(1, 2, 6, 6)).shape == (1, 1, 9, 9)
    tokens = KVTAttention(8, 2, k=3)
    matrix = mixing_matrix(tokens, torch.randn(2, 9, 8), tokens=True)
    assert matrix.shape == (2, 2, 9, 9) and ((matrix > 0).sum(-1) == 3).all()
    assert not matrix.requires_grad


@pytest.mark.parametrize("notation", ["all | row | sigmoid", "window(3) | box | sigmoid"])
def test_rows_are_nan_where_outputs_are(notation):
    layer, x = Mixer(notation, 4).eval(), torch.randn(1, 4, 4, 4)
    x[0, :, 1, 1] = float("nan")
    matrix, y = mixing_matrix(layer, x), layer(x)
    assert torch.equal(matrix.isnan().all(-1)[0, 0], y.isnan().any(1).flatten(1)[0])
    assert torch.equal(matrix.isnan().all(-1), matrix.isnan().any(-1))


def test_a_query_that_is_nan_is_a_row_of_nan():
    layer, x = make("nearest(2, cosine) | ranked | mean", GRID)
    x[0, :, 1, 1] = float("nan")
    matrix = mixing_matrix(layer, x)
    lost = matrix.isnan().all(-1)
    assert lost[0, 0].nonzero().flatten().tolist() == [5] and lost.sum() == matrix.isnan().any(-1).sum()


class Pair(nn.Module):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize(
    ("layer", "shape", "options", "said"),
    [
        (nn.Linear(3, 3), (2, 3), {}, "x must be"),
        (nn.Conv1d(3, 3, 1), (2, 3, 4), {}, "tokens=True or tokens=False"),
        (nn.Flatten(), (2, 3, 4, 4), {}, "not a layer of positions"),
        (Pair(), (2, 3, 4, 4), {}, "returns tuple"),
        (nn.Conv2d(5, 3, 1), (2, 3, 4, 4), {}, "does not take"),
        (nn.Conv2d(3, 6, 1), (2, 3, 4, 4), {"groups": 2}, "groups=2 must divide the 3 input channels"),
        (Mixer("all | row | mean", 3), (2, 3, 4, 4), {"groups": 3}, "knows its own"),
        (Mixer("all | row | mean", 3), (2, 3, 4, 4), {"tokens": True}, "knows its own"),
        (Mixer("all | row | mean", 3), (2, 4, 4, 4), {}, "in_channels=3"),
        (Mixer("all | row | mean", 3), (2, 3, 64, 64), {"limit_gib": 0.1}, r"\(2, 1, 4096, 4096\).*limit_gib=0.1"),
        (nn.Conv2d(3, 3, 1), (1, 3, 64, 64), {"limit_gib": 0.01}, r"\(1, 1, 4096, 4096\).*smaller input"),
        (Mixer("all(cross) | row | softmax", 3), (2, 3, 4, 4), {}, "context="),
        (Mixer("all | row | mean", 3), (2, 3, 4, 4), {"context": torch.zeros(2, 3, 4)}, "leave context out"),
        (Mixer("all(cross) | row | softmax", 3), (2, 3, 4, 4), {"context": torch.zeros(1, 3, 4)}, "batch of x"),
    ],
)  # fmt: skip
def test_what_is_refused(layer, shape, options, said):
    with pytest.raises(ValueError, match=said):
        mixing_matrix(layer, torch.randn(shape), **options)


def test_more_that_is_refused():
    with pytest.raises(ValueError, match="got function"):
        mixing_matrix(lambda x: x, torch.zeros(1, 1, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="int64"):
        mixing_matrix(nn.Identity(), torch.zeros(1, 1, 2, 2).long())
    op = "(all(cross) | row | softmax) + (all | row | softmax)"
    with pytest.raises(ValueError, match="one operand alone"):
        mixing_matrix(Mixer(op, 2), torch.randn(1, 2, 3, 3), context=torch.randn(1, 2, 4, 1))


@pytest.mark.parametrize("name", list(CASES))
def test_looks_is_a_row_of_the_matrix(name):
    layer, x = make(CASES[name], GRID)
    at = tuple(0 for _ in x.shape[2:])
    if layer.operation.needs_context:
        with pytest.raises(ValueError, match="context="):
            looks(layer, x, at)
        return
    row = looks(layer.eval(), x, at).flatten(1)
    assert row.isfinite().all() and row.min() >= 0
    matrix = mixing_matrix(layer, x)
    torch.testing.assert_close(row.sum(1), (matrix[:, :, 0].abs().sum((1, 2)) > 0).to(row))
    # a sum of dense kernels may cancel, or hide a part whose rate is zero: there only what is read is compared
    read = matrix[:, :, 0].abs().sum(1) > 1e-12
    assert torch.equal(row > 1e-12 * row.amax(), read) or not isinstance(layer.operation, Basic)


@pytest.mark.parametrize("weight", ["kernel", "depthwise", "experts(3)"])
def test_one_position_counts_the_size_of_every_slot(weight):
    layer, x = Mixer(f"window(3) | box | {weight}", 2, 2, ndim=1), torch.randn(1, 2, 5)
    size = torch.tensor([1.0, 2.0, 5.0])
    with torch.no_grad():
        layer.weight.copy_(
            torch.stack([size, -size]).view(2, 1, 3).expand_as(layer.weight[:2]).repeat(len(layer.weight) // 2, 1, 1)
        )
    torch.testing.assert_close(looks(layer, x, (1,))[0], torch.tensor([1.0, 2.0, 5.0, 0, 0]) / 8)


def test_acmixs_convolution_is_told_head_by_head():
    """As its output lies, unless that stays in the order of the grouped convolution: then by dimension of a head."""
    x = torch.randn(1, 8, 3, 3, dtype=torch.float64)
    by_head, _ = make("window(3) | box | shift(2)", (3, 3))
    by_dimension, _ = make("window(3) | box | shift(2, interleaved)", (3, 3))
    assert mixing_matrix(by_head, x).shape == (1, 2, 9, 9)
    assert mixing_matrix(by_dimension, x).shape == (1, 4, 9, 9)


@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_the_whole_matrix(name):
    layer, x, context, matrix = made(name)
    rows = [matrix.shape[2] - 1, 0, matrix.shape[2] // 2]
    some = mixing_matrix(layer, x, context=context, rows=rows)
    assert torch.equal(some, matrix[:, :, rows])


def test_rows_of_a_foreign_layer_are_those_of_its_whole_matrix():
    conv = nn.Conv2d(4, 6, 3, stride=2, groups=2)
    x = torch.randn(2, 4, 7, 6)
    whole = mixing_matrix(conv, x, groups=2)
    torch.testing.assert_close(mixing_matrix(conv, x, groups=2, rows=torch.tensor([5, 1])), whole[:, :, [5, 1]])


@pytest.mark.parametrize(
    ("rows", "said"), [([], "at least one"), ([0.5], "whole numbers"), ([4, 9], "from 0 to 8, got 4 to 9")]
)
@pytest.mark.parametrize("layer", [Mixer("window(3) | box | kernel", 2), nn.Conv2d(2, 2, 3, padding=1)])
def test_rows_that_are_none_are_refused(layer, rows, said):
    with pytest.raises(ValueError, match=said):
        mixing_matrix(layer, torch.randn(1, 2, 3, 3), rows=rows)
