"""The cases, as data: ours, the peers, and whether a peer computes the same (then it is checked first)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.peers import attention_module, naive_convnn, naive_kvt, unfold_acmix
from nearfold.nn import ACmix2d, ConvNN2d, KVTAttention, Mixer, TokenMixer

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One comparison. ``parameters`` are those whose gradients both sides compute in forward + backward."""

    title: str
    shape: tuple[int, ...]
    ours: Forward
    peers: dict[str, tuple[Forward, bool]]
    modules: tuple[nn.Module, ...]
    target: str = ""


def _convnn(shape: tuple[int, ...], k: int, target: str, conv: bool = True) -> Case:
    channels = shape[1]
    layer, plain = ConvNN2d(channels, channels, k), nn.Conv2d(channels, channels, 3, padding=1)
    peers: dict[str, tuple[Forward, bool]] = {"naive": (lambda x: naive_convnn(layer, x), True)}
    if conv:
        peers["nn.Conv2d 3x3"] = (plain, False)
    return Case(f"ConvNN2d k={k}", shape, layer, peers, (layer, plain), target)


def _kvt(shape: tuple[int, ...], heads: int, k: int) -> Case:
    layer = KVTAttention(shape[2], heads, k)
    dense = nn.MultiheadAttention(shape[2], heads, batch_first=True)
    peers: dict[str, tuple[Forward, bool]] = {
        "naive": (lambda x: naive_kvt(layer, x, k, heads), True),
        "nn.MultiheadAttention": (lambda x: dense(x, x, x, need_weights=False)[0], False),
    }
    return Case(f"KVTAttention k={k}", shape, layer, peers, (layer, dense))


def _acmix(shape: tuple[int, ...]) -> Case:
    layer = ACmix2d(shape[1], shape[1], 7, 3, 4)
    peers: dict[str, tuple[Forward, bool]] = {"unfold": (lambda x: unfold_acmix(layer, x, 7, 4), True)}
    return Case("ACmix2d 7x7", shape, layer, peers, (layer,))


def _conv_tax(shape: tuple[int, ...]) -> Case:
    layer, plain = Mixer("window(3) | box | kernel", shape[1]), nn.Conv2d(shape[1], shape[1], 3, padding=1)
    plain.load_state_dict(layer.state_dict())
    return Case("conv in the grammar", shape, layer, {"nn.Conv2d 3x3": (plain, True)}, (layer, plain))


def _attention_tax(shape: tuple[int, ...], heads: int) -> Case:
    layer = TokenMixer(f"all | row | softmax(heads={heads})", shape[2])
    peer = attention_module(layer, shape[2], heads)
    peers: dict[str, tuple[Forward, bool]] = {
        "nn.MultiheadAttention": (lambda x: peer(x, x, x, need_weights=False)[0], True)
    }
    return Case("attention in the grammar", shape, layer, peers, (layer, peer))


CASES: dict[str, Callable[[], Case]] = {
    "convnn": lambda: _convnn((16, 64, 32, 32), 9, "naive: at least 3x faster forward + backward"),
    "convnn_memory": lambda: _convnn((8, 64, 64, 64), 9, "naive: peak memory below 1/5", conv=False),
    "convnn_k36": lambda: _convnn((16, 64, 32, 32), 36, ""),
    "kvt": lambda: _kvt((16, 197, 192), 3, 9),
    "acmix": lambda: _acmix((16, 64, 32, 32)),
    "conv_tax": lambda: _conv_tax((16, 64, 32, 32)),
    "attention_tax": lambda: _attention_tax((16, 197, 192), 3),
}


def make(name: str) -> tuple[Case, Tensor]:
    """A case and its input, from a fixed seed."""
    torch.manual_seed(0)
    case = CASES[name]()
    return case, torch.randn(case.shape)
