"""What slots read, what they weigh and what they add up to: shared by the fast backends that know positions.

Shape legend: B batch, H heads, M outputs, S slots, E entries of a slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nearfold.grammar.unions import alone
from nearfold.grammar.words import Softmax
from nearfold.kernels.aggregate import aggregate
from nearfold.kernels.names import DOT_LIKE, INVALID
from nearfold.kernels.slot_scores import slot_scores
from nearfold.kernels.weigh import slot_softmax
from nearfold.lower.bias import score_bias
from nearfold.lower.call import Call, autocast_dtype, count_positions
from nearfold.lower.kernel import finish, kernel_weight, values
from nearfold.lower.meaning import meaning
from nearfold.lower.selection import added, masked_pairs, present, readable, select
from nearfold.lower.weighting import alpha_of, constant_alpha
from nearfold.lower.windows import TableMeaning, home_index, is_table
from nearfold.lower.words.nearest_search import all_ones, in_raster_order, searched, slots_last
from nearfold.lower.words.union import on, repeated


def slots(call: Call) -> tuple[Tensor | None, Tensor]:
    """Scores, None where nobody reads them, and positions (B|1, H|1, M, S) of a search, a table, or a union of them.

    A position is negative where a slot reads nothing; a query that was NaN has NaN scores, or positions -2.
    """
    if is_table(call.op.path):
        return _table(call)
    return _searched(call) if len(call.op.path.inside) == 1 else _union(call)


def _searched(call: Call) -> tuple[Tensor | None, Tensor]:
    call.rows()  # shared with a query that is the same tensor
    score, at = searched(call)
    return in_raster_order(score, at, count_positions(call.padded)) if call.op.shape.raster else (score, at)


def _table(call: Call) -> tuple[Tensor | None, Tensor]:
    op = call.op
    if op.weight.rho.needs_score and op.path.similarity.reduced not in DOT_LIKE:
        found = select(call)
        return found.score, found.index.masked_fill(~found.valid, INVALID)
    path = meaning(op.path)
    assert isinstance(path, TableMeaning)
    index_MS, _ = path.places(call, INVALID)
    at = index_MS[None, None]
    if call.keep is not None:
        at = at.masked_fill(~present(call.keep, at.clamp(min=0)), INVALID)
    home_M = home_index(op, call.grid, call.value.device)
    if call.mask is not None:
        may = readable(masked_pairs(call.mask, home_M, None, index_MS.clamp(min=0)))
        at = at.expand_as(may).masked_fill(~may, INVALID)
    if not op.weight.rho.needs_score:
        return None, at
    B, H = call.value.shape[0], call.heads
    at = at.expand(B, H, -1, -1)
    query, key = (t.expand(B, H, -1, -1) for t in call.embedded())
    if home_M.shape[0] != query.shape[2] or any(s != 1 for s in call.stride):
        query = query[:, :, home_M]
    score = slot_scores(_rows(query), _rows(key), slots_last(at, B, H)).permute(0, 3, 1, 2)
    bias = score_bias(op, call.params, call.grid, home_M, score)
    score = score if bias is None else score + bias
    plus = added(call, home_M, None, index_MS.clamp(min=0))
    score = score if plus is None else score + plus
    if not isinstance(op.weight.rho, Softmax):  # which asks the positions, and finds NaN by itself
        lost = query.isnan().any(-1)[..., None]
        score = score.masked_fill(at < 0, float("-inf")).masked_fill(lost, float("nan"))
    return score, at


def _rows(x: Tensor) -> Tensor:
    """(B, H, N, e) -> (B, N, H * e)."""
    return x.transpose(1, 2).flatten(2)


def _union(call: Call) -> tuple[Tensor | None, Tensor]:
    B, H = call.value.shape[0], call.heads
    found = [slots(on(call, part)) for part in alone(call.op)]
    places = [at.expand(B, H, -1, -1) for _, at in found]
    at = torch.cat(places, -1).masked_fill(repeated(places), INVALID)
    dtypes = [score.dtype for score, _ in found if score is not None]
    if not dtypes:
        return None, at
    each = [torch.zeros_like(at, dtype=dtypes[0]) if score is None else score for score, at in found]
    return torch.cat([score.expand(B, H, -1, -1) for score in each], -1), at


def weighed(call: Call, score: Tensor | None, at: Tensor) -> Tensor | None:
    """Alpha (B|1, H|1, M, S) of `slots`; None where it is one wherever a slot reads anything."""
    rho = call.op.weight.rho
    if score is None:
        return None if all_ones(rho) else constant_alpha(call, at >= 0, at)
    return slot_softmax(score, at, float(rho.scale)) if isinstance(rho, Softmax) else alpha_of(rho, score, at >= 0)


def summed(call: Call, at: Tensor, alpha: Tensor | None, entries: int = 1) -> Tensor:
    """The sum over slots at positions (B|1, H|1, M, S * E), with the kernel and all that follows: (B, O, *out)."""
    own, B, H = meaning(call.op.weight.kernel), call.value.shape[0], call.heads
    value = values(call).transpose(1, 2) if own.reads_more(call.op.weight.kernel) else call.rows()
    kernel = kernel_weight(call)
    weight, groups = (None, 1) if kernel is None else (kernel[0].flatten(2), kernel[1])
    dtype = autocast_dtype(value) or value.dtype
    y = aggregate(
        value.to(dtype).contiguous(),
        slots_last(at, B, H),
        None if alpha is None else slots_last(alpha.to(dtype), B, H),
        None if weight is None else weight.to(dtype),
        groups,
        entries,
    )
    bias = call.params.get("bias")
    if bias is not None and not own.late_bias:  # those finish with theirs
        y.add_(bias.to(y.dtype))  # in place: fresh memory costs more than the sum
    return finish(call, y.transpose(1, 2).unflatten(2, call.out_grid), with_bias=own.late_bias)
