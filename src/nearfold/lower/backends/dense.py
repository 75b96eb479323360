"""`dense`: every score of path `all`, a block of queries at a time; whatever the rho makes of them.

Under gradients each block is made anew in the backward pass, so that no matrix of all pairs is ever held. (Not so where
torch.compile or torch.func records the whole: they hold what they want.)

Shape legend: B batch, H heads, N positions, M outputs, m queries of a block, d value features of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nearfold.grammar.words import All, Mean, Ones
from nearfold.kernels.names import DOT_LIKE
from nearfold.lower.bias import score_bias
from nearfold.lower.call import Call, is_transformed, split_heads
from nearfold.lower.geometry import all_positions
from nearfold.lower.kernel import finish, values
from nearfold.lower.meaning import RhoMeaning, meaning
from nearfold.lower.selection import added, allowed, metric_scores
from nearfold.lower.verdict import Facts, Verdict
from nearfold.lower.weighting import alpha_of

NAME = "dense"
BLOCK_BYTES = 4 << 20  # of scores held at once, several times over; more leave the cache, fewer wait for threads


def supports(facts: Facts) -> Verdict:
    """Path all under a rho that makes alpha of scores, or of which slots there are."""
    op = facts.op
    if not isinstance(op.path, All):
        return Verdict.no(f"path is {op.path.word}, not all")
    if not (op.weight.rho.needs_score or isinstance(op.weight.rho, (Ones, Mean))):
        return Verdict.no(f"rho {op.weight.rho.word} is not made of scores")
    if op.weight.kernel is not None:
        return Verdict.no(f"kernel {op.weight.kernel} has a number for every offset")
    if type(meaning(op.weight.rho)).weigh is RhoMeaning.weigh:
        return Verdict.no(f"rho {op.weight.rho.word} is not made of the scores alone")
    return Verdict.yes("all scores, by blocks of queries that are made again in the backward pass", "roundoff")


def _blocks(call: Call, query_M: Tensor, pairs: int, wide: int) -> tuple[Tensor, ...]:
    """Queries by blocks: all in one where nothing is held, or where their number is not known yet."""
    if call.value.is_meta or torch.compiler.is_compiling():
        return (query_M,)
    return query_M.split(max(1, BLOCK_BYTES // max(pairs * wide, 1)))


def run(call: Call) -> Tensor:
    """(B, C, *out)."""
    op, rho = call.op, call.op.weight.rho
    value = split_heads(values(call), call.heads)
    near, query_M = call.similarity, meaning(rho).queries(call)
    key_N = all_positions(value.shape[2], value.device)
    dtype, wide = value.dtype, torch.promote_types(value.dtype, torch.float32)
    value = value.to(wide)
    query, key = call.embedded() if rho.needs_score else (None, None)
    biases = [p for p in call.params.values() if p.requires_grad]
    # distances hold the differences of all features
    each = key.shape[-1] if key is not None and near.reduced not in DOT_LIKE else 1
    blocks = _blocks(call, query_M, value.shape[0] * call.heads * key_N.shape[0], each * wide.itemsize)

    def block(query: Tensor | None, key: Tensor | None, value: Tensor, at_m: Tensor) -> Tensor:
        mask = allowed(call, at_m, key_N)
        valid = value.new_ones((at_m.shape[0], key_N.shape[0]), dtype=torch.bool) if mask is None else mask
        valid = valid if valid.dim() == 4 else valid[None, None]
        if query is None or key is None:
            score = torch.zeros(valid.shape, dtype=wide, device=value.device)
        else:
            score = metric_scores(near.reduced, near.squared, query, key)
            bias = score_bias(op, call.params, call.grid, at_m, score)
            score = score if bias is None else score + bias
            plus = added(call, at_m, key_N)
            score = (score if plus is None else score + plus).masked_fill(~valid, float("-inf"))
        alpha = alpha_of(rho, score, valid.expand_as(score))
        return alpha.to(wide) @ value

    record = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (query, key, value, call.mask, *biases)
    )
    again = record and len(blocks) > 1 and not is_transformed(value, *call.params.values())
    made = []
    for at_m in blocks:
        query_m = None if query is None else query[:, :, at_m]
        if again:
            made.append(checkpoint(block, query_m, key, value, at_m, use_reentrant=False, preserve_rng_state=False))
        else:
            made.append(block(query_m, key, value, at_m))
    y = made[0] if len(made) == 1 else torch.cat(made, 2)
    y = y.expand(value.shape[0], call.heads, -1, -1).transpose(2, 3).flatten(1, 2)
    return finish(call, y.to(dtype).unflatten(2, call.out_grid))
