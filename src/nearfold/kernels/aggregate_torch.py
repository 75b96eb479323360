"""`nearfold::aggregate` in plain PyTorch: any device, any dtype.

Nothing of size (B, C, N, k) is held: a tile of neighbours is gathered into cache and multiplied there (an implicit
GEMM); the backward gathers it again instead of storing it.

Shape legend: B batch, N positions, C value channels, H heads (each selects on its own), d = C / H, M outputs,
S slots, E entries of a slot, O output channels, G groups of the kernel, c = C / G, o = O / G, r rows of a tile
(outputs). Without a dense kernel every entry counts as a slot.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nearfold.kernels.names import LOST

TILE_BYTES = 2 << 20  # of gathered neighbours held at once


def tiles(
    value: Tensor, index: Tensor, heads_first: bool = False
) -> Iterator[tuple[slice, Tensor, Tensor | None, Tensor]]:
    """(rows, flat index into value's B*N*H rows of d, missing slots or None, neighbours).

    Neighbours are (r, S, C), or (r * H, S, d) with heads first; the flat index is in the same order.
    """
    B, N, C = value.shape
    _, M, S, H = index.shape
    table = value.reshape(B * N * H, C // H)
    rows = max(1, TILE_BYTES // (S * C * value.element_size()))
    flat = index.reshape(B * M, S, H)
    least, most = (int(n) for n in index.aminmax()) if index.numel() else (0, -1)
    if most >= N:  # it would read another sample's row
        raise ValueError(f"index holds a position beyond the {N} of the input: {most}")
    some_missing = least < 0
    head = torch.arange(H, device=value.device)
    sample = torch.arange(B, device=value.device).repeat_interleave(M)[:, None, None] * N
    # one buffer for all tiles: memory that is fresh every time costs more to map than to fill
    buffer = value.new_empty(min(rows, B * M) * S * H, C // H)
    for start in range(0, B * M, rows):
        part = slice(start, min(start + rows, B * M))
        local = flat[part]
        at = ((local.clamp(min=0) if some_missing else local) + sample[part]) * H + head
        if heads_first:
            local, at = local.transpose(1, 2), at.transpose(1, 2)
        at = at.reshape(-1)
        near = torch.index_select(table, 0, at, out=buffer[: len(at)])
        missing = (local < 0).reshape(-1, 1) if some_missing else None
        if missing is not None and missing.any():
            near.masked_fill_(missing, 0)
        else:
            missing = None
        yield part, at, missing, near.view(-1, S, C // H if heads_first else C)


def _scaled(near: Tensor, alpha: Tensor | None) -> Tensor:
    if alpha is None:
        return near
    r, S, C = near.shape
    return (near.view(r, S, alpha.shape[-1], -1) * alpha[..., None]).view(r, S, C)


def _blended(near: Tensor, alpha: Tensor | None, entries: int) -> Tensor:
    """(r, S * E, C) -> (r, S, C): the entries of a slot, times alpha, added up."""
    read = _scaled(near, alpha)
    return read if entries == 1 else read.unflatten(1, (-1, entries)).sum(2)


def _matrix(weight: Tensor, groups: int) -> Tensor:
    """Dense kernel (O, C / G, S) -> (G, S * c, o)."""
    O, c, S = weight.shape
    return weight.view(groups, O // groups, c, S).permute(0, 3, 2, 1).reshape(groups, S * c, O // groups)


def _grouped(near: Tensor, groups: int) -> Tensor:
    """(r, S, C) -> (G, r, S * c)."""
    r, S, C = near.shape
    return near.view(r, S, groups, C // groups).permute(2, 0, 1, 3).reshape(groups, r, -1)


def out_channels(value: Tensor, weight: Tensor | None) -> int:
    """O."""
    return value.shape[2] if weight is None else weight.shape[0]


def _lost(index: Tensor) -> Tensor | None:
    """Outputs (B * M, 1) whose query was NaN; None when there are none."""
    lost = index == LOST
    return lost.flatten(2).any(-1).view(-1, 1) if lost.any() else None


def is_depthwise(weight: Tensor | None, groups: int, channels: int) -> bool:
    """Whether the kernel (O, C / groups, S) maps every channel to itself."""
    return weight is not None and weight.shape[0] == groups == channels


def _slot_weights(weight: Tensor | None, heads: int) -> Tensor | None:
    """Depthwise kernel (C, 1, S) -> (H, S, d)."""
    return None if weight is None else weight[:, 0].unflatten(0, (heads, -1)).transpose(1, 2).contiguous()


def _attend(value: Tensor, index: Tensor, alpha: Tensor, weight: Tensor | None) -> Tensor:
    """Alpha without a dense kernel: per output and head one row of alpha times the (S, d) neighbours."""
    B, M, S, H = index.shape
    whole = value.new_empty(B, M, value.shape[2])
    out = whole.view(B * M, value.shape[2])
    w_HSd = _slot_weights(weight, H)
    rows = alpha.reshape(B * M, S, H)
    for part, _, _, near in tiles(value, index, heads_first=True):
        if w_HSd is not None:
            near = (near.view(-1, *w_HSd.shape) * w_HSd).view_as(near)
        a = rows[part].transpose(1, 2).reshape(-1, 1, S)
        torch.bmm(a, near, out=out[part].view(-1, 1, near.shape[2]))
    return whole


def _attend_backward(
    grad: Tensor, value: Tensor, index: Tensor, alpha: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    B, M, S, H = index.shape
    N, C = value.shape[1:]
    wide = torch.promote_types(value.dtype, torch.float32)
    d_value = torch.zeros(B * N * H, C // H, dtype=wide, device=value.device)
    d_alpha = torch.empty_like(alpha, memory_format=torch.contiguous_format).view(B * M, S, H)
    w_HSd = _slot_weights(weight, H)
    d_w = None if w_HSd is None else torch.zeros(w_HSd.shape, dtype=wide, device=value.device)
    rows, grads = alpha.reshape(B * M, S, H), grad.reshape(B * M * H, 1, C // H)
    for part, at, missing, near in tiles(value, index, heads_first=True):
        g = grads[part.start * H : part.stop * H]
        read = near if w_HSd is None else (near.view(-1, *w_HSd.shape) * w_HSd).view_as(near)
        d_alpha[part] = torch.bmm(g, read.transpose(1, 2)).view(-1, H, S).transpose(1, 2)
        d_near = rows[part].transpose(1, 2).reshape(-1, S, 1) * g
        if w_HSd is not None and d_w is not None:
            d_read = d_near.view(-1, *w_HSd.shape)
            d_w += (d_read * near.view_as(d_read)).sum(0, dtype=wide)
            d_near = d_read * w_HSd
        d_near = d_near.reshape(-1, C // H).to(wide)
        d_value.index_add_(0, at, d_near if missing is None else d_near.masked_fill(missing, 0))
    d_weight = value.new_empty(0)
    if d_w is not None and weight is not None:
        d_weight = d_w.transpose(1, 2).reshape(weight.shape).to(weight.dtype)
    return d_value.view(B, N, C).to(value.dtype), d_alpha.view(B, M, S, H), d_weight


def _own_slots(weight: Tensor | None, groups: int, channels: int, entries: int) -> tuple[Tensor | None, int]:
    """Kernel and entries, every entry a slot of its own where it costs nothing: without a dense kernel."""
    if entries == 1 or weight is None:
        return weight, 1
    if is_depthwise(weight, groups, channels):
        return weight.repeat_interleave(entries, 2), 1
    return weight, entries


def aggregate(
    value: Tensor, index: Tensor, alpha: Tensor | None, weight: Tensor | None, groups: int, entries: int = 1
) -> Tensor:
    """`nearfold.kernels.aggregate.aggregate`."""
    weight, entries = _own_slots(weight, groups, value.shape[2], entries)
    B, _, C = value.shape
    M = index.shape[1]
    O = out_channels(value, weight)
    whole = value.new_empty(B, M, O)  # not a view of its rows: who calls may add to it in place
    out = whole.view(B * M, O)
    depthwise = is_depthwise(weight, groups, C)
    if alpha is not None and (weight is None or depthwise):
        return _attend(value, index, alpha, weight)
    matrix = None if weight is None or depthwise else _matrix(weight, groups)
    flat_alpha = None if alpha is None else alpha.reshape(B * M, *alpha.shape[2:])
    for part, _, _, near in tiles(value, index):
        near = _blended(near, None if flat_alpha is None else flat_alpha[part], entries)
        if weight is None:
            out[part] = near.sum(1)
        elif matrix is None:
            out[part] = (near * weight[:, 0].T).sum(1)
        elif groups == 1:
            torch.mm(near.view(len(near), -1), matrix[0], out=out[part])
        else:
            out[part] = torch.bmm(_grouped(near, groups), matrix).transpose(0, 1).reshape(-1, O)
    lost = _lost(index) if alpha is None else None
    if lost is not None:
        out.masked_fill_(lost, float("nan"))
    return whole


def backward(
    grad: Tensor,
    value: Tensor,
    index: Tensor,
    alpha: Tensor | None,
    weight: Tensor | None,
    groups: int,
    entries: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at value, alpha and weight (empty tensors for those that are None)."""
    kernel, left = _own_slots(weight, groups, value.shape[2], entries)
    if alpha is not None and (kernel is None or is_depthwise(kernel, groups, value.shape[2])):
        d_value, d_alpha, d_weight = _attend_backward(grad, value, index, alpha, kernel)
    else:
        d_value, d_alpha, d_weight = _backward_tiles(grad, value, index, alpha, kernel, groups, left)
    if kernel is not None and left != entries:
        d_weight = d_weight.unflatten(2, (-1, entries)).sum(-1)
    return d_value, d_alpha, d_weight


def _backward_tiles(
    grad: Tensor,
    value: Tensor,
    index: Tensor,
    alpha: Tensor | None,
    weight: Tensor | None,
    groups: int,
    entries: int,
) -> tuple[Tensor, Tensor, Tensor]:
    B, N, C = value.shape
    _, M, SE, H = index.shape
    S = SE // entries
    wide = torch.promote_types(value.dtype, torch.float32)  # sums over many outputs
    d_value = torch.zeros(B * N * H, C // H, dtype=wide, device=value.device)
    d_alpha = value.new_empty((B * M, SE, H) if alpha is not None else 0)
    depthwise = is_depthwise(weight, groups, C)
    matrix = None if weight is None or depthwise else _matrix(weight, groups)
    d_matrix = None if matrix is None else torch.zeros(matrix.shape, dtype=wide, device=value.device)
    d_slots = torch.zeros(S, C, dtype=wide, device=value.device) if depthwise else None
    grad = grad.reshape(B * M, grad.shape[-1])
    flat_alpha = None if alpha is None else alpha.reshape(B * M, SE, H)
    for part, at, missing, near in tiles(value, index):
        g, r = grad[part], len(near)
        tile_alpha = None if flat_alpha is None else flat_alpha[part]
        read = _blended(near, tile_alpha, entries)
        if matrix is None:
            d_read = g[:, None, :].expand(r, S, C)
            if d_slots is not None and weight is not None:
                d_slots += (read * d_read).sum(0)
                d_read = d_read * weight[:, 0].T
        elif groups == 1:
            assert d_matrix is not None
            d_matrix[0].addmm_(read.view(r, -1).T.to(wide), g.to(wide))
            d_read = (g @ matrix[0].T).view(r, S, C)
        else:
            assert d_matrix is not None
            g_G = g.view(r, groups, -1).transpose(0, 1)
            d_matrix += torch.bmm(_grouped(read, groups).transpose(1, 2), g_G).to(wide)
            d_read = torch.bmm(g_G, matrix.transpose(1, 2)).view(groups, r, S, C // groups)
            d_read = d_read.permute(1, 2, 0, 3).reshape(r, S, C)
        if entries > 1:
            d_read = d_read.reshape(r, S, C).repeat_interleave(entries, 1)
        if tile_alpha is not None:
            d_alpha[part] = (near * d_read).view(r, SE, H, -1).sum(-1)
            d_read = _scaled(d_read.reshape(r, SE, C), tile_alpha)
        d_near = d_read.reshape(-1, C // H).to(wide)
        if missing is not None:
            d_near = d_near.masked_fill(missing, 0)
        d_value.index_add_(0, at, d_near)
    if weight is None:
        d_weight = value.new_empty(0)
    elif d_slots is not None:
        d_weight = d_slots.T.reshape(C, 1, S).to(weight.dtype)
    else:
        assert d_matrix is not None
        d_weight = d_matrix.view(groups, S, C // groups, -1).permute(0, 3, 2, 1).reshape(weight.shape)
        d_weight = d_weight.to(weight.dtype).contiguous()
    return (
        d_value.view(B, N, C).to(value.dtype),
        d_alpha.view(B, M, SE, H) if alpha is not None else d_alpha,
        d_weight,
    )
