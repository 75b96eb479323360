"""`nearfold::selective_scan`: the linear recurrence of selective state spaces (Mamba, arXiv 2312.00752).

One operator, three implementations: the compiled engine on the CPU, Triton on CUDA devices, and PyTorch (`scan_torch`)
everywhere else. None holds (B, N, C, S): the forward keeps the state before every chunk of positions, the backward
computes those within a chunk again.

Shape legend: B batch, N positions, C channels, S states, K chunks of `scan_torch.CHUNK` positions. The paper names two
of the operands B and C as well.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nearfold.kernels import cuda, engine, scan_torch, second
from nearfold.kernels.aggregate import served, widened
from nearfold.kernels.names import LOW, require_tensors
from nearfold.kernels.operator import operator


def _require(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> None:
    """ValueError where the operands do not fit one another."""
    operands = {"u": u, "delta": delta, "A": A, "B": B, "C": C}
    require_tensors(**operands)

    def got() -> str:
        return ", ".join(f"{name} {tuple(x.shape)} {x.dtype}" for name, x in operands.items())

    if u.dim() != 3 or delta.shape != u.shape:
        raise ValueError(f"u and delta must be (B, N, C) alike, got {got()}")
    if A.dim() != 2 or A.shape[0] != u.shape[2]:
        raise ValueError(f"A must be (C, S) with the C = {u.shape[2]} channels of u, got {got()}")
    rows = (*u.shape[:2], A.shape[1])
    if B.shape != rows or C.shape != rows:
        raise ValueError(f"B and C must be (B, N, S) = {rows} as u and A, got {got()}")
    if u.shape[2] < 1 or A.shape[1] < 1:
        raise ValueError(f"there must be channels and states, got {got()}")
    if any(x.dtype != u.dtype or x.device != u.device for x in operands.values()) or not u.is_floating_point():
        devices = ", ".join(str(x.device) for x in operands.values())
        raise ValueError(f"the operands must have one floating dtype and one device, got {got()} on {devices}")


def _require_backward(grad: Tensor, u: Tensor, A: Tensor, states: Tensor) -> None:
    require_tensors(grad=grad, states=states)
    if grad.shape != u.shape or grad.dtype != u.dtype:
        raise ValueError(f"grad must be {tuple(u.shape)} {u.dtype} as the output, got {tuple(grad.shape)} {grad.dtype}")
    if states.shape != _states_shape(u, A) or states.dtype != _compute(u.dtype):
        raise ValueError(
            f"states must be {_states_shape(u, A)} {_compute(u.dtype)} as the forward returned them, got "
            f"{tuple(states.shape)} {states.dtype}"
        )


def _compute(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in LOW else dtype


def _states_shape(u: Tensor, A: Tensor, keep: bool = True) -> tuple[int, int, int, int]:
    return u.shape[0], scan_torch.chunks_of(u.shape[1]) if keep else 0, A.shape[1], A.shape[0]


def _rows(x: Tensor) -> Tensor:
    """The tensor itself where the numbers of a position lie next to one another, or a copy where they do."""
    return x if x.shape[2] <= 1 or x.stride(2) == 1 else x.contiguous()


def _wide(*operands: Tensor) -> list[Tensor]:
    return [x for x in widened(*operands) if x is not None]


@operator("nearfold::selective_scan")
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, keep: bool = True
) -> tuple[Tensor, Tensor]:
    """y_t = C_t h_t of h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t with h = 0 before the first position.

    Every channel has S states of its own: h_t is (C, S), B_t and C_t are read by all channels.

    Args:
        u: (B, N, C), floating; all operands in its dtype, with any strides.
        delta: (B, N, C) step sizes, positive.
        A: (C, S), normally negative: positive ones grow without bound.
        B: (B, N, S).
        C: (B, N, S).
        keep: whether there will be a backward, which needs the states; without, it computes them again.

    Returns:
        y (B, N, C) in u's dtype, and for the backward the states (B, K, S, C) before every chunk, without gradient
        (K = 0 where they are not kept);
        bfloat16 and float16 are computed in float32, and their states are float32.

    Raises:
        ValueError: where shapes, dtypes or devices do not fit.

    Selective state spaces: Gu and Dao, arXiv 2312.00752.
    """
    _require(u, delta, A, B, C)
    kernels = cuda.kernels("scan", u, delta, A, B, C)
    if kernels is not None and not kernels.refusal(u, delta, A, B, C):
        with torch.cuda.device_of(u):
            found: tuple[Tensor, Tensor] = kernels.scan(u, delta, A, B, C, keep)
        return found
    wide_u, wide_delta, wide_A, wide_B, wide_C = _wide(u, delta, A, B, C)
    if not served(u, delta, A, B, C):
        with torch.autocast(u.device.type, enabled=False):
            y, states = scan_torch.forward(wide_u, wide_delta, wide_A, wide_B, wide_C)
        return y.to(u.dtype).contiguous(), states.contiguous() if keep else states.new_empty(_states_shape(u, A, False))
    y, states = wide_u.new_empty(u.shape), wide_u.new_empty(_states_shape(u, A, keep))
    engine.run(
        "scan",
        *(_rows(wide_u), _rows(wide_delta), wide_A.contiguous(), _rows(wide_B), _rows(wide_C)),
        *(scan_torch.CHUNK, y, states if keep else None, engine.threads()),
    )
    return y.to(u.dtype), states


@selective_scan.register_fake
def _(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, keep: bool = True) -> tuple[Tensor, Tensor]:
    _require(u, delta, A, B, C)
    return u.new_empty(u.shape), u.new_empty(_states_shape(u, A, keep), dtype=_compute(u.dtype))


@operator("nearfold::selective_scan_backward")
def selective_scan_backward(
    grad: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients at u, delta, A, B and C, given that at y (B, N, C) and the states the forward returned.

    The sums over channels, positions and batch are added in an order that does not depend on the number of threads.
    """
    _require(u, delta, A, B, C)
    _require_backward(grad, u, A, states)
    kernels = cuda.kernels("scan", grad, u, delta, A, B, C, states)
    if kernels is not None and not kernels.refusal(u, delta, A, B, C):
        with torch.cuda.device_of(u):
            made: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = kernels.scan_backward(grad, u, delta, A, B, C, states)
        return made
    wide_u, wide_delta, wide_A, wide_B, wide_C = wide = _wide(u, delta, A, B, C)
    wide_grad = grad.to(wide_u.dtype)
    if not served(u, delta, A, B, C):
        with torch.autocast(u.device.type, enabled=False):
            of_u, of_delta, of_A, of_B, of_C = scan_torch.backward(
                wide_grad, wide_u, wide_delta, wide_A, wide_B, wide_C, states
            )
    else:
        of_u, of_delta, of_A, of_B, of_C = (x.new_empty(x.shape) for x in wide)
        engine.run(
            "scan_backward",
            *(wide_grad.contiguous(), _rows(wide_u), _rows(wide_delta), wide_A.contiguous()),
            *(_rows(wide_B), _rows(wide_C), states.contiguous(), scan_torch.CHUNK),
            *(of_u, of_delta, of_A, of_B, of_C, engine.threads()),
        )
    return (
        of_u.to(u.dtype).contiguous(),
        of_delta.to(u.dtype).contiguous(),
        of_A.to(u.dtype).contiguous(),
        of_B.to(u.dtype).contiguous(),
        of_C.to(u.dtype).contiguous(),
    )


@selective_scan_backward.register_fake
def _(
    grad: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        u.new_empty(u.shape),
        u.new_empty(delta.shape),
        u.new_empty(A.shape),
        u.new_empty(B.shape),
        u.new_empty(C.shape),
    )


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.keep = inputs[5]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    u, delta, A, B, C, states = ctx.saved_tensors
    if not ctx.keep:
        states = selective_scan(u, delta, A, B, C, True)[1]
    return *selective_scan_backward(grad, u, delta, A, B, C, states), None


selective_scan.register_autograd(_backward, setup_context=_setup)


def _again(grad, u, delta, A, B, C, states):  # type: ignore[no-untyped-def]
    return second.gradients(lambda *operands: scan_torch.forward(*operands)[0])(grad, u, delta, A, B, C)


second.register(selective_scan_backward, _again)


@register_flop_formula(torch.ops.nearfold.selective_scan)
def _flops(u_shape, delta_shape, A_shape, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    # of every state: the exponent, its product with the state, that of the input, two sums, and the output's product;
    # an exponential counts as one operation
    B, N, channels = u_shape
    return int(7 * B * N * channels * A_shape[1])


@register_flop_formula(torch.ops.nearfold.selective_scan_backward)
def _backward_flops(grad_shape, u_shape, delta_shape, A_shape, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    # the states again without their output (5), and seven products with six sums of the adjoint recurrence
    B, N, channels = u_shape
    return int(18 * B * N * channels * A_shape[1])
