"""`linear`: alpha of low rank, or a table, never needs the matrix of all pairs of scores.

Shape legend: B batch, H heads, N positions, M outputs, e embedded features, d value features of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.grammar.word import all_ones
from nearfold.grammar.words import All, Causal, Identity, Mean, Normalized, Ones, Row, Synthesized, Table
from nearfold.kernels.names import DOT_LIKE
from nearfold.kernels.ssd import decayed_attention
from nearfold.lower.call import Call, count_positions, split_heads
from nearfold.lower.verdict import Facts, Verdict
from nearfold.lower.weighting import constant_alpha
from nearfold.lower.words.table import require_table

NAME = "linear"


def supports(facts: Facts) -> Verdict:
    """Path all with a table, without scores, or with scores used as they are (not softmaxed)."""
    op = facts.op
    if not isinstance(op.path, All):
        return Verdict.no(f"path is {op.path.word}, not all")
    if op.weight.kernel is not None:
        return Verdict.no("a kernel weighs every offset by another number")
    if isinstance(op.weight.rho, Table):
        return Verdict.yes("a table over positions is F.linear", "roundoff")
    if isinstance(op.weight.rho, Synthesized):
        return Verdict.yes("one product with weights that read no key", "roundoff")
    whole = all_ones(op.path.stride)
    if not isinstance(op.shape, Row) and not (isinstance(op.shape, Causal) and whole):
        return Verdict.no(f"shape {op.shape} is neither a whole row nor causal at stride 1")
    if isinstance(op.weight.rho, (Ones, Mean)):
        return Verdict.yes("one sum over all positions", "roundoff")
    if not isinstance(op.weight.rho, (Identity, Normalized)):
        return Verdict.no(f"rho {op.weight.rho.word} is not linear in the scores")
    if op.path.similarity.reduced not in DOT_LIKE:
        return Verdict.no(f"similarity {op.path.similarity} is not a dot product")
    return Verdict.yes("query (key^T value), in this order: no matrix of scores", "roundoff")


def _table(call: Call) -> Tensor:
    require_table(call)
    params = call.params
    y = F.linear(call.value.flatten(2), params["table_weight"], params.get("table_bias"))
    return y.unflatten(2, call.out_grid)


def _synthesized(call: Call) -> Tensor:
    N, device = count_positions(call.grid), call.value.device
    valid = torch.ones(1, 1, N, N, dtype=torch.bool, device=device)
    valid = valid if call.keep is None else call.keep[:, None, None].expand(-1, -1, N, -1)
    alpha = constant_alpha(call, valid, torch.arange(N, device=device))
    assert alpha is not None
    value = split_heads(call.value, call.heads)
    return (alpha.to(value.dtype) @ value).transpose(2, 3).flatten(1, 2).unflatten(2, call.grid)


def _sums(call: Call) -> Tensor:
    """Without scores: running sums or the one sum, and means."""
    value_BCN = call.value.flatten(2)
    wide_BCN = value_BCN.to(torch.promote_types(value_BCN.dtype, torch.float32))
    causal, count = isinstance(call.op.shape, Causal), value_BCN.shape[2]
    y_BCM = wide_BCN.cumsum(2) if causal else wide_BCN.sum(2, keepdim=True)
    if isinstance(call.op.weight.rho, Mean):
        number = torch.arange(1, count + 1, device=y_BCM.device) if causal else count
        if call.keep is not None:  # a query before the first of them reads nothing
            number = call.keep.cumsum(1) if causal else call.keep.sum(1, keepdim=True)
            number = number[:, None].clamp(min=1)
        y_BCM = y_BCM / number
    if not causal:
        y_BCM = y_BCM.expand(-1, -1, count_positions(call.out_grid))
    return y_BCM.to(value_BCN.dtype).unflatten(2, call.out_grid)


def run(call: Call) -> Tensor:
    """(B, C, *out)."""
    rho = call.op.weight.rho
    if isinstance(rho, Table):
        return _table(call)
    if isinstance(rho, Synthesized):
        return _synthesized(call)
    if isinstance(rho, (Ones, Mean)):
        return _sums(call)
    query, key = call.embedded()
    value = split_heads(call.value, call.heads)
    if call.keep is not None:
        key = key.masked_fill(~call.keep[:, None, :, None], 0)
    dtype, wide = value.dtype, query.dtype
    value = value.to(wide)
    if any(s != 1 for s in call.stride):
        query = query[:, :, call.query_index()]
    B, H = value.shape[:2]
    query, key = query.expand(B, H, -1, -1), key.expand(B, H, -1, -1)
    if isinstance(rho, Normalized):  # the sum of the scores is one more value, of ones
        value = torch.cat([value, torch.ones_like(value[..., :1])], -1)
    y = decayed_attention(query, key, value, None) if isinstance(call.op.shape, Causal) else query @ (key.mT @ value)
    if isinstance(rho, Normalized):
        total = y[..., -1:]
        y = y[..., :-1] / total.masked_fill(total == 0, 1)
    return y.transpose(2, 3).flatten(1, 2).unflatten(2, call.out_grid).to(dtype)
