"""`nearfold::slot_scores`: dot products of queries with the keys an index table chooses for them.

With `slot_softmax` and `aggregate` it is attention over any table of positions. One operator, two implementations: the
compiled engine on the CPU, and PyTorch in blocks everywhere else. The gathered keys (B, M, S, C) are never held whole.

Shape legend: B batch, M queries, N keys, C channels, H heads of d = C / H consecutive channels, S slots.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nearfold.kernels import aggregate_torch, engine, second
from nearfold.kernels.aggregate import aggregate, as_rows, served, widened
from nearfold.kernels.names import require_tensors
from nearfold.kernels.operator import operator


def _require(query: Tensor, key: Tensor, index: Tensor) -> None:
    """ValueError where the operands do not fit one another."""
    require_tensors(query=query, key=key, index=index)
    B, C = query.shape[:1], query.shape[2:]
    if query.dim() != 3 or key.dim() != 3 or key.shape[:1] != B or key.shape[2:] != C or key.dtype != query.dtype:
        raise ValueError(
            "query must be (B, M, C) and key (B, N, C) of one dtype, got "
            f"{tuple(query.shape)} {query.dtype} and {tuple(key.shape)} {key.dtype}"
        )
    if index.dim() != 4 or index.dtype != torch.long or index.shape[:2] != query.shape[:2] or index.shape[2] < 1:
        raise ValueError(
            f"index must be ({query.shape[0]}, {query.shape[1]}, S, H) int64 with S at least 1, got "
            f"{tuple(index.shape)} {index.dtype}"
        )
    if query.shape[2] < 1 or index.shape[3] < 1 or query.shape[2] % index.shape[3]:
        raise ValueError(f"the {query.shape[2]} channels must be divisible by heads={index.shape[3]}")


def _empty(query: Tensor, index: Tensor) -> Tensor:
    """Scores to be: (B, M, S, H), slots next to one another, where a softmax over them reads."""
    B, M, S, H = index.shape
    return query.new_empty(B, H, M, S).permute(0, 2, 3, 1)


@operator("nearfold::slot_scores")
def slot_scores(query: Tensor, key: Tensor, index: Tensor) -> Tensor:
    """score (B, M, S, H) = dot product of query m with key index[m, s] over the head's channels; 0 where index < 0.

    Args:
        query: (B, M, C).
        key: (B, N, C) in query's dtype.
        index: (B, M, S, H) int64 positions, negative where a slot reads nothing; strides of zero are not copied.

    Sums are in float32 at least. In memory the result is (B, H, M, S). ValueError where operands do not fit, or an
    index is beyond the N positions.
    """
    _require(query, key, index)
    score = _empty(query, index)
    if served(key, query):
        q, k = widened(query, key)
        assert q is not None and k is not None
        into = score if score.dtype == q.dtype else _empty(q, index)
        engine.run(
            "aggregate_backward", q.contiguous(), as_rows(k), index, None, None, 1, None, into, None, engine.threads()
        )
        return score if into is score else score.copy_(into)
    B, M, S, H = index.shape
    rows, out = query.reshape(B * M * H, query.shape[2] // H, 1), score.permute(0, 1, 3, 2)
    with torch.autocast(query.device.type, enabled=False):
        for part, _, _, near in aggregate_torch.tiles(key, index, heads_first=True):
            found = torch.bmm(near, rows[part.start * H : part.stop * H])
            at = torch.arange(part.start, part.stop, device=query.device)
            out[at // M, at % M] = found.view(-1, H, S)
    return score.masked_fill_(index < 0, 0)


@slot_scores.register_fake
def _(query: Tensor, key: Tensor, index: Tensor) -> Tensor:
    return _empty(query, index)


@operator("nearfold::slot_scores_backward")
def slot_scores_backward(grad: Tensor, query: Tensor, key: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients at query and key."""
    _require(query, key, index)
    require_tensors(grad=grad)
    if grad.shape != index.shape or grad.dtype != query.dtype:
        raise ValueError(
            f"grad must be {tuple(index.shape)} {query.dtype} as the scores, got {tuple(grad.shape)} {grad.dtype}"
        )
    d_query = aggregate(key, index, grad, None, 1)
    if not served(key, query, grad):
        with torch.autocast(query.device.type, enabled=False):
            return d_query, aggregate_torch.backward(query, key, index, grad, None, 1)[0].contiguous()
    g, q, k = widened(grad, query, key)
    assert g is not None and q is not None and k is not None
    d_key = k.new_empty(k.shape)
    engine.run("aggregate_backward", q.contiguous(), as_rows(k), index, g, None, 1, d_key, None, None, engine.threads())
    return d_query, d_key.to(key.dtype)


@slot_scores_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    return *slot_scores_backward(grad, *ctx.saved_tensors), None


slot_scores.register_autograd(_backward, setup_context=_setup)
second.register(slot_scores_backward, lambda *operands: second.gradients(second.slot_scores)(*operands)[:2])


@register_flop_formula(torch.ops.nearfold.slot_scores)
def _flops(query_shape, key_shape, index_shape, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    B, M, C = query_shape
    return int(2 * B * M * index_shape[2] * C)


@register_flop_formula(torch.ops.nearfold.slot_scores_backward)
def _backward_flops(grad_shape, query_shape, key_shape, index_shape, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 2 * _flops(query_shape, key_shape, index_shape)
