"""Path with Shape -> Selection: for every output position an ordered list of slots and what they read.

This is the meaning, for the oracle and for pictures; fast backends never build the dense scores.

Shape legend: B batch, H heads, M outputs, N positions, S slots, e embedded features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nearfold.grammar.similarity import Place, Position
from nearfold.grammar.words import All, Box, Causal, Deformable, Nearby, Nearest, Scan, Strided, Table
from nearfold.lower.bias import score_bias
from nearfold.lower.call import Call, count_positions, is_transformed
from nearfold.lower.deform import sampled
from nearfold.lower.orders import scan_order
from nearfold.lower.windows import home_index, is_table, window_index


@dataclass(frozen=True)
class Selection:
    """``index`` (B|1, H|1, M, S) into the input positions, ``valid`` the same shape, ``score`` or None.

    A slot that is not valid reads nothing; its index is 0 and its score -inf. A NaN score marks a query that
    was NaN: its output is NaN. A slot at a fractional position reads ``entries`` positions next to one another in S,
    each by its ``coefficient`` (B, H, M, S).
    """

    index: Tensor
    valid: Tensor
    score: Tensor | None
    positions: int
    coefficient: Tensor | None = None
    entries: int = 1

    def __post_init__(self) -> None:
        assert self.index.dtype == torch.long and self.valid.dtype == torch.bool
        assert self.index.shape[-2:] == self.valid.shape[-2:], (self.index.shape, self.valid.shape)
        unknown = torch.compiler.is_compiling() or self.index.is_meta or is_transformed(self.index)
        if not unknown and self.index.numel():
            low, high = self.index.min().item(), self.index.max().item()
            assert low >= 0 and high < self.positions, (low, high, self.positions)


def metric_scores(metric: str, squared: bool, q: Tensor, k: Tensor) -> Tensor:
    """Scores (B, H, M, N) of embedded queries (B, H, M, e) and keys (B, H, N, e), in their dtype under autocast too."""
    if not q.is_meta and torch.is_autocast_enabled(q.device.type):
        with torch.autocast(q.device.type, enabled=False):
            return metric_scores(metric, squared, q, k)
    if metric == "dot":
        return q @ k.transpose(-1, -2)
    if metric == "cosine":
        return (q @ k.transpose(-1, -2)).clamp(-1, 1)
    if metric == "chebyshev":
        return -torch.cdist(q, k, p=float("inf"))
    if metric == "gram":
        square = q.square().sum(-1)[..., :, None] + k.square().sum(-1)[..., None, :] - 2 * (q @ k.transpose(-1, -2))
        square = square.clamp(min=0)
    else:
        square = (q[..., :, None, :] - k[..., None, :, :]).square().sum(-1)
    return -square if squared else distance_score(-square)


def distance_score(rank: Tensor) -> Tensor:
    """Minus the squared distance -> minus the distance, whose gradient at zero is zero."""
    zero = rank == 0
    return -(-rank.masked_fill(zero, -1)).sqrt().masked_fill(zero, 0)


def select(call: Call) -> Selection:
    """The selection of one call, from dense scores."""
    path = call.op.path
    if is_table(path):
        return _table(call)
    if isinstance(path, Deformable):
        return _deformable(call)
    if isinstance(path, (All, Scan)):
        return _all(call)
    return _nearest(call)


def _table(call: Call) -> Selection:
    flat_MS, valid_MS = window_index(call.op, call.grid, call.value.device)
    score = None
    if call.op.weight.rho.needs_score:
        q, k = call.embedded()
        q_M = q[:, :, home_index(call.op, call.grid, call.value.device)]
        k_MS = k[:, :, flat_MS]
        score = metric_scores(call.similarity.reduced, call.similarity.squared, q_M[..., None, :], k_MS).squeeze(-2)
        bias = score_bias(call.op, call.params, call.grid, flat_MS, score)
        score = (score if bias is None else score + bias).masked_fill(~valid_MS, float("-inf"))
    return Selection(flat_MS[None, None], valid_MS[None, None], score, count_positions(call.grid))


def _deformable(call: Call) -> Selection:
    index, valid, coefficient = sampled(call)
    positions = count_positions(call.grid)
    return Selection(index, valid, None, positions, coefficient, 2**call.ndim)


def rule_of(call: Call) -> tuple[int, int, int]:
    """Which keys `nearest` may choose: causal (0 or 1), reach on every axis (-1: any), dilation."""
    path = call.op.path
    near = path.candidates if isinstance(path, Nearest) and isinstance(path.candidates, Nearby) else None
    dilation = call.similarity.dilation if isinstance(call.similarity, Position) else 1
    return int(isinstance(call.op.shape, Causal)), -1 if near is None else near.size // 2, dilation


def allowed(call: Call, query_M: Tensor, key_N: Tensor) -> Tensor | None:
    """Which keys a query may read at all (M, N), by shape and similarity; None for every one.

    Under the call's own mask it is (B|1, H|1, M, N).
    """
    own = _allowed(call, query_M, key_N)
    if call.mask is None:
        return own
    given = call.mask[:, :, query_M][..., key_N]
    return given if own is None else given & own


def _allowed(call: Call, query_M: Tensor, key_N: Tensor) -> Tensor | None:
    causal, reach, dilation = rule_of(call)
    mask = key_N[None, :] <= query_M[:, None] if causal else None
    if isinstance(call.op.path, Scan):
        time_N = scan_order(call.op.path, call.grid, query_M.device).argsort()
        return time_N[key_N][None, :] <= time_N[query_M][:, None]
    if isinstance(call.op.shape, Strided):
        step = call.op.shape.step
        mask = (key_N % step)[None, :] == (query_M % step)[:, None]
    if reach >= 0 or dilation > 1:
        at_Na = Place(call.padded, query_M.device, torch.long).index()
        apart_MNa = at_Na[query_M][:, None] - at_Na[key_N][None]
        close = (apart_MNa % dilation == 0).all(-1)
        if reach >= 0:
            close = close & (apart_MNa.abs() <= reach).all(-1)
        mask = close if mask is None else mask & close
    return mask


def _all(call: Call) -> Selection:
    q, k = call.embedded() if call.op.weight.rho.needs_score else (None, None)
    query_M = call.query_index()
    key_N = torch.arange(count_positions(call.padded), device=query_M.device)
    rho = call.op.weight.rho
    if isinstance(rho, Table):
        query_M = torch.arange(count_positions(call.out_grid), device=query_M.device)
    mask = allowed(call, query_M, key_N)
    valid_MN = torch.ones(query_M.shape[0], key_N.shape[0], dtype=torch.bool, device=query_M.device)
    valid_MN = valid_MN if mask is None else mask
    valid = valid_MN if valid_MN.dim() == 4 else valid_MN[None, None]
    index = key_N.masked_fill(~valid, 0)
    score = None
    if q is not None and k is not None:
        score = metric_scores(call.similarity.reduced, call.similarity.squared, q[:, :, query_M], k)
        bias = score_bias(call.op, call.params, call.grid, query_M, score)
        score = (score if bias is None else score + bias).masked_fill(~valid_MN, float("-inf"))
    return Selection(index, valid, score, key_N.shape[0])


def _nearest(call: Call) -> Selection:
    path = call.op.path
    assert isinstance(path, Nearest)
    q, k, factor = call.ranked()
    query_M = call.query_index()
    chosen = call.candidate_index()
    key_R = torch.arange(count_positions(call.padded), device=query_M.device) if chosen is None else chosen
    q_M = q[:, :, query_M]
    metric, squared = call.similarity.reduced, call.similarity.squared
    # distances rank by their squares: a root rounds different ones to one value, and not alike on every machine
    rooted = metric == "euclidean" and not squared
    score = metric_scores(metric, squared or rooted, q_M, k[:, :, key_R])
    mask = allowed(call, query_M, key_R)
    if mask is not None:
        score = score.masked_fill(~mask, float("-inf"))
    k_slots, again = path.k, float("-inf")
    if path.include_self is not False:
        own_MR = key_R[None, :] == query_M[:, None]
        again = again if path.again is None else path.again / factor  # type: ignore[assignment]
        score = score.masked_fill(own_MR, -again * again if rooted and again < 0 else again)
        k_slots -= 1
    # a key that is NaN is never chosen, a query that is NaN gives NaN (below)
    score = score.masked_fill(score.isnan(), float("-inf"))
    ranked, order = score.sort(dim=-1, descending=True, stable=True)
    ranked, order = ranked[..., :k_slots], order[..., :k_slots]
    index = key_R[order]
    if rooted:
        own = (index == query_M[:, None]) & (path.include_self is not False)
        ranked = distance_score(ranked.masked_fill(own, -1)).masked_fill(own, again)
    ranked = ranked * factor
    missing = k_slots - index.shape[-1]
    if missing > 0:
        ranked = torch.cat([ranked, ranked.new_full((*ranked.shape[:-1], missing), float("-inf"))], -1)
        index = torch.cat([index, index.new_zeros((*index.shape[:-1], missing))], -1)
    if path.include_self is not False:
        own = metric_scores(metric, squared, q_M[..., None, :], k[:, :, query_M][..., None, :])[..., 0] * factor
        if path.include_self is not True:
            own = torch.full_like(own, path.include_self)
        ranked = torch.cat([own, ranked], -1)
        index = torch.cat([query_M[:, None].expand_as(own), index], -1)
    valid = ranked > float("-inf")
    if path.include_self is not False:
        valid = torch.cat([torch.ones_like(valid[..., :1]), valid[..., 1:]], -1)
    index = index.masked_fill(~valid, 0)
    if isinstance(call.op.shape, Box):
        order = (
            index.masked_fill(~valid, key_R.shape[0] + count_positions(call.padded)).sort(dim=-1, stable=True).indices
        )
        index, valid, ranked = index.gather(-1, order), valid.gather(-1, order), ranked.gather(-1, order)
    lost_M1 = q_M.isnan().any(-1, keepdim=True)
    ranked = ranked.masked_fill(lost_M1, float("nan"))
    return Selection(index, valid, ranked, count_positions(call.padded))
