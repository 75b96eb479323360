"""What Nearfold is compared with: the usual formulations, written plainly in PyTorch.

Each takes the layer it imitates, and reads that layer's parameters: gradients can be compared too.

Shape legend: B batch, C channels, H heads, N positions, k neighbours, r candidates, d features of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfold.kernels.sample import draw_positions
from nearfold.nn import ACmix2d, ConvNN2d, ConvNNAttention, Mixer


def projected(layer: Mixer, x: Tensor, heads: int) -> list[Tensor]:
    """Query, key and value (B, H, N, d) of tokens (B, N, D)."""
    p = layer.tensors()
    maps = (F.linear(x, p[f"{n}_weight"], p[f"{n}_bias"]) for n in ("query", "key", "value"))
    return [t.unflatten(2, (heads, -1)).transpose(1, 2) for t in maps]


def joined(layer: Mixer, y: Tensor) -> Tensor:
    """(B, H, N, d) -> (B, N, D) through the output projection."""
    p = layer.tensors()
    return F.linear(y.transpose(1, 2).flatten(2), p["out_weight"], p["out_bias"])


def naive_knn_attention(q: Tensor, key: Tensor, v: Tensor, k: int) -> Tensor:
    """Dense scores, topk, a mask of -inf, softmax (the public KVT layer's way)."""
    scores = q @ key.transpose(-1, -2) * q.shape[-1] ** -0.5
    keep = torch.zeros_like(scores).scatter_(-1, scores.topk(k, dim=-1).indices, 1.0)
    return torch.where(keep > 0, scores, torch.full_like(scores, float("-inf"))).softmax(-1) @ v


def naive_kvt(layer: Mixer, x: Tensor, k: int, heads: int) -> Tensor:
    """KVT attention as a layer."""
    q, key, v = projected(layer, x, heads)
    return joined(layer, naive_knn_attention(q, key, v, k))


def naive_convnn_attention(layer: ConvNNAttention, x: Tensor, k: int, heads: int) -> Tensor:
    """Dense scores, topk, softmax over the k, gathered values, a kernel over ranks (the public layer's way)."""
    q, key, v = projected(layer, x, heads)
    best, index = (q @ key.transpose(-1, -2) * q.shape[-1] ** -0.5).topk(k, dim=-1)
    d = v.shape[3]
    expanded = v.transpose(2, 3).unsqueeze(-1).expand(-1, -1, -1, -1, k).contiguous()
    near_BHdNk = expanded.gather(3, index.unsqueeze(2).expand(-1, -1, d, -1, -1)) * best.softmax(-1).unsqueeze(2)
    y = F.conv1d(near_BHdNk.view(len(x), heads * d, -1), layer.tensors()["weight"], stride=k, groups=heads * d)
    return joined(layer, y.unflatten(1, (heads, d)).transpose(2, 3))


def naive_convnn(layer: ConvNN2d, x: Tensor) -> Tensor:
    """Dense cosine similarity, topk, expand, gather, Conv1d of stride k."""
    k, unit = layer.tensors()["weight"].shape[2], F.normalize(x.flatten(2), dim=1)
    similarity = unit.transpose(1, 2) @ unit
    torch.diagonal(similarity, dim1=1, dim2=2).fill_(1.1)
    return _gathered(layer, x, similarity.topk(k, dim=2).indices)


def naive_convnn_random(layer: ConvNN2d, x: Tensor, r: int) -> Tensor:
    """The same among r positions drawn as the layer draws them; the position itself is slot 0."""
    k, N = layer.tensors()["weight"].shape[2], x.shape[2] * x.shape[3]
    assert layer.sampler is not None
    layer.sampler[1] += 1
    drawn = draw_positions(layer.sampler, N, r)
    unit = F.normalize(x.flatten(2), dim=1)
    similarity = unit.transpose(1, 2) @ unit[:, :, drawn]
    own = drawn == torch.arange(N)[:, None]
    found = drawn[similarity.masked_fill(own, float("-inf")).topk(k - 1, dim=2).indices]
    return _gathered(layer, x, torch.cat([torch.arange(N)[:, None].expand(len(x), -1, 1), found], 2))


def _gathered(layer: ConvNN2d, x: Tensor, index: Tensor) -> Tensor:
    """Neighbours (B, N, k) gathered into (B, C, N k), and a convolution of stride k."""
    B, C, height, width = x.shape
    k = index.shape[2]
    expanded = x.flatten(2).unsqueeze(-1).expand(-1, -1, -1, k).contiguous()
    near = expanded.gather(2, index.unsqueeze(1).expand(-1, C, -1, -1)).view(B, C, -1)
    p = layer.tensors()
    return F.conv1d(near, p["weight"], p["bias"], stride=k).view(B, -1, height, width)


def unfold_neighbourhood(layer: Mixer, x: Tensor, window: int, heads: int) -> Tensor:
    """Attention in a window by unfold; positions outside the image are masked."""
    p = layer.tensors()
    B, _, height, width = x.shape
    q, k, v = (F.conv2d(x, p[f"{n}_weight"][..., None, None], p[f"{n}_bias"]) for n in ("query", "key", "value"))
    d = q.shape[1] // heads

    def unfolded(t: Tensor) -> Tensor:
        return F.unfold(t, window, padding=window // 2).view(-1, d, window * window, height * width)

    k_u, v_u = (unfolded(t.reshape(B * heads, d, height, width)) for t in (k, v))
    inside = F.unfold(x.new_ones(1, 1, height, width), window, padding=window // 2) > 0
    scores = (q.reshape(B * heads, d, 1, -1) * k_u).sum(1) * d**-0.5
    alpha = scores.masked_fill(~inside, float("-inf")).softmax(1)
    y = (alpha.unsqueeze(1) * v_u).sum(2).view(B, -1, height, width)
    return F.conv2d(y, p["out_weight"][..., None, None], p["out_bias"])


def unfold_acmix(layer: ACmix2d, x: Tensor, window: int, heads: int) -> Tensor:
    """Attention half by unfold, convolution half by k^2 maps and a grouped convolution (the public layer's way)."""
    p = layer.tensors()
    B, _, height, width = x.shape
    q, k, v = (F.conv2d(x, p[f"{n}_weight"][..., None, None], p[f"{n}_bias"]) for n in ("query", "key", "value"))
    O = q.shape[1]
    d = O // heads
    columns = torch.linspace(-1, 1, width, dtype=x.dtype, device=x.device).expand(height, -1)
    rows = torch.linspace(-1, 1, height, dtype=x.dtype, device=x.device)[:, None].expand(-1, width)
    place = F.conv2d(torch.stack([columns, rows])[None], p["0.position_weight"][..., None, None], p["0.position_bias"])

    def unfolded(t: Tensor) -> Tensor:
        padded = F.pad(t, [window // 2] * 4, mode="reflect")
        return F.unfold(padded, window).view(len(t), t.shape[1], window * window, height, width)

    q_h, k_h, v_h = (t.reshape(B * heads, d, height, width) for t in (q * d**-0.5, k, v))
    scores = (q_h.unsqueeze(2) * (unfolded(k_h) + place.unsqueeze(2) - unfolded(place))).sum(1)
    attention = (scores.softmax(1).unsqueeze(1) * unfolded(v_h)).sum(2).view(B, O, height, width)
    stacked = torch.cat([t.view(B, heads, d, -1) for t in (q, k, v)], 1)
    maps = F.conv2d(stacked, p["1.weight"][..., None, None]).transpose(1, 2).reshape(B, -1, height, width)
    shifted = F.conv2d(maps, p["1.shift_weight"], padding=1, groups=d)
    shifted = shifted.unflatten(1, (d, heads)).transpose(1, 2).flatten(1, 2)
    return p["rates"][0] * attention + p["rates"][1] * shifted


def attention_module(layer: Mixer, dim: int, heads: int) -> nn.MultiheadAttention:
    """nn.MultiheadAttention with a layer's weights."""
    p = layer.tensors()
    peer = nn.MultiheadAttention(dim, heads, batch_first=True)
    with torch.no_grad():
        peer.in_proj_weight.copy_(torch.cat([p[f"{n}_weight"] for n in ("query", "key", "value")]))
        peer.in_proj_bias.copy_(torch.cat([p[f"{n}_bias"] for n in ("query", "key", "value")]))
        peer.out_proj.weight.copy_(p["out_weight"])
        peer.out_proj.bias.copy_(p["out_bias"])
    return peer


def attention_module_gradients(peer: nn.MultiheadAttention) -> dict[str, Tensor]:
    """Its parameters' gradients by the names of a layer's."""
    found: dict[str, Tensor] = {}
    for part, whole in (("weight", peer.in_proj_weight), ("bias", peer.in_proj_bias)):
        assert whole.grad is not None
        found |= {f"{n}_{part}": g for n, g in zip(("query", "key", "value"), whole.grad.chunk(3), strict=True)}
    out = peer.out_proj
    assert out.weight.grad is not None and out.bias.grad is not None
    return {**found, "out_weight": out.weight.grad, "out_bias": out.bias.grad}


def addmm_topk(query: Tensor, key: Tensor, k: int) -> Tensor:
    """Indices of the nearest keys: distances from norms and one matrix product, then topk."""
    return torch.addmm(key.square().sum(1), query, key.T, alpha=-2).topk(k, largest=False).indices


def cdist_topk(query: Tensor, key: Tensor, k: int) -> Tensor:
    """Indices of the nearest keys: torch.cdist, then topk."""
    return torch.cdist(query, key).topk(k, largest=False).indices
