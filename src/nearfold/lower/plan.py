"""`lower`: choose the backend of every `Basic` operation, from static facts only."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from nearfold._kept import once
from nearfold._numbers import shown
from nearfold.grammar import Basic, Operation, parse
from nearfold.kernels.names import require_tensors
from nearfold.lower import oracle
from nearfold.lower.backends import block, conv, gather, knn, linear, local, scan, sdpa
from nearfold.lower.call import Call
from nearfold.lower.execute import execute
from nearfold.lower.meaning import meaning
from nearfold.lower.verdict import Facts, Verdict

BACKENDS: dict[str, ModuleType] = {
    m.NAME: m for m in (conv, block, sdpa, linear, scan, knn, local, gather)
}  # in order of preference
ORACLE = Verdict.yes("the formula itself, dense and slow", "bitwise")


def verdicts(facts: Facts) -> dict[str, Verdict]:
    """Every backend's verdict, in order of preference; the oracle last."""
    return {name: module.supports(facts) for name, module in BACKENDS.items()} | {"oracle": ORACLE}


@once
def lower(facts: Facts, backend: str = "auto") -> str:
    """Name of the backend that runs these facts.

    A backend asked for by name never falls back: ValueError with the reason and those that can.

    >>> from nearfold import parse
    >>> lower(Facts(parse("window(3) | box | kernel"), 2, torch.float32, "cpu", True))
    'conv'
    """
    found = verdicts(facts)
    if backend == "auto":
        return next(name for name, verdict in found.items() if verdict.ok)
    if backend not in found:
        raise ValueError(f"backend={backend!r} is not one of: auto, {', '.join(found)}")
    if not found[backend].ok:
        others = ", ".join(name for name, verdict in found.items() if verdict.ok)
        raise ValueError(
            f"backend={backend!r} cannot run {facts.op}: {found[backend].reason}. Those that can: {others}"
        )
    return backend


def _masked(backend: str) -> str:
    if backend not in ("auto", "sdpa", "oracle"):
        raise ValueError(f"backend={backend!r} knows no mask: leave it at auto, or take sdpa or oracle")
    return "oracle" if backend == "auto" else backend


def _require_mask(op: Operation, mask: Tensor, x: Tensor, context: Tensor | None) -> None:
    for part in op.parts:
        if not (meaning(part.path).takes_mask(part) and meaning(part.weight.rho).takes_mask):
            raise ValueError(f"{part}: a mask goes with the paths all and nearest(k), without self, padding and table")
    keys = math.prod((x if context is None else context).shape[2:])
    wanted = (x.shape[0], mask.shape[1] if mask.dim() == 4 else 1, math.prod(x.shape[2:]), keys)
    fits = mask.dim() == 4 and all(n in (1, m) for n, m in zip(mask.shape[:2], wanted[:2], strict=True))
    if mask.dtype != torch.bool or not fits or tuple(mask.shape[2:]) != wanted[2:]:
        raise ValueError(
            f"mask must be bool of shape (batch or 1, heads or 1, {wanted[2]}, {keys}), True where a query may read a "
            f"key, got {mask.dtype} {tuple(mask.shape)}"
        )


def runner(name: str) -> Callable[[Call], Tensor]:
    """The function behind a backend's name."""
    return oracle.run if name == "oracle" else BACKENDS[name].run


@once
def _chosen(
    op: Basic, ndim: int, dtype: torch.dtype, device: str, grad: bool, backend: str
) -> Callable[[Call], Tensor]:
    return runner(lower(Facts(op, ndim, dtype, device, grad), backend))


def operation(given: Operation | str) -> Operation:
    """An operation itself, or the one that a notation says; ValueError for anything else."""
    op = parse(given) if isinstance(given, str) else given
    if not isinstance(op, Operation):
        raise ValueError(f"operation must be an Operation or its notation, got {shown(given)}")
    return op


def apply(
    op: Operation | str,
    params: dict[str, Tensor],
    x: Tensor,
    *,
    out_channels: int | None = None,
    backend: str = "auto",
    draw: Tensor | None = None,
    context: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Run an operation on x (B, C, *grid) with parameters as `parameters` names them: (B, O, *out).

    Args:
        op: an operation or its notation.
        params: tensors by name.
        x: the input; its dtype and device are the output's.
        out_channels: O, default C.
        backend: "auto", or a backend's name for every part.
        draw: (seed, draws), int64 of shape (2,): draw random candidates; None searches all of them.
        context: (B, C', *grid'), the second input, from which `cross` paths take keys and values.
        mask: bool (B|1, H|1, N, N'), True where a query may read a key: a slot that it forbids is not valid. For paths
            `all` and `nearest`; the latter then runs on the oracle.
    """
    op = operation(op)
    require_tensors(x=x)
    if x.dim() < 3:
        raise ValueError(f"x must be (batch, channels, *grid), got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}; convert it with x.float()")
    if min(x.shape[1:]) == 0:
        raise ValueError(f"x must have channels and positions, got shape {tuple(x.shape)}")
    if torch.compiler.is_dynamo_compiling():
        from nearfold.lower.inductor import repaired  # it brings torch's compiler in, which takes a second

        repaired()
    ndim, dtype, device, grad = x.dim() - 2, x.dtype, x.device.type, torch.is_grad_enabled()

    def choose(basic: Basic) -> Callable[[Call], Tensor]:
        if mask is None:
            return _chosen(basic, ndim, dtype, device, grad, backend)
        facts = Facts(basic, ndim, dtype, device, grad)
        return runner("sdpa" if backend == "auto" and sdpa.supports(facts).ok else _masked(backend))

    if mask is not None:
        require_tensors(mask=mask)
        _require_mask(op, mask, x, context)

    if context is not None:
        require_tensors(context=context)
        if not op.needs_context:
            raise ValueError(f"{op}: reads one input; leave context out, or write all(cross) or nearest(k, cross)")
        if (
            context.dim() < 3
            or context.shape[0] != x.shape[0]
            or context.dtype != x.dtype
            or min(context.shape[1:]) == 0
        ):
            raise ValueError(
                "context must be (B, C, *grid) with the batch and dtype of x, got "
                f"{tuple(context.shape)} {context.dtype} next to {tuple(x.shape)} {x.dtype}"
            )
    return execute(op, params, x, choose, draw, out_channels=out_channels, context=context, mask=mask)
