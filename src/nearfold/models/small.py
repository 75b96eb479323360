"""The small network of the spectrum study: everything is fixed but the mixing layer.

Choices that are the same for every operator, and why:

- The stem is a plain convolution. It patchifies larger images so that the mixing layers work on a grid of
  about 16 x 16 positions: some operators cost the square of the number of positions.
- A position code is added once, after the stem, scaled by one learned number per channel. Attention by
  features has no sense of place of its own; a fixed sinusoidal code gives it one at any image size.
- Norms are BatchNorm and the second half of a block is pointwise: outside the stem and the last pooling,
  positions exchange information in the mixing layer and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfold.grammar import Operation
from nearfold.nn import Mixer

GRID = 16
"""Side of the grid of positions that the stem aims at, where images are larger than that."""


def stem_stride(size: int | Sequence[int]) -> int:
    """Stride of the stem that brings an image of `size` pixels a side to at most `GRID` positions a side.

    >>> stem_stride(8), stem_stride(32), stem_stride((28, 28))
    (1, 2, 2)
    """
    side = size if isinstance(size, int) else max(size)
    return max(1, math.ceil(side / GRID))


def position_code(channels: int, height: int, width: int, like: Tensor) -> Tensor:
    """Sinusoidal code of the grid, (1, channels, height, width), in the dtype and on the device of `like`.

    A quarter of the channels each: sine and cosine of the row, sine and cosine of the column, at wavelengths
    that grow from 2 pi to 2 pi * 100 positions. Channels left over by the division stay 0.

    >>> position_code(8, 3, 5, torch.zeros(1)).shape
    torch.Size([1, 8, 3, 5])
    """
    n_waves = channels // 4
    exponent = torch.arange(n_waves, device=like.device, dtype=torch.float32) / max(n_waves, 1)
    frequency = 100.0**-exponent
    rows, columns = (
        torch.arange(n, device=like.device, dtype=torch.float32)[None] * frequency[:, None] for n in (height, width)
    )
    code = torch.zeros(channels, height, width, device=like.device, dtype=torch.float32)
    for quarter, wave in enumerate((rows.sin(), rows.cos(), columns.sin(), columns.cos())):
        grid = wave[:, :, None] if quarter < 2 else wave[:, None, :]
        code[quarter * n_waves : (quarter + 1) * n_waves] = grid
    return code[None].to(like.dtype)


class Block(nn.Module):
    """x + Mixer(norm(x)), then x + MLP(norm(x)).

    (B, width, H, W) to the same shape, or, where the operation has a stride, to the grid that it makes: x is then
    averaged over what falls together.
    """

    def __init__(self, operation: Operation | str, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.mixer = Mixer(operation, width, width)
        self.mlp = nn.Sequential(
            nn.BatchNorm2d(width), nn.Conv2d(width, hidden, 1), nn.GELU(), nn.Conv2d(hidden, width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mixer(self.norm(x))
        if mixed.shape != x.shape:
            x = F.adaptive_avg_pool2d(x, mixed.shape[2:])
        x = x + mixed
        return x + self.mlp(x)


class SpectrumNet(nn.Module):
    """Stem, `depth` residual blocks around one Operation, average pooling, linear classifier.

    Maps images (B, in_channels, H, W) to logits (B, classes), at any H and W.

    Args:
        operation: what the mixing layers compute, an Operation or its notation.
        in_channels: channels of the images.
        classes: number of classes.
        width: channels of every block; the heads and channel splits of the operation must divide it.
        depth: number of blocks.
        stride: stride of the stem, see `stem_stride`.
        hidden: channels inside the MLPs; None: twice the width.
        kernel: side of the stem's convolution, odd where it overlaps; None: 3, or 2 * stride - 1 where that is more.
            ``kernel=stride`` cuts patches: then positions exchange nothing outside the operation.

    Raises:
        NotationError: `operation` is a notation that does not parse.
        ValueError: a number below 1, or a width that the operation cannot work with.

    >>> net = SpectrumNet("window(3) | box | kernel", 1, 10, width=8, depth=1)
    >>> net(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        operation: Operation | str,
        in_channels: int,
        classes: int,
        *,
        width: int = 32,
        depth: int = 2,
        stride: int = 1,
        hidden: int | None = None,
        kernel: int | None = None,
    ) -> None:
        super().__init__()
        hidden = 2 * width if hidden is None else hidden
        kernel = max(3, 2 * stride - 1) if kernel is None else kernel
        numbers = {
            "in_channels": in_channels, "classes": classes, "width": width, "depth": depth, "stride": stride,
            "hidden": hidden, "kernel": kernel,
        }  # fmt: skip
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.stem = nn.Conv2d(in_channels, width, kernel, stride, padding=0 if kernel == stride else kernel // 2)
        self.place = nn.Parameter(torch.full((1, width, 1, 1), 0.1))
        self.blocks = nn.ModuleList(Block(operation, width, hidden) for _ in range(depth))
        self.head = nn.Sequential(nn.BatchNorm2d(width), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(width, classes)

    @property
    def mixers(self) -> list[Mixer]:
        """The mixing layers, first to last."""
        return [module for module in self.modules() if isinstance(module, Mixer)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.place * position_code(x.shape[1], x.shape[2], x.shape[3], x)
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.head(x))
