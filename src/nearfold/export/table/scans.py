"""Recurrences as torch's `scan`: a loop over the positions, however many there are, and ONNX's Scan.

Shape legend: B batch, N positions, C channels, S states of a channel, H heads, s keys' features, p values' features.
"""

from __future__ import annotations

from torch import Tensor

from nearfold.kernels.select import wide


def _scan(step, state: Tensor, operands: list[Tensor], fixed: tuple[Tensor, ...] = ()) -> Tensor:  # type: ignore[no-untyped-def]
    """What the steps (state, *operands' rows, *fixed) -> [state, read] read, (B, N, ..), of operands (B, N, ..)."""
    from torch._higher_order_ops.scan import scan_op  # the public one compiles what it is given first

    _, read = scan_op(step, [state], [x.transpose(0, 1) for x in operands], fixed)
    made: Tensor = read.transpose(0, 1)
    return made


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, keep: bool = True
) -> tuple[Tensor, Tensor]:
    """`nearfold::selective_scan`; it keeps no states."""

    def step(h_BCS: Tensor, x: Tensor, d: Tensor, inp: Tensor, out: Tensor, rate: Tensor) -> list[Tensor]:
        h_BCS = (d[..., None] * rate).exp() * h_BCS + (d * x)[..., None] * inp[:, None]
        return [h_BCS, (h_BCS * out[:, None]).sum(-1)]

    operands = [wide(x) for x in (u, delta, B, C)]
    start = operands[0].new_zeros(u.shape[0], u.shape[2], A.shape[1])
    y = _scan(step, start, operands, (wide(A),))
    return y.to(u.dtype).contiguous(), start.new_empty(u.shape[0], 0, A.shape[1], A.shape[0])


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
    """`nearfold::fast_weights`; it keeps no states."""
    names = ("log_decay", "beta", "left", "right")
    given = {n: wide(x) for n, x in zip(names, (log_decay, beta, left, right), strict=True) if x is not None}

    def step(before: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> list[Tensor]:
        more = dict(zip(given, rest, strict=True))
        S = before * more["log_decay"].exp()[..., None] if "log_decay" in more else before
        if "beta" in more:
            v = (v - (S * k[..., None]).sum(-2)) * more["beta"][..., None]
        S = S + k[..., None] * v[..., None, :]
        if "left" in more:
            S = S + more["left"][..., None] * (before * more["right"][..., None]).sum(-2, keepdim=True)
        return [S, (S * q[..., None]).sum(-2)]

    operands = [wide(x) for x in (query, key, value)] + list(given.values())
    B, _, H, s = query.shape
    start = operands[0].new_zeros(B, H, s, value.shape[3])
    y = _scan(step, start, operands)
    empty = start.new_empty(B, H, 0, s, value.shape[3]), start.new_empty(B, 0, H, value.shape[3])
    return y.to(query.dtype).contiguous(), *empty
