"""Derivatives of derivatives: equal to finite differences in float64, for every backend with operators of its own."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradgradcheck

from nearfold.nn import Mixer, deform_conv, knn_attention

OPERATIONS = {
    "conv": "window(3) | box | kernel",
    "acmix": "window(3) | box | shift(heads=2)",
    "a fixed choice": "nearest(3, cosine, self) | ranked | kernel",
    "k-NN attention": "nearest(3, dot) | ranked | softmax(heads=2)",
    "k-NN, cosine and a kernel": "nearest(3, cosine, self) | box | softmax*depthwise",
    "k-NN, euclidean": "nearest(3, euclidean) | ranked | inverse",
    "k-NN, more slots than keys": "nearest(20, euclidean(squared)) | ranked | softmax",
    "window attention": "window(3) | box | softmax(heads=2)",
    "window attention, distances": "window(3, euclidean, mode=reflect) | box | softmax",
    "window scores": "window(3) | box | identity(heads=2)",
    "window scores and a kernel": "window(3) | box | softmax*depthwise",
    "moving windows": "window(3, mode=inside) | box | softmax(heads=2)",
    "involution": "window(3) | box | generated(groups=2)",
    "deformable": "deformable(3) | box | kernel",
    "modulated": "deformable(3) | box | modulated*kernel",
    "scan": "scan(state=2) | causal | selective",
    "delta rule": "scan(state=2) | causal | delta(heads=2, decay=head)",
    "generalised delta rule": "scan(state=2) | causal | rwkv7(heads=2, rank=2)",
    "matrix memory": "scan(state=2) | causal | mlstm(heads=2)",
    "attention": "all | row | softmax(heads=2)",
    "causal attention": "all | causal | softmax(heads=2)",
    "attention, cosine and a bias": "all(cosine) | row | softmax(heads=2)",
    "attention with linear biases": "all(scaled(bias=alibi)) | causal | softmax(heads=4)",
    "attention, shared heads": "all | row | softmax(heads=4, kv=2)",
    "attention in blocks": "block(2) | box | softmax(heads=2)",
    "attention in moved blocks": "block(2, scaled(bias=table), shift=1) | box | softmax(heads=2)",
    "strided attention": "all | strided(2) | softmax(heads=2)",
    "linear attention": "all(elu) | row | normalized(heads=2)",
}


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("name", OPERATIONS)
def test_layers(name):
    torch.manual_seed(0)
    layer = Mixer(OPERATIONS[name], 4).double()
    assert layer.backend == "auto"
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    assert gradgradcheck(lambda x, *_: layer(x), (numbers(1, 4, 3, 4), *layer.parameters()), fast_mode=True)


def test_functions():
    torch.manual_seed(0)
    q, k, v = numbers(1, 2, 5, 3), numbers(1, 2, 6, 3), numbers(1, 2, 6, 2)
    assert gradgradcheck(lambda *t: knn_attention(*t, 3), (q, k, v), fast_mode=True)
    x, offset, weight = numbers(1, 2, 4, 5), numbers(1, 18, 2, 3), numbers(2, 2, 3, 3)
    assert gradgradcheck(deform_conv, (x, offset, weight), fast_mode=True)


def test_a_gradient_penalty_and_the_third_derivative():
    """As the oracle has them; one tensor is query, key and value here."""
    torch.manual_seed(0)
    layer, x = Mixer("nearest(3, euclidean) | ranked | softmax", 4).double(), numbers(2, 4, 3, 4)
    found = {}
    for layer.backend in ("auto", "oracle"):
        y = layer(x).sin().sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
        (third,) = torch.autograd.grad(second.square().sum(), x)
        found[layer.backend] = first, second, third
    for mine, truth in zip(found["auto"], found["oracle"], strict=True):
        assert truth.abs().max() > 0
        torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-9)
