"""`union`: several paths under one weight, where one of them searches; unions of tables alone are `gather`'s.

The search runs by tiles, as in `knn`, and the other paths' scores touch the rows that they read: nothing of size
outputs x positions exists.

Shape legend: B batch, H heads, N positions, M outputs, S slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nearfold.grammar import Basic
from nearfold.grammar.unions import alone
from nearfold.grammar.words import Experts, Max, Nearest, Softmax, Union
from nearfold.kernels.aggregate import aggregate
from nearfold.kernels.names import DOT_LIKE, INVALID
from nearfold.kernels.slot_scores import slot_scores
from nearfold.kernels.weigh import slot_softmax
from nearfold.lower.call import Call, autocast_dtype, count_positions, refuse_derivatives
from nearfold.lower.kernel import finish, kernel_weight, values
from nearfold.lower.meaning import meaning
from nearfold.lower.selection import present
from nearfold.lower.verdict import Facts, Verdict
from nearfold.lower.weighting import alpha_of
from nearfold.lower.windows import home_index, is_table, window_index
from nearfold.lower.words.nearest_search import in_raster_order, searched, slots_last
from nearfold.lower.words.union import on, repeated

NAME = "union"


def supports(facts: Facts) -> Verdict:
    """Unions with a search; scores of a dot product only, where a table's scores are read."""
    op = facts.op
    if not isinstance(op.path, Union):
        return Verdict.no(f"path is {op.path.word}, not a union")
    if is_table(op.path):
        return Verdict.no("none of its paths searches")
    odd = next((path for path in op.path.paths if not (isinstance(path, Nearest) or is_table(path))), None)
    if odd is not None:
        return Verdict.no(f"{odd} is neither a search nor a table")
    tables = any(is_table(path) for path in op.path.paths)
    if tables and op.weight.rho.needs_score and op.path.similarity.reduced not in DOT_LIKE:
        return Verdict.no(f"similarity {op.path.similarity} is not a dot product")
    if isinstance(op.weight.rho, Max) or isinstance(op.weight.kernel, Experts):
        return Verdict.no(f"weight {op.weight} is another one for every channel or input")
    return Verdict.yes("selection by tiles, scores of the other slots, sums over all of them", "roundoff")


def takes_keys(op: Basic) -> bool:
    """Whether it heeds a mask of the keys."""
    return True


def _table(call: Call, part: Basic) -> tuple[Tensor | None, Tensor]:
    """As `searched`, of a path that is a table."""
    index_MS, _ = window_index(part, call.grid, call.value.device, INVALID)
    at = index_MS[None, None]
    if call.keep is not None:
        at = at.masked_fill(~present(call.keep, at.clamp(min=0)), INVALID)
    at = at.expand(call.value.shape[0], call.heads, -1, -1)
    if not part.weight.rho.needs_score:
        return None, at
    query, key = (t.expand(call.value.shape[0], call.heads, -1, -1) for t in call.embedded())
    home_M = home_index(part, call.grid, query.device)
    if home_M.shape[0] != query.shape[2] or any(s != 1 for s in call.stride):
        query = query[:, :, home_M]
    query_rows, key_rows = (t.transpose(1, 2).flatten(2) for t in (query, key))
    return slot_scores(query_rows, key_rows, slots_last(at, *at.shape[:2])).permute(0, 3, 1, 2), at


def run(call: Call) -> Tensor:
    """(B, O, *out)."""
    refuse_derivatives(call)
    rho, own = call.op.weight.rho, call.op.weight.kernel
    B, H = call.value.shape[0], call.heads
    scores, places = [], []
    for part in alone(call.op):
        if is_table(part.path):
            score, at = _table(call, part)
        else:
            with torch.set_grad_enabled(torch.is_grad_enabled() and rho.needs_score):
                score, at = searched(on(call, part))
            if part.shape.raster:
                score, at = in_raster_order(score, at, count_positions(call.padded))
        scores.append(score)
        places.append(at.expand(B, H, -1, -1))
    at = torch.cat(places, -1).masked_fill(repeated(places), INVALID)
    alpha = None
    if any(score is not None for score in scores):
        wide = next(score.dtype for score in scores if score is not None)
        both = zip(scores, places, strict=True)
        read = [torch.zeros_like(place, dtype=wide) if score is None else score for score, place in both]
        score = torch.cat([one.expand(B, H, -1, -1) for one in read], -1)
        alpha = slot_softmax(score, at, float(rho.scale)) if isinstance(rho, Softmax) else alpha_of(rho, score, at >= 0)
    value = values(call).transpose(1, 2) if meaning(own).reads_more(own) else call.rows()
    kernel = kernel_weight(call)
    weight, groups = (None, 1) if kernel is None else (kernel[0].flatten(2), kernel[1])
    dtype = autocast_dtype(value) or value.dtype
    y = aggregate(
        value.to(dtype).contiguous(),
        slots_last(at, B, H),
        None if alpha is None else slots_last(alpha.to(dtype), B, H),
        None if weight is None else weight.to(dtype),
        groups,
    )
    bias = call.params.get("bias")
    later = meaning(own).late_bias
    if bias is not None and not later:
        y.add_(bias.to(y.dtype))
    return finish(call, y.transpose(1, 2).unflatten(2, call.out_grid), with_bias=later)
