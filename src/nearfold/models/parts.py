"""Parts that several families of networks are made of."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from nearfold.grammar import Basic, Operation, parse
from nearfold.grammar.word import with_arguments
from nearfold.nn import Mixer

CONV = "window(3) | box | kernel"
CONVNN = "nearest(9, cosine, self, padding=1) | ranked | kernel"
"""ConvNN as the public networks have it: the border's zeros are candidates (arXiv 2511.14137)."""
HYBRID = f"branch(0.5, {CONVNN}, {CONV}, mix)"
LAYERS = {"conv": CONV, "convnn": CONVNN, "hybrid": HYBRID}


def layer_of(layer: str | Operation) -> Operation:
    """The operation that a network's ``layer`` names: one of `LAYERS`, a notation, or an operation itself.

    >>> print(layer_of("conv"), "and", layer_of("window(5)|box|kernel"))
    window(3) | box | kernel and window(5) | box | kernel
    """
    return parse(LAYERS.get(layer, layer)) if isinstance(layer, str) else layer


def mixing(operation: str | Operation, in_channels: int, out_channels: int, *, bias: bool = True) -> nn.Module:
    """The mixing layer of a network on maps.

    >>> mixing(CONV, 4, 8)
    Mixer(window(3) | box | kernel, 4, 8, ndim=2)
    """
    return Mixer(operation, in_channels, out_channels, bias=bias)


def with_stride(operation: Operation, stride: int) -> Operation:
    """The same operation on a strided grid of outputs.

    Raises:
        ValueError: where a path has no stride.

    >>> print(with_stride(parse("branch(0.5, nearest(9, cosine) | ranked | kernel, window(3) | box | kernel)"), 2))
    branch(0.5, nearest(9, cosine, stride=2) | ranked | kernel, window(3, stride=2) | box | kernel)
    """

    def strided(part: Basic) -> Basic:
        if not hasattr(part.path, "stride"):
            raise ValueError(f"{part}: path {part.path.word} has no stride, and this network strides its layers")
        return dataclasses.replace(part, path=with_arguments(part.path, stride=stride))

    return operation.map(strided)


def classifier(features: int, classes: int) -> nn.Module:
    """The last layer; without classes, nothing.

    >>> classifier(8, 0)
    Identity()
    """
    return nn.Linear(features, classes) if classes else nn.Identity()


def require_size(x: Tensor, least: int) -> None:
    """ValueError where an image is smaller than a network can take."""
    if x.dim() != 4 or min(x.shape[2:]) < least:
        raise ValueError(f"x must be (B, channels, H, W) with H and W of at least {least}, got shape {tuple(x.shape)}")
