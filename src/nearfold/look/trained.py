"""What the layers of a trained network read of an image: each of the map that the layers before it have made.

Shape legend: C channels, H x W pixels, h, w the grid of a layer, M outputs, N positions.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfold.look.derivative import evaluating
from nearfold.look.layers import Reading
from nearfold.look.mixing import mixing_matrix
from nearfold.models.network import Network
from nearfold.models.pretrained import pretrained
from nearfold.models.registry import create
from nearfold.nn.mixer import Mixer, TokenMixer

CAPTION = """\
The layers are those of {name}, {parameters:,} parameters{trained}. The image is cropped to a square and resized to \
{height} x {width} pixels, which is what the network sees. Every layer reads the map that the layers before it have \
made, whose positions stand for larger and larger patches. Groups of channels are averaged; where a kernel maps \
channels, the weight is its size. Colours follow the square root of the weight: above up to the largest of the row, \
below up to the strongest hundredth of the matrix."""


def network_of(model: str | Network) -> Network:
    """A network with the weights that come along, by its name, or the one given.

    Raises:
        ValueError: it has no layer on maps that is a `Mixer`, or no weights come along.
    """
    network = create(model, pretrained=True) if isinstance(model, str) else model
    if not isinstance(network, Network) or not layers_of(network):
        raise ValueError(
            f"model must be a network of nearfold.models with Mixer layers on maps, got {type(network).__name__}"
        )
    return network


def layers_of(network: nn.Module) -> dict[str, Mixer]:
    """The mixing layers on maps, by name."""
    named = network.named_modules()
    return {name: m for name, m in named if isinstance(m, Mixer) and not isinstance(m, TokenMixer) and m.ndim == 2}


def seen(network: Network, pixels: Tensor) -> Tensor:
    """The middle square of an image (3, H, W), as large as the network's images: (3, h, w), from 0 to 1."""
    _, height, width = network.pretrained_cfg["input_size"]
    side = min(pixels.shape[1:])
    top, left = ((n - side) // 2 for n in pixels.shape[1:])
    square = pixels[None, :, top : top + side, left : left + side]
    return F.interpolate(square, (height, width), mode="bilinear", antialias=True, align_corners=False)[0].clamp(0, 1)


def readings(network: Network, pixels: Tensor, at: tuple[float, float]) -> list[Reading]:
    """What every mixing layer reads of an image (3, h, w) for the output at a place.

    Args:
        network: of maps.
        pixels: as `seen` makes them.
        at: row and column, as shares of the image, in [0, 1).
    """
    inputs: dict[str, Tensor] = {}

    def keep(name: str, layer: nn.Module, given: tuple[Any, ...]) -> None:
        inputs[name] = given[0].detach()

    layers = layers_of(network)
    hooks = [layer.register_forward_pre_hook(partial(keep, name)) for name, layer in layers.items()]
    mean, std = (torch.tensor(network.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    try:
        with evaluating(network), torch.no_grad():
            network(((pixels - mean) / std)[None])
            return [_reading(name, layer, inputs[name], at) for name, layer in layers.items()]
    finally:
        for hook in hooks:
            hook.remove()


def _reading(name: str, layer: Mixer, x: Tensor, at: tuple[float, float]) -> Reading:
    grid, out = tuple(x.shape[2:]), tuple(layer(x).shape[2:])
    matrix = mixing_matrix(layer, x)[0].mean(0)
    row, column = (int(share * n) for share, n in zip(at, out, strict=True))
    line = row * out[1] + column
    return Reading(name, str(layer.operation), matrix[line].unflatten(0, grid), matrix, line)


def caption(network: Network) -> str:
    """What the picture shows."""
    name = network.architecture.removeprefix("nearfold_") or type(network).__name__
    entry = pretrained().get(name)
    right = f", trained on {entry.data} ({100 * entry.accuracy:.1f} % of its test images)" if entry else ""
    _, height, width = network.pretrained_cfg["input_size"]
    parameters = sum(p.numel() for p in network.parameters())
    return CAPTION.format(name=name, parameters=parameters, trained=right, height=height, width=width)
