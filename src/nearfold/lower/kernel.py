"""The kernel of a call: what its slots read, its numbers, and what follows the sum. For the oracle and every backend.

Shape legend: B batch, C channels, N positions, O output channels, `out` the output grid.
"""

from __future__ import annotations

from torch import Tensor

from nearfold.lower.call import Call
from nearfold.lower.meaning import meaning


def values(call: Call) -> Tensor:
    """What the slots read: (B, C, N), coordinates appended where asked for, zeros where nothing is."""
    found: Tensor = meaning(call.op.weight.kernel).values(call)
    return found if call.keep is None else found.masked_fill(~call.keep[:, None], 0)


def kernel_weight(call: Call) -> tuple[Tensor, int] | None:
    """The kernel as (O, C / groups, *slots) and its groups; None without one. Separable: its depthwise half."""
    return meaning(call.op.weight.kernel).weight(call)


def finish(call: Call, y: Tensor, with_bias: bool = True) -> Tensor:
    """Channel order, pointwise half and bias of the kernel, bias of a table: (B, O, *out) -> (B, O, *out)."""
    weight = call.op.weight
    return meaning(weight.rho).finish(call, meaning(weight.kernel).finish(call, y, with_bias))
