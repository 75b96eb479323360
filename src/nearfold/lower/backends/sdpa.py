"""`sdpa`: softmax over every position is F.scaled_dot_product_attention.

Shape legend: B batch, H heads, N positions, M outputs, e embedded features, d value features of a head.
"""

from __future__ import annotations

from torch import Tensor

from nearfold.grammar.similarity import Scaled
from nearfold.grammar.words import All, Causal, Softmax
from nearfold.kernels.attention import attention
from nearfold.kernels.names import DOT_LIKE
from nearfold.lower.bias import score_bias
from nearfold.lower.call import Call, split_heads
from nearfold.lower.geometry import all_positions
from nearfold.lower.selection import added, allowed
from nearfold.lower.verdict import Facts, Verdict

NAME = "sdpa"


def supports(facts: Facts) -> Verdict:
    """Path all under softmax of a dot-like similarity."""
    op = facts.op
    if not isinstance(op.path, All):
        return Verdict.no(f"path is {op.path.word}, not all")
    if not isinstance(op.weight.rho, Softmax):
        return Verdict.no(f"rho is {op.weight.rho.word}, not softmax")
    if op.path.similarity.reduced not in DOT_LIKE:
        return Verdict.no(f"similarity {op.path.similarity.word} is not a dot product")
    return Verdict.yes("softmax over all positions is F.scaled_dot_product_attention", "roundoff")


def run(call: Call) -> Tensor:
    """(B, C, *out)."""
    rho, value = call.op.weight.rho, split_heads(call.value, call.heads)
    assert isinstance(rho, Softmax)
    near = call.similarity
    if isinstance(near, Scaled) and not (near.coordinates or near.relative or near.rotary):
        # the scale is SDPA's own; embedding would only copy the query
        assert call.query is not None and call.key is not None
        query, key = split_heads(call.query, call.heads), split_heads(call.key, call.heads)
        scale = rho.scale * query.shape[-1] ** -0.5
    else:
        query, key = (t.to(value.dtype) for t in call.embedded())
        scale = rho.scale
    every = all(s == 1 for s in call.stride)
    query_M = call.query_index()
    if not every:
        query = query[:, :, query_M]
    free = call.mask is None and call.keep is None
    causal = isinstance(call.op.shape, Causal) and every and free
    mask = None
    bias = score_bias(call.op, call.params, call.grid, query_M, value)
    if (plus := added(call, query_M, all_positions(value.shape[2], value.device))) is not None:
        bias = plus if bias is None else bias + plus
    if not causal or bias is not None:
        mask = allowed(call, query_M, all_positions(value.shape[2], value.device))
    if bias is not None:  # SDPA adds the mask after its scale
        bias = (bias * rho.scale).to(value.dtype)
        mask, causal = bias if mask is None else bias.masked_fill(~mask, float("-inf")), False
        mask = mask if mask.dim() == 4 else mask[None]  # with three axes it would not be taken by the fast kernel
    y = attention(query, key, value, mask, causal, scale)
    if not free:  # a query that may read nothing
        read = allowed(call, query_M, all_positions(key.shape[2], key.device))
        assert read is not None
        y = y.masked_fill(~read.any(-1, True), 0)
    y = y.transpose(2, 3).flatten(1, 2)
    return y if call.ndim == 1 else y.unflatten(2, call.out_grid)
