"""Functions for those who bring their own projections or offsets.

Shape legend: B batch, H heads, M queries or outputs, N keys or positions, d features of a head, k neighbours,
C channels, O output channels, S slots, G groups that move on their own, a grid axes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nearfold._numbers import flag, integer, real, sizes
from nearfold.kernels.aggregate import aggregate
from nearfold.kernels.corners import corners
from nearfold.kernels.names import require_tensors
from nearfold.kernels.select import select
from nearfold.kernels.weigh import slot_softmax
from nearfold.lower.call import derivative_of


def _refuse_derivatives(name: str, *tensors: Tensor | None) -> None:
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
