"""`all`: every position of the input, or of a second one.

Shape legend: B batch, H heads, M outputs, N positions.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from nearfold.grammar import Basic
from nearfold.grammar.place import Place
from nearfold.grammar.words import All
from nearfold.lower.bias import alibi, score_bias
from nearfold.lower.call import Call, count_positions
from nearfold.lower.meaning import Lengths, PathMeaning, meaning, means
from nearfold.lower.offsets import by_offset
from nearfold.lower.selection import Selection, added, allowed, metric_scores


@means(All)
class AllMeaning(PathMeaning):
    """Every position."""

    everywhere = True

    def fit(self, op: Basic, grid: Lengths, source: Lengths, drawing: bool) -> Basic:
        shape = op.shape.fit(math.prod(source))
        return op if shape is op.shape else dataclasses.replace(op, shape=shape)

    def takes_mask(self, op: Basic) -> bool:
        return op.weight.kernel is None

    def select(self, call: Call) -> Selection:
        return every(call) if call.op.weight.kernel is None else by_offset(call, every(call))

    def bias(self, op: Basic, params: dict[str, Tensor], grid: Lengths, query_M: Tensor, like: Tensor) -> Tensor:
        at_aN = Place(grid, like.device, like.dtype).index().T.to(torch.promote_types(like.dtype, torch.float32))
        far_MS = sum((at_N[query_M][:, None] - at_N).square() for at_N in at_aN).sqrt()
        return alibi(op, far_MS).to(like.dtype)


def every(call: Call) -> Selection:
    """A slot for every position, valid where the query may read it."""
    rho = call.op.weight.rho
    q, k = call.embedded() if rho.needs_score else (None, None)
    query_M = meaning(rho).queries(call)
    key_N = torch.arange(count_positions(call.padded), device=query_M.device)
    mask = allowed(call, query_M, key_N)
    valid_MN = torch.ones(query_M.shape[0], key_N.shape[0], dtype=torch.bool, device=query_M.device)
    valid_MN = valid_MN if mask is None else mask
    valid = valid_MN if valid_MN.dim() == 4 else valid_MN[None, None]
    index = key_N.masked_fill(~valid, 0)
    score = None
    if q is not None and k is not None:
        score = metric_scores(call.similarity.reduced, call.similarity.squared, q[:, :, query_M], k)
        bias = score_bias(call.op, call.params, call.grid, query_M, score)
        score = score if bias is None else score + bias
        plus = added(call, query_M, key_N)
        score = (score if plus is None else score + plus).masked_fill(~valid_MN, float("-inf"))
    return Selection(index, valid, score, key_N.shape[0], in_order=True)
