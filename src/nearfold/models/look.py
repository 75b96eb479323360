"""What the layers of a trained network read of an image: each of the map that the layers before it have made.

Shape legend: C channels, H x W pixels, h, w the grid of a layer, M outputs, N positions.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfold.look.derivative import evaluating
from nearfold.look.layers import Reading
from nearfold.look.mixing import mixing_matrix
from nearfold.look.picture import draw, load_image, place
from nearfold.models.network import Network
from nearfold.models.pretrained import weights_of
from nearfold.models.registry import create
from nearfold.nn.mixer import Mixer, TokenMixer

if TYPE_CHECKING:
    import numpy
    from matplotlib.figure import Figure

CAPTION = """\
The layers are those of {name}, {parameters:,} parameters{trained}. The image is cropped to a square and resized to \
{height} x {width} pixels, which is what the network sees. Every layer reads the map that the layers before it have \
made, whose positions stand for larger and larger patches. Groups of channels are averaged; where a kernel maps \
channels, the weight is its size. Colours follow the square root of the weight: above up to the largest of the row, \
below up to the strongest hundredth of the matrix."""


def look_into(
    model: str | Network,
    image: str | Path | numpy.ndarray[Any, Any] | Tensor,
    at: tuple[int, int] | None = None,
) -> Figure:
    """Draw what the mixing layers of a network read of a photograph for one position, and their mixing matrices.

    Args:
        model: a network whose weights come along (`nearfold models --pretrained`), by its name, or a network.
        image: as in `nearfold.look.look`. Its middle square is what the network sees.
        at: (row, column) of the position asked, in pixels of the image; default its middle.

    Returns:
        A figure that belongs to no window.

    Raises:
        ValueError: the network has no `Mixer` on maps, no weights come along, or the position is outside the square.

    >>> figure = look_into(create("resnet8s_convnn", widths=(8, 8, 8)), torch.rand(32, 32, 3), (10, 20))
    >>> [text.get_text() for text in figure.axes[1].texts][-1]
    'groups.0.layer'
    """
    network = create(model, pretrained=True) if isinstance(model, str) else model
    if not isinstance(network, Network) or not layers_of(network):
        raise ValueError(
            f"model must be a network of nearfold.models with Mixer layers on maps, got {type(network).__name__}"
        )
    pixels = load_image(image)
    at, side = place(pixels, at), min(pixels.shape[1:])
    row, column = ((a - (n - side) // 2) / side for a, n in zip(at, pixels.shape[1:], strict=True))
    if not (0 <= row < 1 and 0 <= column < 1):
        raise ValueError(f"at={tuple(at)} is outside the image's middle square, which is what the network sees")
    square = seen(network, pixels)
    there = (int(row * square.shape[1]), int(column * square.shape[2]))
    return draw(square, readings(network, square, (row, column)), there, _caption(network, isinstance(model, str)))


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


def _caption(network: Network, along: bool) -> str:
    """What the picture shows; ``along``: of a network with the weights that come along."""
    name = network.architecture.removeprefix("nearfold_") or type(network).__name__
    trained = ""
    if along:
        entry = weights_of(name)
        trained = f", trained on {entry.data} ({100 * entry.accuracy:.1f} % of its test images)"
    _, height, width = network.pretrained_cfg["input_size"]
    parameters = sum(p.numel() for p in network.parameters())
    return CAPTION.format(name=name, parameters=parameters, trained=trained, height=height, width=width)
