"""The layers behind `nearfold.look`: what a patch of an image is described by, and operations with plain weights.

Shape legend: F features, C channels, h, w the grid of patches, M outputs, N positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.grammar import CATALOGUE, Basic, Operation, parse
from nearfold.grammar.words import Scan
from nearfold.look.mixing import mixing_matrix
from nearfold.lower.meaning import meaning
from nearfold.nn.mixer import Mixer

FEATURES = (
    "brightness", "red - green", "blue - yellow", "contrast",
    "slope down", "slope right", "horizontal edges", "vertical edges",
)  # fmt: skip
"""What a patch of the image is described by."""
SHARPNESS = 2.0  # times the query: attention as peaked as a trained layer's, not the haze of an untrained one
GATES = tuple(
    f"{name}_weight" for name in ("a_proj", "b_proj", "f_proj", "g_proj", "i_proj", "a_up", "f_up", "g_up", "w_up")
)
"""What makes decays and shares of the input: half open, whatever it is."""
STEP = 0.01  # delta of a state space: its slowest state remembers 1 / STEP = 100 positions


@dataclass(frozen=True)
class Reading:
    """What one operation reads.

    Attributes:
        title: its name in the catalogue, or "" for one that has none.
        notation: the operation.
        row: (h, w), the weights with which the position asked reads every patch; may be signed.
        matrix: (M, N), those of all positions.
        line: the row of the matrix that belongs to the position asked.
    """

    title: str
    notation: str
    row: Tensor
    matrix: Tensor
    line: int

    @property
    def signed(self) -> bool:
        """Whether some weights of the matrix are negative."""
        return bool((self.matrix < 0).any())

    @property
    def summary(self) -> str:
        """How many positions are read, and how many equally weighted ones would be as spread out.

        >>> Reading("", "", torch.tensor([[1.0, 1.0, 0.0]]), torch.ones(1, 3), 0).summary
        'reads 2 of 3 positions, spread as over 2.0'
        """
        share = self.row.abs().double().flatten()
        share = share / share.sum().clamp(min=1e-30)
        spread = float(torch.special.entr(share).sum().exp())
        read = int((share > 0).sum())
        return f"reads {read} of {share.numel()} positions, spread as over {spread:.1f}"


def features(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Every patch of an image (3, H, W) as the numbers of `FEATURES`: (1, F, h, w).

    First every feature gets mean 0 and variance 1 over the image, then every patch the mean square 1 over its features,
    as the norm before a layer does it: without, the few odd patches would be all that attention sees.

    >>> features(torch.rand(3, 20, 30), (4, 5)).shape
    torch.Size([1, 8, 4, 5])
    """
    red, green, blue = pixels = pixels.double()  # contrast is a small difference of large numbers
    bright = pixels.mean(0)
    down, right = torch.gradient(bright)
    maps = torch.stack([bright, red - green, blue - (red + green) / 2, bright**2, down, right, down.abs(), right.abs()])
    patches = F.adaptive_avg_pool2d(maps[None], grid)
    patches[:, 3] = (patches[:, 3] - patches[:, 0] ** 2).clamp(min=0).sqrt()
    centred = patches - patches.mean((2, 3), keepdim=True)
    equal = centred / (centred.square().mean((2, 3), keepdim=True).sqrt() + 1e-4)
    return (equal / (equal.square().mean(1, keepdim=True).sqrt() + 1e-2)).float()


def read(operation: str | Operation, x: Tensor, patch: tuple[int, int]) -> Reading:
    """What a plain layer of an operation reads of features (1, F, h, w) for the output at a patch (row, column)."""
    title, op = _named(operation)
    if op.needs_context:
        raise ValueError(f"{op}: reads a second input, and there is one image; leave cross out")
    grid = (x.shape[2], x.shape[3])
    fit = op.map(lambda part: part.sized(grid[0] * grid[1]))
    sequence = fit.for_sequences  # then patches in raster order
    layer = plain_layer(fit, 1 if sequence else 2)
    tiled = x.repeat(1, layer.in_channels // x.shape[1], 1, 1)
    matrix = mixing_matrix(layer, tiled.flatten(2) if sequence else tiled)[0].mean(0)
    line = _line(layer, grid, patch, len(matrix))
    return Reading(title, str(fit), matrix[line].unflatten(0, grid), matrix, line)


def _line(layer: Mixer, grid: tuple[int, int], patch: tuple[int, int], outputs: int) -> int:
    """The output position that stands for a patch: with a stride there are fewer."""
    if outputs == grid[0] * grid[1]:
        return patch[0] * grid[1] + patch[1]
    with torch.no_grad():
        out = layer(torch.zeros(1, layer.in_channels, *grid)).shape[2:]
    row, column = (p * n // size for p, n, size in zip(patch, out, grid, strict=True))
    return int(row * out[1] + column)


def _named(operation: str | Operation) -> tuple[str, Operation]:
    """Title (of an entry of the catalogue that is the same, or "") and operation."""
    if isinstance(operation, str):
        operation = parse(operation)
    return next((e.title for e in CATALOGUE.values() if e.operation == operation), ""), operation


def plain_layer(op: Operation, ndim: int = 2, channels: int | None = None) -> Mixer:
    """A layer whose weights are the plain ones that `look` describes, over features repeated for every head.

    ``channels``: so many instead, such as `FEATURES`, of which every head then sees its share.

    >>> layer = plain_layer(parse("all | row | softmax(heads=2)"))
    >>> layer.in_channels, layer.key_weight.diagonal().min().item(), layer.key_bias.abs().max().item()
    (16, 1.0, 0.0)
    """
    heads = [getattr(word, name, None) or 1 for part in op.parts for word, name in (
        (part, "heads"), (part.weight.rho, "scan_heads"), (part.weight.kernel, "groups"), (part.weight.kernel, "heads")
    )]  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = Mixer(op, channels or len(FEATURES) * math.lcm(*heads), ndim=ndim).eval()
    owners = dict(_owners(op, ""))
    with torch.no_grad():
        for name, tensor in layer.tensors().items():
            prefix, _, last = name.rpartition(".")
            _set_plain(tensor, last, owners.get(prefix + "." if prefix else ""), ndim)
    return layer


def _owners(op: Operation, prefix: str) -> Iterator[tuple[str, Basic]]:
    """The prefix of the parameters' names, and the `Basic` part that owns them."""
    if isinstance(op, Basic):
        yield prefix, op
    for i, part in enumerate(op.operands):
        yield from _owners(part, f"{prefix}{i}.")


def _set_plain(tensor: Tensor, name: str, owner: Basic | None, ndim: int) -> None:
    if name in ("query_weight", "key_weight", "value_weight", "out_weight"):
        torch.nn.init.eye_(tensor).mul_(SHARPNESS if name == "query_weight" else 1.0)
    elif name in ("dt_bias", "dt_proj_bias"):
        tensor.fill_(math.log(math.expm1(STEP)))
    elif name in ("D", "dt_proj_weight", "mask_weight", "position_weight") or name.endswith("bias"):
        tensor.zero_()
        if name == "mask_bias" and owner is not None and meaning(owner.weight.rho).start(owner, ndim) is None:
            tensor.fill_(1 / math.prod(owner.path.slot_shape(ndim)))  # a weight that is not kept in bounds: a mean
    elif name == "x_proj_weight" and owner is not None:
        state = torch.arange(cast(Scan, owner.path).state)
        tensor.zero_()
        for first in (len(tensor) - 2 * len(state), len(tensor) - len(state)):  # B, then C
            tensor[first + state, state % len(FEATURES)] = 1
    elif name == "feature_weight":  # of which offsets are made: the position's own features
        tensor.zero_().flatten(2)[..., tensor[0, 0].numel() // 2] = 1
    elif name in ("q_proj_weight", "r_proj_weight", "k_proj_weight") and owner is not None:
        state = torch.arange(cast(Scan, owner.path).state)
        tensor.zero_().unflatten(0, (-1, len(state)))[:, state, state % len(FEATURES)] = 1
    elif name in GATES:
        tensor.zero_()
    elif name == "offset_weight":
        _slide_uphill(tensor, ndim)
    elif name == "weight" and owner is not None:
        _average(tensor, owner)


def _average(weight: Tensor, owner: Basic) -> None:
    """A kernel that averages its slots, channel by channel; next to a rho that weights them, one that adds them."""
    kernel, slots = owner.weight.kernel, weight[0, 0].numel()
    meaning(kernel).fill_plain(kernel, weight, 1.0 if owner.weight.rho.needs_score else 1 / slots)


def _slide_uphill(weight: Tensor, ndim: int) -> None:
    """Every slot moves along the gradient of brightness at its own place; (group, slot, axis) x C x slots.

    Without axes of slots it is that at the query's place.
    """
    slopes = [FEATURES.index("slope down"), FEATURES.index("slope right")][-ndim:]
    if weight.dim() == 2:
        weight.zero_()
        for axis, channel in enumerate(slopes):
            weight[axis::ndim, channel] = 1
        return
    slots = weight[0, 0].numel()
    moves = torch.zeros(len(weight) // (slots * ndim), slots, ndim, weight.shape[1], slots)
    for slot in range(slots):
        for axis, channel in enumerate(slopes):
            moves[:, slot, axis, channel, slot] = 1
    weight.copy_(moves.flatten(0, 2).view_as(weight))
