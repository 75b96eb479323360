"""`beside`: the tokens' rows are F.scaled_dot_product_attention, those of the map a table of positions.

Shape legend: B batch, H heads, N positions, T tokens, M positions of the map, S slots, e embedded features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nearfold.grammar.words import Beside, Softmax
from nearfold.kernels.aggregate import aggregate
from nearfold.kernels.attention import attention
from nearfold.kernels.names import DOT_LIKE, INVALID
from nearfold.kernels.slot_scores import slot_scores
from nearfold.kernels.weigh import slot_softmax
from nearfold.lower.call import Call, autocast_dtype, refuse_derivatives, split_heads
from nearfold.lower.selection import present
from nearfold.lower.verdict import Facts, Verdict
from nearfold.lower.words.beside import around
from nearfold.lower.words.nearest_search import slots_last

NAME = "beside"


def supports(facts: Facts) -> Verdict:
    """Path beside with a dot product."""
    path = facts.op.path
    if not isinstance(path, Beside):
        return Verdict.no(f"path is {path.word}, not beside")
    if path.similarity.reduced not in DOT_LIKE:
        return Verdict.no(f"similarity {path.similarity} is not a dot product")
    return Verdict.yes("tokens by F.scaled_dot_product_attention, the map by a table of positions", "roundoff")


def run(call: Call) -> Tensor:
    """(B, C, *grid)."""
    refuse_derivatives(call)
    path, rho = call.op.path, call.op.weight.rho
    assert isinstance(path, Beside) and isinstance(rho, Softmax)
    B, H, T = call.value.shape[0], call.heads, path.tokens
    dtype = autocast_dtype(call.value) or call.value.dtype
    query, key = (t.expand(B, H, -1, -1) for t in call.embedded())
    at = around(call.op, call.value.device)[None, None]
    if call.keep is not None:
        at = at.masked_fill(~present(call.keep, at.clamp(min=0)), INVALID)
    where = slots_last(at, B, H)
    score = slot_scores(_rows(query[:, :, T:]), _rows(key), where).permute(0, 3, 1, 2)
    alpha = slot_softmax(score, at.expand(B, H, -1, -1), float(rho.scale))
    y = aggregate(call.rows().to(dtype), where, slots_last(alpha.to(dtype), B, H), None, 1)
    if T:
        value, there = split_heads(call.value, H), None if call.keep is None else call.keep[:, None, None]
        asks, asked = query[:, :, :T].to(value.dtype), key.to(value.dtype)
        heard = attention(asks, asked, value, there, scale=float(rho.scale))
        heard = heard if there is None else heard.masked_fill(~there.any(-1, True), 0)
        y = torch.cat([heard.transpose(1, 2).flatten(2).to(y.dtype), y], 1)
    return y.transpose(1, 2).unflatten(2, call.out_grid)


def _rows(x: Tensor) -> Tensor:
    """(B, H, N, e) -> (B, N, H * e)."""
    return x.transpose(1, 2).flatten(2).contiguous()
