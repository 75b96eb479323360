"""`nearfold::select`: the k best keys of every query, without ever holding all M x R scores.

One operator, three implementations: the compiled engine on the CPU, Triton on CUDA devices, and PyTorch
(`select_torch`) everywhere else.

Shape legend: B batch, H heads, M queries, R keys, e embedded features, k slots.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nearfold.kernels import approximate, cuda, engine, second, select_torch
from nearfold.kernels.names import LOW, require_tensors
from nearfold.kernels.operator import operator
from nearfold.kernels.search import Search

# what the compiled engine knows; the rounding of "gram" is that of norms and a matrix product, which PyTorch keeps
METRICS = {"dot": 0, "cosine": 1, "euclidean": 2, "chebyshev": 3}
DIFFERENTIABLE = ("dot", "cosine", "euclidean")
MOST_SLOTS = 1024  # beyond, a sort is faster than the engine's buffers


def _served(query: Tensor, key: Tensor, search: Search) -> bool:
    _, reach, dilation = search.rule
    whole = math.prod(search.grid) == key.shape[2] or (
        reach < 0 and dilation == 1
    )  # a reach needs every position as a key
    return (
        search.metric in METRICS
        and search.k <= MOST_SLOTS
        and whole
        and query.numel() * key.numel() > 0
        and engine.serves(query, key)
    )


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of scores."""
    return torch.float32 if x.dtype in LOW else x.dtype


def wide(x: Tensor) -> Tensor:
    """The tensor in the dtype of scores."""
    return x.to(wide_dtype(x))


def _require_rows(query: Tensor, key: Tensor, metric: str) -> None:
    require_tensors(query=query, key=key)
    if metric not in METRICS and metric != "gram":
        raise ValueError(f"metric must be one of {', '.join(METRICS)} and gram, got {metric!r}")
    if query.dim() != 4 or key.dim() != 4 or query.shape[:2] != key.shape[:2] or query.shape[3] != key.shape[3]:
        raise ValueError(
            f"query must be (B, H, M, e) and key (B, H, R, e), got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if query.dtype != key.dtype or not query.is_floating_point():
        raise ValueError(f"query and key must have one floating dtype, got {query.dtype} and {key.dtype}")


def _require(query: Tensor, key: Tensor, search: Search, recall: float) -> None:
    """ValueError where the operands do not fit one another."""
    k, metric, _, query_index, key_index, _, rule, _, _ = search
    _require_rows(query, key, metric)
    require_tensors(query_index=query_index, key_index=key_index)
    for name, index, n in (("query_index", query_index, query.shape[2]), ("key_index", key_index, key.shape[2])):
        if index.shape != (n,) or index.dtype != torch.long:
            raise ValueError(f"{name} must be ({n},) int64, got {tuple(index.shape)} {index.dtype}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if len(rule) != 3 or rule[0] not in (0, 1) or rule[1] < -1 or rule[2] < 1:
        raise ValueError(f"rule must be [causal 0 or 1, reach >= -1, dilation >= 1], got {rule}")
    if not 0 < recall <= 1:
        raise ValueError(f"recall must be above 0 and at most 1, got {recall}")


@operator("nearfold::select")
def select(
    query: Tensor,
    key: Tensor,
    k: int,
    metric: str,
    squared: bool,
    query_index: Tensor,
    key_index: Tensor,
    grid: list[int],
    rule: list[int],
    own: bool,
    again: float,
    recall: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Scores (B, H, M, k) and indices (B, H, M, k) into the keys of the k best, best first, ties by the lowest index.

    Scores are computed and returned in float32 at least.

    Args:
        query: (B, H, M, e), float32, float64, bfloat16 or float16, any strides.
        key: (B, H, R, e), same dtype.
        k: how many; slots beyond the keys there are: index -1, score -inf. It and the next eight: `Search`.
        metric: dot, cosine, euclidean, chebyshev or gram.
        squared: of distances.
        query_index: (M,) int64.
        key_index: (R,) int64.
        grid: sizes.
        rule: [causal, reach, dilation].
        own: whether ``again`` counts.
        again: the own position's score.
        recall: below 1, an approximate search is enough that is expected to find at least this share of the k best
            (`approximate`); it is exact where that is as fast, where ``rule`` forbids a key, and where a feature is not
            finite. Scores are exact, and equal inputs have equal results.

    A NaN key is never chosen; a NaN query has NaN scores and indices -2.
    """
    search = Search(k, metric, squared, query_index, key_index, grid, rule, own, again)
    _require(query, key, search, recall)
    if recall < 1:
        query, key = wide(query), wide(key)
        if (found := approximate.select(query, key, search, recall, _exact)) is not None:
            return found
    return _exact(query, key, search)


def _exact(query: Tensor, key: Tensor, search: Search) -> tuple[Tensor, Tensor]:
    k, metric, squared, query_index, key_index, grid, (causal, reach, dilation), own, again = search
    slots = (*query.shape[:3], k)
    kernels = cuda.kernels("select", query, key)
    if kernels is not None and query.numel() * key.numel() and not kernels.refusal(query, key, search):
        found: tuple[Tensor, Tensor] = kernels.select(query, key, search)
        return found
    query, key = wide(query), wide(key)
    if not _served(query, key, search):
        with torch.autocast(query.device.type, enabled=False):
            flat = select_torch.select(query.flatten(0, 1), key.flatten(0, 1), search)
        return flat[0].view(slots), flat[1].view(slots)
    score, index = query.new_empty(slots), torch.empty(slots, dtype=torch.long)
    engine.run(
        "select",
        *(query, key, METRICS[metric], squared, query_index.contiguous(), key_index.contiguous(), grid),
        *(bool(causal), reach, dilation, own, again, score, index, engine.threads()),
    )
    return score, index


@select.register_fake
def _(
    query: Tensor,
    key: Tensor,
    k: int,
    metric: str,
    squared: bool,
    query_index: Tensor,
    key_index: Tensor,
    grid: list[int],
    rule: list[int],
    own: bool,
    again: float,
    recall: float = 1.0,
) -> tuple[Tensor, Tensor]:
    shape = (*query.shape[:3], k)
    return query.new_empty(shape, dtype=wide_dtype(query)), query.new_empty(shape, dtype=torch.long)


@operator("nearfold::select_backward")
def select_backward(
    grad: Tensor, query: Tensor, key: Tensor, index: Tensor, metric: str, squared: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `select`'s scores at query and key; ``grad`` is zero where the score was a constant."""
    _require_rows(query, key, metric)
    require_tensors(grad=grad, index=index)
    if grad.shape != index.shape or grad.shape[:3] != query.shape[:3] or grad.dtype != wide_dtype(query):
        raise ValueError(
            f"grad must be {tuple(query.shape[:3])} and slots, in {wide_dtype(query)}, and index alike, got "
            f"{tuple(grad.shape)} {grad.dtype} and {tuple(index.shape)}"
        )
    kernels = cuda.kernels("select", grad, query, key)
    if (
        kernels is not None
        and query.numel() * key.numel()
        and not kernels.refusal_of_rows(query, key, index.shape[3], metric)
    ):
        made: tuple[Tensor, Tensor] = kernels.select_backward(
            grad, query, key, index, metric, squared, deterministic=cuda.deterministic()
        )
        return made
    if query.dtype in LOW:
        d_wide = select_backward(grad, wide(query), wide(key), index, metric, squared)
        return d_wide[0].to(query.dtype), d_wide[1].to(key.dtype)
    d_query, d_key = torch.empty_like(query), torch.empty_like(key)
    if metric not in DIFFERENTIABLE or query.numel() * key.numel() == 0 or not engine.serves(grad, query, key):
        if index.numel() and int(index.max()) >= key.shape[2]:  # it would read another head's key
            raise ValueError(f"index holds a position beyond the {key.shape[2]} keys: {int(index.max())}")
        with torch.autocast(query.device.type, enabled=False):
            flat = select_torch.select_backward(
                grad.flatten(0, 1), query.flatten(0, 1), key.flatten(0, 1), index.flatten(0, 1), metric, squared
            )
        return d_query.copy_(flat[0].view_as(query)), d_key.copy_(flat[1].view_as(key))
    query, key = _rows(query), _rows(key)
    into_query, into_key = _rows(d_query), _rows(d_key)
    engine.run(
        "select_backward",
        grad.contiguous(),
        query,
        key,
        index.contiguous(),
        METRICS[metric],
        squared,
        into_query,
        into_key,
        engine.threads(),
    )
    if into_query is not d_query:
        d_query.copy_(into_query)
    if into_key is not d_key:
        d_key.copy_(into_key)
    return d_query, d_key


def _rows(x: Tensor) -> Tensor:
    """The tensor itself where its features lie next to one another, or a copy where they do."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


@select_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, index: Tensor, metric: str, squared: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, _, metric, squared, query_index, key_index, _, _, own, _, _ = inputs
    ctx.save_for_backward(query, key, output[1], query_index, key_index)
    ctx.metric, ctx.squared, ctx.own = metric, squared, own
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the indices


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 12
    query, key, index, query_index, key_index = ctx.saved_tensors
    if ctx.own:  # the own position's score is a constant
        grad = grad.masked_fill(key_index[index.clamp(min=0)] == query_index[:, None], 0)
    d_query, d_key = select_backward(grad, query, key, index, ctx.metric, ctx.squared)
    return d_query, d_key, *(None,) * 10


select.register_autograd(_backward, setup_context=_setup)
second.register(select_backward, lambda *operands: second.gradients(second.chosen_scores)(*operands)[:2])


@register_flop_formula(torch.ops.nearfold.select)
def _select_flops(query_shape, key_shape, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    """Of the exact search among the keys that the rule allows away from the border.

    How many fewer an approximate one needs depends on the data.
    """
    B, H, M, e = query_shape
    grid, (_, reach, dilation) = args[5], args[6]
    keys = key_shape[2]
    if reach >= 0:
        keys = min(keys, math.prod(min(n, 2 * (reach // dilation) + 1) for n in grid))
    return int(2 * B * H * M * keys * e)


@register_flop_formula(torch.ops.nearfold.select_backward)
def _select_backward_flops(grad_shape, query_shape, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    B, H, M, k = grad_shape
    return int(4 * B * H * M * k * query_shape[-1])
