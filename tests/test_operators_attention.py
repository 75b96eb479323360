"""Positions and attention over tokens against torch, or the paper's formula.

Nothing here goes through the oracle: these tests say that the words mean what the field means by them.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.formulas import close, masked_attention, positions, project
from torch import nn

from nearfold import nn as near
from nearfold.nn import Mixer

pytestmark = pytest.mark.usefixtures("float64")

# --- positions


def test_alibi_of_a_power_of_two():
    layer = near.SelfAttention(8, 4, positions="alibi", causal=True)
    x = torch.randn(2, 9, 8)
    far = (torch.arange(9)[:, None] - torch.arange(9)).double()
    slopes = torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256])  # the paper's, for four heads
    close(layer(x), masked_attention(layer, x.mT, far >= 0, -slopes[:, None, None] * far).mT)


def test_alibi_on_an_image_is_the_distance():
    layer = Mixer("all(scaled(bias=alibi)) | row | softmax(heads=2)", 4)
    x = torch.randn(2, 4, 3, 4)
    far = torch.tensor([[math.dist(i, j) for j in positions((3, 4))] for i in positions((3, 4))])
    slopes = torch.tensor([2.0**-4, 2.0**-8])
    everywhere = torch.ones(12, 12, dtype=torch.bool)
    close(layer(x), masked_attention(layer, x, everywhere, -slopes[:, None, None] * far))


def test_rotary_positions_are_turns_of_complex_numbers():
    layer = near.SelfAttention(8, 2, positions="rotary")
    x = torch.randn(1, 9, 8)
    q, k, v = project(layer, x.mT)
    turn = torch.polar(torch.ones(9, 2), torch.arange(9.0)[:, None] * torch.tensor([1.0, 0.01]))
    q, k = (
        torch.view_as_real(torch.complex(t[..., :2], t[..., 2:]) * turn).transpose(-1, -2).flatten(-2) for t in (q, k)
    )
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    close(layer(x), F.linear(y, layer.out_weight, layer.out_bias))


def test_rotary_positions_know_offsets_only():
    """On an image: scores of a constant map depend on the offset, and differ along both axes."""
    from nearfold.grammar.similarity import Place, Scaled

    place = Place((5, 6), torch.device("cpu"), torch.float64)
    vector = torch.randn(1, 1, 1, 8).expand(1, 1, 30, 8)
    q, k = Scaled(rotary=True).embed(vector, vector, place, {})
    score = (q @ k.mT)[0, 0].reshape(5, 6, 5, 6)
    close(score[1, 1, 3, 4], score[2, 2, 4, 5])
    assert (score[1, 1, 3, 4] - score[1, 1, 4, 3]).abs() > 1e-3


def test_encodings_are_what_they_say():
    from nearfold.grammar.similarity import Place, encode

    place = Place((4, 5), torch.device("cpu"), torch.float64)
    at = torch.tensor(positions((4, 5)), dtype=torch.float64)
    unit = at / torch.tensor([3.0, 4.0]) * 2 - 1
    close(encode(True, place, None), unit.flip(1))
    for kind, angle, frequency in (
        ("sinusoidal", at, [10000 ** (-j / 4) for j in range(4)]),
        ("fourier", unit.flip(1), [math.pi * 2**j for j in range(4)]),
    ):
        turns = [angle[:, a] * f for a in range(2) for f in frequency]
        truth = torch.stack([t.sin() for t in turns] + [t.cos() for t in turns], 1)
        close(encode(kind, place, None), truth)
    weight = torch.randn(8, 16)
    close(encode("learned", place, weight), encode("fourier", place, None) @ weight.T)


@pytest.mark.parametrize("kind", ["raw", "sinusoidal", "fourier", "learned"])
def test_encodings_of_values_are_more_channels(kind):
    from nearfold.grammar.similarity import Place, encode

    layer = Mixer(f"window(3) | box | kernel(coordinates={kind})", 3, 5)
    x = torch.randn(2, 3, 4, 6)
    code = encode(kind, Place((4, 6), x.device, x.dtype), layer.tensors().get("value_encoding_weight"))
    both = torch.cat([x, code.T.unflatten(1, (4, 6)).expand(2, -1, -1, -1)], 1)
    close(layer(x), F.conv2d(both, layer.weight, layer.bias, padding=1))


# --- attention over tokens


def test_table_is_a_matrix_over_positions():
    layer = Mixer("all | row | table(20)", 3)
    x = torch.randn(2, 3, 4, 5)
    truth = torch.einsum("mn,bcn->bcm", layer.table_weight, x.flatten(2)) + layer.table_bias
    close(layer(x), truth.unflatten(2, (4, 5)))


@pytest.mark.parametrize("causal", [False, True])
def test_linear_attention_is_the_papers_formula(causal):
    layer = near.LinearAttention(6, 2, causal=causal)
    x = torch.randn(2, 9, 6)
    q, k, v = project(layer, x.mT)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    rows = []
    for i in range(9):
        seen = slice(0, i + 1) if causal else slice(None)
        top = torch.einsum("bhe,bhje,bhjd->bhd", q[:, :, i], k[:, :, seen], v[:, :, seen])
        rows.append(top / torch.einsum("bhe,bhje->bh", q[:, :, i], k[:, :, seen])[..., None])
    y = torch.stack(rows, 2).transpose(1, 2).flatten(2)
    close(layer(x), F.linear(y, layer.out_weight, layer.out_bias))


@pytest.mark.parametrize("kv", [1, 2, 4])
def test_grouped_queries_are_torchs(kv):
    layer = near.SelfAttention(16, 4, kv_heads=kv)
    x = torch.randn(2, 7, 16)
    q = F.linear(x, layer.query_weight, layer.query_bias).unflatten(2, (4, 4)).transpose(1, 2)
    k, v = (
        F.linear(x, layer.get_parameter(f"{n}_weight"), layer.get_parameter(f"{n}_bias")).unflatten(2, (kv, 4))
        for n in ("key", "value")
    )
    assert layer.key_weight.shape == (4 * kv, 16)
    y = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True)
    close(layer(x), F.linear(y.transpose(1, 2).flatten(2), layer.out_weight, layer.out_bias))


def test_cross_attention_is_torchs():
    layer = near.CrossAttention(12, 3, context_dim=8)
    twin = nn.MultiheadAttention(12, 3, kdim=8, vdim=8, batch_first=True)
    with torch.no_grad():
        twin.q_proj_weight.copy_(layer.query_weight)
        twin.k_proj_weight.copy_(layer.key_weight)
        twin.v_proj_weight.copy_(layer.value_weight)
        twin.in_proj_bias.copy_(torch.cat([layer.query_bias, layer.key_bias, layer.value_bias]))
        twin.out_proj.weight.copy_(layer.out_weight)
        twin.out_proj.bias.copy_(layer.out_bias)
    x, context = torch.randn(2, 7, 12), torch.randn(2, 5, 8)
    close(layer(x, context), twin(x, context, context, need_weights=False)[0])


def test_cross_nearest_reads_the_best_of_the_context():
    layer = Mixer("nearest(3, scaled, cross) | ranked | softmax(heads=2)", 4, ndim=2, context_channels=6)
    x, context = torch.randn(2, 4, 3, 4), torch.randn(2, 6, 5, 2)
    q = project(layer, x, "query")[0]
    k, v = project(layer, context, "key value")
    score = q @ k.mT / math.sqrt(2)
    kept = score.masked_fill(score < score.topk(3, -1).values[..., -1:], -math.inf)
    y = (torch.softmax(kept, -1) @ v).transpose(1, 2).flatten(2)
    close(layer(x, context).flatten(2).mT, F.linear(y, layer.out_weight, layer.out_bias))


def test_convnn_on_volumes():
    layer = near.ConvNN3d(3, 5, k=4)
    x = torch.randn(2, 3, 2, 3, 4)
    flat = F.normalize(x.flatten(2), dim=1)
    score = flat.mT @ flat
    score.diagonal(dim1=1, dim2=2).fill_(math.inf)
    near_by = score.topk(4, -1).indices
    read = x.flatten(2)[torch.arange(2)[:, None, None], :, near_by]  # (B, N, k, C)
    truth = torch.einsum("bnkc,ock->bon", read, layer.weight) + layer.bias[:, None]
    close(layer(x).flatten(2), truth)
