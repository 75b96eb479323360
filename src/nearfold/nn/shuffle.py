"""A layer between pixel shuffles: space to channels before it, channels to space after it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, fx

from nearfold._numbers import integer
from nearfold.grammar import Operation
from nearfold.lower.plan import Context
from nearfold.nn.mixer import Mixer

SHUFFLES = ("none", "before", "after", "both")


class Shuffled(Mixer):
    """An operation on a grid that is unshuffled before it, and shuffled after it.

    Args:
        operation: an `Operation` or its notation; it sees the channels and the grid of what is unshuffled.
        in_channels: as seen from outside the shuffling.
        out_channels: likewise.
        ndim: grid axes.
        bias: as in `Mixer`.
        backend: as in `Mixer`.
        shuffle: none, before, after or both.
        shuffle_scale: by which every axis shrinks before and grows after.

    >>> import torch
    >>> Shuffled("window(3) | box | kernel", 1, 2, shuffle="both")(torch.zeros(1, 1, 6, 8)).shape
    torch.Size([1, 2, 6, 8])
    """

    def __init__(
        self,
        operation: Operation | str,
        in_channels: int,
        out_channels: int,
        *,
        ndim: int = 2,
        bias: bool = True,
        backend: str = "auto",
        shuffle: str = "none",
        shuffle_scale: int = 2,
    ) -> None:
        if shuffle not in SHUFFLES:
            raise ValueError(f"shuffle must be one of {', '.join(SHUFFLES)}, got {shuffle!r}")
        shuffle_scale = integer("shuffle_scale", shuffle_scale, most=2**10)
        in_channels, out_channels = integer("in_channels", in_channels), integer("out_channels", out_channels)
        many = shuffle_scale ** integer("ndim", ndim)
        super().__init__(
            operation,
            in_channels * (many if shuffle in ("before", "both") else 1),
            out_channels * (many if shuffle in ("after", "both") else 1),
            ndim=ndim, bias=bias, backend=backend,
        )  # fmt: skip
        self.in_channels, self.out_channels = in_channels, out_channels
        self.shuffle, self.shuffle_scale = shuffle, shuffle_scale

    def forward(self, x: Tensor, context: Context | None = None, mask: Tensor | None = None) -> Tensor:
        """x (B, in_channels, *grid) -> (B, out_channels, *out_grid)."""
        if isinstance(x, fx.Proxy):
            return self._leaf(x, context, mask)
        self._require(x)
        y = self._run(self.prepare(x), context, mask)
        return _shuffle(y, self.shuffle_scale) if self.shuffle in ("after", "both") else y

    def prepare(self, x: Tensor) -> Tensor:
        """Unshuffled, where the layer does that first."""
        if self.shuffle not in ("before", "both"):
            return x
        if any(n % self.shuffle_scale for n in x.shape[2:]):
            raise ValueError(
                f"shuffle={self.shuffle!r} needs grid sizes divisible by shuffle_scale={self.shuffle_scale}, "
                f"got {tuple(x.shape[2:])}; pad the input first"
            )
        return _unshuffle(x, self.shuffle_scale)


def _unshuffle(x: Tensor, scale: int) -> Tensor:
    """Space to channels: nn.PixelUnshuffle on images, alike on volumes; on sequences the ConvNN code's flat reshape."""
    if x.dim() == 4:
        return F.pixel_unshuffle(x, scale)
    if x.dim() == 5:
        cut = x.reshape(*x.shape[:2], *(m for n in x.shape[2:] for m in (n // scale, scale)))
        return cut.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)
    return x.reshape(x.shape[0], x.shape[1] * scale, -1)


def _shuffle(x: Tensor, scale: int) -> Tensor:
    if x.dim() == 4:
        return F.pixel_shuffle(x, scale)
    if x.dim() == 5:
        cut = x.unflatten(1, (-1, scale, scale, scale)).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return cut.reshape(*cut.shape[:2], *(n * scale for n in x.shape[2:]))
    return x.reshape(x.shape[0], x.shape[1] // scale, -1)
