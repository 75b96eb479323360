"""Whole layers on the Triton kernels, against the oracle: what a CUDA tensor would go through, in the interpreter."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from nearfold.kernels import cuda
from nearfold.lower.call import Call
from nearfold.nn import ConvNN2d, Mixer
from nearfold.nn.functional import knn_attention

LAYERS = {
    "convnn": "nearest(5, cosine, self) | ranked | kernel",
    "convnn, border": "nearest(4, cosine, self, padding=1) | box | kernel(groups=2)",
    "depthwise": "nearest(3, euclidean) | ranked | depthwise",
    "kvt": "nearest(5, scaled) | ranked | softmax(heads=2)",
    "convnn attention": "nearest(4, dot) | ranked | softmax(heads=2)*depthwise",
    "separable": "nearest(3, euclidean(squared)) | ranked | inverse(heads=2)*separable",
    "blend": "nearest(4, blend(0.3), self) | ranked | kernel",
    "causal": "nearest(3, scaled) | causal | softmax(heads=2)",
    "window candidates": "nearest(3, cosine, window(3)) | ranked | kernel",
    "strided": "nearest(3, cosine, grid(3), stride=2) | ranked | kernel",
    "plain": "nearest(3, cosine) | ranked | ones",
    "deformable": "deformable(3) | box | modulated*kernel",
    "window attention": "window(3) | box | softmax(heads=2)",
    "acmix": "a*(window(3, scaled(relative), mode=reflect) | box | softmax(heads=2, project=qkv))"
    " + b*(window(3) | box | shift(2))",
    "scan": "scan(state=3) | causal | selective",
}

KERNELS = {
    "deformable": ["aggregate", "corners"],
    "window attention": ["local_attention"],
    "acmix": ["local_attention", "grouped_conv"],
    "scan": ["scan"],
}  # the others aggregate


def outcome(layer: Mixer, x: Tensor, backend: str) -> dict[str, Tensor]:
    layer.backend = backend
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    grads = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad} | grads


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_the_oracles(name, monkeypatch):
    layer = Mixer(LAYERS[name], 4, 4)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(2, 4, 4, 5)
    truth = outcome(layer, x, "oracle")
    used = []
    for kind in KERNELS.get(name, ["aggregate"]):
        module = importlib.import_module(f"nearfold.kernels.triton.{kind}")
        for way in (kind, f"{kind}_backward"):
            real = getattr(module, way)
            monkeypatch.setattr(module, way, lambda *a, n=way, f=real, **k: used.append(n) or f(*a, **k))
    with cuda.interpreted():
        mine = outcome(layer, x, "auto")
    ran = {way for kind in KERNELS.get(name, ["aggregate"]) for way in (kind, f"{kind}_backward")}
    assert ran == set(used)
    for what, found in mine.items():
        scale = truth[what].abs().max().item()
        assert (found - truth[what]).abs().max().item() <= 2e-5 * max(scale, 1), what


def test_attention_to_all_keys_is_dense_attention():
    q, k, v = torch.randn(3, 1, 2, 11, 8).unbind()
    with cuda.interpreted():
        y = knn_attention(q, k, v, 11)
    assert torch.allclose(y, torch.nn.functional.scaled_dot_product_attention(q, k, v), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_compared_as_it_is(dtype, monkeypatch):
    """The rows go to the search in their own dtype, and scores come back in float32."""
    layer = Mixer("nearest(4, scaled, self) | ranked | softmax(heads=2)", 8).to(dtype)
    x = torch.randn(1, 8, 4, 4).to(dtype)
    truth = outcome(layer, x, "oracle")
    seen = []
    real = Call.compared
    monkeypatch.setattr(Call, "compared", lambda call: seen.append(real(call)) or seen[-1])
    with cuda.interpreted():
        mine = outcome(layer, x, "auto")
    assert seen[0][0].dtype == dtype and seen[0][2] == 0.5
    budget = {torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for what, found in mine.items():
        assert found.dtype == dtype
        scale = truth[what].float().abs().max().item()
        assert (found.float() - truth[what].float()).abs().max().item() <= budget * max(scale, 1), what


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("heads", [2, 6])
def test_acmix_convolution_in_low_precision(heads, autocast, monkeypatch):
    """Six heads take two steps. Maps, weight and output have the dtype that a convolution would have."""
    layer = Mixer(f"window(3) | box | shift({heads})", 6, 6)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(1, 6, 4, 5)
    truth = outcome(layer, x, "oracle")
    if not autocast:
        layer, x = layer.bfloat16(), x.bfloat16()
    module = importlib.import_module("nearfold.kernels.triton.grouped_conv")
    used = []
    for way in ("grouped_conv", "grouped_conv_backward"):
        real = getattr(module, way)
        monkeypatch.setattr(module, way, lambda *a, n=way, f=real: used.append(n) or f(*a))
    with cuda.interpreted(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mine = outcome(layer, x, "auto")
    assert used == ["grouped_conv", "grouped_conv_backward"] and mine["y"].dtype == torch.bfloat16
    for what, found in mine.items():
        scale = truth[what].abs().max().item()
        assert (found.float() - truth[what]).abs().max().item() <= 3e-2 * max(scale, 1), what


def test_a_layer_trains():
    layer = ConvNN2d(4, 4, 3)
    optimizer = torch.optim.SGD(layer.parameters(), 0.05)
    x, wanted = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    losses = []
    with cuda.interpreted():
        for _ in range(3):
            optimizer.zero_grad()
            loss = (layer(x) - wanted).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
