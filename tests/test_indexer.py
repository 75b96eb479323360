"""Choosing by one thing and weighing by another, against topk, masks and the paper's loss written out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.formulas import agree, close, masked_attention, project, scrambled

from nearfold import parse
from nearfold.nn import Mixer, TokenMixer
from nearfold.nn.indexer import indexer_loss

pytestmark = pytest.mark.usefixtures("float64")


def index_scores(layer, x_BNC):
    """One number at a time: sum over heads of w * relu(q . k), with the published roots."""
    by = layer.operation.path.by
    B, N, _ = x_BNC.shape
    scores = torch.zeros(B, N, N)
    for b in range(B):
        for t in range(N):
            share = layer.index_share_weight @ x_BNC[b, t]
            query = (layer.index_query_weight @ x_BNC[b, t]).view(by.heads, by.size)
            for s in range(N):
                key = layer.index_key_weight @ x_BNC[b, s]
                scores[b, t, s] = sum(share[j] * F.relu(query[j] @ key) for j in range(by.heads))
    return scores / math.sqrt(by.heads * by.size)


def best(scores, k):
    """The k best: where every head's relu is zero, scores are equal, and the lowest index comes first."""
    value, at = scores.sort(dim=-1, descending=True, stable=True)
    return value[..., :k], at[..., :k]


def weighing(layer):
    """All parameters but the indexer's, which no gradient reaches."""
    return [p for name, p in layer.named_parameters() if not name.startswith("index_")]


@pytest.mark.parametrize("causal", [False, True])
def test_an_indexer_chooses_for_all_heads(causal):
    op = f"nearest(4, scaled, by=indexer(3, 5)) | {'causal' if causal else 'ranked'} | softmax(heads=2)"
    layer, x = scrambled(Mixer(op, 8, ndim=1)), torch.randn(2, 8, 11)
    scores = index_scores(layer, x.mT).detach()
    if causal:
        scores = scores.masked_fill(~torch.ones(11, 11).tril().bool(), -math.inf)
    value, at = best(scores, 4)
    mask = torch.zeros(2, 11, 11).scatter(-1, at, (value > -math.inf).double()).bool()[:, None]
    agree(layer, x.requires_grad_(), lambda x: masked_attention(layer, x, mask), weighing(layer))


def test_no_gradient_reaches_an_indexer_through_its_choice():
    layer = Mixer("nearest(3, scaled, by=indexer(2, 4)) | ranked | softmax(heads=2)", 8, ndim=1)
    layer(torch.randn(1, 8, 9)).sum().backward()
    assert {n for n, p in layer.named_parameters() if p.grad is None} == {
        "index_query_weight", "index_key_weight", "index_share_weight",
    }  # fmt: skip


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_its_loss_is_the_papers(everywhere, causal):
    op = f"nearest(4, scaled, by=indexer(2, 3)) | {'causal' if causal else 'ranked'} | softmax(heads=2)"
    layer, x = scrambled(TokenMixer(op, 8)), torch.randn(2, 11, 8)
    seen = torch.ones(11, 11).tril().bool() if causal else torch.ones(11, 11).bool()
    scores = index_scores(layer, x)
    q, k, _ = project(layer, x.mT)
    main = q @ k.mT / math.sqrt(q.shape[-1])
    total = 0.0
    for b in range(2):
        for t in range(11):
            read = seen[t].nonzero()[:, 0]
            if not everywhere:
                read = read[best(scores[b, t, read], min(4, len(read)))[1]]
            p = torch.softmax(main[b, :, t, read], -1).mean(0).detach()
            said = torch.log_softmax(scores[b, t, read], -1)
            total = total + (p * (p.log() - said)).sum()
    truth = total / 22
    names = [n for n, _ in layer.named_parameters() if n.startswith("index_")]
    own = [layer.get_parameter(n) for n in names]
    loss = indexer_loss(layer, x, everywhere=everywhere)
    close(loss, truth)
    for one, other in zip(torch.autograd.grad(loss, own), torch.autograd.grad(truth, own), strict=True):
        close(one, other)


def test_training_the_indexer_finds_what_attention_weighs():
    """The share of attention's mass that the choice holds grows, and nothing but the indexer moves."""
    torch.manual_seed(0)
    layer, x = (
        Mixer("nearest(8, scaled, by=indexer(4, 16)) | ranked | softmax(heads=2)", 16, ndim=1),
        torch.randn(8, 16, 64),
    )
    with torch.no_grad():
        layer.query_weight.mul_(6)  # attention that has favourites
    before = {n: p.clone() for n, p in layer.named_parameters()}
    q, k, _ = project(layer, x)
    attention = torch.softmax(q @ k.mT / math.sqrt(8), -1).mean(1).detach()
    own = [p for n, p in layer.named_parameters() if n.startswith("index_")]
    optimizer, held = torch.optim.Adam(own, 0.03), []
    for step in range(201):
        if step in (0, 200):
            scores = index_scores_fast(layer, x)
            held.append(attention.gather(-1, scores.topk(8, -1).indices).sum(-1).mean().item())
        optimizer.zero_grad()
        indexer_loss(layer, x, everywhere=step < 120).backward()
        optimizer.step()
    best = attention.topk(8, -1).values.sum(-1).mean().item()
    assert held[1] > held[0] + 0.5 * (best - held[0]), (held, best)
    assert all(torch.equal(p, before[n]) for n, p in layer.named_parameters() if not n.startswith("index_"))


def index_scores_fast(layer, x):
    by = layer.operation.path.by
    query = F.linear(x.mT, layer.index_query_weight).unflatten(-1, (by.heads, by.size))
    each = torch.einsum("bthe,bse->bths", query, F.linear(x.mT, layer.index_key_weight)).relu()
    return torch.einsum("bth,bths->bts", F.linear(x.mT, layer.index_share_weight), each).detach()


def test_another_similarity_may_choose():
    """The three nearest in space, weighed by features; and those of one direction, weighed by distance."""
    layer, x = (
        scrambled(Mixer("nearest(3, scaled, by=position) | ranked | softmax(heads=2)", 4, ndim=1)),
        torch.randn(2, 4, 9),
    )
    far = (torch.arange(9)[:, None] - torch.arange(9)).abs()
    near = torch.zeros(9, 9).scatter(1, (far * 100 + torch.arange(9)).topk(3, largest=False).indices, 1).bool()
    agree(layer, x.requires_grad_(), lambda x: masked_attention(layer, x, near), weighing(layer))

    layer = scrambled(Mixer("nearest(3, euclidean, by=cosine) | ranked | softmax(heads=1)", 4, ndim=1))

    def truth(x):
        q, k, v = (t[:, 0] for t in project(layer, x))
        at = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).topk(3, -1).indices
        score = -torch.cdist(q, k, compute_mode="donot_use_mm_for_euclid_dist")
        mask = torch.zeros_like(score).scatter(-1, at, 1).bool()
        y = torch.softmax(score.masked_fill(~mask, -math.inf), -1) @ v
        return F.linear(y, layer.out_weight, layer.out_bias).mT

    agree(layer, x, truth, weighing(layer))


def test_a_nan_position_is_never_chosen_and_loses_itself_alone():
    layer, x = (
        Mixer("nearest(3, scaled, by=indexer(2, 4)) | ranked | softmax(heads=2)", 8, ndim=1),
        torch.randn(1, 8, 9),
    )
    x[0, 2, 4] = math.nan
    for backend in ("auto", "oracle"):
        layer.backend = backend
        lost = layer(x).isnan().any(1)[0]
        assert lost.nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nearest(3, by=blend(0.5, learned)) | ranked | softmax", "by must be a similarity without parameters"),
        ("nearest(3, self, again=0.5, by=position) | ranked | ones", "again must be left out beside by"),
        ("nearest(3, by=indexer(2, 4), cross) | ranked | softmax", "a similarity beside recall, padding or cross"),
        ("nearest(3, by=indexer(0, 4)) | ranked | softmax", "heads must be a positive integer"),
        ("nearest(3, by=indexed(2)) | ranked | softmax", "did you mean indexer?"),
    ],
)
def test_what_does_not_go_together_says_so(text, said):
    with pytest.raises(ValueError) as error:
        parse(text)
    assert said in str(error.value)


def test_a_layer_without_an_indexer_has_no_such_loss():
    with pytest.raises(ValueError, match="has no indexer"):
        indexer_loss(Mixer("kvt", 8), torch.randn(1, 8, 4, 4))
    layer = Mixer("nearest(3, by=indexer(1, 2)) | ranked | ones", 8)
    with pytest.raises(ValueError, match="weighs by ones, which does not share one out"):
        indexer_loss(layer, torch.randn(1, 8, 4, 4))
