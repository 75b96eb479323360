"""Approximate selection: the recall that was asked, exact scores, and an exact search where that is as fast."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F

from nearfold.grammar.notation import parse
from nearfold.kernels import approximate, bins, clusters, engine
from nearfold.kernels.search import Search
from nearfold.lower.explain import explain
from nearfold.nn import ConvNNAttention, KVTAttention, Mixer
from nearfold.nn.functional import knn_attention

select = importlib.import_module("nearfold.kernels.select").select
METRICS = ("dot", "cosine", "euclidean")


def arguments(query, key, k, metric, squared=False, own=False, again=float("-inf")):
    """Arguments of `select`: any key may be chosen."""
    M, R = query.shape[2], key.shape[2]
    return (query, key, k, metric, squared, torch.arange(M), torch.arange(R), [R], [0, -1, 1], own, again)


def features(kind, n, e, *lead):
    """(*lead, n, e) of vectors: independent ones, those of a smooth map, many duplicates, or a hundred clumps."""
    if kind == "noise":
        return torch.randn(*lead, n, e)
    if kind == "duplicates":
        return torch.randint(0, 3, (*lead, n, 3)).float().repeat_interleave(-(-e // 3), -1)[..., :e]
    if kind == "clumps":
        return torch.randn(*lead, 100, e)[..., torch.randint(0, 100, (n,)), :] + 0.2 * torch.randn(*lead, n, e)
    side = math.isqrt(n)
    coarse = torch.randn(math.prod(lead), e, 5, 5)
    fine = F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=True)
    return (fine + 0.02 * torch.randn_like(fine)).flatten(2).transpose(1, 2).reshape(*lead, n, e)


def operands(kind, metric, n, e, *lead):
    x = features(kind, n, e, *lead)
    if metric == "cosine":
        x = F.normalize(x, dim=-1)
    if metric == "dot":
        q, k = torch.randn(2, e, e) / e**0.5
        return x @ q, x @ k
    return x, x


def score_of(query, rows, metric, squared):
    """Query (..., e) with keys (..., k, e), in float64."""
    query, rows = query.double()[..., None, :], rows.double()
    if metric == "euclidean":
        square = (query - rows).square().sum(-1)
        return -square if squared else -square.sqrt()
    return (query * rows).sum(-1)


def true_scores(index, args):
    """The scores of chosen keys, in float64."""
    query, key, _, metric, squared = args[:5]
    rows = key.gather(2, index.flatten(2)[..., None].expand(-1, -1, -1, key.shape[3])).unflatten(2, index.shape[2:])
    return score_of(query, rows, metric, squared)


def recall(found, truth, args):
    """The share found of the k best: by scores, for among equal ones, up to rounding, any is as good."""
    found, worst = true_scores(found[1], args), true_scores(truth[1], args)[..., -1:]
    return (found >= worst - 1e-6 * worst.abs()).double().mean().item()


def check_scores(found, args, own=False):
    """Every score belongs to its key; best first, equal ones by index; no key twice, and never the own one."""
    score, index = found
    metric, squared = args[3:5]
    truth = true_scores(index, args)
    torch.testing.assert_close(score.double(), truth, rtol=2e-5, atol=2e-5 * truth.abs().max().item())
    assert (score[..., 1:] <= score[..., :-1]).all()
    tied = score[..., 1:] == score[..., :-1]
    if squared or metric != "euclidean":  # a root makes some equal that were not
        assert (index[..., 1:] > index[..., :-1])[tied].all()
    assert (index.sort(-1).values.diff(dim=-1) > 0).all()
    if own:
        assert (index != args[5][:, None]).all()


# ---- bins ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k,L", [(1, 7), (9, 78), (36, 100), (100, 478)])
def test_expected_recall_is_that_of_random_bins(k, L):
    share = torch.tensor([len(set(torch.randint(0, L, (k,)).tolist())) / k for _ in range(3000)])
    assert abs(share.mean().item() - bins.expected_recall(k, L)) <= 4 * share.std().item() / 3000**0.5 + 1e-9


@pytest.mark.parametrize("k", [1, 2, 9, 36, 256])
@pytest.mark.parametrize("asked", [0.5, 0.9, 0.95, 0.999])
def test_bins_are_the_fewest(k, asked):
    L = bins.bins_for(k, asked)
    assert bins.expected_recall(k, L) >= asked
    assert k == L or bins.expected_recall(k, L - 1) < asked


@pytest.mark.parametrize("kind", ["noise", "map", "duplicates", "clumps"])
@pytest.mark.parametrize("metric", METRICS)
def test_bins_reach_the_expected_recall(metric, kind):
    """Four thousand rows of one order: the standard error is that of the few hundred positions it has."""
    torch.manual_seed(0)
    query, key = operands(kind, metric, 2025, 8, 2, 1)
    args = arguments(query, key, 9, metric)
    truth = select(*args)
    for asked in (0.8, 0.95):
        L = bins.bins_for(9, asked)
        flat = bins.select(query.flatten(0, 1), key.flatten(0, 1), Search(*args[2:11]), L)
        found = tuple(x.view_as(truth[0]) for x in flat)
        share = recall(found, truth, args)
        assert share >= asked - 0.01, (asked, share)
        if kind == "noise":  # neither by chance nor by searching everything
            assert share <= bins.expected_recall(9, L) + 0.02, share
        check_scores(found, args)


# ---- clusters --------------------------------------------------------------------------------------------------------


@pytest.fixture
def many(monkeypatch):
    """Clusters serve from few keys on."""
    monkeypatch.setattr(approximate, "CLUSTERS", dict.fromkeys(METRICS, 1024))


@pytest.mark.parametrize("asked", [0.8, 0.95])
@pytest.mark.parametrize("kind", ["map", "clumps", "duplicates"])
@pytest.mark.parametrize("metric", METRICS)
def test_clusters_reach_the_recall(many, metric, kind, asked):
    torch.manual_seed(0)
    query, key = operands(kind, metric, 4096, 16, 1, 2)
    args = arguments(query, key, 9, metric)
    found, truth = select(*args, asked), select(*args)
    assert recall(found, truth, args) >= asked
    check_scores(found, args)


def test_clusters_search_less(many, monkeypatch):
    """On a map a fraction of all similarities; on independent vectors, where no list helps, the exact search runs."""
    pairs = []
    counted = clusters._pairs
    monkeypatch.setattr(clusters, "_pairs", lambda *a: pairs.append(counted(*a)) or pairs[-1])
    torch.manual_seed(0)
    for kind in ("map", "noise"):
        query, key = operands(kind, "euclidean", 4096, 16, 1, 1)
        args = arguments(query, key, 9, "euclidean")
        found = select(*args, 0.95)
        if kind == "noise":
            truth = select(*args)
            assert torch.equal(found[1], truth[1])
            torch.testing.assert_close(found[0], truth[0])
    assert pairs[0] < 0.2 * 4096**2 and pairs[1] > clusters.MOST * 4096**2, pairs


def test_fewer_queries_than_keys_and_other_values(many):
    """Queries that are not the keys, in float64, with squares."""
    torch.manual_seed(0)
    key = features("map", 4096, 12, 1, 1).double()
    query = features("map", 2116, 12, 1, 1).double()
    args = arguments(query, key, 17, "euclidean", squared=True)
    found, truth = select(*args, 0.9), select(*args)
    assert recall(found, truth, args) >= 0.9
    check_scores(found, args)


# ---- both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ["off", None], ids=["bins", "clusters"])
@pytest.mark.parametrize("metric", METRICS)
def test_the_own_position_is_never_found(many, monkeypatch, metric, isa):
    torch.manual_seed(0)
    query, key = operands("map", metric, 2025, 16, 1, 1)
    if isa == "off":
        monkeypatch.setattr(approximate, "BINS", dict.fromkeys(METRICS, 64))
        monkeypatch.setattr(approximate, "CLUSTERS", {})
    args = arguments(query, key, 9, metric, own=True)
    with engine.forced(isa or engine.names()[0]):
        method = approximate.how(metric, 2025, 2025, 9, 0.9, engine.serves(query, key))
        assert method == ("bins" if isa == "off" else "clusters")
        found, again = select(*args, 0.9), select(*args, 0.9)
    assert torch.equal(found[0], again[0]) and torch.equal(found[1], again[1])  # equal inputs, equal results
    assert recall(found, select(*args), args) >= 0.9 - 0.01
    check_scores(found, args, own=True)


@pytest.mark.parametrize("odd", ["nan", "inf"])
def test_what_is_not_finite_is_searched_exactly(many, odd):
    query, key = operands("map", "euclidean", 2025, 4, 1, 1)
    key = key.clone()
    key[0, 0, 77, 2] = float(odd)
    args = arguments(query, key, 9, "euclidean")
    for found, truth in zip(select(*args, 0.5), select(*args), strict=True):
        torch.testing.assert_close(found, truth, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("metric", [*METRICS, "chebyshev", "gram"])
def test_recall_one_and_few_keys_are_exact(metric):
    query, key = operands("map", "cosine" if metric == "cosine" else "euclidean", 400, 4, 2, 2)
    args = arguments(query, key, 9, metric)
    truth = select(*args)
    for asked in (1.0, 0.5):
        found = select(*args, asked)
        assert torch.equal(found[0], truth[0]) and torch.equal(found[1], truth[1])


def test_gradients_are_those_of_the_scores(many):
    torch.manual_seed(0)
    x = features("map", 2025, 8, 1, 1).double().requires_grad_()
    score, index = select(*arguments(x, x, 9, "euclidean", squared=True), 0.9)
    weight = torch.randn_like(score)
    (found,) = torch.autograd.grad((score * weight).sum(), x)
    again = -(x[0, 0][:, None] - x[0, 0][index[0, 0]]).square().sum(-1)
    (truth,) = torch.autograd.grad((again * weight[0, 0]).sum(), x)
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)


def test_the_operator_is_well_formed(many):
    query, key = (features("map", 1024, 4, 1, 1).requires_grad_() for _ in range(2))
    torch.library.opcheck(select.registered, (*arguments(query, key, 3, "euclidean"), 0.9))


@pytest.mark.parametrize("asked", [0, -0.5, 1.5, float("nan")])
def test_a_recall_that_is_no_share_is_refused(asked):
    x = torch.randn(1, 1, 20, 4)
    with pytest.raises(ValueError, match="recall"):
        select(*arguments(x, x, 3, "dot"), float(asked))
    with pytest.raises(ValueError, match="recall"):
        knn_attention(x, x, x, 3, recall=asked)
    with pytest.raises(ValueError, match="recall"):
        KVTAttention(4, 2, recall=asked)


# ---- in the language -------------------------------------------------------------------------------------------------


def test_notation():
    text = "nearest(9, euclidean, recall=0.95) | ranked | softmax"
    assert "recall=0.95" in str(parse(text)) and parse(str(parse(text))) == parse(text)
    assert "recall" not in str(parse("nearest(9, euclidean, recall=1) | ranked | softmax"))


def test_explain_says_what_is_approximate():
    asked = explain("nearest(9, euclidean, recall=0.95) | ranked | softmax", (1, 8, 8, 8))
    assert "recall=0.95 (exact below 16384 keys, then by clusters" in str(asked)
    kept = explain("nearest(9, dot, grid(5), recall=0.9) | ranked | softmax", (1, 8, 8, 8))
    assert "clusters" not in str(kept)


@pytest.mark.parametrize("layer", ["conv", "kvt", "convnn"])
def test_layers(many, layer):
    """A map in clumps through a layer: near the exact one, compiled the same, and it trains."""
    torch.manual_seed(0)
    make = {
        "conv": lambda recall=1.0: Mixer(f"nearest(9, cosine, self, recall={recall}) | ranked | kernel", 8),
        "kvt": lambda **r: KVTAttention(8, 2, 9, **r),
        "convnn": lambda **r: ConvNNAttention(8, 2, k=9, **r),
    }[layer]
    approximated, plain = make(recall=0.9), make()
    plain.load_state_dict(approximated.state_dict())
    x = features("map", 2025, 8, 1)
    x = x.transpose(1, 2).unflatten(2, (45, 45)) if layer == "conv" else x
    found, truth = approximated(x), plain(x)
    found.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in approximated.parameters())
    assert not torch.equal(found, truth)
    assert (found - truth).square().mean() < 0.05 * truth.var()
    compiled = torch.compile(approximated, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), found)


def test_function(many):
    torch.manual_seed(0)
    q, k = operands("map", "dot", 2025, 16, 1, 2)
    v = torch.randn(1, 2, 2025, 16)
    found, truth = knn_attention(q, k, v, 9, recall=0.9), knn_attention(q, k, v, 9)
    assert not torch.equal(found, truth)
    assert (found - truth).square().mean() < 0.2 * truth.var()


def test_mixer_runs_the_oracle_exactly():
    torch.manual_seed(0)
    text = "nearest(4, euclidean, recall=0.5) | ranked | kernel"
    layer = Mixer(text, 4, 4)
    x = torch.randn(1, 4, 7, 7)
    truth = layer(x)
    layer.backend = "oracle"
    torch.testing.assert_close(layer(x), truth)
