"""The gated delta rule, and its peers.

Shape legend: B batch, N positions, H heads, K chunks, T positions of a chunk, s features of query and key, p of value.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.build import _optional, _with_path
from benchmarks.case import Case, Forward, Peer
from nearfold.kernels.fast_weights import fast_weights


def loop(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """One position after the other, by batched matrix products; cut by `unbind`, whose gradient is one tensor."""
    B, _, H, _ = query.shape
    each = (query, key, value, log_decay.exp(), beta[..., None])
    steps = (x.transpose(1, 2).flatten(0, 1)[:, :, None].unbind(1) for x in each)
    state, rows = query.new_zeros(B * H, query.shape[-1], value.shape[-1]), []
    for q, k, v, decay, share in zip(*steps, strict=True):
        state = state * decay
        state = torch.baddbmm(state, k.mT, share * (v - k @ state))
        rows.append(q @ state)
    return torch.cat(rows, 1).unflatten(0, (B, H)).transpose(1, 2)


def chunks(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor, T: int = 64) -> Tensor:
    """By chunks of matrix products, arXiv 2412.06464: the WY representation, by one triangular solve for all chunks."""
    N = query.shape[1]
    q, k, v, g, b = (
        F.pad(x, (0, 0, 0, 0, 0, -N % T)).unflatten(1, (-1, T)).permute(0, 3, 1, 2, 4)
        for x in (query, key, value, log_decay, beta[..., None])
    )  # (B, H, K, T, .)
    total = g.cumsum(3)
    lower = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    decay = (total - total.mT).masked_fill(~lower, -torch.inf).exp()
    since, rest, whole = total.exp(), (total[..., -1:, :] - total).exp(), total[..., -1:, :].exp()
    near = b * (k @ k.mT) * decay  # the solver reads what is below the diagonal
    made = torch.linalg.solve_triangular(near, b * torch.cat([v, k * since], -1), upper=False, unitriangular=True)
    fixed, slope = made.split([v.shape[-1], k.shape[-1]], -1)
    scores, far, late = (q @ k.mT) * decay, q * since, (k * rest).mT
    state, rows = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
    for i in range(q.shape[2]):
        written = fixed[:, :, i] - slope[:, :, i] @ state
        rows.append(far[:, :, i] @ state + scores[:, :, i] @ written)
        state = whole[:, :, i] * state + late[:, :, i] @ written
    return torch.stack(rows, 2).flatten(2, 3).transpose(1, 2)[:, :N]


def _transformers() -> Forward:
    """Its chunked form; ImportError where it is not there."""
    from nearfold._torchvision import load

    try:
        rule = load("transformers.models.qwen3_next.modeling_qwen3_next").torch_chunk_gated_delta_rule
    except (AttributeError, RuntimeError) as error:
        raise ImportError("it has no gated delta rule") from error
    # it divides queries by the root of their features
    return lambda q, k, v, g, b: rule(q * q.shape[-1] ** 0.5, k, v, g[..., 0], b)[0]


def gated_delta_rule(shape: tuple[int, int, int, int]) -> Case:
    """`nearfold::fast_weights` with one decay a head and keys (B, N, H, s) of length one, values as large."""
    query, key = (F.normalize(torch.randn(shape), dim=-1) for _ in range(2))
    decay, beta = -F.softplus(torch.randn(*shape[:3], 1) - 3), torch.rand(shape[:3])
    inputs = (query, key, torch.randn(shape), decay, beta)

    def ours(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> Tensor:
        return fast_weights(q, k, v, g, b, None, None, torch.is_grad_enabled())[0]

    absent: dict[str, str] = {}
    found = {
        "chunks of matrix products": Peer(chunks),
        # its backward keeps three states for every position: in float64 they do not fit
        "loop over time": Peer(loop, dtype=torch.float32),
    }
    theirs = _optional(_transformers, absent, "transformers")
    if theirs is not None:
        found["transformers"] = Peer(theirs, dtype=torch.float32)
    return Case(inputs, ours, _with_path(ours, found), absent)
