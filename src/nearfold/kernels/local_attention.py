"""`nearfold::local_attention`: softmax over the slots of a window, and the weighted sum of their values.

One operator, three implementations: the compiled engine on the CPU, Triton on CUDA devices, and PyTorch
(`local_attention_torch`) everywhere else. None unfolds; the engine holds the scores of one vector of outputs at a time,
forward and backward.

Shape legend: B batch, H heads, e embedded features, d value features, S slots, `*grid` the keys' grid, `*out` the
output grid; one to three grid axes.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nearfold.kernels import cuda, engine, local_attention_torch, second
from nearfold.kernels.local_attention_torch import Window
from nearfold.kernels.names import require_tensors
from nearfold.kernels.operator import operator

METRICS = {"dot": 0, "euclidean": 2}
MOST_NUMBER = 2**24 - 1  # of a window: products stay integers


def _require(query: Tensor, key: Tensor, value: Tensor, window: Window, metric: str) -> None:
    """ValueError where the operands do not fit one another."""
    require_tensors(query=query, key=key, value=value)
    axes = query.dim() - 3
    if not 1 <= axes <= 3 or key.dim() != query.dim() or value.dim() != query.dim():
        raise ValueError(
            "query (B, H, e, *out), key (B, H, e, *grid) and value (B, H, d, *grid) must have 1 to 3 grid axes, got "
            f"shapes {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if (
        key.shape[:3] != query.shape[:3]
        or value.shape[:2] != query.shape[:2]
        or value.shape[3:] != key.shape[3:]
        or not query.dtype == key.dtype == value.dtype
    ):
        raise ValueError(
            "query (B, H, e, *out), key (B, H, e, *grid) and value (B, H, d, *grid) do not fit: got "
            f"{tuple(query.shape)} {query.dtype}, {tuple(key.shape)} {key.dtype} and {tuple(value.shape)} {value.dtype}"
        )
    for name, least in (("size", 1), ("stride", 1), ("dilation", 1), ("before", 0)):
        numbers = getattr(window, name)
        if len(numbers) != axes or min(numbers) < least or max(numbers) > MOST_NUMBER:
            raise ValueError(
                f"{name} must be {axes} integers from {least} to {MOST_NUMBER}, one per grid axis, got {numbers}"
            )
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")


def _served(*tensors: Tensor) -> bool:
    return all(t.numel() > 0 for t in tensors) and engine.serves(*tensors)


@operator("nearfold::local_attention")
def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    size: list[int],
    stride: list[int],
    dilation: list[int],
    before: list[int],
    reflect: bool,
    metric: str,
    squared: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """y (B, H, d, *out) = sum over slots of softmax(scale * score) * value, and what the backward needs of the softmax.

    Args:
        query: (B, H, e, *out), any strides, as all operands.
        key: (B, H, e, *grid), same dtype.
        value: (B, H, d, *grid), same dtype.
        size: slots per axis. Slot k of output o reads the position o * stride + k * dilation - before of an axis.
        stride: per axis.
        dilation: per axis.
        before: padding before the first position, per axis; after the last there is as much as the outputs read.
        reflect: whether positions outside the grid are mirrored ones; otherwise they have weight zero.
        metric: "dot", or "euclidean" for minus the distance.
        squared: with euclidean, minus the squared distance.
        scale: of the scores.

    The second result (B, H, 2, *out) is the largest score and one over the sum of exponentials; it has no gradient.
    An output without any slot inside the grid is zero.
    """
    window = Window(size, stride, dilation, before, reflect)
    _require(query, key, value, window, metric)
    kernels = _on_gpu(window, metric, query, key, value)
    if kernels is not None:
        made: tuple[Tensor, Tensor] = kernels.local_attention(
            query, key, value, size, stride, dilation, before, reflect, metric, squared, scale
        )
        return made
    if not _served(query, key, value):
        with torch.autocast(query.device.type, enabled=False):
            return local_attention_torch.forward(query, key, value, window, metric, squared, scale)
    y, stats = _outputs(query, value)
    engine.run(
        "local",
        *(query, key, value, size, stride, dilation, before, reflect, METRICS[metric], squared, scale),
        *(y, stats, engine.threads()),
    )
    return y, stats


def _on_gpu(
    window: Window, metric: str, query: Tensor, key: Tensor, value: Tensor, grad: Tensor | None = None
) -> ModuleType | None:
    """The Triton kernels, where they can compute this."""
    kernels = cuda.kernels("local_attention", query, key, value, grad)
    if kernels is None:
        return None
    no = kernels.refusal(
        query, key, value, window.size, window.stride, window.dilation, window.before, window.reflect, metric
    )
    return None if no else kernels


def _outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    B, H, _, *out = query.shape
    return value.new_empty(B, H, value.shape[2], *out), value.new_empty(B, H, 2, *out)


@local_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    size: list[int],
    stride: list[int],
    dilation: list[int],
    before: list[int],
    reflect: bool,
    metric: str,
    squared: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _outputs(query, value)


@operator("nearfold::local_attention_backward")
def local_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stats: Tensor,
    size: list[int],
    stride: list[int],
    dilation: list[int],
    before: list[int],
    reflect: bool,
    metric: str,
    squared: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at query, key and value; at distance zero the distance's gradient is zero."""
    window = Window(size, stride, dilation, before, reflect)
    _require(query, key, value, window, metric)
    require_tensors(grad=grad, stats=stats)
    B, H, _, *out = query.shape
    for name, t, channels in (("grad", grad, value.shape[2]), ("stats", stats, 2)):
        if list(t.shape) != [B, H, channels, *out] or t.dtype != query.dtype:
            raise ValueError(f"{name} must be {(B, H, channels, *out)} {query.dtype}, got {tuple(t.shape)} {t.dtype}")
    kernels = _on_gpu(window, metric, query, key, value, grad)
    if kernels is not None:
        made: tuple[Tensor, Tensor, Tensor] = kernels.local_attention_backward(
            grad, query, key, value, stats, size, stride, dilation, before, reflect, metric, squared, scale
        )
        return made
    if not _served(query, key, value, grad, stats):
        with torch.autocast(query.device.type, enabled=False):
            return local_attention_torch.backward(grad, query, key, value, stats, window, metric, squared, scale)
    found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    engine.run(
        "local_backward",
        *(grad, query, key, value, stats, size, stride, dilation, before, reflect, METRICS[metric], squared, scale),
        *(*found, engine.threads()),
    )
    return found


@local_attention_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stats: Tensor,
    size: list[int],
    stride: list[int],
    dilation: list[int],
    before: list[int],
    reflect: bool,
    metric: str,
    squared: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, *ctx.rest = inputs
    ctx.save_for_backward(query, key, value, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    return *local_attention_backward(grad, *ctx.saved_tensors, *ctx.rest), *(None,) * 8


local_attention.register_autograd(_backward, setup_context=_setup)


def _again(grad, query, key, value, stats, size, stride, dilation, before, reflect, metric, squared, scale):  # type: ignore[no-untyped-def]
    window = Window(size, stride, dilation, before, reflect)

    def formula(q, k, v):  # type: ignore[no-untyped-def]
        return local_attention_torch.differentiable(q, k, v, window, metric, squared, scale)

    return second.gradients(formula)(grad, query, key, value)


second.register(local_attention_backward, _again)


def _flops(query: tuple[int, ...], value: tuple[int, ...], size: list[int]) -> int:
    pairs = query[0] * query[1] * math.prod(query[3:]) * math.prod(size)
    return 2 * pairs * (query[2] + value[2])


@register_flop_formula(torch.ops.nearfold.local_attention)
def _forward_flops(query, key, value, size, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return _flops(query, value, size)


@register_flop_formula(torch.ops.nearfold.local_attention_backward)
def _backward_flops(grad, query, key, value, stats, size, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 2 * _flops(query, value, size)
