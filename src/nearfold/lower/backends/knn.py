"""`knn`: nearest neighbours, selected and aggregated by tiles; O(N k) memory, forward and backward.

Shape legend: B batch, H heads, N positions, R candidates, M outputs, S slots, e embedded features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nearfold.grammar.operation import Basic
from nearfold.grammar.similarity import Cosine, Dot, Euclidean, Scaled
from nearfold.grammar.words import (
    AllCandidates,
    Box,
    Causal,
    Dense,
    Depthwise,
    Nearest,
    Ones,
    Ranked,
    Rho,
    Softmax,
)
from nearfold.kernels import approximate
from nearfold.kernels.aggregate import aggregate
from nearfold.kernels.names import DOT_LIKE, LOST
from nearfold.kernels.neighbors import Neighbors
from nearfold.kernels.select import MOST_SLOTS, select, wide, wide_dtype
from nearfold.kernels.weigh import slot_softmax
from nearfold.kernels.whole import whole
from nearfold.lower.call import Call, Run, autocast_dtype, refuse_derivatives
from nearfold.lower.frame import Frame
from nearfold.lower.geometry import all_positions
from nearfold.lower.kernel import finish, kernel_weight, values
from nearfold.lower.meaning import meaning
from nearfold.lower.verdict import Facts, Verdict
from nearfold.lower.weighting import alpha_of
from nearfold.lower.words.nearest import candidate_index, rule_of

NAME = "knn"


def supports(facts: Facts) -> Verdict:
    """Path nearest, with anything."""
    if not isinstance(facts.op.path, Nearest):
        return Verdict.no(f"path is {facts.op.path.word}, not nearest")
    if _recall(facts.op) == 1:
        return Verdict.yes("selection and aggregation by tiles", "roundoff")
    method = approximate.describe(facts.op.path.similarity.reduced)
    exactness = "roundoff" if method == "exact" else "recall"
    return Verdict.yes(f"selection with recall={facts.op.path.recall} ({method}), aggregation by tiles", exactness)


def _recall(op: Basic) -> float:
    """The share of the best keys that is enough: what was asked where any key may be chosen, otherwise all of them."""
    path = op.path
    assert isinstance(path, Nearest)
    any_key = isinstance(path.candidates, AllCandidates) and not isinstance(op.shape, Causal) and path.again is None
    return path.recall if any_key and getattr(path.similarity, "dilation", 1) == 1 else 1.0


def _select(call: Call) -> tuple[Tensor | None, Tensor]:
    """Score (None where nobody reads it) and position (B|1, H|1, M, S); position -1 where there is none."""
    path = call.op.path
    assert isinstance(path, Nearest)
    query, key, factor = call.compared()
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
            _recall(call.op),
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
    if _all_ones(call.op.weight.rho):
        return None, at
    if own:
        score = torch.cat(
            [_own_score(call, wide(query_m), wide(key if whole else key[:, :, query_M]), factor), score], -1
        )
    return score, at


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


def _raster(score: Tensor | None, at: Tensor, positions: int) -> tuple[Tensor | None, Tensor]:
    """Slots in raster order of their positions, missing ones last."""
    order = at.masked_fill(at < 0, positions).sort(dim=-1, stable=True).indices
    return None if score is None else score.gather(-1, order), at.gather(-1, order)


def _all_ones(rho: Rho) -> bool:
    """Whether alpha is one in every slot that reads anything: NaN queries are marked in `at` then.

    Several heads may be NaN one by one, which only alpha can say.
    """
    return isinstance(rho, Ones) and rho.heads == 1


def _alpha(rho: Rho, score: Tensor | None, at: Tensor) -> Tensor | None:
    if score is None:
        return None
    if isinstance(rho, Softmax):
        return slot_softmax(score, at, float(rho.scale))
    return alpha_of(rho, score, at >= 0)


def prepare(at: Frame) -> Run:
    """What runs on this frame: one call of the compiled engine where it knows all of the words."""
    settled = _settled(at)
    if settled is None:
        return run

    def at_once(call: Call) -> Tensor:
        value, query, key = call.value, call.query, call.key
        key = None if key is query else key
        query = None if query is value and key is None else query
        places = call.query_index() if settled.partial else None
        operands = (query, key, value, call.params.get("weight"), call.params.get("bias"), places)

        def again(query: Tensor | None, key: Tensor | None, value: Tensor, *others: Tensor | None) -> Tensor:
            given = zip(("weight", "bias"), others, strict=False)
            params = call.params | {name: tensor for name, tensor in given if tensor is not None}
            query = value if query is None else query
            return run(Call(at, params, value, query, query if key is None else key, call.x, call.draw))

        return whole(settled, operands, again)

    return at_once


def _settled(at: Frame) -> Neighbors | None:
    """The layer as the engine takes it, None where it knows some word only in parts."""
    op, path, rho, kernel = at.op, at.op.path, at.op.weight.rho, at.op.weight.kernel
    assert isinstance(path, Nearest)
    near, own = path.similarity, path.include_self
    known = (
        isinstance(near, (Cosine, Dot, Scaled, Euclidean))
        and not (near.coordinates or near.placed)
        and isinstance(path.candidates, AllCandidates)
        and isinstance(op.shape, Ranked)
        and path.again is None
        and path.k <= MOST_SLOTS
        and (own is False or (own is True and path.k > 1))
        and _recall(op) == 1
        and (_all_ones(rho) or isinstance(rho, Softmax))
        and (kernel is None or (isinstance(kernel, (Dense, Depthwise)) and not getattr(kernel, "coordinates", False)))
    )
    if not known:
        return None
    scale = float(rho.scale) if isinstance(rho, Softmax) else None
    return Neighbors(
        path.k,
        at.heads,
        0 if isinstance(kernel, Depthwise) else kernel.groups if isinstance(kernel, Dense) else 1,
        near.reduced,
        isinstance(near, Cosine),
        near.squared,
        own is True,
        scale,
        isinstance(near, Scaled),
        at.padding > 0 or any(s != 1 for s in at.stride),
        at.out_grid,
    )


def run(call: Call) -> Tensor:
    """(B, O, *out)."""
    refuse_derivatives(call)
    weight_word = call.op.weight
    appended = meaning(weight_word.kernel).reads_more(weight_word.kernel)
    value = values(call).transpose(1, 2) if appended else call.rows()
    if torch.compiler.is_compiling():  # drops what nothing reads; a graph that switches gradients does not load again
        score, at = _select(call)
    else:  # under constant alpha nothing flows back through the scores: nothing is kept for it
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight_word.rho.needs_score):
            score, at = _select(call)
    if isinstance(call.op.shape, Box):
        score, at = _raster(score, at, value.shape[1])
    B, H = value.shape[0], call.heads
    alpha = _alpha(weight_word.rho, score, at)
    kernel = kernel_weight(call)
    weight, groups = (None, 1) if kernel is None else kernel
    auto = autocast_dtype(value)
    dtype = auto or value.dtype
    if auto is not None and weight is not None:
        weight = weight.to(auto)
    y = aggregate(
        value.to(dtype).contiguous(),
        _slots_last(at, B, H),
        None if alpha is None else _slots_last(alpha.to(dtype), B, H),
        weight,
        groups,
    )
    bias = call.params.get("bias")
    plain = not meaning(weight_word.kernel).late_bias  # those finish with theirs
    if plain and bias is not None:
        y.add_(bias.to(y.dtype))  # in place: fresh memory costs more than the sum
    return finish(call, y.transpose(1, 2).unflatten(2, call.out_grid), with_bias=not plain)


def _slots_last(x: Tensor, B: int, H: int) -> Tensor:
    """A view (B|1, H|1, M, S) -> (B, M, S, H)."""
    return x.expand(B, H, -1, -1).permute(0, 2, 3, 1)
