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


def own_values(call: Call) -> Tensor:
    """The queries' own values (B, C, M)."""
    return values(call).index_select(2, meaning(call.op.path).own(call))


def brought(call: Call, index: Tensor, value: Tensor | None = None) -> Tensor:
    """What the slots that read ``index`` (B|1, H|1, M, S) bring: (B, C, M, S).

    The values there (``value`` (B, C, N), by default the call's), or what a kernel with ``edges`` makes of them and the
    queries' own.
    """
    value_BCN, kernel = values(call) if value is None else value, call.op.weight.kernel
    B, (_, H, M, S) = value_BCN.shape[0], index.shape
    value_BHdN = value_BCN.unflatten(1, (H, -1))
    flat = index.expand(B, H, M, S).reshape(B, H, 1, M * S).expand(-1, -1, value_BHdN.shape[2], -1)
    read_BCMS = value_BHdN.gather(3, flat).unflatten(3, (M, S)).flatten(1, 2)
    if kernel is None or not kernel.edges:
        return read_BCMS
    return meaning(kernel).messages(call, read_BCMS, own_values(call)[..., None])


def kernel_weight(call: Call) -> tuple[Tensor, int] | None:
    """The kernel as (O, C / groups, *slots) and its groups; None without one. Separable: its depthwise half."""
    return meaning(call.op.weight.kernel).weight(call)


def finish(call: Call, y: Tensor, with_bias: bool = True) -> Tensor:
    """Channel order, pointwise half and bias of the kernel, bias of a table: (B, O, *out) -> (B, O, *out)."""
    weight = call.op.weight
    return meaning(weight.rho).finish(call, meaning(weight.kernel).finish(call, y, with_bias))
