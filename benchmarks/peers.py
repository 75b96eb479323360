"""What Nearfold is compared with: the usual formulations, written plainly.

Shape legend: B batch, C channels, H heads, N positions, k neighbours, d features of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfold.nn import ACmix2d, ConvNN2d, KVTAttention


def naive_convnn(layer: ConvNN2d, x: Tensor) -> Tensor:
    """Dense cosine similarity, topk, expand, gather, Conv1d of stride k."""
    B, C, height, width = x.shape
    k = layer.weight.shape[2]
    flat = x.flatten(2)
    unit = F.normalize(flat, dim=1)
    similarity = unit.transpose(1, 2) @ unit
    torch.diagonal(similarity, dim1=1, dim2=2).fill_(1.1)
    index = similarity.topk(k, dim=2).indices
    expanded = flat.unsqueeze(-1).expand(-1, -1, -1, k).contiguous()
    near = expanded.gather(2, index.unsqueeze(1).expand(-1, C, -1, -1)).view(B, C, -1)
    return F.conv1d(near, layer.weight, layer.bias, stride=k).view(B, -1, height, width)


def naive_kvt(layer: KVTAttention, x: Tensor, k: int, heads: int) -> Tensor:
    """Dense scores, topk, a mask of -inf, softmax (the public KVT layer's way)."""
    p = layer.tensors()
    q, key, v = (
        F.linear(x, p[f"{n}_weight"], p[f"{n}_bias"]).unflatten(2, (heads, -1)).transpose(1, 2)
        for n in ("query", "key", "value")
    )
    scores = q @ key.transpose(-1, -2) * q.shape[-1] ** -0.5
    keep = torch.zeros_like(scores).scatter_(-1, scores.topk(k, dim=-1).indices, 1.0)
    alpha = torch.where(keep > 0, scores, torch.full_like(scores, float("-inf"))).softmax(-1)
    return F.linear((alpha @ v).transpose(1, 2).flatten(2), p["out_weight"], p["out_bias"])


def unfold_acmix(layer: ACmix2d, x: Tensor, window: int, heads: int) -> Tensor:
    """Attention half by unfold, convolution half by k^2 maps and a grouped convolution (the public layer's way)."""
    p = layer.tensors()
    B, _, height, width = x.shape
    q, k, v = (F.conv2d(x, p[f"{n}_weight"][..., None, None], p[f"{n}_bias"]) for n in ("query", "key", "value"))
    O = q.shape[1]
    d = O // heads
    columns = torch.linspace(-1, 1, width, dtype=x.dtype).expand(height, -1)
    rows = torch.linspace(-1, 1, height, dtype=x.dtype)[:, None].expand(-1, width)
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


def attention_module(layer: nn.Module, dim: int, heads: int) -> nn.MultiheadAttention:
    """nn.MultiheadAttention with a layer's weights."""
    p = layer.tensors()  # type: ignore[operator]
    peer = nn.MultiheadAttention(dim, heads, batch_first=True)
    with torch.no_grad():
        peer.in_proj_weight.copy_(torch.cat([p[f"{n}_weight"] for n in ("query", "key", "value")]))
        peer.in_proj_bias.copy_(torch.cat([p[f"{n}_bias"] for n in ("query", "key", "value")]))
        peer.out_proj.weight.copy_(p["out_weight"])
        peer.out_proj.bias.copy_(p["out_bias"])
    return peer
