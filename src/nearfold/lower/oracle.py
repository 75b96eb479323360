"""The oracle: any operation, straight from the formula. Never fast, always right.

    y_i = sum over slots s of alpha[i, s] * W_s * value[index[i, s]]

Shape legend: B batch, C value channels, H heads, d channels of a head, M outputs, N positions, S slots,
O output channels, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nearfold.lower.call import Call
from nearfold.lower.kernel import finish, kernel_weight, values
from nearfold.lower.selection import Selection, select
from nearfold.lower.weighting import alpha_of, constant_alpha


def run(call: Call) -> Tensor:
    """One call, from the formula: (B, O, *out)."""
    chosen = select(call)
    value_BCN = values(call)
    alpha = weights(call, chosen).to(value_BCN.dtype)
    y_BOM = aggregate(value_BCN, chosen, alpha, kernel_weight(call), max(call.heads, alpha.shape[1]))
    return finish(call, y_BOM.unflatten(2, call.out_grid))


def weights(call: Call, chosen: Selection) -> Tensor:
    """Alpha times the coefficient of what a slot reads (B|1, H|1, M, S)."""
    per_slot = chosen.per_slot(chosen.valid)
    alpha = constant_alpha(call, per_slot, chosen.index)
    if alpha is None:
        assert chosen.score is not None
        alpha = alpha_of(call.op.weight.rho, chosen.score, per_slot)
    elif chosen.score is not None:  # a query that was NaN
        alpha = alpha.masked_fill(chosen.score.isnan(), float("nan"))
    if chosen.coefficient is not None:
        alpha = alpha.repeat_interleave(chosen.entries, -1) * chosen.coefficient
    return alpha


def aggregate(
    value_BCN: Tensor, chosen: Selection, alpha: Tensor, kernel: tuple[Tensor, int] | None, heads: int
) -> Tensor:
    """Sum over slots: (B, O, M)."""
    value_BHdN = value_BCN.unflatten(1, (heads, -1))
    B, H, d, _ = value_BHdN.shape
    M, S = chosen.index.shape[-2:]
    index = chosen.index.expand(B, H, M, S)
    read = value_BHdN.gather(3, index.reshape(B, H, 1, M * S).expand(B, H, d, M * S)).unflatten(3, (M, S))
    read = read.masked_fill(~chosen.valid.unsqueeze(2), 0)
    read_BCMS = (read * alpha.unsqueeze(2)).flatten(1, 2)
    if chosen.entries > 1:
        read_BCMS = read_BCMS.unflatten(-1, (-1, chosen.entries)).sum(-1)
    if kernel is None:
        return read_BCMS.sum(-1)
    weight, groups = kernel
    weight_GoCS = weight.flatten(2).unflatten(0, (groups, -1))
    read_BGCMS = read_BCMS.unflatten(1, (groups, -1))
    return torch.einsum("bgcms,gocs->bgom", read_BGCMS, weight_GoCS).flatten(1, 2)
