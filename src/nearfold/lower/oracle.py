"""The oracle: any operation, straight from the formula. Never fast, always right.

    y_i = sum over slots s of alpha[i, s] * W_s * value[index[i, s]]

Shape legend: B batch, C value channels, H heads, d channels of a head, M outputs, N positions, S slots,
O output channels, G groups, a grid axes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nearfold.grammar.similarity import Place, encode
from nearfold.grammar.words import Dense, Depthwise, Experts, Separable, Shift
from nearfold.lower.call import Call
from nearfold.lower.generated import constant_alpha
from nearfold.lower.selection import Selection, select
from nearfold.lower.weighting import alpha_of
from nearfold.lower.windows import window_index


def values(call: Call) -> Tensor:
    """What the slots read: (B, C, N), with coordinates appended to every head where asked for."""
    kernel = call.op.weight.kernel
    if isinstance(kernel, Shift):
        assert call.query is not None and call.key is not None
        parts = [t.flatten(2).unflatten(1, (kernel.heads, -1)) for t in (call.query, call.key, call.value)]
        # group by head dimension, then (query, key, value) x heads: the grouped convolution's layout
        return torch.stack(parts, 1).flatten(1, 2).transpose(1, 2).flatten(1, 2)
    value = call.value.flatten(2)
    coordinates = getattr(kernel, "coordinates", False)
    if coordinates is not False:
        wide = torch.promote_types(value.dtype, torch.float32)
        place = Place(call.padded, value.device, wide)
        code_pN = encode(coordinates, place, call.params.get("value_encoding_weight")).T.to(value.dtype)
        heads = value.unflatten(1, (call.heads, -1))
        value = torch.cat([heads, code_pN.expand(*heads.shape[:2], *code_pN.shape)], 2).flatten(1, 2)
    return value


def kernel_weight(call: Call) -> tuple[Tensor, int] | None:
    """The kernel as (O, C / groups, *slots) and its groups; None without one. Separable: its depthwise half."""
    kernel, weight = call.op.weight.kernel, call.params.get("weight")
    if kernel is None:
        return None
    assert weight is not None
    if isinstance(kernel, Dense):
        return weight, kernel.groups
    if isinstance(kernel, Experts):
        return weight, 1
    if isinstance(kernel, (Depthwise, Separable)):
        return weight, weight.shape[0]
    assert isinstance(kernel, Shift)
    # k^2 pointwise maps, shifted and summed, are one grouped kernel: sum over maps of shift * map
    merged = torch.einsum("ot...,tm->om...", call.params["shift_weight"], weight)
    return merged, merged.shape[0] // kernel.heads


def finish(call: Call, y: Tensor, with_bias: bool = True) -> Tensor:
    """Channel order, pointwise half and bias of the kernel: (B, O, *out) -> (B, O, *out)."""
    kernel = call.op.weight.kernel
    if isinstance(kernel, Shift):
        return shifted_bias(call, kernel, _by_head(y, kernel))
    bias = call.params.get("bias")
    if isinstance(kernel, Experts):
        share_BE = expert_shares(call).to(y.dtype)
        y = torch.einsum("beo...,be->bo...", y.unflatten(1, (kernel.count, -1)), share_BE)
    table_bias = call.params.get("table_bias")
    if table_bias is not None:
        return y + table_bias.to(y.dtype).reshape(call.out_grid)
    if isinstance(kernel, Separable):
        return _pointwise(y, call.params["pointwise_weight"], bias, kernel.groups)
    return y if bias is None or not with_bias else y + bias.view(-1, *(1,) * call.ndim).to(y.dtype)


def _by_head(y: Tensor, kernel: Shift) -> Tensor:
    """The grouped convolution's channels (head dimension first), head by head unless they are to stay."""
    return y if kernel.interleaved else y.unflatten(1, (-1, kernel.heads)).transpose(1, 2).flatten(1, 2)


def shifted_bias(call: Call, kernel: Shift, y: Tensor) -> Tensor:
    """Adds the biases of the maps that were shifted and summed: at the border fewer of them arrive."""
    bias_t = call.params.get("slot_bias")
    if bias_t is None:
        return y
    arriving_OS = torch.einsum("ots,t->os", call.params["shift_weight"].flatten(2), bias_t)
    _, valid_MS = window_index(call.op, call.grid, y.device)
    bias_OM = (arriving_OS @ valid_MS.to(arriving_OS.dtype).T).unflatten(1, call.out_grid)
    return y + _by_head(bias_OM[None], kernel).to(y.dtype)


def expert_shares(call: Call) -> Tensor:
    """How much of every expert an input gets (B, E)."""
    kernel = call.op.weight.kernel
    assert isinstance(kernel, Experts)
    mean_BC = call.value.flatten(2).mean(-1)
    hidden = torch.relu(mean_BC @ call.params["router_reduce_weight"].to(mean_BC.dtype).T)
    logits = hidden @ call.params["router_weight"].to(mean_BC.dtype).T + call.params["router_bias"].to(mean_BC.dtype)
    return torch.softmax(logits / kernel.temperature, -1)


def _pointwise(y: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    rows = y.flatten(2).unflatten(1, (groups, -1))
    out = torch.einsum("bgcm,goc->bgom", rows, weight.flatten(1).unflatten(0, (groups, -1)))
    out = out.flatten(1, 2).unflatten(2, y.shape[2:])
    return out if bias is None else out + bias.view(-1, *(1,) * (y.dim() - 2)).to(out.dtype)


def run(call: Call) -> Tensor:
    """One call, from the formula: (B, O, *out)."""
    chosen = select(call)
    value_BCN = values(call)
    alpha = weights(call, chosen).to(value_BCN.dtype)
    y_BOM = aggregate(value_BCN, chosen, alpha, kernel_weight(call), max(call.heads, alpha.shape[1]))
    return finish(call, y_BOM.unflatten(2, call.out_grid))


def weights(call: Call, chosen: Selection) -> Tensor:
    """Alpha times the coefficient of what a slot reads (B|1, H|1, M, S)."""
    per_slot = chosen.valid
    if chosen.entries > 1:  # a slot is there, and each of its entries may be outside
        per_slot = torch.ones_like(chosen.valid[..., :: chosen.entries])
    alpha = None
    if chosen.score is None or call.op.weight.rho.needs_score is False:
        alpha = constant_alpha(call, per_slot, chosen.index)
    if alpha is None:
        assert chosen.score is not None
        return alpha_of(call.op.weight.rho, chosen.score, chosen.valid)
    if chosen.coefficient is not None:
        alpha = alpha.repeat_interleave(chosen.entries, -1) * chosen.coefficient
    if chosen.score is not None:  # a query that was NaN
        alpha = alpha.masked_fill(chosen.score.isnan(), float("nan"))
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
