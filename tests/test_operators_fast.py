"""Fast weights as layers against transformers' own recurrences, or the papers', one position after the other.

Nothing here goes through the oracle but to be compared: these tests say that the words mean what the field means.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.formulas import agree, close, scrambled

from nearfold import nn as near
from nearfold._torchvision import load
from nearfold.kernels.fast_weights import fast_weights
from nearfold.look.mixing import mixing_matrix
from nearfold.nn import Mixer

pytestmark = pytest.mark.usefixtures("float64")
TOKENS = pytest.mark.parametrize("tokens", [1, 2, 7, 70])


def named(layer, prefix=""):
    return {n.removeprefix(prefix): p for n, p in layer.named_parameters() if n.startswith(prefix)}


def rows(p, name, x, heads):
    return F.linear(x, p[f"{name}_weight"], p.get(f"{name}_bias")).unflatten(-1, (heads, -1))


def unit(x, eps=1e-6):
    return x / (x.square().sum(-1, keepdim=True) + eps).sqrt()


def recurrence(q, k, v, step):
    """S_t = step(t, S_{t-1}), read by q_t: S (B, H, s, p), all else (B, N, H, ...)."""
    S, out = q.new_zeros(*k.shape[:1], *k.shape[2:], v.shape[3]), []
    for t in range(q.shape[1]):
        S = step(t, S)
        out.append((S * q[:, t, ..., None]).sum(2))
    return torch.stack(out, 1)


def outer(a, b):
    return a[..., :, None] * b[..., None, :]


def delta(p, x, v, heads, decay):
    """arXiv 2406.06484, 2412.06464, 2510.26692."""
    q, k = (unit(F.silu(rows(p, n, x, heads))) for n in ("q_proj", "k_proj"))
    q = q / math.sqrt(q.shape[-1])
    beta = torch.sigmoid(F.linear(x, p["b_proj_weight"]))
    kept = torch.ones_like(k)
    if decay == "head":
        kept = torch.exp(-p["A_log"].exp() * F.softplus(F.linear(x, p["a_proj_weight"]) + p["dt_bias"]))[..., None]
    if decay == "channel":
        made = F.linear(F.linear(x, p["f_down_weight"]), p["f_up_weight"]) + p["dt_bias"]
        kept = torch.exp(-p["A_log"].exp()[:, None] * F.softplus(made.unflatten(-1, (heads, -1))))

    def step(t, S):
        # the transition written as the matrix that it is
        I = torch.eye(k.shape[-1]).expand(*k.shape[:1], heads, -1, -1)
        moved = (I - beta[:, t, :, None, None] * outer(k[:, t], k[:, t])) @ torch.diag_embed(
            kept[:, t].expand_as(k[:, t])
        )
        return moved @ S + beta[:, t, :, None, None] * outer(k[:, t], v[:, t])

    return recurrence(q, k, v, step)


def additive(p, x, v, heads, decay):
    """arXiv 2307.08621 (fixed), 2405.05254 (head), 2312.06635 (channel)."""
    q, k = rows(p, "q_proj", x, heads), rows(p, "k_proj", x, heads)
    N, s = q.shape[1], q.shape[-1]
    if decay == "channel":
        made = F.linear(F.linear(x, p["g_down_weight"]), p["g_up_weight"], p["g_up_bias"]).unflatten(-1, (heads, -1))
        kept = torch.sigmoid(made) ** (1 / 16)
    else:
        # pairs of features as complex numbers, turned by exp(i n theta); query and conjugate key
        theta = torch.logspace(0, -4, s // 2) if s > 2 else torch.ones(1)
        turn = torch.polar(torch.ones(N, s // 2), torch.arange(N)[:, None] * theta)[:, None]
        q, k = (torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous()) * turn) for y in (q, k))
        q, k = q.flatten(-2), k.flatten(-2)
        kept = (1 - 2.0 ** (-5 - torch.arange(heads)))[:, None].expand(*q.shape[:3], 1)
        if decay == "head":
            kept = torch.sigmoid(F.linear(x, p["g_proj_weight"], p["g_proj_bias"]))[..., None] ** (1 / 16)
    return recurrence(q / math.sqrt(s), k, v, lambda t, S: kept[:, t, ..., None] * S + outer(k[:, t], v[:, t]))


def mlstm(p, x, v, heads, _):
    """arXiv 2405.04517, eq. 19 to 27: the gates as they are, nothing subtracted from them."""
    q, k = rows(p, "q_proj", x, heads), rows(p, "k_proj", x, heads)
    k = k / math.sqrt(k.shape[-1])
    opened = torch.exp(F.linear(x, p["i_proj_weight"], p["i_proj_bias"]))
    kept = torch.sigmoid(F.linear(x, p["f_proj_weight"], p["f_proj_bias"]))
    C, n, out = 0, 0, []
    for t in range(x.shape[1]):
        C = kept[:, t, :, None, None] * C + opened[:, t, :, None, None] * outer(k[:, t], v[:, t])
        n = kept[:, t, :, None] * n + opened[:, t, :, None] * k[:, t]
        below = (n * q[:, t]).sum(-1).abs().clamp(min=1)
        out.append((C * q[:, t, ..., None]).sum(2) / below[..., None])
    return torch.stack(out, 1)


def rwkv7(p, x, v, heads, _):
    """arXiv 2503.14456: S (p, s) as there, multiplied from the right."""
    r, k = rows(p, "r_proj", x, heads), rows(p, "k_proj", x, heads)
    through = lambda n, act: F.linear(act(F.linear(x, p[f"{n}_down_weight"])), p[f"{n}_up_weight"], p[f"{n}_up_bias"])  # noqa: E731
    w = torch.exp(-math.exp(-0.5) * torch.sigmoid(through("w", torch.tanh))).unflatten(-1, (heads, -1))
    a = torch.sigmoid(through("a", lambda y: y)).unflatten(-1, (heads, -1))
    by = {n: p[n].unflatten(0, (heads, -1)) for n in ("k_k", "k_a", "r_k")}
    kappa = F.normalize(k * by["k_k"], dim=-1)
    key = k * torch.lerp(torch.ones_like(a), a, by["k_a"])
    S, out = x.new_zeros(x.shape[0], heads, v.shape[-1], k.shape[-1]), []
    for t in range(x.shape[1]):
        move = torch.diag_embed(w[:, t]) - outer(kappa[:, t], a[:, t] * kappa[:, t])
        S = S @ move + outer(v[:, t], key[:, t])
        bonus = (r[:, t] * key[:, t] * by["r_k"]).sum(-1, keepdim=True) * v[:, t]
        out.append((S @ r[:, t, ..., None])[..., 0] + bonus)
    return torch.stack(out, 1)


LAYERS = {
    "DeltaNet": (lambda **k: near.DeltaNet(12, 3, 5, **k), delta, "none"),
    "GatedDeltaNet": (lambda **k: near.GatedDeltaNet(12, 3, 5, **k), delta, "head"),
    "KimiDeltaAttention": (lambda **k: near.KimiDeltaAttention(12, 3, 5, **k), delta, "channel"),
    "Retention": (lambda **k: near.Retention(12, 3, 6, **k), additive, "fixed"),
    "Retention, two features": (lambda **k: near.Retention(12, 3, 2, **k), additive, "fixed"),
    "Retention gated": (lambda **k: near.Retention(12, 3, 4, gated=True, **k), additive, "head"),
    "GatedLinearAttention": (lambda **k: near.GatedLinearAttention(12, 3, 5, **k), additive, "channel"),
    "MLSTM": (lambda **k: near.MLSTM(12, 3, 5, **k), mlstm, ""),
    "RWKV7": (lambda **k: near.RWKV7(12, 3, 5, rank=4, **k), rwkv7, ""),
}


def formula(layer, make, decay, x, heads=3, prefix=""):
    """The layer by hand, along tokens (B, N, D)."""
    p = named(layer, prefix)
    v = rows(p, "value", x, heads)
    return F.linear(make(p, x, v, heads, decay).flatten(2), p["out_weight"], p["out_bias"])


@TOKENS
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_the_papers_formulas(name, reverse, tokens):
    make, by_hand, decay = LAYERS[name]
    layer = scrambled(make(reverse=reverse))
    x = torch.randn(2, tokens, 12, requires_grad=True)

    def truth(x):
        turned = x.flip(1) if reverse else x
        y = formula(layer, by_hand, decay, turned)
        return y.flip(1) if reverse else y

    agree(layer, x, truth)


@pytest.mark.parametrize("order", ["raster", "columns", "snake"])
@pytest.mark.parametrize("word", ["delta(heads=3, project=vo, decay=head)", "mlstm(heads=3, project=vo)"])
def test_orders_over_an_image(word, order):
    layer = scrambled(Mixer(f"scan(state=4, order={order}, reverse) | causal | {word}", 12))
    H, W = 5, 4
    line = [(r, c) for r in range(H) for c in range(W)]
    at = {
        "raster": line,
        "columns": [(r, c) for c in range(W) for r in range(H)],
        "snake": [(r, c if r % 2 == 0 else W - 1 - c) for r, c in line],
    }[order][::-1]
    x = torch.randn(2, 12, H, W)
    by_hand, decay = (delta, "head") if "delta" in word else (mlstm, "")
    truth = torch.zeros_like(x)
    made = formula(layer, by_hand, decay, torch.stack([x[:, :, r, c] for r, c in at], 1))
    for (r, c), y in zip(at, made.unbind(1), strict=True):
        truth[:, :, r, c] = y
    close(layer(x), truth)


def test_both_ways_is_the_sum_of_two():
    layer = scrambled(Mixer("gated_deltanet_bidirectional", 12, ndim=1))
    x = torch.randn(2, 12, 9)
    one, other = layer.operation.parts
    rows_of = x.mT

    def part(i, rows):
        p = named(layer)
        mine = {n.removeprefix(f"{i}."): t for n, t in p.items()}
        v = rows_of if "value_weight" not in mine else F.linear(rows, mine["value_weight"], mine["value_bias"])
        y = delta(mine, rows, v.unflatten(-1, (4, -1)), 4, "head").flatten(2)
        return F.linear(y, mine["out_weight"], mine["out_bias"])

    truth = part(0, rows_of) + part(1, rows_of.flip(1)).flip(1)
    assert (one.path.reverse, other.path.reverse) == (False, True)
    close(layer(x).mT, truth)


# --- transformers


def library(name):
    pytest.importorskip("transformers")
    return load(name)


def given(shape=(2, 150, 3, 16), p=24, decays=1):
    q, k = torch.randn(shape), torch.randn(shape)
    decay = -F.softplus(torch.randn(*shape[:3], decays))
    leaves = [q, k, torch.randn(*shape[:3], p), decay, torch.rand(shape[:3])]
    return [x.requires_grad_() for x in leaves]


def compare(ours, theirs, leaves, budget):
    """Output and every gradient; transformers computes in float32."""
    found = []
    for call in (ours, theirs):
        y = call(*leaves)
        probe = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).view_as(y)
        found.append([y, *torch.autograd.grad((y * probe).sum(), leaves)])
    for mine, truth in zip(*found, strict=True):
        assert (mine - truth).abs().max() <= budget * truth.abs().max().clamp(min=1)


def ours(q, k, v, decay, beta):
    return fast_weights(unit(q) / math.sqrt(q.shape[-1]), unit(k), v, decay, beta)[0]


@pytest.mark.parametrize("form", ["torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"])
def test_the_gated_delta_rule_is_that_of_qwen3_next(form):
    qwen = library("transformers.models.qwen3_next.modeling_qwen3_next")
    rule = getattr(qwen, form)
    call = lambda q, k, v, g, b: rule(q, k, v, g[..., 0], b, use_qk_l2norm_in_kernel=True, initial_state=None)[0]  # noqa: E731
    compare(ours, call, given(), 1e-5)


def test_kimi_delta_attention_is_that_of_transformers():
    kimi = library("transformers.models.kimi_linear.modeling_kimi_linear")
    for form in (kimi.recurrent_kimi_delta_attention, kimi.chunk_kimi_delta_attention):
        more = {"initial_state": None, "output_final_state": False, "chunk_size": 64, "use_qk_l2norm_in_kernel": True}
        call = lambda *t, form=form, more=more: form(*t, **more)[0]  # noqa: E731
        compare(ours, call, given(decays=16), 1e-5)


@pytest.mark.parametrize("level", [0.0, 30.0, -30.0])
def test_the_matrix_memory_is_that_of_xlstm(level):
    """Also where no gate fits a number as it is: exp(30) for each of 150 positions, or next to nothing."""
    xlstm = library("transformers.models.xlstm.modeling_xlstm")
    if xlstm.external_xlstm:
        pytest.skip("transformers runs another package here")
    layer = scrambled(near.MLSTM(12, 3, 5))
    with torch.no_grad():
        layer.i_proj_bias += level
    x = torch.randn(2, 150, 12, requires_grad=True)
    p = named(layer)

    def truth(x):
        q, k, v = (rows(p, n, x, 3).transpose(1, 2) for n in ("q_proj", "k_proj", "value"))
        gates = [F.linear(x, p[f"{n}_weight"], p[f"{n}_bias"]).mT for n in ("i_proj", "f_proj")]
        h = xlstm.mlstm_recurrent_sequence_native(q, k, v, *gates, eps=0.0, dtype_state=torch.float64)
        h = h[0] if isinstance(h, tuple) else h
        return F.linear(h.transpose(1, 2).flatten(2), p["out_weight"], p["out_bias"])

    for backend in ("auto", "oracle"):  # the sum that divides may be near zero: relative to the largest number
        layer.backend = backend
        compare(lambda x, *_: layer(x), lambda x, *_: truth(x), [x, *layer.parameters()], 1e-9)


# --- what holds for all


@pytest.mark.parametrize("name", LAYERS)
def test_a_mixing_matrix_times_the_values_is_the_layer(name):
    layer = scrambled(LAYERS[name][0]())
    x = torch.randn(2, 9, 12)
    matrix = mixing_matrix(layer, x)
    assert matrix.shape == (2, 3, 9, 9) and not matrix.triu(1).any()
    p = named(layer)
    value = rows(p, "value", x, 3)
    y = torch.einsum("bhmn,bnhp->bmhp", matrix, value).flatten(2)
    close(F.linear(y, p["out_weight"], p["out_bias"]), layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_positions_that_are_not_there_leave_no_trace(name):
    layer = scrambled(LAYERS[name][0]())
    x = torch.randn(2, 9, 12)
    keep = torch.ones(2, 9, dtype=torch.bool)
    keep[0, [0, 3, 4]] = False
    keep[1, 6:] = False
    poisoned = x.masked_fill(~keep[..., None], math.nan)
    y = layer(poisoned, mask=keep)
    for b in range(2):
        close(y[b, keep[b]], layer(x[b : b + 1, keep[b]])[0])


def test_gates_at_their_ends():
    """mLSTM: an input gate that is closed at first, and a forget gate that forgets everything."""
    layer = near.MLSTM(8, 2)
    x = torch.randn(1, 40, 8, requires_grad=True)
    for name, level in (("i_proj", -200.0), ("i_proj", 600.0), ("f_proj", -1e4), ("f_proj", 1e4)):
        with torch.no_grad():
            layer.get_parameter(f"{name}_bias").fill_(level)
        for backend in ("auto", "oracle") if level < 600 else ("auto",):
            layer.backend = backend
            y = layer(x)
            assert y.isfinite().all() and torch.autograd.grad(y.sum(), x)[0].isfinite().all()
        layer = near.MLSTM(8, 2)


def test_what_is_refused():
    with pytest.raises(ValueError, match="num_heads=5 must divide embed_dim=12"):
        near.GatedDeltaNet(12, 5)
    with pytest.raises(ValueError, match=r"state must be even, got scan\(state=3\); decay=channel takes any"):
        near.Retention(12, 4)
    with pytest.raises(ValueError, match="decay must be none, head or channel, got decay='fixed'"):
        Mixer("scan(state=4) | causal | delta(heads=2, decay=fixed)", 8)
    with pytest.raises(ValueError, match="project must be v, o or vo"):
        Mixer("scan(state=4) | causal | mlstm(project=qk)", 8)
    with pytest.raises(ValueError, match="rwkv7 goes with path scan"):
        Mixer("all | causal | rwkv7", 8)
    with pytest.raises(ValueError, match="backend='scan'"):
        near.GatedDeltaNet(12, 3, backend="scan")(torch.randn(1, 5, 12))
