"""Small calls, where a layer's Python costs more than its arithmetic: one image of 8 x 8, 64 tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.case import Case, Forward, Peer
from nearfold.nn import ACmix2d, BranchingConv2d, ConvNN2d, ConvNNAttention, DeformConv2d, Mixer, SelfAttention

Shape = tuple[int, ...]
IMAGE_LAYERS: dict[str, Callable[[int], Mixer]] = {
    "Mixer": lambda C: Mixer("window(3) | box | kernel", C),
    "ConvNN2d": lambda C: ConvNN2d(C, C, 9),
    "BranchingConv2d": lambda C: BranchingConv2d(C, C),
    "ACmix2d": lambda C: ACmix2d(C, C),
    "DeformConv2d": lambda C: DeformConv2d(C, C),
}
TOKEN_LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    "SelfAttention": SelfAttention,
    "ConvNNAttention": lambda C, heads: ConvNNAttention(C, heads, 9),
}


def _oracle(layer: nn.Module) -> Peer:
    """The same layer on the oracle, with the same parameters: what ours is checked against."""
    slow = copy.deepcopy(layer)
    for module in slow.modules():
        if isinstance(module, Mixer):
            module.backend = "oracle"

    def forward(x: Tensor) -> Tensor:
        made: Tensor = torch.func.functional_call(slow, dict(layer.named_parameters()), (x,))
        return made

    return Peer(forward, timed=False)


def _case(layer: nn.Module, name: str, plain: nn.Module, forward: Forward, shape: Shape) -> Case:
    found = {"oracle": _oracle(layer), name: Peer(forward, same=False)}
    return Case((torch.randn(shape),), layer, found, module=layer, others=(plain,))


def image(shape: Shape, layer: str) -> Case:
    """A layer on maps beside a 3 x 3 convolution."""
    plain = nn.Conv2d(shape[1], shape[1], 3, padding=1)
    return _case(IMAGE_LAYERS[layer](shape[1]), "nn.Conv2d 3x3", plain, plain, shape)


def tokens(shape: Shape, heads: int, layer: str) -> Case:
    """A layer on tokens beside dense attention."""
    dense = nn.MultiheadAttention(shape[2], heads, batch_first=True)
    ours = TOKEN_LAYERS[layer](shape[2], heads)
    return _case(ours, "nn.MultiheadAttention", dense, lambda x: dense(x, x, x, need_weights=False)[0], shape)
