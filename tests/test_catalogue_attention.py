"""Rows of the catalogue for attention everywhere, to learned keys and between channels, against the paper's formula.

Nothing here goes through the oracle but to be compared: these tests say that a row means what its paper means.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.formulas import agree, close, masked_attention, project, scrambled

from nearfold import parse
from nearfold._torchvision import load
from nearfold.grammar.maps import orthogonal
from nearfold.nn import Mixer

pytestmark = pytest.mark.usefixtures("float64")
GRIDS = [(9,), (4, 3), (1, 1), (2, 3, 2)]


def library(name):
    """A module of another library, or a visible skip."""
    try:
        load("torchvision")
        return load(name)
    except ModuleNotFoundError:
        pytest.skip(f"{name.split('.')[0]} is not installed")


def drawn(notation, channels, grid, **named):
    """A layer without special values made for this grid, and an input."""
    op = parse(notation).map(lambda part: part.sized(math.prod(grid)))
    layer = scrambled(Mixer(op, channels, ndim=len(grid), **named))
    return layer, torch.randn(2, channels, *grid, requires_grad=True)


def out(layer, y, grid):
    """(B, H, N, d) through the output map: (B, C, *grid)."""
    y = F.linear(y.transpose(1, 2).flatten(2), layer.out_weight, layer.out_bias)
    return y.mT.unflatten(2, grid)


def everywhere(grid):
    N = math.prod(grid)
    return torch.ones(N, N, dtype=torch.bool)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_nonlocal_block_has_no_scale(grid):
    layer, x = drawn("nonlocal", 4, grid)

    def truth(x):
        theta, phi, g = (t[:, 0] for t in project(layer, x))
        return out(layer, (torch.softmax(torch.bmm(theta, phi.mT), -1) @ g)[:, None], grid)

    agree(layer, x, truth)


def normalised(layer, x, grid, weight):
    """Sums over all pairs, one query at a time: weight(q, k, i, j) (B, H)."""
    q, k, v = project(layer, x)
    rows = []
    for i in range(q.shape[2]):
        w = torch.stack([weight(q[:, :, i], k[:, :, j], i, j) for j in range(k.shape[2])], -1)
        rows.append((w[..., None] * v).sum(2) / w.sum(-1, keepdim=True))
    return out(layer, torch.stack(rows, 2), grid)


def positive(layer, x):
    """Numbers with which a query has positive features: without, its row is zero here, and 0 / 0 in the formula."""
    with torch.no_grad():
        for tensor in (x, *layer.parameters()):
            tensor.abs_()
        layer.query_bias[::2] -= 3  # and some that are none
    return layer, x


@pytest.mark.parametrize("grid", GRIDS)
def test_relu_linear_attention(grid):
    layer, x = positive(*drawn("linear_relu", 16, grid))
    agree(layer, x, lambda x: normalised(layer, x, grid, lambda q, k, i, j: (q.relu() * k.relu()).sum(-1)))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("shape", ["row", "causal"])
def test_cosformer_reweighs_by_the_distance(grid, shape):
    layer, x = drawn(f"all(relu(reweighted)) | {shape} | normalized(heads=4)", 16, grid)
    N = math.prod(grid)

    def weight(q, k, i, j):
        if shape == "causal" and j > i:
            return torch.zeros_like(q[..., 0])
        return (q.relu() * k.relu()).sum(-1) * math.cos(math.pi / 2 * (i - j) / N)

    layer, x = positive(layer, x)
    agree(layer, x, lambda x: normalised(layer, x, grid, weight))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("shape", ["row", "causal"])
def test_performer_is_softmax_kernels_by_random_features(grid, shape):
    layer, x = drawn(f"all(favor(5, seed=3)) | {shape} | normalized(heads=2)", 8, grid)
    w = orthogonal(5, 4, 3, torch.device("cpu"))

    def phi(x):
        x = x / math.sqrt(2)  # d ** (1 / 4)
        return torch.stack([torch.exp((row * x).sum(-1) - (x * x).sum(-1) / 2) for row in w], -1) / math.sqrt(5)

    def weight(q, k, i, j):
        return torch.zeros_like(q[..., 0]) if shape == "causal" and j > i else (phi(q) * phi(k)).sum(-1)

    agree(layer, x, lambda x: normalised(layer, x, grid, weight))


def test_random_features_estimate_the_exponential():
    """Without bias, and with a smaller error the more there are; rows are orthogonal, and as long as Gaussian ones."""
    q, k = torch.randn(1, 1, 40, 8) * 0.5, torch.randn(1, 1, 40, 8) * 0.5
    truth = torch.exp(q @ k.mT / math.sqrt(8))
    errors = []
    for many in (8, 4096):
        query, key = parse(f"all(favor({many})) | row | normalized").path.similarity.embed(q, k, None, {})
        errors.append(((query @ key.mT) / truth - 1).abs().mean().item())
    assert errors[1] < 0.03 < errors[0]
    w = orthogonal(2048, 16, 0, torch.device("cpu"))
    assert abs(w.mean()) < 0.01 and abs(w.var() - 1) < 0.02 and abs(w.norm(dim=1).square().mean() - 16) < 0.3
    close((w[:16] @ w[:16].T) * (1 - torch.eye(16)), torch.zeros(16, 16))
    assert not torch.equal(w, orthogonal(2048, 16, 1, torch.device("cpu")))


@pytest.mark.parametrize("grid", GRIDS)
def test_efficient_attention_is_the_papers_two_softmaxes(grid):
    layer, x = drawn("efficient", 8, grid)

    def truth(x):
        q, k, v = project(layer, x)
        context = torch.softmax(k, 2).mT @ v  # (B, H, d, d)
        return out(layer, torch.softmax(q, 3) @ context, grid)

    agree(layer, x, truth)


def test_efficient_shares_all_positions():
    with pytest.raises(ValueError, match=r"all\(efficient\) \| row"):
        Mixer("all(efficient) | causal | identity", 4)
    with pytest.raises(ValueError, match="whatever a mask says"):
        Mixer("efficient", 4, ndim=1)(torch.ones(1, 4, 5), mask=torch.tensor([3]))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("heads", [8, 2])
def test_hydra_is_three_products_of_features(grid, heads):
    """With a head for every channel, as the paper's code: q * sum(k * v), q and k unit vectors of all channels."""
    layer, x = drawn(f"all(unit) | row | identity(heads={heads})", 8, grid)

    def truth(x):
        q, k, v = (t.transpose(1, 2).flatten(2) for t in project(layer, x))  # (B, N, C)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        if heads == 8:
            y = q * (k * v).sum(1, keepdim=True)
            return out(layer, y[:, None], grid)
        q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        return out(layer, q @ k.mT @ v, grid)

    agree(layer, x, truth)


@pytest.mark.parametrize("grid", GRIDS)
def test_attention_free_and_global_context(grid):
    """exp(k) v over exp(k), for every channel or by one number of each position."""
    layer, x = drawn("aft_simple", 8, grid)

    def channelwise(x):
        k, v = (t.transpose(1, 2).flatten(2) for t in project(layer, x, "key value"))
        y = (k.exp() * v).sum(1, keepdim=True) / k.exp().sum(1, keepdim=True)
        return out(layer, y.expand_as(v)[:, None], grid)

    agree(layer, x, channelwise)
    other, x = drawn("global_context", 8, grid)

    def pooled(x):
        k, v = (t[:, 0] for t in project(other, x, "key value"))
        share = torch.softmax(k.sum(-1), -1)  # one map of the channels to a number: the sum of the rows of the key's
        y = torch.einsum("bn,bnc->bc", share, v)[:, None].expand_as(v)
        return out(other, y[:, None], grid)

    agree(other, x, pooled)


@pytest.mark.parametrize("grid", GRIDS)
def test_slots_that_do_not_compete(grid):
    N = math.prod(grid)
    weighs = {
        "sigmoid_attention": lambda s: torch.sigmoid(s - math.log(N)),
        "relu_attention": lambda s: s.relu() / N,
        "squared_relu": lambda s: (s / N).relu() ** 2,
    }
    for name, weigh in weighs.items():
        layer, x = drawn(name, 8, grid)

        def truth(x, layer=layer, weigh=weigh):
            q, k, v = project(layer, x)
            return out(layer, weigh(q @ k.mT / math.sqrt(q.shape[-1])) @ v, grid)

        agree(layer, x, truth)


def test_slots_count_those_that_are_there():
    """A causal query, and one under a mask, divides by what it may read."""
    layer, x = drawn("all | causal | sigmoid(heads=2)", 4, (5,))
    q, k, v = project(layer, x)
    score = q @ k.mT / math.sqrt(2)
    rows = [torch.sigmoid(score[:, :, i, : i + 1] - math.log(i + 1))[..., None] * v[:, :, : i + 1] for i in range(5)]
    truth = out(layer, torch.stack([row.sum(2) for row in rows], 2), (5,))
    for layer.backend in ("auto", "oracle"):
        close(layer(x), truth)
    layer, x = drawn("relu_attention", 4, (6,))
    for layer.backend in ("auto", "oracle"):
        close(layer(x, mask=torch.tensor([4, 4]))[..., :4], layer(x[..., :4]))


@pytest.mark.parametrize("grid", GRIDS)
def test_synthesizers_ask_no_key(grid):
    layer, x = drawn("synthesizer_random", 8, grid)

    def by_table(x):
        (v,) = project(layer, x, "value")
        return out(layer, torch.softmax(layer.table_weight, -1) @ v, grid)

    agree(layer, x, by_table)
    dense, x = drawn("synthesizer_dense", 8, grid)

    def by_query(x):
        (v,) = project(dense, x, "value")
        hidden = F.linear(x.flatten(2).mT, dense.reduce_weight, dense.reduce_bias).relu()
        score = F.linear(hidden, dense.span_weight, dense.span_bias).unflatten(2, (4, -1)).transpose(1, 2)
        return out(dense, torch.softmax(score, -1) @ v, grid)

    agree(dense, x, by_query)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("n", [1, 3])
def test_linformer_mixes_keys_and_values(grid, n):
    layer, x = drawn(f"projected({n}, 9) | row | softmax(heads=4)", 8, grid)

    def truth(x):
        q, k, v = project(layer, x)
        k, v = (
            torch.einsum("pn,bhnd->bhpd", layer.get_parameter(f"{t}_table"), y) for t, y in (("key", k), ("value", v))
        )
        return out(layer, F.scaled_dot_product_attention(q, k, v), grid)

    agree(layer, x, truth)


def test_linformer_is_for_one_number_of_positions():
    layer = Mixer("linformer", 8)
    layer(torch.randn(1, 8, 8, 8))
    for layer.backend in ("auto", "oracle"):
        with pytest.raises(ValueError, match="tables are for 64 positions, got a grid of"):
            layer(torch.randn(1, 8, 8, 7))


@pytest.mark.parametrize("grid", GRIDS)
def test_pooling_by_attention_is_torchs_with_learned_queries(grid):
    layer, x = drawn("all | row | seeds(5, heads=2)", 8, grid)
    twin = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    names = {"key": 1, "value": 2}

    def truth(x):
        own = dict(layer.named_parameters())
        rows = x.flatten(2).mT
        weight = torch.cat([torch.eye(8), *(own[f"{n}_weight"] for n in names)])
        bias = torch.cat([torch.zeros(8), *(own[f"{n}_bias"] for n in names)])
        given = {"in_proj_weight": weight, "in_proj_bias": bias}
        given |= {"out_proj.weight": own["out_weight"], "out_proj.bias": own["out_bias"]}
        query = layer.seed_weight.expand(len(x), -1, -1)
        y, _ = torch.func.functional_call(twin, given, (query, rows, rows))
        return y.mT.unflatten(2, (1,) * (len(grid) - 1) + (5,))

    agree(layer, x, truth)


@pytest.mark.parametrize("grid", GRIDS)
def test_one_step_of_slot_attention(grid):
    layer, x = drawn("all | row | seeds(4, competing)", 8, grid)

    def truth(x):
        k, v = (t[:, 0] for t in project(layer, x, "key value"))
        share = torch.softmax(k @ layer.seed_weight.T / math.sqrt(8), -1)  # of the slots, for every position
        y = (share / share.sum(1, keepdim=True)).mT @ v
        y = F.linear(y, layer.out_weight, layer.out_bias).mT
        return y.unflatten(2, (1,) * (len(grid) - 1) + (4,))

    agree(layer, x, truth)


@pytest.mark.parametrize("text", ["seeds(3, heads=2)", "seeds(3, competing)", "latents(3, heads=2)"])
def test_seeds_and_latents_read_what_is_there(text):
    layer, x = drawn(f"all | row | {text}", 4, (7,))
    keep = torch.tensor([5, 5])
    for layer.backend in ("auto", "oracle"):
        one, two = layer(x, mask=keep), layer(x[..., :5])
        close(one[..., : two.shape[-1]], two)


@pytest.mark.parametrize("grid", GRIDS)
def test_latents_gather_and_hand_back(grid):
    """FLARE: two plain attentions, latents to keys, then keys to latents, with a scale of one."""
    layer, x = drawn("flare", 16, grid)

    def truth(x):
        k, v = project(layer, x, "key value")
        latent = layer.latent_weight.unflatten(1, (4, -1)).transpose(0, 1).expand(len(x), -1, -1, -1)
        gathered = F.scaled_dot_product_attention(latent, k, v, scale=1.0)
        return out(layer, F.scaled_dot_product_attention(k, latent, gathered, scale=1.0), grid)

    agree(layer, x, truth)


def test_nystromformer_is_transformers():
    """On twelve tokens with four landmarks, where segments are bins; their convolution left out.

    One image and one head: they start the pseudo-inverse by one number for all.
    """
    module = library("transformers.models.nystromformer.modeling_nystromformer")
    config = library("transformers").NystromformerConfig(
        hidden_size=8, num_attention_heads=1, num_landmarks=4, segment_means_seq_len=12, conv_kernel_size=1,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs = module.NystromformerSelfAttention(config)
    layer, x = drawn("all | row | nystrom(4)", 8, (12,))
    x = torch.randn(1, 8, 12, requires_grad=True)

    def truth(x):
        own = dict(layer.named_parameters())
        given = {f"{n}.{p}": own[f"{n}_{p}"] for n in ("query", "key", "value") for p in ("weight", "bias")}
        given["conv.weight"] = torch.zeros(1, 1, 1, 1)
        (y, *_) = torch.func.functional_call(theirs, given, (x.mT,))
        return F.linear(y, layer.out_weight, layer.out_bias).mT

    agree(layer, x, truth)


@pytest.mark.parametrize("grid", [(11,), (5, 4), (1, 1)])
def test_nystrom_is_three_softmaxes(grid):
    layer, x = drawn("all | row | nystrom(2, heads=2)", 8, grid)
    pool = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d}[len(grid)]

    def truth(x):
        q, k, v = project(layer, x)
        marks = [pool(t.mT.flatten(1, 2).unflatten(2, grid), 2).flatten(2).unflatten(1, (2, -1)).mT for t in (q, k)]
        one, a, two = (torch.softmax(s @ t.mT / 2, -1) for s, t in ((q, marks[1]), marks, (marks[0], k)))
        eye = torch.eye(a.shape[-1])
        z = a.mT / (a.abs().sum(-2).amax(-1) * a.abs().sum(-1).amax(-1))[..., None, None]
        for _ in range(6):
            z = z @ (13 * eye - a @ z @ (15 * eye - a @ z @ (7 * eye - a @ z))) / 4
        return out(layer, one @ z @ two @ v, grid)

    agree(layer, x, truth)


def test_nystrom_comes_near_attention():
    """With a landmark for every position the pseudo-inverse undoes what it stands between."""
    layer, x = drawn("all | row | nystrom(9, heads=2)", 8, (9,))
    close_by = masked_attention(layer, x, everywhere((9,)))
    with torch.no_grad():
        assert (layer(x) - close_by).abs().max() < 0.2 * close_by.abs().max()


@pytest.mark.parametrize("grid", [(5, 4), (1, 1)])
@pytest.mark.parametrize("name", ["squeeze_excite", "eca"])
def test_gates_are_timms(name, grid):
    layers = library("timm.layers")
    layer, x = drawn(name, 32, grid)
    theirs = layers.SEModule(32, rd_channels=2) if name == "squeeze_excite" else layers.EcaModule(kernel_size=3)

    def truth(x):
        own = dict(layer.named_parameters())
        if name == "eca":
            given = {"conv.weight": own["excite_span_weight"].view(1, 1, 3)}
        else:
            given = {
                "fc1.weight": own["excite_reduce_weight"].view(2, 32, 1, 1), "fc1.bias": own["excite_reduce_bias"],
                "fc2.weight": own["excite_weight"].view(32, 2, 1, 1), "fc2.bias": own["excite_bias"],
            }  # fmt: skip
        assert given.keys() == dict(theirs.named_parameters()).keys()
        return torch.func.functional_call(theirs, given, (x,))

    agree(layer, x, truth)


@pytest.mark.parametrize("name", ["squeeze_excite", "eca"])
def test_gates_are_made_of_what_is_there(name):
    layer, x = drawn(name, 4, (7,))
    for layer.backend in ("auto", "oracle"):
        close(layer(x, mask=torch.tensor([5, 5]))[..., :5], layer(x[..., :5]))


@pytest.mark.parametrize("notation", ["excite(span=2)", "excite(4, span=3)", "excite(0)"])
def test_gates_refuse(notation):
    with pytest.raises(ValueError, match="must be"):
        Mixer(f"window(1) | box | {notation}", 4)


def test_gates_are_for_single_positions():
    with pytest.raises(ValueError, match="gates channels, not positions"):
        Mixer("window(3) | box | excite", 4)
