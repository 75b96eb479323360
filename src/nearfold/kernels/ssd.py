"""Causal attention whose weights decay, in time linear in N: the structured dual of a selective state space.

With one decay per head and position, the recurrence of a state space is a masked attention without softmax (Mamba-2,
arXiv 2405.21060): inside chunks it is computed as such, by matrix products, and from chunk to chunk a state (s, p) is
carried. Plain PyTorch operations, differentiable.

Shape legend: B batch, H heads, N positions, s state size (features of query and key), p features of value, T positions
of a chunk, K chunks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold._numbers import parts
from nearfold.kernels.names import LOW


def _require(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, chunk: int) -> None:
    """ValueError where the operands do not fit one another."""

    def got() -> str:
        decay = "None" if log_decay is None else f"{tuple(log_decay.shape)}"
        return f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}, log_decay {decay}"

    if query.dim() != 4 or value.dim() != 4 or key.dim() != 4:
        raise ValueError(f"query, key (B, H or 1, N, s) and value (B, H, N, p) must have four axes, got {got()}")
    B, H, N, _ = value.shape
    s = query.shape[3]
    if query.shape not in ((B, H, N, s), (B, 1, N, s)) or key.shape not in ((B, H, N, s), (B, 1, N, s)):
        raise ValueError(f"query and key must be (B, H, N, s) or (B, 1, N, s) as value (B, H, N, p), got {got()}")
    if log_decay is not None and log_decay.shape != (B, H, N):
        raise ValueError(f"log_decay must be {(B, H, N)} as value, got {got()}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")


def _chunked(x: Tensor, T: int, K: int) -> Tensor:
    """(B, H, N, ...) -> (B, H, K, T, ...), zeros after the last position."""
    missing = K * T - x.shape[2]
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, missing))
    return x.unflatten(2, (K, T))


def segments(log_decay: Tensor) -> Tensor:
    """(.., T) -> (.., T, T): entry (i, j) is the sum over j < l <= i, and -inf above the diagonal.

    Each sum is added on its own, from its first term: a difference of running sums would lose the small ones behind
    large ones, and be NaN behind an infinite one.
    """
    T = log_decay.shape[-1]
    lower = torch.ones(T, T, dtype=torch.bool, device=log_decay.device).tril()
    terms = log_decay[..., None].expand(*log_decay.shape, T).masked_fill(~lower.tril(-1), 0)
    return terms.cumsum(-2).masked_fill(~lower, -torch.inf)


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None) -> Tensor:
    """The same as a recurrence, for any number of positions."""
    from nearfold.kernels.fast_weights import fast_weights

    H = value.shape[1]
    q, k = (x.expand(-1, H, -1, -1) for x in (query, key))
    q, k, v = (x.transpose(1, 2) for x in (q, k, value))
    decay = None if log_decay is None else log_decay.to(value.dtype)[..., None].transpose(1, 2)
    y: Tensor = fast_weights(q, k, v, decay, None, None, None, False)[0]
    return y.transpose(1, 2)


def decayed_attention(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None = None, *, chunk: int = 64
) -> Tensor:
    """y_i = sum over j <= i of exp(sum over j < l <= i of log_decay_l) * (query_i . key_j) * value_j.

    Args:
        query: (B, H, N, s), floating; or (B, 1, N, s), one for all heads.
        key: (B, H, N, s) or (B, 1, N, s), same dtype.
        value: (B, H, N, p), same dtype.
        log_decay: (B, H, N), normally at most 0 and as low as one likes; None for no decay, which is causal linear
            attention.
        chunk: T, positions that meet in one matrix; changes time, memory and rounding, not the result.

    Returns:
        (B, H, N, p), in O(N (T (s + p) + s p)) operations per head and O(N T + N s p / T) memory.

    Raises:
        ValueError: where shapes do not fit, or chunk is below 1.

    Structured state space duality: Dao and Gu, arXiv 2405.21060.
    """
    _require(query, key, value, log_decay, chunk)
    N = value.shape[2]
    if torch.compiler.is_exporting() and not isinstance(N, int):
        return _one_by_one(query, key, value, log_decay)  # the number of chunks would be that of the example
    T = max(min(chunk, N), 1)
    K = max(parts(N, T), 1)
    q, k, v = (_chunked(x, T, K) for x in (query, key, value))
    read = "" if q.shape[1] == 1 else "h"  # a head that all share has no axis: nothing is expanded
    write = "" if k.shape[1] == 1 else "h"
    q = q if read else q[:, 0]
    k = k if write else k[:, 0]
    both = read or write

    scores = torch.einsum(f"b{read}kis,b{write}kjs->b{both}kij", q, k)
    if both == "":
        scores = scores[:, None]
    inside = whole = None
    if log_decay is None:
        weights = scores.tril()
        late = v
    else:
        steps = _chunked(log_decay.float() if log_decay.dtype in LOW else log_decay, T, K)
        decay = segments(steps).exp()
        weights = scores * decay.to(scores.dtype)
        late = v * decay[..., -1, :, None].to(v.dtype)
        inside = steps.cumsum(-1).exp()
        whole = inside[..., -1, None, None].to(v.dtype)
    y = weights @ v
    if K > 1:
        added = torch.einsum(f"b{write}kjs,bhkjp->bhksp", k, late)
        state = torch.zeros_like(added[:, :, 0])
        states = []
        for i in range(K):
            states.append(state)
            state = added[:, :, i] + (state if whole is None else state * whole[:, :, i])
        earlier = torch.einsum(f"b{read}kis,bhksp->bhkip", q, torch.stack(states, 2))
        y = y + (earlier if inside is None else earlier * inside[..., None].to(v.dtype))
    return y.flatten(2, 3)[:, :, :N]
