"""torch's own operators, where torch.onnx has no translation, a wrong one, or none with open sizes.

Each is written as `ExportedProgram.run_decompositions` takes it: NotImplemented leaves the operator as it is.

Shape legend: B batch, C channels, O outputs, G groups, n positions of an axis, m after pooling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nearfold.export.table.windows import along, read


def pad(x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    """`aten::pad`, and `aten::constant_pad_nd`: torch.onnx takes numbers, and no open sizes."""
    if mode != "constant" or all(type(amount) is int for amount in pad):
        made: Tensor = NotImplemented
        return made
    for i, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        axis = x.dim() - 1 - i
        n = x.shape[axis]
        at = torch.arange(n + before + after, device=x.device) - before
        there = (at >= 0) & (at < n)
        x = x.index_select(axis, torch.where(there, at, 0))
        x = x.masked_fill(~there.view(-1, *[1] * i), value or 0)
    return x


def constant_pad_nd(x: Tensor, amounts: Sequence[int], value: float = 0) -> Tensor:
    """`aten::constant_pad_nd`."""
    return pad(x, amounts, "constant", value)


def sort(x: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    """`aten::sort.stable` where topk takes the lowest place among equals."""
    value, at = x.topk(x.shape[dim], dim, largest=descending)
    return value, at


def searchsorted(
    boundaries: Tensor,
    values: Tensor,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Tensor:
    """`aten::searchsorted`, by counting."""
    assert sorter is None
    low, x = boundaries[..., None, :], values[..., None]
    before = low <= x if right or side == "right" else low < x
    return before.sum(-1, dtype=torch.int32 if out_int32 else torch.long)


def cummax(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """`aten::cummax`."""
    from torch._higher_order_ops.scan import scan_op

    def step(most: Tensor, at: Tensor, row: Tensor, place: Tensor) -> list[Tensor]:
        better = (row >= most) | row.isnan()
        most, at = torch.where(better, row, most), torch.where(better, place, at)
        return [most, at, most.clone(), at.clone()]

    rows = x.movedim(dim, 0)
    places = torch.arange(rows.shape[0], device=x.device)
    start = torch.full_like(rows[0], float("-inf")), torch.zeros_like(rows[0], dtype=torch.long)
    _, _, most, at = scan_op(step, [*start], [rows, places], ())
    return most.movedim(0, dim), at.movedim(0, dim)


def linalg_qr(x: Tensor, mode: str = "reduced") -> tuple[Tensor, Tensor]:
    """`aten::linalg_qr` by Gram and Schmidt, twice for each column, with a positive diagonal."""
    assert mode == "reduced" and x.shape[-2] >= x.shape[-1]
    q = x[..., :0]
    for column in x.split(1, -1):
        for _ in range(2):
            column = column - q @ (q.mT @ column)
        q = torch.cat([q, column / column.square().sum(-2, keepdim=True).sqrt()], -1)
    return q, (q.mT @ x).triu()


def remainder(x: Tensor, other: float) -> Tensor:
    """`aten::remainder.Scalar` by an open size."""
    if type(other) in (int, float):
        made: Tensor = NotImplemented
        return made
    return x.remainder(torch.full((), other, dtype=x.dtype, device=x.device))


def log_sigmoid(x: Tensor) -> Tensor:
    """`aten::log_sigmoid`: torch.onnx's log(sigmoid(x)) is minus infinity from -104 down, and inexact before."""
    return -torch.nn.functional.softplus(-x)


def _means(n: int, m: int, like: Tensor) -> Tensor:
    """(m, n): what every output of adaptive average pooling takes of every position."""
    i, at = torch.arange(m, device=like.device)[:, None], torch.arange(n, device=like.device)
    first, last = i * n // m, ((i + 1) * n + m - 1) // m
    return ((at >= first) & (at < last)).to(like.dtype) / (last - first)


def adaptive_avg_pool2d(x: Tensor, size: Sequence[int]) -> Tensor:
    """`aten::adaptive_avg_pool2d`, also where the number of positions is open or no multiple."""
    down, right = (_means(n, m, x) for n, m in zip(x.shape[-2:], size, strict=True))
    return down @ (x @ right.T)


def adaptive_avg_pool1d(x: Tensor, size: Sequence[int]) -> Tensor:
    """`aten::adaptive_avg_pool1d`."""
    return x @ _means(x.shape[-1], size[0], x).T


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """`aten::convolution` of so many groups as there are samples, which ONNX's Conv wants as a number."""
    made: Tensor = NotImplemented
    if type(groups) is int or transposed:
        return made
    axes = weight.dim() - 2
    amounts = [amount for p in padding for amount in (p, p)]
    if any(amounts):
        x = torch.nn.functional.pad(x, amounts[::-1])
    size = weight.shape[2:]
    out = [(n - d * (k - 1) - 1) // t + 1 for n, k, t, d in zip(x.shape[2:], size, stride, dilation, strict=True)]
    starts = [torch.arange(k, device=x.device) * d for k, d in zip(size, dilation, strict=True)]
    places = [along(axis, starts[axis], stride[axis], out) for axis in range(axes)]
    C, slots = weight.shape[1], math.prod(size)
    near = read(x, places, out)  # (1, G C, slots, *out)
    rows = near.reshape(groups, C * slots, -1)
    y = weight.flatten(1).reshape(groups, -1, C * slots) @ rows
    y = y.reshape(1, weight.shape[0], *out)
    return y if bias is None else y + bias.view(-1, *[1] * axes)


def _conv(axes: int) -> Any:
    def conv(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sequence[int] = (1,),
        padding: Sequence[int] = (0,),
        dilation: Sequence[int] = (1,),
        groups: int = 1,
    ) -> Tensor:
        each = [list(v) * (axes // len(v)) for v in (stride, padding, dilation)]
        return convolution(x, weight, bias, each[0], each[1], each[2], False, [0] * axes, groups)

    return conv


def table() -> dict[Any, Any]:
    """By operator."""
    aten = torch.ops.aten
    return {
        aten.pad.default: pad,
        aten.constant_pad_nd.default: constant_pad_nd,
        aten.sort.stable: sort,
        aten.searchsorted.Tensor: searchsorted,
        aten.cummax.default: cummax,
        aten.log_sigmoid.default: log_sigmoid,
        aten.remainder.Scalar: remainder,
        aten.linalg_qr.default: linalg_qr,
        aten.adaptive_avg_pool1d.default: adaptive_avg_pool1d,
        aten.adaptive_avg_pool2d.default: adaptive_avg_pool2d,
        aten.conv1d.default: _conv(1),
        aten.conv2d.default: _conv(2),
        aten.conv3d.default: _conv(3),
    }
