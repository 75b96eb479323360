"""`nearfold::fast_weights`: matrices that a sequence writes and reads (DeltaNet, RetNet, GLA, mLSTM, RWKV-7).

One operator: the compiled engine on the CPU, step after step with the matrix in the first cache; PyTorch by chunks
(`fast_weights_torch`) everywhere else, on CUDA devices, too. The forward keeps the matrix before every chunk of
positions, the backward makes those within a chunk again.

Shape legend: B batch, N positions, H heads, K chunks of `fast_weights_torch.CHUNK` positions, s features of query and
key, p of value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nearfold.kernels import engine, fast_weights_torch, second
from nearfold.kernels.aggregate import served, widened
from nearfold.kernels.names import LOW, require_tensors
from nearfold.kernels.operator import differentiated, operator

NAMES = ("query", "key", "value", "log_decay", "beta", "left", "right")


def _require(*operands: Tensor | None) -> None:
    """ValueError where the operands do not fit one another."""
    named = zip(NAMES, operands, strict=True)
    given: dict[str, Any] = {name: x for name, x in named if x is not None or name in NAMES[:3]}
    require_tensors(**given)
    query, _, value = (given[name] for name in NAMES[:3])

    def got() -> str:
        return ", ".join(f"{name} {tuple(x.shape)} {x.dtype}" for name, x in given.items())

    if query.dim() != 4 or value.dim() != 4 or value.shape[:3] != query.shape[:3]:
        raise ValueError(f"query must be (B, N, H, s) and value (B, N, H, p), got {got()}")
    rows, each = tuple(query.shape), tuple(query.shape[:3])
    allowed = dict.fromkeys(NAMES, (rows,)) | {"log_decay": (rows, (*each, 1)), "beta": (each,), "value": ()}
    for name, x in given.items():
        if allowed[name] and tuple(x.shape) not in allowed[name]:
            raise ValueError(f"{name} must be {' or '.join(map(str, allowed[name]))} as query and value, got {got()}")
    if ("left" in given) != ("right" in given) or ("beta" in given and "left" in given):
        raise ValueError(f"left and right go together, and not with beta; got {', '.join(given)}")
    if rows[2] < 1 or rows[3] < 1 or value.shape[3] < 1:
        raise ValueError(f"there must be heads and features, got {got()}")
    if any(x.dtype != query.dtype or x.device != query.device for x in given.values()) or not query.is_floating_point():
        devices = ", ".join(str(x.device) for x in given.values())
        raise ValueError(f"the operands must have one floating dtype and one device, got {got()} on {devices}")


def _require_backward(grad: Tensor, value: Tensor, states: Tensor, reads: Tensor, kept: tuple[Any, Any]) -> None:
    require_tensors(grad=grad, states=states, reads=reads)
    if grad.shape != value.shape or grad.dtype != value.dtype:
        wanted = f"{tuple(value.shape)} {value.dtype}"
        raise ValueError(f"grad must be {wanted} as the output, got {tuple(grad.shape)} {grad.dtype}")
    dtype = _compute(value.dtype)
    for name, x, shape in (("states", states, kept[0]), ("reads", reads, kept[1])):
        if x.shape != shape or x.dtype != dtype:
            raise ValueError(
                f"{name} must be {shape} {dtype} as the forward returned them, got {tuple(x.shape)} {x.dtype}"
            )


def _compute(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in LOW else dtype


def _kept(query: Tensor, value: Tensor, corrected: bool, keep: bool = True) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the states and of what a correction read."""
    (B, N, H, s), p = query.shape, value.shape[3]
    chunks = fast_weights_torch.chunks_of(N) if keep else 0
    return (B, H, chunks, s, p), (B, N if keep and corrected else 0, H, p)


def _plain(*operands: Tensor | None) -> list[Tensor | None]:
    """As the engine takes them."""
    return [None if x is None else x.contiguous() for x in widened(*operands)]


@operator("nearfold::fast_weights")
def fast_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    left: Tensor | None = None,
    right: Tensor | None = None,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """y_t = S_t^T query_t of S_t = diag(exp(log_decay_t)) S_{t-1} + left_t right_t^T S_{t-1} + key_t value_t^T.

    S is (s, p), zero before the first position. ``beta`` instead of left and right is the delta rule: what the decayed
    state holds under a key is replaced, by a share beta, with the value,

        S_t = D S_{t-1} + beta_t key_t (value_t - (D S_{t-1})^T key_t)^T,  D = diag(exp(log_decay_t)).

    Args:
        query: (B, N, H, s), floating; all operands in its dtype.
        key: (B, N, H, s).
        value: (B, N, H, p).
        log_decay: (B, N, H, 1), one for a head, or (B, N, H, s); normally at most 0 and as low as one
            likes; None for no decay.
        beta: (B, N, H); None without the delta rule.
        left: (B, N, H, s), with ``right``: any correction of rank one; None for none.
        right: (B, N, H, s).
        keep: whether there will be a backward, which needs what is kept; without, it computes it again.

    Returns:
        y (B, N, H, p) in the dtype of query, and for the backward, without gradient, the states (B, H, K, s, p) before
        every chunk and what the correction read (B, N, H, p), both empty where nothing is kept; bfloat16 and float16
        are computed in float32, and what is kept is float32.

    Raises:
        ValueError: where shapes, dtypes or devices do not fit.

    Delta rule: arXiv 2406.06484; with decays: arXiv 2412.06464; the general form: RWKV-7, arXiv 2503.14456.
    """
    operands = (query, key, value, log_decay, beta, left, right)
    _require(*operands)
    wide = _plain(*operands)
    shapes = _kept(query, value, beta is not None or left is not None, keep)
    made = _compute(query.dtype)
    if not served(query, *(x for x in operands if x is not None)) or not value.numel():
        states, reads = (query.new_empty(shape, dtype=made) for shape in shapes)
        if not value.numel():
            return torch.zeros_like(value, memory_format=torch.contiguous_format), states, reads
        with torch.autocast(query.device.type, enabled=False):
            y, before, read = fast_weights_torch.forward(*wide)  # type: ignore[arg-type]
        if keep:
            states, reads = before.contiguous(), reads if read is None else read.contiguous()
        return y.to(query.dtype).contiguous(), states, reads
    y, states, reads = (query.new_empty(shape, dtype=made) for shape in (value.shape, *shapes))
    some = reads if reads.numel() else None
    engine.run("fast", *wide, fast_weights_torch.CHUNK, y, some, states if keep else None, engine.threads())
    return y.to(query.dtype), states, reads


@fast_weights.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    left: Tensor | None = None,
    right: Tensor | None = None,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    _require(query, key, value, log_decay, beta, left, right)
    kept = _kept(query, value, beta is not None or left is not None, keep)
    states, reads = (query.new_empty(shape, dtype=_compute(query.dtype)) for shape in kept)
    return value.new_empty(value.shape), states, reads


@operator("nearfold::fast_weights_backward")
def fast_weights_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    states: Tensor,
    reads: Tensor,
) -> list[Tensor]:
    """Gradients at the operands that are there, given that at y (B, N, H, p) and what the forward kept.

    The sums over features, positions and heads are added in an order that does not depend on the number of threads.
    """
    operands = (query, key, value, log_decay, beta, left, right)
    _require(*operands)
    _require_backward(grad, value, states, reads, _kept(query, value, beta is not None or left is not None))
    there = [x for x in operands if x is not None]
    if not value.numel():
        return [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in there]
    wide = _plain(*operands)
    wide_grad = grad.to(_compute(grad.dtype)).contiguous()
    if served(query, *there):
        made: list[Tensor | None] = [None if x is None else torch.empty_like(x) for x in wide]
        some = reads if reads.numel() else None
        each = (wide_grad, *wide, fast_weights_torch.CHUNK, some, states, *made, engine.threads())
        engine.run("fast_backward", *each)
        found = [x for x in made if x is not None]
    else:
        found = _again(wide_grad, *wide)
    return [x.to(like.dtype).contiguous() for x, like in zip(found, there, strict=True)]


def _again(grad: Tensor, *operands: Tensor | None) -> list[Tensor]:
    """At the operands that are there, by autograd through the chunks."""
    with differentiated(), torch.autocast(grad.device.type, enabled=False):
        leaves: Any = [None if x is None else x.detach().requires_grad_() for x in operands]
        y = fast_weights_torch.forward(*leaves)[0]
        return list(torch.autograd.grad(y, [x for x in leaves if x is not None], grad))


@fast_weights_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    states: Tensor,
    reads: Tensor,
) -> list[Tensor]:
    operands = (query, key, value, log_decay, beta, left, right)
    return [x.new_empty(x.shape) for x in operands if x is not None]


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.there = [x is not None for x in inputs[:7]]
    ctx.save_for_backward(*(x for x in inputs[:7] if x is not None), *output[1:])
    ctx.keep = inputs[7]
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
    *given, states, reads = ctx.saved_tensors
    rest = iter(given)
    operands: Any = [next(rest) if there else None for there in ctx.there]
    if not ctx.keep:
        states, reads = fast_weights(*operands)[1:]
    made = iter(fast_weights_backward(*(grad, *operands, states, reads)))
    return *(next(made) if there else None for there in ctx.there), None


fast_weights.register_autograd(_backward, setup_context=_setup)


def _twice(grad, *operands):  # type: ignore[no-untyped-def]
    made = second.gradients(lambda *given: fast_weights_torch.forward(*given)[0])(grad, *operands[:7])
    return [x for x, given in zip(made, operands, strict=False) if given is not None]


second.register(fast_weights_backward, _twice)


def _numbers(query_shape: Any, value_shape: Any) -> int:
    B, N, H, s = query_shape
    return int(B * N * H * s * value_shape[3])


@register_flop_formula(torch.ops.nearfold.fast_weights)
def _flops(query_shape, key_shape, value_shape, decay=None, beta=None, left=None, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    # of every number of the state: its decay, what is written and what the query reads, each a product and a sum; what
    # a correction reads is two more, and under the general rule two to write it
    return (5 + 2 * (beta is not None) + 4 * (left is not None)) * _numbers(query_shape, value_shape)


@register_flop_formula(torch.ops.nearfold.fast_weights_backward)
def _backward_flops(grad, query_shape, key_shape, value_shape, *rest, **kwargs) -> int:  # type: ignore[no-untyped-def]
    beta, left = rest[1:3]
    # the states again (3), and of the adjoint: what query, key, value and decay get, the query's share, its decay (11)
    return (14 + 4 * (beta is not None) + 10 * (left is not None)) * _numbers(query_shape, value_shape)
