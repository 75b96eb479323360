"""The oracle: any operation, straight from the formula. Never fast, always right.

    y_i = sum over slots s of alpha[i, s] * W_s * value[index[i, s]]

Under `relative` and `edge` a slot brings what the kernel makes of value[index[i, s]] and the query's own value.

Shape legend: B batch, C value channels, H heads, d channels of a head, M outputs, N positions, S slots,
O output channels, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nearfold.lower.call import Call
from nearfold.lower.kernel import brought, finish, kernel_weight
from nearfold.lower.selection import Selection, select
from nearfold.lower.weighting import alpha_of, constant_alpha


def run(call: Call) -> Tensor:
    """One call, from the formula: (B, O, *out)."""
    chosen = select(call)
    read_BCMS = brought(call, chosen.index)
    alpha = weights(call, chosen).to(read_BCMS.dtype)
    y_BOM = aggregate(read_BCMS, chosen, alpha, kernel_weight(call), max(call.heads, alpha.shape[1]))
    return finish(call, y_BOM.to(call.value.dtype).unflatten(2, call.out_grid))


def weights(call: Call, chosen: Selection) -> Tensor:
    """Alpha times the coefficient of what a slot reads (B|1, H|1, M, S)."""
    per_slot = chosen.per_slot(chosen.valid)
    alpha = constant_alpha(call, per_slot, chosen.index)
    if alpha is None:
        assert chosen.score is not None
        alpha = alpha_of(call.op.weight.rho, chosen.score, per_slot, fast=False)
    elif chosen.score is not None:  # a query that was NaN
        alpha = alpha.masked_fill(chosen.score.isnan(), float("nan"))
    if chosen.coefficient is not None:
        alpha = alpha.repeat_interleave(chosen.entries, -1) * chosen.coefficient
    return alpha


def aggregate(
    read_BCMS: Tensor, chosen: Selection, alpha: Tensor, kernel: tuple[Tensor, int] | None, heads: int
) -> Tensor:
    """Sum over slots: (B, O, M)."""
    read_BHdMS = read_BCMS.unflatten(1, (heads, -1)).masked_fill(~chosen.valid.unsqueeze(2), 0)
    read_BCMS = (read_BHdMS * alpha.unsqueeze(2)).flatten(1, 2)
    if chosen.entries > 1:
        read_BCMS = read_BCMS.unflatten(-1, (-1, chosen.entries)).sum(-1)
    if kernel is None:
        return read_BCMS.sum(-1)
    weight, groups = kernel
    weight_GoCS = weight.flatten(2).unflatten(0, (groups, -1))
    read_BGCMS = read_BCMS.unflatten(1, (groups, -1))
    return torch.einsum("bgcms,gocs->bgom", read_BGCMS, weight_GoCS).flatten(1, 2)
