"""`nearfold::aggregate`: sum over slots of alpha * W_s * value[index], without holding (B, C, N, k).

A slot may hold several entries that share its W_s, as the corners around a fractional position do.

One operator, three implementations: the compiled engine on the CPU, Triton on CUDA devices, and PyTorch
(`aggregate_torch`) everywhere else.

Shape legend: B batch, N positions, C value channels, H heads (each selects on its own), M outputs, S slots, O output
channels.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nearfold.kernels import aggregate_torch, cuda, engine, second
from nearfold.kernels.aggregate_torch import out_channels
from nearfold.kernels.names import LOW, require_tensors
from nearfold.kernels.operator import operator


def _require(
    value: Tensor, index: Tensor, alpha: Tensor | None, weight: Tensor | None, groups: int, entries: int
) -> None:
    """ValueError where the operands do not fit one another."""
    require_tensors(value=value, index=index)
    if value.dim() != 3 or index.dim() != 4 or index.dtype != torch.long or value.shape[0] != index.shape[0]:
        raise ValueError(
            "value must be (B, N, C) and index (B, M, S, H) int64, got "
            f"{tuple(value.shape)} and {tuple(index.shape)} {index.dtype}"
        )
    C, SE, H = value.shape[2], index.shape[2], index.shape[3]
    if alpha is not None and (alpha.shape != index.shape or alpha.dtype != value.dtype):
        raise ValueError(
            f"alpha must be {tuple(index.shape)} {value.dtype} as index and value, "
            f"got {tuple(alpha.shape)} {alpha.dtype}"
        )
    if C < 1 or SE < 1:
        raise ValueError(
            f"value and index must have channels and slots, got {tuple(value.shape)}, {tuple(index.shape)}"
        )
    if H < 1 or C % H or groups < 1 or C % groups:
        raise ValueError(f"the {C} channels must be divisible by heads={H} and by groups={groups}")
    if entries < 1 or SE % entries:
        raise ValueError(f"the {SE} slots of index must be divisible by entries={entries}")
    S = SE // entries
    if weight is not None and (
        weight.dim() != 3
        or weight.shape[1:] != (C // groups, S)
        or weight.shape[0] % groups
        or weight.dtype != value.dtype
    ):
        raise ValueError(
            f"weight must be (O, {C // groups}, {S}) {value.dtype} with O divisible by groups={groups}, for {SE} slots "
            f"of index and entries={entries}, got "
            f"{tuple(weight.shape)} {weight.dtype}"
        )


def _on_gpu(
    value: Tensor, index: Tensor, alpha: Tensor | None, weight: Tensor | None, groups: int, entries: int
) -> ModuleType | None:
    """The Triton kernels, where they can compute this."""
    kernels = cuda.kernels("aggregate", value, index, alpha, weight)
    if kernels is None or value.numel() * index.numel() == 0:
        return None
    return None if kernels.refusal(value, index, alpha, weight, groups, entries) else kernels


def served(value: Tensor, *others: Tensor | None) -> bool:
    """Whether the engine computes this; bfloat16 and float16 are widened for it, O(N C) numbers."""
    if value.numel() == 0:
        return False
    if value.dtype in LOW:
        return value.device.type == "cpu" and engine.get() is not None
    return engine.serves(value, *others)


def widened(*tensors: Tensor | None) -> list[Tensor | None]:
    """bfloat16 and float16 as float32, everything else as it is."""
    return [t.float() if t is not None and t.dtype in LOW else t for t in tensors]


@operator("nearfold::aggregate")
def aggregate(
    value: Tensor, index: Tensor, alpha: Tensor | None, weight: Tensor | None, groups: int, entries: int = 1
) -> Tensor:
    """y (B, M, O) = sum over slots s of W_s (sum over the slot's entries e of alpha[.., e] * value[index[.., e]]).

    Args:
        value: (B, N, C).
        index: (B, M, S * entries, H) int64 positions; -1 reads nothing; -2 too, and without alpha it makes the output
            NaN. Slot s owns the entries from s * entries on; head h reads C / H consecutive channels.
        alpha: (B, M, S * entries, H) in value's dtype, or None for ones.
        weight: (O, C / groups, S) in value's dtype; (C, 1, S) with groups = C is depthwise; None for ones.
        groups: groups of the kernel.
        entries: entries of a slot, at least 1. Without a weight they only make more slots.

    Sums are in float32 at least. ValueError where operands do not fit, or an index is beyond the N positions.
    """
    _require(value, index, alpha, weight, groups, entries)
    kernels = _on_gpu(value, index, alpha, weight, groups, entries)
    if kernels is not None:
        made: Tensor = kernels.aggregate(value, index, alpha, weight, groups, entries)
        return made
    if not served(value, alpha, weight):
        with torch.autocast(value.device.type, enabled=False):
            return aggregate_torch.aggregate(value, index, alpha, weight, groups, entries)
    wide_value, wide_alpha, wide_weight = widened(value, alpha, weight)
    assert wide_value is not None
    wide = as_rows(wide_value)
    out = wide.new_empty(value.shape[0], index.shape[1], out_channels(value, weight))
    if wide_weight is not None:
        wide_weight = wide_weight.contiguous()
    engine.run("aggregate", wide, index, wide_alpha, wide_weight, groups, out, engine.threads(), entries)
    return out.to(value.dtype)


def as_rows(value: Tensor) -> Tensor:
    """The tensor itself where rows lie apart and their channels next to one another, or a copy where they do."""
    C = value.shape[2]
    if (C <= 1 or value.stride(2) == 1) and (value.shape[1] <= 1 or value.stride(1) >= C):
        return value
    return value.contiguous()


@aggregate.register_fake
def _(
    value: Tensor, index: Tensor, alpha: Tensor | None, weight: Tensor | None, groups: int, entries: int = 1
) -> Tensor:
    return value.new_empty(value.shape[0], index.shape[1], out_channels(value, weight))


@operator("nearfold::aggregate_backward")
def aggregate_backward(
    grad: Tensor,
    value: Tensor,
    index: Tensor,
    alpha: Tensor | None,
    weight: Tensor | None,
    groups: int,
    entries: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at value, alpha and weight (empty tensors for those that are None)."""
    _require(value, index, alpha, weight, groups, entries)
    require_tensors(grad=grad)
    out = (value.shape[0], index.shape[1], out_channels(value, weight))
    if grad.shape != out or grad.dtype != value.dtype:
        raise ValueError(f"grad must be {out} {value.dtype} as the output, got {tuple(grad.shape)} {grad.dtype}")
    none = value.new_empty(0)
    kernels = _on_gpu(value, index, alpha, weight, groups, entries)
    if kernels is not None:
        d_value, d_slots, d_weight = kernels.aggregate_backward(
            grad, value, index, alpha, weight, groups, entries, deterministic=cuda.deterministic()
        )
        if alpha is not None and d_slots.stride() != (like := torch.empty_like(alpha)).stride():
            d_slots = like.copy_(d_slots)  # laid out as the fake says
        return d_value, d_slots, d_weight
    d_alpha = none if alpha is None else torch.empty_like(alpha)
    if not served(value, grad, alpha, weight):
        with torch.autocast(value.device.type, enabled=False):
            d_value, found, d_weight = aggregate_torch.backward(grad, value, index, alpha, weight, groups, entries)
        return d_value.contiguous(), d_alpha if alpha is None else d_alpha.copy_(found), d_weight.contiguous()
    wide_grad, wide_value, wide_alpha, wide_weight = widened(grad, value, alpha, weight)
    assert wide_grad is not None and wide_value is not None
    wide = as_rows(wide_value)
    if wide_weight is not None:
        wide_weight = wide_weight.contiguous()
    d_value = wide.new_empty(wide.shape)
    d_kernel = None if wide_weight is None else torch.empty_like(wide_weight)
    into = None if wide_alpha is None else torch.empty_like(wide_alpha)
    engine.run(
        "aggregate_backward",
        wide_grad.contiguous(),
        wide,
        index,
        wide_alpha,
        wide_weight,
        groups,
        d_value,
        into,
        d_kernel,
        engine.threads(),
        entries,
    )
    if into is not None:
        d_alpha = into if into.dtype == value.dtype else d_alpha.copy_(into)
    return d_value.to(value.dtype), d_alpha, none.clone() if d_kernel is None else d_kernel.to(value.dtype)


@aggregate_backward.register_fake
def _(
    grad: Tensor,
    value: Tensor,
    index: Tensor,
    alpha: Tensor | None,
    weight: Tensor | None,
    groups: int,
    entries: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    none = value.new_empty(0)
    d_alpha = none if alpha is None else torch.empty_like(alpha)
    d_weight = none.clone() if weight is None else weight.new_empty(weight.shape)
    return value.new_empty(value.shape), d_alpha, d_weight


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    value, index, alpha, weight, groups, entries = inputs
    ctx.save_for_backward(value, index, alpha, weight)
    ctx.groups, ctx.entries = groups, entries


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    value, index, alpha, weight = ctx.saved_tensors
    d_value, d_alpha, d_weight = aggregate_backward(grad, value, index, alpha, weight, ctx.groups, ctx.entries)
    return d_value, None, None if alpha is None else d_alpha, None if weight is None else d_weight, None, None


aggregate.register_autograd(_backward, setup_context=_setup)


def _again(grad, value, index, alpha, weight, groups, entries=1):  # type: ignore[no-untyped-def]
    found = second.gradients(second.aggregate)(grad, value, index, alpha, weight, groups, entries)
    return found[0], found[2], found[3]


second.register(aggregate_backward, _again)


def _count(value_shape, index_shape, weight_shape, groups, entries) -> int:  # type: ignore[no-untyped-def]
    B, _, C = value_shape
    _, M, SE, _ = index_shape
    if weight_shape is None:
        return int(2 * B * M * SE * C)
    blending = 2 * SE * C if entries > 1 else 0
    return int(B * M * (2 * SE // entries * C * (weight_shape[0] // groups) + blending))


@register_flop_formula(torch.ops.nearfold.aggregate)
def _flops(value_shape, index_shape, alpha_shape, weight_shape, groups, entries=1, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return _count(value_shape, index_shape, weight_shape, groups, entries)


@register_flop_formula(torch.ops.nearfold.aggregate_backward)
def _backward_flops(  # type: ignore[no-untyped-def]
    grad_shape, value_shape, index_shape, alpha_shape, weight_shape, groups, entries=1, **kwargs
) -> int:
    return 2 * _count(value_shape, index_shape, weight_shape, groups, entries)
