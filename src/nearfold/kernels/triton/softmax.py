"""`nearfold::slot_softmax` on a CUDA device: one pass forward, one back.

Shape legend: N rows, k slots; of a program BM rows, KP slots (a power of two, at least k).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from nearfold.kernels import names
from nearfold.kernels.triton.rows import DTYPES, NAMED, as_compiled

MOST_SLOTS = 4096  # a row lives in registers
LOST = tl.constexpr(names.LOST)


def refusal(score: Tensor) -> str:
    """Why the kernels cannot run on scores (.., k); empty where they can."""
    if score.dtype not in DTYPES:
        return f"scores are {score.dtype}, not float32, bfloat16 or float16"
    return f"k = {score.shape[-1]} is more than {MOST_SLOTS}" if score.shape[-1] > MOST_SLOTS else ""


@triton.jit
def _softmax_kernel(  # type: ignore[no-untyped-def]
    score,  # (N, k)
    index,  # (N, k) int64
    alpha,  # (N, k)
    N,
    k,
    scale,
    lowest,  # of the scores' dtype
    BM: tl.constexpr,
    KP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)[:, None]
    slot = tl.arange(0, KP)[None, :]
    there = (row < N) & (slot < k)
    at = tl.load(index + row * k + slot, mask=there, other=-1)
    x = tl.load(score + row * k + slot, mask=there & (at >= 0), other=0.0).to(tl.float32) * scale
    x = tl.where(at >= 0, x, tl.where(slot < k, lowest, float("-inf")))
    x = tl.exp(x - tl.max(x, 1)[:, None])
    x = tl.where(at >= 0, x / tl.sum(x, 1)[:, None], 0.0)
    lost = tl.max((at == LOST).to(tl.int32), 1) > 0
    x = tl.where(lost[:, None], float("nan"), x)
    tl.store(alpha + row * k + slot, x.to(alpha.dtype.element_ty), mask=there)


@triton.jit
def _softmax_backward_kernel(  # type: ignore[no-untyped-def]
    grad,  # (N, k) all
    alpha,
    d_score,
    N,
    k,
    scale,
    BM: tl.constexpr,
    KP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)[:, None]
    slot = tl.arange(0, KP)[None, :]
    there = (row < N) & (slot < k)
    g = tl.load(grad + row * k + slot, mask=there, other=0.0).to(tl.float32)
    a = tl.load(alpha + row * k + slot, mask=there, other=0.0).to(tl.float32)
    d = scale * a * (g - tl.sum(g * a, 1)[:, None])
    tl.store(d_score + row * k + slot, d.to(d_score.dtype.element_ty), mask=there)


def _blocks(k: int) -> dict[str, int]:
    KP = int(triton.next_power_of_2(k))
    return {"BM": max(1, 1024 // KP), "KP": KP}


def slot_softmax(score: Tensor, index: Tensor, scale: float) -> Tensor:
    """As `nearfold.kernels.weigh.slot_softmax`, of scores (.., k) and indices alike, with at least one number."""
    alpha = torch.empty_like(score, memory_format=torch.contiguous_format)
    k = score.shape[-1]
    rows, blocks = score.numel() // k, _blocks(k)
    with torch.cuda.device_of(score):
        _softmax_kernel[(triton.cdiv(rows, blocks["BM"]),)](
            score.contiguous(),
            index.contiguous(),
            alpha,
            rows,
            k,
            scale,
            torch.finfo(score.dtype).min,
            **blocks,
            num_warps=4,
        )
    return alpha


def slot_softmax_backward(grad: Tensor, alpha: Tensor, scale: float) -> Tensor:
    """As `nearfold.kernels.weigh.slot_softmax_backward`, with at least one number."""
    d_score = torch.empty_like(alpha, memory_format=torch.contiguous_format)
    k = alpha.shape[-1]
    rows, blocks = alpha.numel() // k, _blocks(k)
    with torch.cuda.device_of(alpha):
        _softmax_backward_kernel[(triton.cdiv(rows, blocks["BM"]),)](
            grad.contiguous(), alpha.contiguous(), d_score, rows, k, scale, **blocks, num_warps=4
        )
    return d_score


def _forward_variant(dtype: str, k: int) -> dict:
    pointers = dict.fromkeys(("score", "alpha"), f"*{dtype}") | {"index": "*i64"}
    return as_compiled(_softmax_kernel, dict(_blocks(k)), pointers, ("scale", "lowest"), 4)


def _backward_variant(dtype: str, k: int) -> dict:
    pointers = dict.fromkeys(("grad", "alpha", "d_score"), f"*{dtype}")
    return as_compiled(_softmax_backward_kernel, dict(_blocks(k)), pointers, ("scale",), 4)


# what is launched on a large device, to be built without one
VARIANTS: list[Callable[[], dict]] = [
    partial(make, dtype, k) for make in (_forward_variant, _backward_variant) for dtype in NAMED for k in (9, 1000)
]
