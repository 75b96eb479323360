"""Fast weights in PyTorch, for whatever the engine does not serve: parallel within chunks, a state from chunk to chunk.

Inside a chunk what a correction reads of the state depends on what it read before: a triangular system of T unknowns
(the WY representation of DeltaNet, arXiv 2406.06484, with decays as in arXiv 2412.06464). All systems are solved at
once, for whatever state they start from; then the states follow one another. Decays are only ever multiplied: pairs of
positions meet by halves of a chunk, each decayed up to the border between them, so that no exponent is positive unless
a decay is.

Shape legend: B batch, N positions, H heads, K chunks, T positions of a chunk, s features of query and key, p of value.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold._numbers import parts
from nearfold.kernels.ssd import segments

CHUNK = 64  # a power of two


def chunks_of(positions: int) -> int:
    """How many chunks so many positions make."""
    return parts(positions, CHUNK)


def _chunked(x: Tensor, T: int) -> Tensor:
    """(B, N, H, f) -> (B, H, K, T, f), zeros after the last position."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % T))
    return x.unflatten(1, (-1, T)).permute(0, 3, 1, 2, 4)


def _after(x: Tensor) -> Tensor:
    """(..., T, f): sums of what comes after each."""
    return F.pad(x[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def _scores(rows: Tensor, columns: Tensor, decay: Tensor | None) -> Tensor:
    """Entry (i, j), j <= i, is the sum over features of rows_i columns_j exp(sum of decay over (j, i]): (..., T, T)."""
    if decay is None:
        return (rows @ columns.mT).tril()
    if decay.shape[-1] == 1:
        return (rows @ columns.mT).tril() * segments(decay[..., 0]).exp()
    T = rows.shape[-2]
    found = (rows * columns).sum(-1)[..., None, None]  # blocks of one position each: (..., T, 1, 1)
    width = 1
    while width < T:
        pairs = (-1, 2, width)
        each = decay.unflatten(-2, pairs)
        late = rows.unflatten(-2, pairs)[..., 1, :, :] * each[..., 1, :, :].cumsum(-2).exp()
        early = columns.unflatten(-2, pairs)[..., 0, :, :] * _after(each[..., 0, :, :]).exp()
        first, second = found.unflatten(-3, (-1, 2)).unbind(-3)
        found = torch.cat([F.pad(first, (0, width)), torch.cat([late @ early.mT, second], -1)], -2)
        width *= 2
    return found[..., 0, :, :]


def _before(rows: Tensor, columns: Tensor, decay: Tensor | None) -> Tensor:
    """As `_scores` for j < i, with the decay over (j, i - 1] instead."""
    moved = F.pad(rows[..., 1:, :], (0, 0, 0, 1))
    return F.pad(_scores(moved, columns, decay)[..., :-1, :], (0, 0, 1, 0))


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y (B, N, H, p), the states (B, H, K, s, p) before every chunk, and what a correction read (B, N, H, p).

    As `nearfold.kernels.fast_weights.fast_weights`; float32 or float64, differentiable.
    """
    N = query.shape[1]
    T = min(CHUNK, 1 << max(N - 1, 0).bit_length())
    q, k, v = (_chunked(x, T) for x in (query, key, value))
    decay, a, b = (None if x is None else _chunked(x, T) for x in (log_decay, left, right))
    B, H, K, _, s = q.shape
    # decays since the chunk began, the position's own with them and without; those after it; those of the whole chunk
    inside = before = after = q.new_ones(())
    whole: Tensor | None = None
    if decay is not None:
        total = decay.cumsum(-2)
        inside, before = total.exp(), F.pad(total[..., :-1, :], (0, 0, 1, 0)).exp()
        after, whole = _after(decay).exp(), total[..., -1, :, None].exp()
    # a system (I + near) x = given, of which the last columns are multiplied by the state before the chunk
    near = given = None
    writes, rate = k, q.new_ones(())
    if beta is not None:  # x is what is written: beta (value - read)
        rate = _chunked(beta[..., None], T)
        near, given = rate * _scores(k, k, decay).tril(-1), rate * torch.cat([v, -k * inside], -1)
    elif a is not None and b is not None:  # x is what is read
        near, given, writes = -_before(b, a, decay), torch.cat([_before(b, k, decay) @ v, b * before], -1), a
    fixed = slope = None
    if near is not None and given is not None:
        made = torch.linalg.solve_triangular(near, given, upper=False, unitriangular=True)
        fixed, slope = made.split([v.shape[-1], s], -1)
    added = None if beta is not None else (k * after).mT @ v
    late = (writes * after).mT
    state, states, found = q.new_zeros(B, H, s, v.shape[-1]), [], []
    for i in range(K):
        states.append(state)
        on = state if whole is None else state * whole[:, :, i]
        if added is not None:
            on = on + added[:, :, i]
        if fixed is not None and slope is not None:
            found.append(fixed[:, :, i] + slope[:, :, i] @ state)
            on = on + late[:, :, i] @ found[-1]
        state = on
    first = torch.stack(states, 2)
    y, reads = (q * inside) @ first, None
    if beta is None:
        y = y + _scores(q, k, decay) @ v
    if found:
        x = torch.stack(found, 2)
        y, reads = y + _scores(q, writes, decay) @ x, x
        if beta is not None:
            reads = (k * inside) @ first + _scores(k, k, decay).tril(-1) @ x
    return _joined(y, N), first, None if reads is None else _joined(reads, N)


def _joined(x: Tensor, N: int) -> Tensor:
    """(B, H, K, T, p) -> (B, N, H, p)."""
    return x.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :N]
