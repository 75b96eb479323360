"""Unions of paths, and the paths made for them, against attention and convolution under a mask written by hand.

Nothing here goes through the oracle: these tests say that the words mean what the field means by them.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.formulas import agree, mask_of, masked_attention, positions, project, scrambled

from nearfold import parse
from nearfold.grammar.unions import alone
from nearfold.lower.windows import window_index
from nearfold.nn import Mixer

pytestmark = pytest.mark.usefixtures("float64")
BACKENDS = ("auto", "oracle")


def test_sinks_are_a_band_and_the_first_columns():
    layer, x = scrambled(Mixer("window(4) & first(2) | causal | softmax(heads=2)", 6, ndim=1)), torch.randn(2, 6, 11)
    i, j = torch.arange(11)[:, None], torch.arange(11)
    mask = (j <= i) & ((i - j < 4) | (j < 2))
    agree(layer, x.requires_grad_(), lambda x: masked_attention(layer, x, mask))


def test_criss_cross_reads_its_own_position_once():
    layer, x = scrambled(Mixer("axial(0) & axial(1) | box | softmax(heads=2)", 6)), torch.randn(2, 6, 4, 5)
    mask = mask_of((4, 5), lambda i, j: i[0] == j[0] or i[1] == j[1])
    agree(layer, x.requires_grad_(), lambda x: masked_attention(layer, x, mask))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_axial_is_attention_along_each_line(axis):
    layer, x = scrambled(Mixer(f"axial({axis}) | box | softmax(heads=2)", 4, ndim=3)), torch.randn(1, 4, 3, 2, 4)
    mask = mask_of((3, 2, 4), lambda i, j: all(a == axis or p == q for a, (p, q) in enumerate(zip(i, j, strict=True))))
    agree(layer, x.requires_grad_(), lambda x: masked_attention(layer, x, mask))


def test_bigbird_reads_a_window_the_first_and_what_was_drawn():
    op = parse("window(3) & first(2) & scattered(3) | box | softmax(heads=2)")
    drawn, _ = window_index(alone(op)[2], (4, 5), torch.device("cpu"))
    layer, x = scrambled(Mixer(op, 4)), torch.randn(2, 4, 4, 5)
    at = positions((4, 5))
    near = mask_of((4, 5), lambda i, j: max(abs(p - q) for p, q in zip(i, j, strict=True)) <= 1)
    mask = near | (torch.arange(len(at)) < 2) | torch.zeros(20, 20).scatter(1, drawn, 1).bool()
    agree(layer, x.requires_grad_(), lambda x: masked_attention(layer, x, mask))


@pytest.mark.parametrize("similarity", ["scaled", "cosine"])
def test_local_and_nearest_share_one_softmax(similarity):
    """The mask is drawn from the scores: the window, and the five most similar anywhere."""
    op = f"window(3, {similarity}) & nearest(5, {similarity}) | ranked | softmax(heads=2)"
    layer, x = scrambled(Mixer(op, 6)), torch.randn(2, 6, 4, 5)
    near = mask_of((4, 5), lambda i, j: max(abs(p - q) for p, q in zip(i, j, strict=True)) <= 1)

    def truth(x):
        q, k, v = project(layer, x)
        if similarity == "cosine":
            score = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        else:
            score = q @ k.mT / math.sqrt(q.shape[-1])
        mask = near | torch.zeros_like(score).scatter(-1, score.topk(5, -1).indices, 1).bool()
        y = torch.softmax(score.masked_fill(~mask, -math.inf), -1) @ v
        y = F.linear(y.transpose(1, 2).flatten(2), layer.out_weight, layer.out_bias)
        return y.transpose(1, 2).unflatten(2, x.shape[2:])

    agree(layer, x.requires_grad_(), truth)


@pytest.mark.parametrize("stride", [1, 2])
def test_under_a_kernel_every_path_has_slots_of_its_own(stride):
    """A 3 x 3 convolution, and a map for each rank of those that the window does not reach."""
    layer = scrambled(
        Mixer(f"window(3, stride={stride}) & nearest(4, cosine, stride={stride}) | ranked | kernel", 3, 5)
    )
    x = torch.randn(2, 3, 4, 6)
    assert layer.weight.shape == (5, 3, 9 + 4)
    at = positions((4, 6))
    queries = [n for n, p in enumerate(at) if all(v % stride == 0 for v in p)]

    def truth(x):
        flat = x.flatten(2)
        unit = F.normalize(flat, dim=1)
        ranks = (unit.mT @ unit)[:, queries].topk(4, -1).indices
        columns = []
        for b in range(2):
            for m, i in enumerate(queries):
                y = layer.bias
                near = [(at[i][0] + a, at[i][1] + c) for a in (-1, 0, 1) for c in (-1, 0, 1)]
                for slot, p in enumerate(near):
                    if p in at:
                        y = y + layer.weight[:, :, slot] @ flat[b, :, at.index(p)]
                for rank, j in enumerate(ranks[b, m].tolist()):
                    if at[j] not in near:
                        y = y + layer.weight[:, :, 9 + rank] @ flat[b, :, j]
                columns.append(y)
        out = (-(-4 // stride), -(-6 // stride))
        return torch.stack(columns).unflatten(0, (2, len(queries))).mT.unflatten(2, out)

    agree(layer, x.requires_grad_(), truth)


@pytest.mark.parametrize("shape", ["box", "causal"])
@pytest.mark.parametrize("n", [1, 3, 40])
def test_scattered_positions_are_distinct_allowed_and_fixed(shape, n):
    op = parse(f"scattered({n}) | {shape} | softmax")
    index, valid = window_index(op, (30,), torch.device("cpu"))
    for i in range(30):
        read = index[i][valid[i]].tolist()
        assert len(set(read)) == len(read) == min(n, i + 1 if shape == "causal" else 30)
        assert read == sorted(read) and (shape == "box" or max(read) <= i)
    assert torch.equal(index, window_index(op, (30,), torch.device("cpu"))[0])


def test_scattered_positions_are_spread_evenly_and_seeds_differ():
    """Chi-square of 2,000 draws of 4 among 50: expected 49, standard deviation 9.9."""
    one, two = (
        window_index(parse(f"scattered(4, seed={s}) | box | ones"), (2000,), torch.device("cpu"))[0] for s in (0, 1)
    )
    count = (one // 40).flatten().bincount(minlength=50).double()
    assert 20 < (count - 160).square().sum() / 160 < 90
    assert (one == two).double().mean() < 0.02


def test_a_nan_query_is_lost_alone():
    for text in ("window(1) & nearest(2, cosine) | ranked | mean", "first(1) & nearest(2, dot) | box | ones(heads=2)"):
        layer, x = Mixer(text, 4), torch.randn(1, 4, 3, 3)
        x[0, :, 2, 2] = math.nan
        for backend in BACKENDS:
            layer.backend = backend
            lost = layer(x).isnan().any(1)[0]
            assert lost[2, 2] and lost.sum() == 1, (text, backend)


def test_the_oracle_takes_an_empty_batch():
    layer = Mixer("window(3, cosine) & nearest(4, cosine) | ranked | softmax(heads=2)", 4, backend="oracle")
    assert layer(torch.randn(0, 4, 3, 3)).shape == (0, 4, 3, 3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("window(3) & all | box | softmax", "paths must be windows, blocks, nearest"),
        ("window(3) & nearest(9, cosine) | box | softmax", "compare by one similarity"),
        ("window(3) & nearest(9, stride=2) | box | ones", "stride must be equal in all paths"),
        ("window(3) & nearest(9, padding=1) | box | ones", "without padding and cross"),
        ("window(3) & block(2) | causal | softmax", "shape causal does not go with path block"),
        ("window(3) & block(2) | ranked | softmax", "no path of window(3) & block(2) ranks its slots"),
        ("window(3, scaled(relative)) & first(1) | box | softmax", "without relative and bias"),
        ("axial(0) & window(3) | box | kernel", "a kernel needs a fixed number of slots"),
        ("window(3) & | box | kernel", "'|' is not a path"),
        ("window(3) & windox(3) | box | kernel", "did you mean window?"),
        ("union(3) | box | kernel", "'union' is not a path"),
    ],
)
def test_what_does_not_go_together_says_so(text, said):
    with pytest.raises(ValueError) as error:
        parse(text)
    assert said in str(error.value)


def test_paths_on_different_grids_say_so():
    with pytest.raises(ValueError, match=r"axis=2 is beyond the input's 2 grid axes"):
        Mixer("axial(2) & axial(0) | box | softmax", 4)(torch.randn(1, 4, 3, 3))
