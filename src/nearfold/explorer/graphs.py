"""The graphs that the page runs, in ONNX: what operators, or the layers of a network, read of every position.

Each answers by weights (rows, columns, h, w): for every output position the weights with which it reads the map, heads
and groups of channels averaged, as `nearfold.look.mixing_matrix` says it; the function itself is what is exported.

Shape legend: F features, C channels, H x W pixels, h, w a layer's grid, rows, columns its outputs', S slots.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from nearfold.explorer.operators import GRID, LAMBDA, Operator
from nearfold.export import to_onnx
from nearfold.grammar import parse
from nearfold.look.layers import FEATURES, features, plain_layer
from nearfold.look.mixing import own_mixing, triangle
from nearfold.models.look import layers_of
from nearfold.nn.mixer import Mixer

SIDE = 224
"""Pixels along each side of the photograph that the page sees."""
STORE = Path(__file__).parent / "graphs.zip"
"""The graphs that come along; recipes/explorer_graphs.py makes them."""
SMALL = 1e-6
"""Rows of a factor so much shorter than its longest one are roundoff: of kernels that are alike in all slots."""

EDGE = 2.0**-20
"""So far from 0 and from 1 a learned lambda stays."""


class Weights(nn.Module):
    """What a layer reads of a map (1, C, h, w): (rows, columns, h, w).

    Args:
        layer: on maps, or on sequences, which are then maps in raster order.
        x: a map; the grid is fixed.

    Raises:
        ValueError: the layer's kernel depends on its input.

    >>> layer = Mixer("window(3) | box | mean", 4)
    >>> Weights(layer, torch.randn(1, 4, 5, 6))(torch.randn(1, 4, 5, 6)).shape
    torch.Size([5, 6, 5, 6])
    """

    def __init__(self, layer: Mixer, x: Tensor) -> None:
        super().__init__()
        self.layer, self.grid = layer, tuple(x.shape[2:])
        with torch.no_grad():
            self.out = tuple(layer(x).shape[2:]) if layer.ndim == 2 else self.grid
        # what follows from the weights alone is computed here, once, and not in the page
        found, again = (self._factors(given) for given in (x, -x))
        if not all(map(torch.equal, found, again)):
            raise ValueError(f"{layer.operation}: its kernel depends on the input, and the page knows constant ones")
        self.factors = len(found)
        for i, factor in enumerate(found):
            self.register_buffer(f"factor{i}", factor)

    def _factors(self, x: Tensor) -> list[Tensor]:
        """Of every dense kernel."""
        found: list[Tensor] = []

        def factor(blocks: Tensor) -> Tensor:
            found.append(_compact(triangle(blocks)))
            return found[-1]

        self._matrix(x, factor)
        return found

    def _matrix(self, x: Tensor, factor: Callable[[Tensor], Tensor]) -> Tensor:
        return own_mixing(self.layer, x if self.layer.ndim == 2 else x.flatten(2), factor=factor).matrix[0].mean(0)

    def forward(self, x: Tensor) -> Tensor:
        kept = (self.get_buffer(f"factor{i}") for i in range(self.factors))
        return self._matrix(x, lambda _: next(kept)).view(*self.out, *self.grid)


def _compact(factor_BLqS: Tensor) -> Tensor:
    """Without the rows that are nothing but roundoff."""
    size_q = factor_BLqS.square().sum((0, 1, 3)).sqrt()
    return factor_BLqS[:, :, size_q > SMALL * size_q.max()]


class Described(nn.Module):
    """A photograph (3, H, W) -> what its patches are described by, (1, F, GRID, GRID)."""

    def forward(self, pixels: Tensor) -> Tensor:
        return features(pixels, (GRID, GRID))


def plain(notation: str) -> Weights:
    """What an operation with plain weights reads of features (1, F, GRID, GRID), of which each head sees its share.

    >>> plain("window(3) | box | kernel")(torch.randn(1, 8, 28, 28))[0, 0, :2, :3].mul(9).round().tolist()
    [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]
    """
    op = parse(notation)
    layer = plain_layer(op, 1 if op.for_sequences else 2, len(FEATURES))
    return Weights(layer, torch.randn(1, len(FEATURES), GRID, GRID, generator=torch.Generator().manual_seed(0)))


class Blended(nn.Module):
    """`plain` of an operation with blend(learned), whose lambda (1,) is an input, from 0 to 1."""

    def __init__(self, notation: str) -> None:
        super().__init__()
        self.weights = plain(notation)

    def forward(self, x: Tensor, lam: Tensor) -> Tensor:
        logit = lam.clamp(EDGE, 1 - EDGE).logit()  # at the very ends it is infinite, and infinity times zero no number
        weights: Tensor = torch.func.functional_call(self.weights, {"layer.blend_logit": logit}, (x,))
        return weights


class Layers(nn.Module):
    """What the mixing layers of a network read of an image: (3, H, W), from 0 to 1, -> their `Weights`.

    Args:
        network: of images (B, 3, H, W), with `Mixer` layers on maps.
        size: H, W.
        mean, std: taken from the channels of the image, and what they are then divided by.

    Raises:
        ValueError: there is no such layer, or a layer's kernel depends on its input.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: nn.Module, size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.network = network.eval()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])
        self.layers = layers_of(network)
        if not self.layers:
            raise ValueError(
                f"{type(network).__name__} has no Mixer layer on maps, of which the page could show anything"
            )
        with torch.no_grad():
            given = self._given(torch.rand(3, *size, generator=torch.Generator().manual_seed(0)))
        self.weights = nn.ModuleList(Weights(layer, given[name]) for name, layer in self.layers.items())

    def _given(self, pixels: Tensor) -> dict[str, Tensor]:
        """The maps that the layers read."""
        given: dict[str, Tensor] = {}

        def keep(name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
            given[name] = args[0]

        hooks = [layer.register_forward_pre_hook(partial(keep, name)) for name, layer in self.layers.items()]
        try:
            self.network(((pixels - self.mean) / self.std)[None])
        finally:
            for hook in hooks:
                hook.remove()
        return given

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        given = self._given(pixels)
        return tuple(w(given[name]) for name, w in zip(self.layers, self.weights, strict=True))

    @property
    def labels(self) -> list[str]:
        """What each output is: the layer's name, and its operation."""
        return [f"{name}: {layer.operation}" for name, layer in self.layers.items()]


def layers_to_onnx(network: nn.Module, path: Path | str, *, size: tuple[int, int] | None = None) -> None:
    """Write what a network's mixing layers read of an image as ONNX, for the page.

    The file has one input, the image (3, H, W) from 0 to 1, and an output (rows, columns, h, w) for every layer, whose
    name says which it is. The network's ``pretrained_cfg`` says what is taken from the image and what it is divided by;
    without, nothing is.

    Args:
        network: of images of three channels, with `Mixer` layers on maps, such as `nearfold.models` has, or
            `nearfold.convert` leaves in others.
        path: ends in ``.onnx``.
        size: H, W; default: that of ``pretrained_cfg``.

    Raises:
        ValueError: there is no size, no such layer, or a layer's kernel depends on its input.
        ImportError: onnx, onnxscript or onnxruntime is not installed.
    """
    cfg = getattr(network, "pretrained_cfg", None) or {}
    if size is None:
        if not cfg.get("input_size"):
            raise ValueError("size must say the height and width of the network's images, such as size=(32, 32)")
        size = tuple(cfg["input_size"][1:])
    model = Layers(network, size, tuple(cfg.get("mean", (0.0,) * 3)), tuple(cfg.get("std", (1.0,) * 3))).eval()
    pixels = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    to_onnx(model, pixels, path)
    _label(Path(path), model.labels)


def _label(path: Path, labels: list[str]) -> None:
    """Name the outputs of an ONNX file."""
    import onnx

    file = onnx.load(path)
    names = {output.name: label for output, label in zip(file.graph.output, labels, strict=True)}
    for output in file.graph.output:
        output.name = names[output.name]
    for node in file.graph.node:
        node.output[:] = [names.get(name, name) for name in node.output]
        node.input[:] = [names.get(name, name) for name in node.input]
    onnx.save(file, path)


def operator_graphs(operator: Operator) -> Iterator[tuple[str, bytes]]:
    """The graphs of an operator, one for every setting of its sliders: name and ONNX file.

    Their inputs are the features (1, F, GRID, GRID), and lambda (1,) where it blends.
    """
    example = torch.randn(1, len(FEATURES), GRID, GRID, generator=torch.Generator().manual_seed(1))
    for chosen in operator.variants():
        notation = operator.written(**chosen)
        model, args = (
            (Blended(notation), (example, torch.tensor([LAMBDA]))) if operator.blends else (plain(notation), (example,))
        )
        yield operator.key(**chosen), written(model, args)


def written(model: nn.Module, args: tuple[Tensor, ...]) -> bytes:
    """A model as an ONNX file."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        to_onnx(model.eval(), args, path)
        return path.read_bytes()


def kept(name: str) -> bytes:
    """A graph that comes along.

    >>> len(kept("features")) > 1000
    True
    """
    with zipfile.ZipFile(STORE) as store:
        return store.read(f"{name}.onnx")
