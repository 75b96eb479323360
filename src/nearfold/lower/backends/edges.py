"""`edges`: the largest of neighbours, differences to neighbours, perceptrons of pairs.

Searches run by tiles, tables read what they name: nothing of size outputs x positions exists. The rest is PyTorch, on
the CPU and on CUDA (`kernels/edges.py`).

Shape legend: B batch, H heads, N positions, M outputs, S slots, C channels, O output channels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from nearfold.grammar.words import Edge, Max, Nearest, Relative
from nearfold.kernels.aggregate import aggregate
from nearfold.kernels.edges import largest, largest_pair, largest_slot, pairs
from nearfold.kernels.names import LOST
from nearfold.lower.call import Call, autocast_dtype, refuse_derivatives
from nearfold.lower.kernel import finish, own_values
from nearfold.lower.verdict import Facts, Verdict
from nearfold.lower.weighting import wide_dtype
from nearfold.lower.windows import is_table
from nearfold.lower.words.nearest_search import slots_last
from nearfold.lower.words.slots import slots, weighed

NAME = "edges"


def supports(facts: Facts) -> Verdict:
    """Neighbours that are searched or in a table, under max, relative or edge."""
    op = facts.op
    if not (isinstance(op.weight.rho, Max) or isinstance(op.weight.kernel, (Relative, Edge))):
        return Verdict.no(f"weight {op.weight} reads no pair of positions and no largest value")
    odd = next((path for path in op.path.inside if not (isinstance(path, Nearest) or is_table(path))), None)
    if odd is not None:
        return Verdict.no(f"{odd} is neither a search nor a table")
    return Verdict.yes("neighbours selected by tiles, their rows gathered slot by slot", "roundoff")


def run(call: Call) -> Tensor:
    """(B, O, *out)."""
    refuse_derivatives(call)
    return bring(call, *slots(call))


def weights(call: Call, score: Tensor | None, at: Tensor) -> Tensor:
    """Alpha (B|1, H|1, M, S), ones written out."""
    alpha = weighed(call, score, at)
    return (at >= 0).to(wide_dtype(call)) if alpha is None else alpha


def bring(call: Call, score: Tensor | None, at: Tensor) -> Tensor:
    """What neighbours bring (B, O, *out): at positions (B|1, H|1, M, S), and their scores where those are read."""
    rho, kernel = call.op.weight.rho, call.op.weight.kernel
    B, H, dtype = call.value.shape[0], call.heads, autocast_dtype(call.value) or call.value.dtype
    rows = call.rows().to(dtype)
    own = None if kernel is None else own_values(call).transpose(1, 2).to(dtype)
    at_BMS = at[:, 0].expand(B, -1, -1)
    if isinstance(kernel, Edge):
        assert own is not None
        wide = autocast_dtype(call.value) or wide_dtype(call)
        y = _edge(call, rows.to(wide), own.to(wide), at_BMS, None if isinstance(rho, Max) else weights(call, score, at))
        y = y.to(dtype)
    elif isinstance(rho, Max):
        y = largest(rows, at_BMS)[0]
        if own is not None:
            y = y - own * (at_BMS >= 0).any(-1, keepdim=True)
    else:
        alpha = slots_last(weights(call, score, at).to(dtype), B, H)
        y = aggregate(rows.contiguous(), slots_last(at, B, H), alpha, None, 1)
        assert own is not None
        total_BMH = alpha.masked_fill(slots_last(at, B, H) < 0, 0).sum(2)
        y = y - (own.unflatten(2, (H, -1)) * total_BMH[..., None]).flatten(2)
    lost_BM = (at == LOST).flatten(3).any(-1).any(1)
    y = y.masked_fill(lost_BM[..., None], float("nan"))
    return finish(call, y.transpose(1, 2).unflatten(2, call.out_grid))


def _edge(call: Call, rows: Tensor, own: Tensor, at_BMS: Tensor, alpha: Tensor | None) -> Tensor:
    """What a perceptron of pairs makes (B, M, O); ``alpha`` is None for the largest."""
    kernel, params = call.op.weight.kernel, call.params
    assert isinstance(kernel, Edge)
    params = {name: p.to(rows.dtype) for name, p in params.items()}
    weight, bias = params["edge_weight"], params.get("bias")
    if alpha is None and not kernel.hidden:
        return largest_pair(rows, own, at_BMS, weight, bias, kernel.slope)
    first = (params["hidden_weight"], params.get("hidden_bias")) if kernel.hidden else (weight, bias)
    message = pairs(rows, own, at_BMS, *first, kernel.slope)
    if alpha is None:
        return largest_slot(F.linear(message, weight, bias), at_BMS)
    alpha_BMS = alpha[:, 0].expand_as(at_BMS).masked_fill(at_BMS < 0, 0).to(message.dtype)
    y = (alpha_BMS[..., None, :] @ message)[..., 0, :]
    if not kernel.hidden:
        return y
    y = F.linear(y, weight)  # once for the sum, not for every pair
    return y if bias is None else y + (alpha_BMS.sum(-1)[..., None] * bias).to(y.dtype)
