"""Random numbers that follow from a counter alone: the same on every device, and traced by every compiler."""

from __future__ import annotations

from torch import Tensor

_MASK = 0xFFFFFFFF


def scrambled(x: Tensor) -> Tensor:
    """A 32-bit integer mixer (xor-shift-multiply) in int64 arithmetic that never overflows.

    >>> import torch
    >>> int(scrambled(torch.tensor(1)))
    2865059655
    """
    for multiplier in (0x7FEB352D, 0x846CA68B):
        x = x ^ (x >> 16)
        x = (x * multiplier) & _MASK
    return x ^ (x >> 16)
