"""The search of `nearest` by tiles: what the fast backends that need one share.

Shape legend: B batch, H heads, M outputs, S slots.
"""

from __future__ import annotations

from math import nan
from typing import cast

import torch
from torch import Tensor

from nearfold.grammar.operation import Basic
from nearfold.grammar.words import AllCandidates, Causal, Nearest, Ones, Rho
from nearfold.kernels.names import DOT_LIKE, INVALID, LOST
from nearfold.kernels.select import select, wide, wide_dtype
from nearfold.kernels.slot_scores import slot_scores
from nearfold.lower.call import Call
from nearfold.lower.geometry import all_positions
from nearfold.lower.selection import metric_scores
from nearfold.lower.words.indexer import indexed, indexed_by
from nearfold.lower.words.nearest import candidate_index, candidates_of, chosen_by, kept_slots, rule_of


def recall_of(op: Basic) -> float:
    """The share of the best keys that is enough: what was asked where any key may be chosen, otherwise all of them."""
    path = op.path
    assert isinstance(path, Nearest)
    any_key = isinstance(path.candidates, AllCandidates) and not isinstance(op.shape, Causal) and path.again is None
    return path.recall if any_key and getattr(path.similarity, "dilation", 1) == 1 else 1.0


def searched(call: Call) -> tuple[Tensor | None, Tensor]:
    """Score (None where nobody reads it) and position (B|1, H|1, M, S); position -1 where there is none."""
    path = call.op.path
    assert isinstance(path, Nearest)
    if path.by is not None:
        return _chosen(call)
    score, at = _ranked(call, path)
    if path.prunes:
        assert score is not None
        at = at.expand_as(score)
        at = at.masked_fill(~kept_slots(path, score, at >= 0) & (at != LOST), INVALID)
    return None if all_ones(call.op.weight.rho) else score, at


def _ranked(call: Call, path: Nearest) -> tuple[Tensor | None, Tensor]:
    """The k that are most similar, best first, behind the own slot where there is one."""
    query, key, factor = call.compared()
    own_key = key
    if call.keep is not None:  # a key that is NaN is never chosen
        query, own_key = (t.expand(call.keep.shape[0], -1, -1, -1) for t in (query, key))
        key = own_key.masked_fill(~call.keep[:, None, :, None], float("nan"))
    B, H = query.shape[:2]
    query_M, key_R = call.query_index(), candidate_index(call)
    every = key_R is None
    own = path.include_self is not False
    if key_R is None:
        key_R = all_positions(key.shape[2], key.device)
    whole = query.shape[2] == query_M.shape[0]
    query_m = query if whole else query[:, :, query_M]
    k = path.k - own
    if k:
        chosen = key if every else key[:, :, key_R]
        again = float("-inf")
        if path.again is not None:
            assert isinstance(factor, float)  # the grammar knows no `again` beside a learned factor
            again = path.again / factor
        score, at = select(
            query_m,
            chosen,
            k,
            call.similarity.reduced,
            call.similarity.squared,
            query_M,
            key_R,
            [max(query.shape[2], key.shape[2])] if call.op.cross else list(call.padded),
            list(rule_of(call)),
            own,
            again,
            recall_of(call.op),
        )
        if not (isinstance(factor, float) and factor == 1):
            score = score * factor
        if not every:
            at = torch.where(at < 0, at, key_R[at.clamp(min=0)])
    else:
        score = query_m.new_empty(B, H, query_M.shape[0], 0, dtype=wide_dtype(query))
        at = torch.empty(B, H, query_M.shape[0], 0, dtype=torch.long, device=key.device)
    if own:
        home = query_M[:, None].expand(B, H, -1, 1)
        at = torch.cat([home if k else _lost_home(home, query_m), at], -1)
    if all_ones(call.op.weight.rho) and not path.prunes:
        return None, at
    if own:
        score = torch.cat(
            [_own_score(call, wide(query_m), wide(own_key if whole else own_key[:, :, query_M]), factor), score], -1
        )
    return score, at


def _chosen(call: Call) -> tuple[Tensor | None, Tensor]:
    """What another similarity, or an indexer, chooses, with the scores of the one that weighs."""
    path, rho, query_M = cast(Nearest, call.op.path), call.op.weight.rho, call.query_index()
    B, H = call.value.shape[0], call.heads
    if indexed_by(call.op) is None:
        at = searched(chosen_by(call))[1]
    else:
        at = indexed(call, query_M, candidates_of(call), rule_of(call))
    at = at.expand(B, H, -1, -1)
    if not rho.needs_score:
        if all_ones(rho):
            return None, at
        return torch.zeros(at.shape, dtype=wide_dtype(call.value), device=at.device).masked_fill(at == LOST, nan), at
    query, key = (t.expand(B, H, -1, -1) for t in call.embedded())
    query = query if query.shape[2] == query_M.shape[0] else query[:, :, query_M]
    if call.similarity.reduced in DOT_LIKE:
        rows = (t.transpose(1, 2).flatten(2) for t in (query, key))
        score = slot_scores(*rows, slots_last(at, B, H)).permute(0, 3, 1, 2)  # type: ignore[call-arg]
    else:
        near = key.gather(2, at.clamp(min=0).flatten(2)[..., None].expand(-1, -1, -1, key.shape[-1]))
        near = near.unflatten(2, at.shape[2:])
        score = metric_scores(call.similarity.reduced, call.similarity.squared, query.unsqueeze(-2), near).squeeze(-2)
    if type(path.include_self) is float:
        score = torch.where(at == query_M[:, None], path.include_self, score)
    return score.masked_fill(at == LOST, nan), at


def _own_score(call: Call, query: Tensor, key: Tensor, factor: float | Tensor) -> Tensor:
    """The score of slot 0 (B, H, M, 1): the position's similarity with itself, or the number asked for."""
    given = call.op.path.include_self  # type: ignore[attr-defined]
    lost = query.isnan().any(-1, keepdim=True)
    if given is not True:
        return torch.full_like(query[..., :1], given).masked_fill(lost, float("nan"))
    if call.similarity.reduced in DOT_LIKE:
        return (query * key).sum(-1, keepdim=True) * factor
    if call.similarity.squared:
        return -(query - key).square().sum(-1, keepdim=True) * factor
    order = float("inf") if call.similarity.reduced == "chebyshev" else 2
    return -torch.linalg.vector_norm(query - key, ord=order, dim=-1, keepdim=True) * factor


def _lost_home(home: Tensor, query: Tensor) -> Tensor:
    """With no slot but the own one, that one tells that the query was NaN."""
    return home.masked_fill(query.isnan().any(-1, keepdim=True), LOST)


def in_raster_order(score: Tensor | None, at: Tensor, positions: int) -> tuple[Tensor | None, Tensor]:
    """Slots in raster order of their positions, missing ones last."""
    order = at.masked_fill(at < 0, positions).sort(dim=-1, stable=True).indices
    return None if score is None else score.gather(-1, order), at.gather(-1, order)


def all_ones(rho: Rho) -> bool:
    """Whether alpha is one in every slot that reads anything: NaN queries are marked in `at` then.

    Several heads may be NaN one by one, which only alpha can say.
    """
    return isinstance(rho, Ones) and rho.heads == 1


def slots_last(x: Tensor, B: int, H: int) -> Tensor:
    """A view (B|1, H|1, M, S) -> (B, M, S, H)."""
    return x.expand(B, H, -1, -1).permute(0, 2, 3, 1)
