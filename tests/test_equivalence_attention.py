"""Attention is exactly torch's, or a formula written out here; so is a search among features.

Everything in float64, outputs and gradients within 1e-12 (absolute) of the reference.
Shape legend: B batch, C channels, O output channels, H heads, d channels of a head, N positions, S slots.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.equivalence import BACKENDS, LETTERS, agree, attention_pair, close
from torch import Tensor

from nearfold.nn import ConvNN2d, ConvNNAttention, KVTAttention, Mixer, TokenMixer

pytestmark = pytest.mark.usefixtures("float64")

# --- attention


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("heads", [1, 3, 6])
@pytest.mark.parametrize(
    "notation",
    [
        "all | row | softmax(heads={heads})",
        "nearest({n}, scaled) | ranked | softmax(heads={heads})",
        "nearest({n}, scaled) | ranked | softmax(heads={heads})*depthwise",
        "nearest({n}, scaled) | box | softmax(heads={heads})*depthwise",
        "nearest(100, scaled) | ranked | softmax(heads={heads})*depthwise",  # more than there are
        "nearest({n}, scaled, self) | ranked | softmax(heads={heads})",
    ],
)
def test_attention_is_multihead_attention(notation, heads, bias, backend):
    n = 11
    ours = TokenMixer(notation.format(n=n, heads=heads), 12, bias=bias, backend=backend)
    if "depthwise" in notation:
        assert bool((ours.weight == 1).all()), "the kernel starts as ones: exactly attention"
    theirs, pairs = attention_pair(ours, 12, heads, bias)
    agree(ours, lambda x: theirs(x, x, x, need_weights=False)[0], torch.randn(2, n, 12), pairs)


def projected(ours, x: Tensor, heads: int) -> list[Tensor]:
    """Query, key and value (B, H, N, d) of tokens (B, N, D)."""
    weights = [(getattr(ours, f"{c}_weight"), getattr(ours, f"{c}_bias")) for c in LETTERS]
    return [F.linear(x, w, b).unflatten(2, (heads, -1)).transpose(1, 2) for w, b in weights]


def joined(ours, y_BHNd: Tensor) -> Tensor:
    return F.linear(y_BHNd.transpose(1, 2).flatten(2), ours.out_weight, ours.out_bias)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", ["all | causal | softmax(heads=3)", "nearest(9, scaled) | causal | softmax(heads=3)"])
def test_causal_attention(path, backend):
    ours = TokenMixer(path, 12, backend=backend)
    x = torch.randn(2, 9, 12)

    def reference(x):
        return joined(ours, F.scaled_dot_product_attention(*projected(ours, x, 3), is_causal=True))

    y = agree(ours, reference, x)
    later = x.clone()
    later[:, 5:] += 1
    close(ours(later)[:, :5], y[:, :5], "outputs before a change")


def test_strided_attention_reads_a_class_of_positions():
    ours = TokenMixer("all | strided(3) | softmax(heads=2)", 8)
    at = torch.arange(10)

    def reference(x):
        mask = (at[:, None] - at[None, :]) % 3 == 0
        return joined(ours, F.scaled_dot_product_attention(*projected(ours, x, 2), attn_mask=mask))

    agree(ours, reference, torch.randn(2, 10, 8))


def test_local_attention_is_a_banded_mask():
    ours = Mixer("window(5) | box | softmax(heads=2)", 8, ndim=1)
    at = torch.arange(13)
    band = (at[:, None] - at[None, :]).abs() <= 2

    def reference(x):
        q, k, v = projected(ours, x.transpose(1, 2), 2)
        return joined(ours, F.scaled_dot_product_attention(q, k, v, attn_mask=band)).transpose(1, 2)

    agree(ours, reference, torch.randn(2, 8, 13))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("k", "heads"), [(1, 1), (4, 3), (10, 2), (50, 3)])
def test_kvt_is_attention_masked_to_the_best_keys(k, heads, backend):
    ours = KVTAttention(12, heads, k, backend=backend)

    def reference(x):
        q, key, v = projected(ours, x, heads)
        score = q @ key.transpose(2, 3) / math.sqrt(12 // heads)
        smallest_kept = score.sort(-1, descending=True).values[..., : min(k, x.shape[1])][..., -1:]
        return joined(ours, torch.softmax(score.masked_fill(score < smallest_kept, float("-inf")), -1) @ v)

    agree(ours, reference, torch.randn(2, 11, 12))


def test_convnn_attention_starts_as_kvt():
    kvt, convnn = KVTAttention(12, 3, 5), ConvNNAttention(12, 3, 5)
    missing = convnn.load_state_dict(kvt.state_dict(), strict=False)
    assert missing.missing_keys == ["weight"] and not missing.unexpected_keys
    pairs = [(p, lambda n=n: kvt.get_parameter(n).grad) for n, p in convnn.named_parameters() if n != "weight"]
    agree(convnn, kvt, torch.randn(2, 11, 12), pairs)


def test_convnn_attention_weights_ranks():
    """The kernel multiplies the j-th best neighbour by its own weight, per channel."""
    ours = ConvNNAttention(12, 3, 5)
    with torch.no_grad():
        ours.weight.normal_()

    def reference(x):
        q, key, v = projected(ours, x, 3)
        score, index = (q @ key.transpose(2, 3) / 2).sort(-1, descending=True)
        alpha, index = torch.softmax(score[..., :5], -1), index[..., :5]
        near = torch.take_along_dim(v.unsqueeze(2), index.unsqueeze(-1), 3)  # (B, H, N, S, d)
        weight = ours.weight[:, 0].unflatten(0, (3, 4))  # (H, d, S)
        return joined(ours, torch.einsum("bhns,bhnsd,hds->bhnd", alpha, near, weight))

    agree(ours, reference, torch.randn(2, 11, 12))


# --- ConvNN


@pytest.mark.parametrize("stride", [1, (2, 3)])
def test_convnn_is_a_strided_conv_over_sorted_neighbours(stride):
    """The published formulation: k columns for every position, then a 1-D convolution of stride k."""
    ours = ConvNN2d(4, 6, k=5, stride=stride)

    def reference(x):
        flat = x.flatten(2)
        unit = F.normalize(flat, dim=1)
        similarity = unit.transpose(1, 2) @ unit
        similarity.diagonal(dim1=1, dim2=2).fill_(2)  # the position itself comes first
        index = similarity.sort(-1, descending=True).indices[..., :5]
        columns = flat.gather(2, index.flatten(1)[:, None].expand(-1, 4, -1))
        y = F.conv1d(columns, ours.weight, ours.bias, stride=5).unflatten(2, x.shape[2:])
        row, column = (stride, stride) if isinstance(stride, int) else stride
        return y[:, :, ::row, ::column]

    agree(ours, reference, torch.randn(2, 4, 5, 7))


@pytest.mark.parametrize("kernel", ["kernel", "depthwise", "separable"])
def test_blend_at_its_ends(kernel):
    """At lam = 0 it is position, at lam = 1 the features' own metric (their scale does not change a rank)."""
    x = torch.randn(2, 4, 6, 5)
    for blend, end in (
        ("blend(0)", "position"),
        ("blend(1)", "euclidean"),
        ("blend(1, cosine)", "cosine"),
        ("blend(1, unit)", "euclidean"),
    ):
        for rest in ("", ", self", ", padding=1", ", stride=2"):
            mine, theirs = (Mixer(f"nearest(7, {s}{rest}) | ranked | {kernel}", 4) for s in (blend, end))
            mine.load_state_dict(theirs.state_dict())
            pairs = [(mine.get_parameter(n), lambda p=p: p.grad) for n, p in theirs.named_parameters()]
            agree(mine, theirs, x, pairs)


def test_blend_between_its_ends_is_neither():
    x = torch.randn(2, 4, 6, 5)
    layers = [Mixer(f"nearest(7, blend({lam})) | ranked | kernel", 4) for lam in (0, 0.4, 1)]
    for other in layers[1:]:
        other.load_state_dict(layers[0].state_dict())
    outputs = [layer(x) for layer in layers]
    assert not torch.equal(outputs[1], outputs[0]) and not torch.equal(outputs[1], outputs[2])
