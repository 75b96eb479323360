"""`max`: the largest value of a window, channel by channel.

Shape legend: B batch, C channels, M outputs, N positions, S slots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nearfold.grammar.words import Max
from nearfold.lower.call import Call
from nearfold.lower.meaning import RhoMeaning, means
from nearfold.lower.weighting import wide_dtype


@means(Max)
class MaxMeaning(RhoMeaning):
    """One for the first slot with the channel's largest value."""

    apart = True

    def looks(self, rho: Any, heads: int, channels: int) -> int:
        return channels

    def constant(self, call: Call, valid: Tensor, index: Tensor) -> Tensor:
        value_BCN = call.value.flatten(2)
        read = value_BCN[:, :, index[0, 0]].masked_fill(~valid, float("-inf"))
        first = read.argmax(-1, keepdim=True)
        return torch.zeros_like(read, dtype=wide_dtype(call)).scatter_(-1, first, 1.0) * valid
