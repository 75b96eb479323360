"""ACmix's convolution half where query, key and value are not those of one `Mixer` (arXiv 2111.14556, 4.2 and 4.3)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOTS = 9  # of the 3 x 3 window


class ShiftConv(nn.Module):
    """Three maps of one width, cut into heads, to 9 maps a head feature, shifted and summed.

    Args:
        channels: of each of the three maps.
        out_channels: a multiple of channels / heads.
        heads: pieces of every map; the 3 x heads pieces are mapped to 9.

    What ``shift(heads, bias)`` does inside a `Mixer`, which owns the projections too.

    >>> ShiftConv(8, 16, heads=2)(*torch.zeros(3, 1, 8, 5, 6)).shape
    torch.Size([1, 16, 5, 6])
    """

    def __init__(self, channels: int, out_channels: int, heads: int) -> None:
        super().__init__()
        if channels % heads or out_channels % (channels // heads):
            raise ValueError(
                f"heads={heads} must divide channels={channels}, and what they leave out_channels={out_channels}"
            )
        self.heads = heads
        bound = 1 / math.sqrt(3 * heads)
        self.weight = nn.Parameter(torch.empty(SLOTS, 3 * heads).uniform_(-bound, bound))
        self.slot_bias = nn.Parameter(torch.empty(SLOTS).uniform_(-bound, bound))
        self.shift_weight = nn.Parameter(torch.eye(SLOTS).reshape(SLOTS, 3, 3).repeat(out_channels, 1, 1, 1))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Three maps (B, channels, H, W) to (B, out_channels, H, W), out channels head by head."""
        pieces = torch.cat([t.unflatten(1, (self.heads, -1)) for t in (query, key, value)], 1)
        maps = torch.einsum("tm,bmdhw->bdthw", self.weight, pieces) + self.slot_bias[:, None, None]
        groups = maps.shape[1]
        y = F.conv2d(maps.to(query.dtype).flatten(1, 2), self.shift_weight.to(query.dtype), padding=1, groups=groups)
        return y.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def rates() -> nn.Parameter:
    """The learnable shares of the attention and of the convolution half."""
    return nn.Parameter(torch.full((2,), 0.5))
