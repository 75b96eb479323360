"""`indexer`: which keys a query chooses, by small maps of the input, apart from what weighs them.

Shape legend: B batch, C channels, N positions, M queries, R candidates, I heads of the indexer, e features of one.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.grammar import Basic
from nearfold.grammar.words import Indexer, Nearest
from nearfold.kernels.choose import choose
from nearfold.lower.call import Call
from nearfold.lower.meaning import Sizes
from nearfold.lower.parameters import Parameter
from nearfold.lower.weighting import wide_dtype


def index_parameters(indexer: Indexer, sizes: Sizes) -> dict[str, Parameter]:
    """Its maps of the input, without biases as published."""
    C, size = sizes.in_channels, indexer.size
    made = {"index_query": indexer.heads * size, "index_key": size, "index_share": indexer.heads}
    return {f"{name}_weight": Parameter((n, C), "uniform", C) for name, n in made.items()}


def indexed_by(op: Basic) -> Indexer | None:
    """The indexer of an operation, where it has one."""
    by = op.path.by if isinstance(op.path, Nearest) else None
    return by if isinstance(by, Indexer) else None


def index_maps(call: Call, query_M: Tensor, key_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query (B, M, I, e), share (B, M, I) and key (B, R, e) of the call's indexer."""
    by = cast(Indexer, indexed_by(call.op))
    x_BNC = call.x.flatten(2).transpose(1, 2).to(wide_dtype(call))
    query, key, share = (call.params[f"index_{name}_weight"].to(x_BNC.dtype) for name in ("query", "key", "share"))
    asks_BMC = x_BNC[:, query_M]
    query_BMIe = F.linear(asks_BMC, query).unflatten(2, (by.heads, by.size))
    # the two roots change nobody's rank, but how sharp a softmax of the scores is
    return query_BMIe, F.linear(asks_BMC, share) * (by.heads * by.size) ** -0.5, F.linear(x_BNC[:, key_R], key)


def indexed(call: Call, query_M: Tensor, key_R: Tensor, rule: tuple[int, int, int]) -> Tensor:
    """Positions (B, 1, M, k) that the call's indexer chooses, the own one first where asked for, -1 for none.

    No gradient goes through them.
    """
    path = cast(Nearest, call.op.path)
    own = path.include_self is not False
    kind = call.x.device.type
    with nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):  # which the meta device lacks
        query, share, key = index_maps(call, query_M, key_R)
        if call.keep is not None:  # a key that is NaN is never chosen
            key = key.masked_fill(~call.keep[:, key_R, None], float("nan"))
        at = choose(query, share, key, path.k - own, query_M, key_R, list(call.padded), list(rule), own)
    if own:
        at = torch.cat([query_M[:, None].expand(at.shape[0], -1, 1), at], -1)
    return at[:, None]
