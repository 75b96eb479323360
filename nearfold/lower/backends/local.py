"""`local`: a window whose weight looks at the scores, by shifted views: no unfold, nothing of size window x C x N.

One pass over the slots computes the scores, a second one adds up alpha * value; each reads the padded maps
through a strided view.

Shape legend: B batch, H heads, d features, S slots, O output channels, `grid` the output grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nearfold.grammar.words import Ones, Window
from nearfold.kernels.select import DOT_LIKE
from nearfold.lower import oracle
from nearfold.lower.call import Call
from nearfold.lower.geometry import WindowGeometry
from nearfold.lower.verdict import Facts, Verdict
from nearfold.lower.weighting import alpha_of

NAME = "local"


def supports(facts: Facts) -> Verdict:
    """Window paths whose weight reads scores of a dot product or a euclidean distance."""
    op = facts.op
    if not isinstance(op.path, Window):
        return Verdict.no(f"path is {op.path.word}, not window")
    if isinstance(op.weight.rho, Ones):
        return Verdict.no("weight does not look at the scores: conv does it")
    if op.path.similarity.reduced not in (*DOT_LIKE, "euclidean"):
        return Verdict.no(f"similarity {op.path.similarity} is neither a dot product nor euclidean")
    return Verdict.yes("shifted views, one slot at a time", "roundoff")


def _shifted(
    padded: Tensor, offset: tuple[int, ...], stride: tuple[int, ...], out: tuple[int, ...]
) -> Tensor:
    """The view of a padded map (B, C, *padded) that one slot reads: (B, C, *out)."""
    for axis, (start, step, n) in enumerate(zip(offset, stride, out, strict=True)):
        padded = padded.narrow(2 + axis, start, (n - 1) * step + 1)
        if step > 1:
            padded = padded[(slice(None),) * (2 + axis) + (slice(None, None, step),)]
    return padded


def _grid_last(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """(B, H, N, e) -> (B * H, e, *grid)."""
    return x.transpose(2, 3).flatten(0, 1).unflatten(2, grid)


def run(call: Call) -> Tensor:
    """(B, O, *out)."""
    op, geometry = call.op, WindowGeometry.of(call.op, call.ndim)
    assert isinstance(op.path, Window)
    out, mode = geometry.output(call.grid), op.path.mode
    query, key = call.embedded()
    home = geometry.home()
    q = _shifted(_grid_last(query, call.grid), home, geometry.stride, out)
    k = geometry.pad(_grid_last(key, call.grid), mode)
    score = _scores(call, geometry, q, k, out)
    inside = geometry.pad(torch.ones(1, 1, *call.grid, device=k.device), mode)
    valid = torch.stack([_shifted(inside, o, geometry.stride, out)[:, 0] > 0 for o in geometry.offsets()], -1)
    B, heads = call.value.shape[0], call.heads
    alpha = alpha_of(op.weight.rho, score.masked_fill(~valid, float("-inf")), valid).to(call.value.dtype)
    v = geometry.pad(oracle.values(call).unflatten(2, call.grid), mode)
    alpha = alpha.unflatten(0, (query.shape[0], query.shape[1])).expand(B, heads, *alpha.shape[1:])
    return oracle.finish(call, _sum(call, geometry, alpha, v, out))


def _scores(call: Call, geometry: WindowGeometry, q: Tensor, k: Tensor, out: tuple[int, ...]) -> Tensor:
    """(B * H, *out, S)."""
    found = []
    for offset in geometry.offsets():
        k_s = _shifted(k, offset, geometry.stride, out)
        if call.similarity.reduced in DOT_LIKE:
            found.append((q * k_s).sum(1))
        else:
            square = (q - k_s).square().sum(1)
            found.append(-square if call.similarity.squared else -_safe_sqrt(square))
    return torch.stack(found, -1)


def _safe_sqrt(x: Tensor) -> Tensor:
    """Square root whose gradient at zero is zero."""
    zero = x == 0
    return x.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def _sum(call: Call, geometry: WindowGeometry, alpha: Tensor, v: Tensor, out: tuple[int, ...]) -> Tensor:
    """Sum over slots of alpha * W_s * value: (B, O, *out)."""
    kernel = oracle.kernel_weight(call)
    total: Tensor | None = None
    for s, offset in enumerate(geometry.offsets()):
        v_s = _shifted(v, offset, geometry.stride, out).unflatten(1, (call.heads, -1))
        y = (alpha[..., s].unsqueeze(2) * v_s).flatten(1, 2)
        if kernel is not None:
            weight, groups = kernel
            w_s = weight.flatten(2)[..., s].to(y.dtype)
            rows = y.flatten(2).unflatten(1, (groups, -1))
            y = torch.einsum("bgcm,goc->bgom", rows, w_s.unflatten(0, (groups, -1)))
            y = y.flatten(1, 2).unflatten(2, out)
        total = y if total is None else total + y
    assert total is not None
    return total
