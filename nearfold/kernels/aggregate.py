"""`nearfold::aggregate`: sum over slots of alpha * W_s * value[index], without holding (B, C, N, k).

One operator, two implementations: the compiled engine on the CPU, and PyTorch (`aggregate_torch`) everywhere else.

Shape legend: B batch, N positions, C value channels, H heads (each selects on its own), M outputs, S slots, O output
channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nearfold.kernels import aggregate_torch, engine
from nearfold.kernels.aggregate_torch import out_channels

LOW = (torch.bfloat16, torch.float16)


def _require(value: Tensor, index: Tensor, alpha: Tensor | None, weight: Tensor | None, groups: int) -> None:
    """ValueError where the operands do not fit one another."""
    if value.dim() != 3 or index.dim() != 4 or index.dtype != torch.long or value.shape[0] != index.shape[0]:
        raise ValueError(
            "value must be (B, N, C) and index (B, M, S, H) int64, got "
            f"{tuple(value.shape)} and {tuple(index.shape)} {index.dtype}"
        )
    C, S, H = value.shape[2], index.shape[2], index.shape[3]
    if alpha is not None and (alpha.shape != index.shape or alpha.dtype != value.dtype):
        raise ValueError(
            f"alpha must be {tuple(index.shape)} {value.dtype} as index and value, "
            f"got {tuple(alpha.shape)} {alpha.dtype}"
        )
    if C < 1 or S < 1:
        raise ValueError(
            f"value and index must have channels and slots, got {tuple(value.shape)}, {tuple(index.shape)}"
        )
    if H < 1 or C % H or groups < 1 or C % groups:
        raise ValueError(f"the {C} channels must be divisible by heads={H} and by groups={groups}")
    if weight is not None and (
        weight.dim() != 3
        or weight.shape[1:] != (C // groups, S)
        or weight.shape[0] % groups
        or weight.dtype != value.dtype
    ):
        raise ValueError(
            f"weight must be (O, {C // groups}, {S}) {value.dtype} with O divisible by groups={groups}, got "
            f"{tuple(weight.shape)} {weight.dtype}"
        )


def _served(value: Tensor, *others: Tensor | None) -> bool:
    """Whether the engine computes this; bfloat16 and float16 are widened for it, O(N C) numbers."""
    if value.numel() == 0:
        return False
    if value.dtype in LOW:
        return value.device.type == "cpu" and engine.get() is not None
    return engine.serves(value, *others)


def _wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t.float() if t is not None and t.dtype in LOW else t for t in tensors]


@torch.library.custom_op("nearfold::aggregate", mutates_args=())
def aggregate(value: Tensor, index: Tensor, alpha: Tensor | None, weight: Tensor | None, groups: int) -> Tensor:
    """y (B, M, O) = sum over slots s of alpha[.., s] * W_s value[index[.., s]].

    Args:
        value: (B, N, C).
        index: (B, M, S, H) int64 positions; -1 reads nothing; -2 too, and without alpha it makes the output NaN.
        alpha: (B, M, S, H) in value's dtype, or None for ones.
        weight: (O, C / groups, S) in value's dtype; (C, 1, S) with groups = C is depthwise; None for ones.
        groups: groups of the kernel.

    Sums are in float32 at least. ValueError where operands do not fit, or an index is beyond the N positions.
    """
    _require(value, index, alpha, weight, groups)
    if not _served(value, alpha, weight):
        with torch.autocast(value.device.type, enabled=False):
            return aggregate_torch.aggregate(value, index, alpha, weight, groups)
    module = engine.get()
    assert module is not None
    wide_value, wide_alpha, wide_weight = _wide(value, alpha, weight)
    assert wide_value is not None
    wide = _rows(wide_value)
    out = wide.new_empty(value.shape[0], index.shape[1], out_channels(value, weight))
    if wide_weight is not None:
        wide_weight = wide_weight.contiguous()
    module.aggregate(wide, index, wide_alpha, wide_weight, groups, out, engine.threads())
    return out.to(value.dtype)


def _rows(value: Tensor) -> Tensor:
    """The tensor itself where rows lie apart and their channels next to one another, or a copy where they do."""
    C = value.shape[2]
    if (C <= 1 or value.stride(2) == 1) and (value.shape[1] <= 1 or value.stride(1) >= C):
        return value
    return value.contiguous()


@aggregate.register_fake
def _(value: Tensor, index: Tensor, alpha: Tensor | None, weight: Tensor | None, groups: int) -> Tensor:
    return value.new_empty(value.shape[0], index.shape[1], out_channels(value, weight))


@torch.library.custom_op("nearfold::aggregate_backward", mutates_args=())
def aggregate_backward(
    grad: Tensor, value: Tensor, index: Tensor, alpha: Tensor | None, weight: Tensor | None, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at value, alpha and weight (empty tensors for those that are None)."""
    _require(value, index, alpha, weight, groups)
    out = (value.shape[0], index.shape[1], out_channels(value, weight))
    if grad.shape != out or grad.dtype != value.dtype:
        raise ValueError(f"grad must be {out} {value.dtype} as the output, got {tuple(grad.shape)} {grad.dtype}")
    none = value.new_empty(0)
    d_alpha = none if alpha is None else torch.empty_like(alpha)
    if not _served(value, grad, alpha, weight):
        with torch.autocast(value.device.type, enabled=False):
            d_value, found, d_weight = aggregate_torch.backward(grad, value, index, alpha, weight, groups)
        return d_value.contiguous(), d_alpha if alpha is None else d_alpha.copy_(found), d_weight.contiguous()
    module = engine.get()
    assert module is not None
    wide_grad, wide_value, wide_alpha, wide_weight = _wide(grad, value, alpha, weight)
    assert wide_grad is not None and wide_value is not None
    wide = _rows(wide_value)
    if wide_weight is not None:
        wide_weight = wide_weight.contiguous()
    d_value = wide.new_empty(wide.shape)
    d_kernel = None if wide_weight is None else torch.empty_like(wide_weight)
    into: Tensor | None = None
    if alpha is not None and wide_alpha is not None:
        # the engine writes the gradient where it reads alpha: an expanded alpha has no room for that
        into = torch.empty_like(wide_alpha)
        if into.stride() != wide_alpha.stride():
            room = torch.empty_like(into)
            wide_alpha = room.copy_(wide_alpha)
    module.aggregate_backward(
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
    )
    if into is not None:
        d_alpha = into if into.dtype == value.dtype else d_alpha.copy_(into)
    return d_value.to(value.dtype), d_alpha, none.clone() if d_kernel is None else d_kernel.to(value.dtype)


@aggregate_backward.register_fake
def _(
    grad: Tensor, value: Tensor, index: Tensor, alpha: Tensor | None, weight: Tensor | None, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    none = value.new_empty(0)
    d_alpha = none if alpha is None else torch.empty_like(alpha)
    d_weight = none.clone() if weight is None else weight.new_empty(weight.shape)
    return value.new_empty(value.shape), d_alpha, d_weight


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    value, index, alpha, weight, groups = inputs
    ctx.save_for_backward(value, index, alpha, weight)
    ctx.groups = groups


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    value, index, alpha, weight = ctx.saved_tensors
    d_value, d_alpha, d_weight = aggregate_backward(grad, value, index, alpha, weight, ctx.groups)
    return d_value, None, None if alpha is None else d_alpha, None if weight is None else d_weight, None


aggregate.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.nearfold.aggregate)
def _flops(value_shape, index_shape, alpha_shape, weight_shape, groups, **kwargs) -> int:  # type: ignore[no-untyped-def]
    B, _, C = value_shape
    _, M, S, _ = index_shape
    out = 1 if weight_shape is None else weight_shape[0] // groups
    return int(2 * B * M * S * C * out)


@register_flop_formula(torch.ops.nearfold.aggregate_backward)
def _backward_flops(grad_shape, value_shape, index_shape, alpha_shape, weight_shape, groups, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 2 * _flops(value_shape, index_shape, alpha_shape, weight_shape, groups)
