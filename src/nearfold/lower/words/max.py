"""`max`: the largest of what the slots bring, channel by channel.

Shape legend: B batch, C channels, H heads, M outputs, S slots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nearfold.grammar.words import Max
from nearfold.lower.call import Call
from nearfold.lower.kernel import brought
from nearfold.lower.meaning import RhoMeaning, means
from nearfold.lower.weighting import wide_dtype


@means(Max)
class MaxMeaning(RhoMeaning):
    """One for the first slot with the channel's largest value."""

    apart = True

    def looks(self, rho: Any, heads: int, channels: int) -> int:
        return channels

    def constant(self, call: Call, valid: Tensor, index: Tensor) -> Tensor:
        read_BCMS = brought(call, index).masked_fill(~valid, float("-inf"))
        first = read_BCMS.argmax(-1, keepdim=True)
        return torch.zeros_like(read_BCMS, dtype=wide_dtype(call)).scatter_(-1, first, 1.0) * valid
