"""The mixing matrix of a layer of another library, by differentiation; and how large a matrix may be.

Shape legend: B batch, G groups of channels, M outputs, N positions, O output channels, C channels, c channels of a
group, K copies, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

BLOCK = 1 << 23  # numbers that one block of copies of a layer's input may hold


def require_room(what: str, shape: tuple[int, ...], dtype: torch.dtype, limit_gib: float) -> None:
    """ValueError where a tensor would be larger than the limit."""
    gib = math.prod(shape) * dtype.itemsize / 2**30
    if gib > limit_gib:
        raise ValueError(
            f"{what}: the mixing matrix would be (B, G, M, N) = {shape}, {gib:.1f} GiB, above limit_gib={limit_gib:g}. "
            "It grows with the square of the positions: give a smaller input or fewer images, or raise limit_gib; one "
            "row alone is nearfold.look.looks(layer, x, at)"
        )


def require_rows(rows: Tensor, outputs: int) -> None:
    """ValueError where a row is no output."""
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < outputs:
        raise ValueError(f"rows must be from 0 to {outputs - 1}, got {int(rows.min())} to {int(rows.max())}")


def differentiated(
    layer: nn.Module,
    x: Tensor,
    context: Tensor | None,
    groups: int,
    tokens: bool | None,
    limit_gib: float,
    rows: Tensor | None = None,
) -> Tensor:
    """`nearfold.look.mixing_matrix` of a layer of another library, whose arguments these are."""
    source = x if context is None else context
    if tokens is None:
        if x.dim() == 3 or source.dim() == 3:
            raise ValueError(
                f"x of shape {tuple(x.shape)} could be (batch, positions, channels) or (batch, channels, positions): "
                "say which with tokens=True or tokens=False"
            )
        tokens = False
    with evaluating(layer), torch.enable_grad():
        y_OM = _outputs(layer, x[:1], context if context is None else context[:1], tokens)[1][0]
        source_CN = _rows(source[:1].detach(), tokens)[0]
        (O, M), (C, N) = y_OM.shape, source_CN.shape
        for name, channels in (("input", C), ("output", O)):
            if groups < 1 or channels % groups:
                raise ValueError(f"groups={groups} must divide the {channels} {name} channels")
        wide = torch.promote_types(y_OM.dtype, torch.float32)
        rows = torch.arange(M) if rows is None else rows
        require_rows(rows, M)
        R = len(rows)
        require_room(type(layer).__name__, (x.shape[0], groups, R, N), wide, limit_gib)
        copies = max(1, min(O * R, BLOCK // (C * N + O * M + R * N)))
        rows = rows.to(y_OM.device)
        images = [
            _jacobian(
                layer, x[b : b + 1], None if context is None else context[b : b + 1], groups, tokens, copies, rows
            )
            for b in range(x.shape[0])
        ]
    return torch.stack(images)


@contextmanager
def evaluating(layer: nn.Module) -> Iterator[None]:
    """Evaluation mode, and every module's own mode back afterwards."""
    modes = [(module, module.training) for module in layer.modules()]
    layer.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _rows(x: Tensor, tokens: bool) -> Tensor:
    """(B, C, *grid) or (B, *grid, C) -> (B, C, N)."""
    return (x.movedim(-1, 1) if tokens else x).flatten(2)


def _outputs(layer: nn.Module, x: Tensor, context: Tensor | None, tokens: bool) -> tuple[Tensor, Tensor]:
    """The input to differentiate by, which requires gradients, and the output (B, O, M)."""
    name = type(layer).__name__
    given = [x.detach()] if context is None else [x.detach(), context.detach()]
    given[-1] = source = given[-1].clone().requires_grad_()
    try:
        y = layer(*(t.clone() for t in given))  # which a layer may overwrite
    except torch.OutOfMemoryError:  # says enough, and not that the shape is wrong
        raise
    except (TypeError, RuntimeError, IndexError, AssertionError) as error:
        shapes = " and ".join(str(tuple(t.shape)) for t in given)
        raise ValueError(f"{name} does not take {shapes}: {error}") from error
    if not isinstance(y, Tensor):
        raise ValueError(f"{name} returns {type(y).__name__}, not one tensor; wrap it in a module that returns only y")
    if y.dim() < 3 or y.shape[0] != x.shape[0]:
        wanted = "(batch, *out, channels)" if tokens else "(batch, channels, *out)"
        raise ValueError(
            f"{name} is not a layer of positions: it must make {wanted}, got {tuple(y.shape)} for {tuple(x.shape)}"
        )
    if not y.requires_grad:
        raise ValueError(f"{name}: its output cannot be differentiated by its input")
    return source, _rows(y, tokens)


def _jacobian(
    layer: nn.Module,
    x: Tensor,
    context: Tensor | None,
    groups: int,
    tokens: bool,
    copies: int,
    rows_R: Tensor,
) -> Tensor:
    """One image's rows (G, R, N). The batch axis carries copies of it, each asked for another output number.

    Any layer can do this: torch.func.vmap would need a batching rule of every operator on the way.
    """
    many = x.expand(copies, *x.shape[1:])
    source, y_KOM = _outputs(
        layer, many, None if context is None else context.expand(copies, *context.shape[1:]), tokens
    )
    C, N = _rows(source, tokens).shape[1:]
    O, R = y_KOM.shape[1], len(rows_R)
    total = y_KOM.new_zeros(groups * R, N, dtype=torch.promote_types(y_KOM.dtype, torch.float32))
    for first in range(0, O * R, copies):
        asked_K = torch.arange(first, min(first + copies, O * R), device=y_KOM.device)  # of output channels and rows
        channel_K, at_K = asked_K // R, asked_K % R
        copy_K = asked_K - first
        ask_KOM = y_KOM.new_zeros(y_KOM.shape)  # not zeros_like, whose rows lie as those of y: no view is flat then
        ask_KOM[copy_K, channel_K, rows_R[at_K]] = 1
        grad = torch.autograd.grad(y_KOM, source, ask_KOM, retain_graph=True, allow_unused=True)[0]
        if grad is None:
            continue
        group_K = channel_K // (O // groups)
        grad_KcN = _rows(grad, tokens).unflatten(1, (groups, -1))[copy_K, group_K].to(total.dtype)
        number_KN = grad_KcN[:, 0] if O == C == groups else grad_KcN.square().sum(1)
        total.index_add_(0, group_K * R + at_K, number_KN)
    size = total if O == C == groups else (total * groups / O).sqrt()
    return size.detach().unflatten(0, (groups, R))
