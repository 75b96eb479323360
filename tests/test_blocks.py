"""Whole blocks as neighbours, against masks built from the papers' rules one query at a time."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.formulas import agree, close, masked_attention, positions, project, scrambled

from nearfold import parse
from nearfold.nn import Mixer

pytestmark = pytest.mark.usefixtures("float64")


def chosen_mask(layer, x, block_of, k, own, causal, pooled):
    """mask (B, H, N, N): each query reads the blocks whose mean key it likes best, by the rules of MoBA."""
    q, k_BHNd, _ = (t.detach() for t in project(layer, x))
    B, H, N, _ = q.shape
    blocks = sorted(set(block_of))
    members = [[n for n in range(N) if block_of[n] == b] for b in blocks]
    mask = torch.zeros(B, H, N, N, dtype=torch.bool)
    for b in range(B):
        for h in range(H):
            means = [k_BHNd[b, h, m].mean(0) for m in members]
            for i in range(N):
                home = blocks.index(block_of[i])
                ask = q[b, h, members[home]].mean(0) if pooled else q[b, h, i]
                gate = {j: float(ask @ mean) for j, mean in enumerate(means)}
                open_ = [j for j in gate if not (own and j == home) and not (causal and j >= home)]
                best = sorted(open_, key=lambda j: (-gate[j], j))[: k - own]
                for j in [*([home] if own else []), *best]:
                    mask[b, h, i, members[j]] = True
    return mask & torch.ones(N, N).tril().bool() if causal else mask


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_moba_on_a_sequence(own, causal):
    shape = "causal" if causal else "ranked"
    op = f"nearest_blocks(2, 3{', self' if own else ''}) | {shape} | softmax(heads=2)"
    layer, x = scrambled(Mixer(op, 8, ndim=1)), torch.randn(2, 8, 11)
    block_of = [n // 3 for n in range(11)]

    def truth(x):
        mask = chosen_mask(layer, x, block_of, 2, own, causal, pooled=False)
        q, k, v = project(layer, x)
        score = (q @ k.mT / math.sqrt(4)).masked_fill(~mask, -math.inf)
        alpha = torch.softmax(score.masked_fill(~mask.any(-1, keepdim=True), 0), -1) * mask
        y = (alpha @ v).transpose(1, 2).flatten(2)
        return torch.nn.functional.linear(y, layer.out_weight, layer.out_bias).mT

    agree(layer, x.requires_grad_(), truth)


@pytest.mark.parametrize("grid", [(4, 4), (5, 3)])
@pytest.mark.parametrize("pooled", [True, False])
def test_tiles_of_an_image(grid, pooled):
    """As VSA's tiles, which choose together (here in the plane), and without."""
    op = f"nearest_blocks(2, (2, 2){', pooled' if pooled else ''}) | ranked | softmax(heads=2)"
    layer, x = scrambled(Mixer(op, 8)), torch.randn(2, 8, *grid)
    block_of = [(i // 2, j // 2) for i, j in positions(grid)]

    def truth(x):
        return masked_attention(layer, x, chosen_mask(layer, x, block_of, 2, False, False, pooled))

    agree(layer, x.requires_grad_(), truth)


def test_as_many_blocks_as_there_are_is_attention():
    layer, x = Mixer("nearest_blocks(4, 4) | ranked | softmax(heads=2)", 8, ndim=1), torch.randn(1, 8, 14)
    dense = Mixer("all | row | softmax(heads=2)", 8, ndim=1)
    dense.load_state_dict(layer.state_dict())
    close(layer(x), dense(x))


def test_later_keys_do_not_change_a_causal_choice():
    layer, x = Mixer("nearest_blocks(2, 4, self) | causal | softmax(heads=2)", 8, ndim=1), torch.randn(1, 8, 16)
    other = x.clone()
    other[..., 9:] = torch.randn(1, 8, 7)
    for backend in ("auto", "oracle"):
        layer.backend = backend
        close(layer(x)[..., :9], layer(other)[..., :9])


def test_more_blocks_than_there_are_is_said():
    with pytest.warns(UserWarning, match="k=9, but the map has only 3 blocks"):
        Mixer("nearest_blocks(9, 4) | ranked | softmax", 4, ndim=1)(torch.randn(1, 4, 10))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nearest_blocks(2, 4, cosine) | ranked | softmax", "similarity must be dot or scaled"),
        ("nearest_blocks(2, 4) | ranked | kernel", "a kernel needs a fixed number of slots"),
        ("nearest_blocks(0, 4) | ranked | softmax", "k must be a positive integer"),
        ("nearest_blocks(2, (2, 2)) | causal | softmax", "is for sequences"),
        ("nearest_blocks(2, 4) & window(3) | box | softmax", "paths must be windows"),
    ],
)
def test_what_does_not_go_together_says_so(text, said):
    with pytest.raises(ValueError) as error:
        parse(text)
    assert said in str(error.value)


def test_causal_blocks_are_for_sequences():
    with pytest.raises(ValueError, match="causal blocks are those of a sequence, got 2 grid axes"):
        Mixer("nearest_blocks(2, 4) | causal | softmax", 4)(torch.randn(1, 4, 4, 4))
