"""`nearest`: the k most similar of its candidates.

Shape legend: B batch, H heads, M outputs, N positions, R candidates, S slots, a grid axes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import cast

import torch
from torch import Tensor

from nearfold._kept import kept, once
from nearfold.grammar import Basic
from nearfold.grammar.place import Place
from nearfold.grammar.similarity import Similarity
from nearfold.grammar.words import AllCandidates, Grid, Nearby, Nearest, Random
from nearfold.kernels.names import LOST
from nearfold.kernels.sample import draw_positions
from nearfold.lower.call import Call, count_positions
from nearfold.lower.geometry import all_positions
from nearfold.lower.meaning import Lengths, PathMeaning, Sizes, means
from nearfold.lower.parameters import Parameter
from nearfold.lower.selection import Selection, added, allowed, distance_score, metric_scores
from nearfold.lower.words.indexer import index_parameters, indexed, indexed_by


@means(Nearest)
class NearestMeaning(PathMeaning):
    """The k most similar positions."""

    slots = "rank"

    def parameters(self, op: Basic, sizes: Sizes) -> dict[str, Parameter]:
        by = indexed_by(op)
        return {} if by is None else index_parameters(by, sizes)

    def border(self, op: Basic) -> int:
        return cast(Nearest, op.path).padding

    def fit(self, op: Basic, grid: Lengths, source: Lengths, drawing: bool) -> Basic:
        path = cast(Nearest, op.path)
        k = min(path.k, _fillable(path, grid, source, drawing))
        return op if k == path.k else dataclasses.replace(op, path=dataclasses.replace(path, k=k))

    def narrow(self, fitted: Basic, params: dict[str, Tensor]) -> dict[str, Tensor]:
        if "weight" not in params:
            return params
        # slots are filled from the first on
        return params | {"weight": params["weight"][..., : cast(Nearest, fitted.path).k]}

    def unfilled(self, op: Basic, grid: Lengths, context: Lengths | None) -> str | None:
        path = cast(Nearest, op.path)
        if path.cross and context is None:
            return None
        source = context if path.cross and context is not None else tuple(n + 2 * path.padding for n in grid)
        can = _fillable(path, grid, source, drawing=False)
        if not 0 < can < path.k:
            return None
        where = " x ".join(map(str, context if path.cross and context is not None else grid))
        return f"{path}: k={path.k}, but only {can} slots can be filled on a grid of {where}; the others read nothing"

    def takes_mask(self, op: Basic) -> bool:
        path = cast(Nearest, op.path)
        return path.include_self is False and path.padding == 0 and indexed_by(op) is None

    def allowed(self, call: Call, query_M: Tensor, key_N: Tensor) -> Tensor | None:
        _, reach, dilation = rule_of(call)
        mask = call.op.shape.allows(query_M, key_N)
        if reach >= 0 or dilation > 1:
            at_Na = Place(call.padded, query_M.device, torch.long).index()
            apart_MNa = at_Na[query_M][:, None] - at_Na[key_N][None]
            close = (apart_MNa % dilation == 0).all(-1)
            if reach >= 0:
                close = close & (apart_MNa.abs() <= reach).all(-1)
            mask = close if mask is None else mask & close
        return mask

    def select(self, call: Call) -> Selection:
        return self._nearest(call) if cast(Nearest, call.op.path).by is None else self._chosen(call)

    def _chosen(self, call: Call) -> Selection:
        """What something else than the similarity chooses, with the similarity's scores."""
        path, query_M = cast(Nearest, call.op.path), call.query_index()
        if indexed_by(call.op) is None:
            found = self._nearest(chosen_by(call))
            index, valid, lost = found.index, found.valid, cast(Tensor, found.score).isnan()
        else:
            at = indexed(call, query_M, candidates_of(call), rule_of(call))
            if call.op.shape.raster:
                order = at.masked_fill(at < 0, count_positions(call.padded)).sort(-1).indices
                at = at.gather(-1, order)
            index, valid = at.clamp(min=0), at >= 0
            lost = (at == LOST).any(-1, keepdim=True).expand_as(at)
        if not call.op.weight.rho.needs_score:
            score = torch.zeros(index.shape, dtype=call.value.dtype, device=index.device)
        else:
            q, k = call.embedded()
            B, H = (max(t.shape[axis] for t in (q, k, index)) for axis in (0, 1))
            index, valid, lost = (t.expand(B, H, -1, -1) for t in (index, valid, lost))
            k_MS = k.expand(B, H, -1, -1).gather(2, index.flatten(2)[..., None].expand(-1, -1, -1, k.shape[-1]))
            k_MS = k_MS.unflatten(2, index.shape[2:])
            near = call.similarity
            score = metric_scores(near.reduced, near.squared, q[:, :, query_M].unsqueeze(-2), k_MS).squeeze(-2)
            if type(path.include_self) is float:
                score = torch.where(index == query_M[:, None], path.include_self, score)
        score = score.masked_fill(~valid, float("-inf")).masked_fill(lost, float("nan"))
        return Selection(index.masked_fill(~valid, 0), valid, score, count_positions(call.padded))

    def _nearest(self, call: Call) -> Selection:
        path = cast(Nearest, call.op.path)
        q, k, factor = call.ranked()
        query_M = call.query_index()
        key_R = candidates_of(call)
        q_M = q[:, :, query_M]
        metric, squared = call.similarity.reduced, call.similarity.squared
        # distances rank by their squares: a root rounds different ones to one value, and not alike on every machine
        plus = added(call, query_M, key_R)
        rooted = metric == "euclidean" and not squared and plus is None
        score = metric_scores(metric, squared or rooted, q_M, k[:, :, key_R])
        score = score if plus is None else score + plus / factor
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
            own = own.expand(*ranked.shape[:-1], 1)
            ranked = torch.cat([own, ranked], -1)
            index = torch.cat([query_M[:, None].expand_as(own), index], -1)
        valid = ranked > float("-inf")
        if path.include_self is not False:
            valid = torch.cat([torch.ones_like(valid[..., :1]), valid[..., 1:]], -1)
        lost_M1 = q_M.isnan().any(-1, keepdim=True)
        if path.prunes:
            valid = kept_slots(path, ranked, valid)
            ranked = ranked.masked_fill(~valid, float("-inf"))
        index = index.masked_fill(~valid, 0)
        if call.op.shape.raster:
            behind = key_R.shape[0] + count_positions(call.padded)
            order = index.masked_fill(~valid, behind).sort(dim=-1, stable=True).indices
            index, valid, ranked = index.gather(-1, order), valid.gather(-1, order), ranked.gather(-1, order)
        ranked = ranked.masked_fill(lost_M1, float("nan"))
        return Selection(index, valid, ranked, count_positions(call.padded))


def chosen_by(call: Call) -> Call:
    """The call with the similarity that chooses in the place of the one that weighs."""
    path = cast(Nearest, call.op.path)
    op = _by_alone(call.op)
    assert isinstance(path.by, Similarity)
    return dataclasses.replace(call, at=dataclasses.replace(call.at, op=op))


@once
def _by_alone(op: Basic) -> Basic:
    path = cast(Nearest, op.path)
    return dataclasses.replace(op, path=dataclasses.replace(path, similarity=cast(Similarity, path.by), by=None))


def kept_slots(path: Nearest, ranked: Tensor, valid: Tensor) -> Tensor:
    """Which of the valid slots (B, H, M, S), best first, ``least`` and ``top_p`` leave; an own one is the first."""
    first = torch.zeros_like(valid)
    first[..., : int(path.include_self is not False)] = True
    kept = valid
    if path.least is not None:
        kept = kept & ((ranked >= path.least) | first)
    if path.top_p is not None:  # of what is left
        with torch.no_grad():
            score = ranked.masked_fill(~kept, torch.finfo(ranked.dtype).min)
            share = torch.softmax(score, -1).masked_fill(~kept, 0)
            before = share.cumsum(-1) - share
        kept = kept & (before < path.top_p)
    return kept


def candidates_of(call: Call) -> Tensor:
    """Ascending positions (R,) among which `nearest` searches."""
    chosen = candidate_index(call)
    return all_positions(count_positions(call.padded), call.value.device) if chosen is None else chosen


def rule_of(call: Call) -> tuple[int, int, int]:
    """Which keys `nearest` may choose: causal (0 or 1), reach on every axis (-1: any), dilation."""
    candidates = cast(Nearest, call.op.path).candidates
    reach = candidates.size // 2 if isinstance(candidates, Nearby) else -1
    return int(call.op.shape.causal), reach, call.similarity.dilation


def candidate_index(call: Call) -> Tensor | None:
    """Ascending positions (R,) among which `nearest` searches; None for every position."""
    candidates, total = cast(Nearest, call.op.path).candidates, count_positions(call.padded)
    if isinstance(candidates, Random) and call.draw is not None and candidates.r < total:
        return draw_positions(call.draw, total, candidates.r)
    if isinstance(candidates, Grid) and _some(candidates, call.grid):
        return _grid_positions(candidates, call.grid, call.at.padding, call.value.device)
    return None


def _some(candidates: Grid, grid: Lengths) -> bool:
    """Whether the candidates are less fine than the map on some axis: then not all positions are."""
    return candidates.inset > 0 or any(candidates.r < n for n in grid)


@kept
def _grid_positions(candidates: Grid, grid: Lengths, padding: int, device: torch.device) -> Tensor:
    """Ascending positions of the padded grid among which `nearest` searches."""
    flat = torch.zeros(1, dtype=torch.long, device=device)
    for n in grid:
        inset = min(candidates.inset, (n - 1) // 2)
        room = n - 2 * inset
        if candidates.r >= room:
            axis = torch.arange(inset, inset + room, device=device)
        else:
            axis = torch.linspace(inset, inset + room - 1, candidates.r, device=device).long()
        flat = (flat[:, None] * (n + 2 * padding) + axis + padding).reshape(-1)
    return flat


def _fillable(path: Nearest, grid: Lengths, source: Lengths, drawing: bool) -> int:
    """How many slots can be filled on this grid; ``source`` is where the keys are, its border included."""
    candidates, own = path.candidates, path.include_self is not False
    keys = math.prod(source)
    if isinstance(candidates, Random) and drawing:
        keys = min(keys, candidates.r)
    if isinstance(candidates, Grid) and _some(candidates, grid):
        keys = math.prod(min(candidates.r, n - 2 * min(candidates.inset, (n - 1) // 2)) for n in grid)
    if isinstance(candidates, Nearby):
        keys = math.prod(min(candidates.size, n) for n in source)
    # among all positions the own one, which has a slot, is taken out of the search
    return keys + int(own) - int(own and path.again is None and isinstance(candidates, AllCandidates))
