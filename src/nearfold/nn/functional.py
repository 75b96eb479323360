"""Functions for those who bring their own projections or offsets.

Shape legend: B batch, H heads, M queries or outputs, N keys or positions, d features of a head, k neighbours,
C channels, O output channels, S slots, G groups that move on their own, a grid axes, L maps, P points on each of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nearfold._numbers import flag, integer, real, sizes
from nearfold.kernels.aggregate import aggregate
from nearfold.kernels.corners import corners
from nearfold.kernels.names import require_tensors
from nearfold.kernels.sampled import sampled
from nearfold.kernels.select import select
from nearfold.kernels.weigh import slot_softmax
from nearfold.lower.call import derivative_of, refuse_trace

Shapes = Sequence[Sequence[int]] | Tensor


def _refuse_derivatives(name: str, *tensors: Tensor | None) -> None:
    refuse_trace(name)
    if how := derivative_of(*(t for t in tensors if t is not None)):
        raise NotImplementedError(
            f"{name}: {how} is not there; differentiate with torch.autograd.grad, or take a layer of nearfold.nn with "
            "backend='oracle'"
        )


def knn_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k: int,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    recall: float = 1.0,
) -> Tensor:
    """Attention to the k best keys of every query: `F.scaled_dot_product_attention` with all weights but k zero.

    Exact: the k keys are those with the largest scaled dot products, ties by the lowest index, and their weights are a
    softmax over those k. The N x M scores are never stored, forward or backward; with k >= N it is dense attention.

    Args:
        query: (B, H, M, d), float32, float64, bfloat16 or float16; scores are computed in float32 at least.
        key: (B, H, N, d), same dtype.
        value: (B, H, N, d_v), same dtype.
        k: neighbours, at least 1.
        is_causal: query i sees keys 0 .. i.
        scale: of the dot products; default 1 / sqrt(d).
        recall: below 1, an approximate search is enough that is expected to find this share of the k best keys.

    Returns:
        (B, H, M, d_v), in value's dtype. A query that is NaN gives NaN; a key that is NaN is never chosen.

    ValueError when shapes or dtypes do not fit. Source: KVT (arXiv 2106.00515); ConvNN attention (arXiv 2606.14725).

    >>> q, k, v = torch.randn(3, 2, 4, 50, 16).unbind()
    >>> knn_attention(q, k, v, 9).shape
    torch.Size([2, 4, 50, 16])
    >>> dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    >>> torch.allclose(knn_attention(q, k, v, 50), dense, atol=1e-5)
    True
    """
    require_tensors(query=query, key=key, value=value)
    shapes = tuple(query.shape), tuple(key.shape), tuple(value.shape)
    if any(t.dim() != 4 for t in (query, key, value)):
        raise ValueError("query, key and value must be (B, H, N, d), got {}, {} and {}".format(*shapes))
    if query.shape[:2] != key.shape[:2] or key.shape[:3] != value.shape[:3] or query.shape[3] != key.shape[3]:
        raise ValueError("query, key and value must agree in B, H, N and d, got {}, {} and {}".format(*shapes))
    if not (query.dtype == key.dtype == value.dtype and query.is_floating_point()):
        raise ValueError(
            f"query, key and value must have one floating dtype, got {query.dtype}, {key.dtype} and {value.dtype}"
        )
    B, H, M, d = query.shape
    N = key.shape[2]
    if d == 0 or N == 0 or H == 0:
        raise ValueError("query and key must have heads, keys and features, got {} and {}".format(*shapes))
    # slots beyond the keys weigh nothing; a compiled graph holds for other numbers of keys, too
    k = integer("k", k)
    k = k if torch.compiler.is_compiling() else min(k, N)
    recall = real("recall", recall)
    if not 0 < recall <= 1:
        raise ValueError(f"recall must be above 0 and at most 1 (exact), got {recall!r}")
    factor = d**-0.5 if scale is None else real("scale", scale)
    _refuse_derivatives("knn_attention", query, key, value)
    later = factor > 0  # it does not change the ranking: multiplied with k scores instead of d features
    score, index = select(
        query if later else query.to(torch.promote_types(query.dtype, torch.float32)) * factor,
        key if later else key.to(torch.promote_types(key.dtype, torch.float32)),
        k,
        "dot",
        False,
        torch.arange(M, device=query.device),
        torch.arange(N, device=query.device),
        [max(M, N)],
        [int(flag("is_causal", is_causal)), -1, 1],
        False,
        0.0,
        recall,
    )
    alpha = slot_softmax(score, index, factor if later else 1.0)
    y = aggregate(
        value.flatten(0, 1), index.flatten(0, 1)[..., None], alpha.to(value.dtype).flatten(0, 1)[..., None], None, 1
    )
    return y.unflatten(0, (B, H))


def deform_conv(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Deformable convolution with offsets from outside: `torchvision.ops.deform_conv2d` on one to three grid axes.

    Args:
        input: (B, C, *grid), float32, float64, bfloat16 or float16; sums and positions are in float32 at least.
        offset: (B, G * S * a, *out) in input's dtype: how far every slot is moved, in positions; channels are ordered
            (group, slot, axis), the first axis first. G divides C.
        weight: (O, C / groups, *size), S slots.
        bias: (O,).
        stride: per axis.
        padding: positions added on each side; they read zero.
        dilation: per axis.
        mask: (B, G * S, *out): every slot's value is multiplied with it (version 2, arXiv 1811.11168).

    Returns:
        (B, O, *out), (bi, tri)linearly interpolated; zero beyond the grid. Gradients flow to everything.

    ValueError where shapes or dtypes do not fit. Source: arXiv 1703.06211, eq. 2 to 4.

    >>> x, weight = torch.randn(2, 4, 6, 7), torch.randn(8, 4, 3, 3)
    >>> y = deform_conv(x, torch.zeros(2, 18, 6, 7), weight, padding=1)
    >>> torch.allclose(y, torch.nn.functional.conv2d(x, weight, padding=1), atol=1e-5)
    True
    """
    require_tensors(input=input, offset=offset, weight=weight)
    require_tensors(**{name: t for name, t in (("bias", bias), ("mask", mask)) if t is not None})
    axes = input.dim() - 2
    if not 1 <= axes <= 3 or weight.dim() != input.dim() or offset.dim() != input.dim():
        raise ValueError(
            "input (B, C, *grid), offset (B, G * S * a, *out) and weight (O, C / groups, *size) must have one to three "
            f"grid axes, got {tuple(input.shape)}, {tuple(offset.shape)} and {tuple(weight.shape)}"
        )
    size, grid = list(weight.shape[2:]), list(input.shape[2:])
    if 0 in weight.shape or 0 in input.shape[1:]:
        raise ValueError(
            "input (B, C, *grid) and weight (O, C / groups, *size) must have channels, positions and slots, got "
            f"{tuple(input.shape)} and {tuple(weight.shape)}"
        )
    how = {
        name: sizes(name, given, axes, least)
        for name, given, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1))
    }
    room = [n + 2 * p - d * (k - 1) - 1 for n, p, d, k in zip(grid, how["padding"], how["dilation"], size, strict=True)]
    out = [r // s + 1 for r, s in zip(room, how["stride"], strict=True)]
    B, C, slots = input.shape[0], input.shape[1], math.prod(size)
    groups = offset.shape[1] // (slots * axes)
    if min(room) < 0 or offset.shape != (B, groups * slots * axes, *out) or groups < 1 or C % groups:
        raise ValueError(
            f"offset must be (B, G * {slots * axes}, *out), here ({B}, G * {slots * axes}, "
            f"{', '.join(map(str, out))}), with G a divisor of the {C} channels, got {tuple(offset.shape)}"
        )
    if mask is not None and mask.shape != (B, groups * slots, *out):
        raise ValueError(f"mask must be {(B, groups * slots, *out)}, got {tuple(mask.shape)}")
    if C % weight.shape[1] or weight.shape[0] % (C // weight.shape[1]):
        raise ValueError(f"weight {tuple(weight.shape)} does not fit {C} channels: it is (O, C / groups, *size)")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},) for weight {tuple(weight.shape)}, got {tuple(bias.shape)}")
    dtypes = {t.dtype for t in (input, offset, weight, bias, mask) if t is not None}
    if len(dtypes) > 1 or not input.is_floating_point():
        raise ValueError(f"all operands must have one floating dtype, got {', '.join(sorted(map(str, dtypes)))}")
    _refuse_derivatives("deform_conv", input, offset, weight, bias, mask)
    wide = torch.promote_types(input.dtype, torch.float32)
    outputs = math.prod(out)
    share, index = corners(
        offset.to(wide).reshape(B * groups, slots, axes, outputs),
        None if mask is None else mask.to(wide).reshape(B * groups, slots, outputs),
        *(grid, out, size, how["stride"], how["dilation"], how["padding"]),
    )
    index, share = (t.unflatten(0, (B, groups)).permute(0, 2, 3, 1) for t in (index, share))
    y = aggregate(
        input.flatten(2).transpose(1, 2).contiguous(),
        index,
        share.to(input.dtype),
        weight.flatten(2),
        C // weight.shape[1],
        2**axes,
    )
    if bias is not None:
        y.add_(bias)
    return y.transpose(1, 2).unflatten(2, out)


def deform_attn(value: Tensor, spatial_shapes: Shapes, sampling_locations: Tensor, attention_weights: Tensor) -> Tensor:
    """Deformable attention: every query and head sums a few points of several maps, between their positions.

    What Deformable DETR's `MultiScaleDeformableAttention` computes (its ``level_start_index`` follows from the shapes),
    on one to three grid axes. Nothing of size points x channels is kept, forward or backward.

    Args:
        value: (B, N, H, d): the positions of L maps, one map after another, each in raster order; float32, float64,
            bfloat16 or float16.
        spatial_shapes: positions of every map per axis, L of them, such as [(64, 64), (32, 32)], or a tensor (L, a);
            one on a device is waited for.
        sampling_locations: (B, M, H, L, P, a), the **last axis first**: (x, y) on images. 0 is the outer edge of a
            map's first position, 1 that of its last (align_corners=False). In value's dtype, or in float32 beside a
            shorter one, which is to be preferred.
        attention_weights: (B, M, H, L, P), in the same dtype. They need not add up to one.

    Returns:
        (B, M, H * d), (bi, tri)linearly interpolated; zero beyond a map. Gradients flow to all three tensors. A
        location that is NaN makes its query's head NaN, and has no gradient.

    ValueError where shapes or dtypes do not fit. On CUDA it is PyTorch around `nearfold::aggregate`. Source: arXiv
    2010.04159, eq. 3.

    >>> value, weights = torch.arange(6.0).view(1, 6, 1, 1), torch.ones(1, 1, 1, 1, 1)
    >>> deform_attn(value, [(2, 3)], torch.tensor([0.5, 0.25]).view(1, 1, 1, 1, 1, 2), weights)
    tensor([[[1.]]])
    """
    require_tensors(value=value, sampling_locations=sampling_locations, attention_weights=attention_weights)
    if value.dim() != 4 or sampling_locations.dim() != 6:
        raise ValueError(
            "value must be (B, N, H, d) and sampling_locations (B, M, H, L, P, a), got "
            f"{tuple(value.shape)} and {tuple(sampling_locations.shape)}"
        )
    B, N, H, d = value.shape
    M, L, P, axes = sampling_locations.shape[1], *sampling_locations.shape[3:]
    shapes = _shapes(spatial_shapes, axes)
    if min(H, d, P) < 1 or not 1 <= axes <= 3 or sampling_locations.shape[:4] != (B, M, H, len(shapes)):
        raise ValueError(
            f"sampling_locations must be ({B}, M, {H}, {len(shapes)}, P, a) for value {tuple(value.shape)} and the "
            f"{len(shapes)} maps of spatial_shapes, with heads, points and one to three axes, got "
            f"{tuple(sampling_locations.shape)}"
        )
    if attention_weights.shape != (B, M, H, L, P):
        raise ValueError(
            f"attention_weights must be {(B, M, H, L, P)} for sampling_locations {tuple(sampling_locations.shape)}, "
            f"got {tuple(attention_weights.shape)}"
        )
    if (positions := sum(map(math.prod, shapes))) != N:
        raise ValueError(f"value must have the {positions} positions of the maps {shapes}, got {tuple(value.shape)}")
    wide = torch.promote_types(value.dtype, torch.float32)
    dtypes = {sampling_locations.dtype, attention_weights.dtype}
    if not value.is_floating_point() or dtypes - {value.dtype, wide} or len(dtypes) > 1:
        raise ValueError(
            "value, sampling_locations and attention_weights must have one floating dtype (the last two may be float32 "
            f"beside a shorter value), got {value.dtype}, {sampling_locations.dtype} and {attention_weights.dtype}"
        )
    _refuse_derivatives("deform_attn", value, sampling_locations, attention_weights)
    size = torch.tensor([shape[::-1] for shape in shapes], dtype=wide, device=value.device)[:, None]
    place = (sampling_locations.to(wide) * size - 0.5).flip(-1).flatten(3, 4)
    grid = [n for shape in shapes for n in shape]
    return sampled(value.flatten(2), place, attention_weights.to(wide).flatten(3), grid)


def _shapes(given: Shapes, axes: int) -> list[tuple[int, ...]]:
    """The positions of every map per axis, as Python's own."""
    rows = given.tolist() if isinstance(given, Tensor) else given
    if not isinstance(rows, (list, tuple)) or not rows or not all(isinstance(row, (list, tuple)) for row in rows):
        raise ValueError(f"spatial_shapes must be one shape for each map, such as [(64, 64), (32, 32)], got {given!r}")
    return [tuple(sizes("spatial_shapes", row, axes)) for row in rows]
