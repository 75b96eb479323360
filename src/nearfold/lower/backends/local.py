"""`local`: a window whose weight looks at the scores: no unfold, nothing of size window x C x N.

Shape legend: B batch, C channels, H heads, e embedded features, d features of a head, S slots, M outputs, `out` the
output grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nearfold.grammar import Basic
from nearfold.grammar.similarity import Place, Scaled
from nearfold.grammar.words import Softmax, Window
from nearfold.kernels.aggregate import aggregate
from nearfold.kernels.local import local_scores, local_sum, shifted
from nearfold.kernels.local_attention import local_attention
from nearfold.kernels.names import DOT_LIKE, INVALID, NORMED
from nearfold.kernels.whole import whole
from nearfold.kernels.windows import WindowAttention
from nearfold.lower.bias import has_bias
from nearfold.lower.call import Call, Run, autocast_dtype, refuse_derivatives
from nearfold.lower.frame import Frame
from nearfold.lower.geometry import WindowGeometry, crop
from nearfold.lower.kernel import finish, kernel_weight, values
from nearfold.lower.verdict import Facts, Verdict
from nearfold.lower.weighting import alpha_of
from nearfold.lower.windows import window_index

NAME = "local"


def supports(facts: Facts) -> Verdict:
    """Window paths whose weight reads scores of a dot product or a euclidean distance."""
    op = facts.op
    if not isinstance(op.path, Window):
        return Verdict.no(f"path is {op.path.word}, not window")
    if not op.weight.rho.needs_score:
        return Verdict.no("weight does not look at the scores")
    if op.cross:
        return Verdict.no("the window lies on another grid")
    if op.path.mode == "inside":
        return Verdict.no("the window moves at the border")
    if has_bias(op):
        return Verdict.no("the scores have a bias")
    if op.path.similarity.reduced not in (*DOT_LIKE, *NORMED):
        return Verdict.no(f"similarity {op.path.similarity} is neither a dot product nor euclidean")
    if _one_operator(op, facts.ndim):
        return Verdict.yes("softmax over the window in one operator, without unfold", "roundoff", keys=False)
    return Verdict.yes("shifted views, one slot at a time", "roundoff", keys=False)


def _one_operator(op: Basic, ndim: int) -> bool:
    """Softmax without a kernel over them is `nearfold::local_attention`."""
    return isinstance(op.weight.rho, Softmax) and op.weight.kernel is None and ndim <= 3


def _grid_last(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """(B, H, N, e) -> (B * H, e, *grid)."""
    return x.transpose(2, 3).flatten(0, 1).unflatten(2, grid).contiguous()


def prepare(at: Frame) -> Run:
    """What runs on this frame: softmax without a kernel is one operator, whose window is settled here."""
    op, rho, path, ndim = at.op, at.op.weight.rho, at.op.path, len(at.grid)
    if not _one_operator(op, ndim):
        return run
    assert isinstance(path, Window) and isinstance(rho, Softmax)
    geometry, near = WindowGeometry.of(op, ndim), path.similarity
    size, stride, dilation, before = map(list, (geometry.size, geometry.stride, geometry.dilation, geometry.before))
    home = geometry.home()
    covered = [(n - 1) * s + 1 for n, s in zip(at.out_grid, stride, strict=True)]
    everywhere = home == (0,) * ndim and at.out_grid == at.grid and set(geometry.stride) == {1}
    metric = "dot" if near.reduced in DOT_LIKE else "euclidean"
    plain = isinstance(near, Scaled) and not (near.coordinates or near.rotary)

    def attention(call: Call, position: Tensor | None = None) -> Tensor:
        refuse_derivatives(call)
        query, key, scale = _planes(call, position) if plain else _embedded(call)
        dtype = autocast_dtype(call.value) or call.value.dtype
        y, _ = local_attention(
            query if everywhere else crop(query, home, covered, stride),
            key,
            call.value.unflatten(1, (at.heads, -1)).to(dtype).to(query.dtype),
            size,
            stride,
            dilation,
            before,
            path.mode == "reflect",
            metric,
            near.squared,
            scale * rho.scale,
        )
        return y.flatten(1, 2).to(dtype)

    if not plain:
        return attention
    window, reflect = (size, stride, dilation, before), path.mode == "reflect"
    layer = WindowAttention(at.heads, list(geometry.home()), window, reflect, float(rho.scale), at.out_grid)

    def at_once(call: Call) -> Tensor:
        position = _position(call, near) if isinstance(near, Scaled) and near.relative else None

        def again(query: Tensor, key: Tensor, value: Tensor, position: Tensor | None) -> Tensor:
            return attention(Call(at, call.params, value, query, key, call.x, call.draw), position)

        return whole(layer, (call.query, call.key, call.value, position), again)

    return at_once


def _position(call: Call, near: Scaled) -> Tensor:
    """ACmix's map of the coordinates (d, *grid)."""
    assert call.key is not None
    wide = torch.promote_types(call.value.dtype, torch.float32)
    place = Place(call.padded, call.key.device, wide)
    return near.position(place, call.params, call.key.to(wide)).T.unflatten(1, call.grid)


def _planes(call: Call, position: Tensor | None) -> tuple[Tensor, Tensor, float]:
    """Query and key (B, H, d, *grid) as they are, but for ACmix's positions; and the factor of their scores."""
    assert call.query is not None and call.key is not None
    wide = torch.promote_types(call.value.dtype, torch.float32)
    query, key = (t.unflatten(1, (call.heads, -1)).to(wide) for t in (call.query, call.key))
    return query, key if position is None else key - position, query.shape[2] ** -0.5


def _embedded(call: Call) -> tuple[Tensor, Tensor, float]:
    """The same of any similarity."""
    query, key, scale = call.embedded_differences()
    sizes = (call.value.shape[0], call.heads, *(-1,) * (1 + call.ndim))
    query, key = (t.transpose(2, 3).unflatten(3, call.grid).expand(sizes) for t in (query, key))
    return query, key, scale


def run(call: Call) -> Tensor:
    """(B, O, *out)."""
    refuse_derivatives(call)
    op, geometry = call.op, WindowGeometry.of(call.op, call.ndim)
    assert isinstance(op.path, Window)
    out, mode, stride = call.out_grid, op.path.mode, list(geometry.stride)
    offsets = [n for offset in geometry.offsets() for n in offset]
    query, key = call.embedded()
    q = shifted(_grid_last(query, call.grid), geometry.home(), stride, out).contiguous()
    k = geometry.pad(_grid_last(key, call.grid), mode)
    metric = "dot" if call.similarity.reduced in DOT_LIKE else "euclidean"
    score_SL = local_scores(q, k, offsets, stride, metric, call.similarity.squared).movedim(1, -1)
    index_MS, valid_MS = window_index(op, call.grid, query.device)
    valid = valid_MS.unflatten(0, out)
    alpha = alpha_of(op.weight.rho, score_SL.masked_fill(~valid, float("-inf")), valid)
    B, heads = call.value.shape[0], call.heads
    alpha = alpha.unflatten(0, query.shape[:2]).expand(B, heads, *alpha.shape[1:])
    dtype = autocast_dtype(call.value) or call.value.dtype
    value, alpha = values(call).to(dtype), alpha.to(dtype)
    kernel = kernel_weight(call)
    if kernel is None:
        v = geometry.pad(value.unflatten(2, call.grid), mode).unflatten(1, (heads, -1)).flatten(0, 1)
        y = local_sum(alpha.flatten(0, 1).movedim(-1, 1).contiguous(), v.contiguous(), offsets, stride)
        return finish(call, y.unflatten(0, (B, heads)).flatten(1, 2))
    weight, groups = kernel
    at = index_MS.masked_fill(~valid_MS, INVALID)[None, :, :, None].expand(B, -1, -1, heads)
    alpha_BMSH = alpha.reshape(B, heads, *index_MS.shape).permute(0, 2, 3, 1)
    y = aggregate(
        value.transpose(1, 2).contiguous(),
        at.contiguous(),
        alpha_BMSH.contiguous(),
        weight.flatten(2).to(weight.dtype if autocast_dtype(call.value) is None else dtype),
        groups,
    )
    return finish(call, y.transpose(1, 2).unflatten(2, out))
