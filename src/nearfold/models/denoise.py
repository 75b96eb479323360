"""A small denoising network: everything is fixed but the mixing layer.

With ``nearest`` in the place of the convolution, a position reads the positions that look like it, wherever they are:
non-local means with learned features and a learned kernel (Buades, Coll and Morel, doi 10.1137/040616024).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from nearfold.grammar import Operation
from nearfold.nn import Mixer


class DenoiseBlock(nn.Module):
    """x + Conv2d(ReLU(Mixer(x))); (B, width, H, W) to the same shape."""

    def __init__(self, operation: Operation | str, width: int) -> None:
        super().__init__()
        self.mixer = Mixer(operation, width, width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv(self.mixer(x).relu())
        return out


class DenoiseNet(nn.Module):
    """Images without their noise, (B, channels, H, W) to the same shape, at any H and W.

    A convolution to `width` channels, `depth` blocks around one operation, a convolution back: together they predict
    the noise, which is subtracted (residual learning, arXiv 1608.03981). Fresh, the network returns its input: the
    last convolution starts at zero. No norms: they would take away what tells how strong the noise is.

    Args:
        operation: what the mixing layers compute, an Operation or its notation.
        channels: of the images.
        width: channels between the first and the last layer.
        depth: number of blocks.
        scale: the blocks work on a grid of one position for scale x scale pixels, which the first layer reads as
            channels and the last one gives back (arXiv 1710.04026).

    Raises:
        ValueError: a number below 1, or a width that the operation cannot work with.

    >>> import torch
    >>> net = DenoiseNet("nearest(9, cosine, window(15), self) | ranked | kernel", width=8, depth=1)
    >>> image = torch.rand(1, 1, 12, 17)
    >>> torch.equal(net(image), image)
    True
    """

    def __init__(
        self, operation: Operation | str, channels: int = 1, *, width: int = 48, depth: int = 3, scale: int = 2
    ) -> None:
        super().__init__()
        for name, value in {"channels": channels, "width": width, "depth": depth, "scale": scale}.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        self.scale = scale
        self.stem = nn.Conv2d(channels * scale**2, width, 3, padding=1)
        self.blocks = nn.ModuleList(DenoiseBlock(operation, width) for _ in range(depth))
        self.head = nn.Conv2d(width, channels * scale**2, 3, padding=1)
        for zero in self.head.parameters():
            nn.init.zeros_(zero)

    @property
    def mixers(self) -> list[Mixer]:
        """The mixing layers, first to last."""
        return [module for module in self.modules() if isinstance(module, Mixer)]

    def noise(self, x: Tensor) -> Tensor:
        """The noise in images, (B, channels, H, W)."""
        height, width = x.shape[2:]
        x = F.pad(x, (0, -width % self.scale, 0, -height % self.scale), mode="replicate")
        x = self.stem(F.pixel_unshuffle(x, self.scale))
        for block in self.blocks:
            x = block(x)
        return F.pixel_shuffle(self.head(x.relu()), self.scale)[:, :, :height, :width]

    def forward(self, x: Tensor) -> Tensor:
        return x - self.noise(x)
