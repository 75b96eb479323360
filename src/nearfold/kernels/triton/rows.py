"""What the kernels of the search and of its gradient share: how rows are loaded, and what a compiler is told of them.

Shape legend: R rows of e features; of a program BM rows, BE features.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMED = dict(zip(("fp32", "bf16", "fp16"), DTYPES, strict=True))
DENSE = {"q_stride_e": 1, "k_stride_e": 1}  # features lie next to one another
MOST_FEATURES = 128  # held of a row at once


@triton.jit
def load_rows(base, row, there, feature, row_stride, feature_stride, e, UPCAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows (BM, BE) of a matrix, zero where ``there`` (BM,) is false and beyond its e features."""
    at = base + row.to(tl.int64)[:, None] * row_stride + feature.to(tl.int64)[None, :] * feature_stride
    found = tl.load(at, mask=there[:, None] & (feature < e)[None, :], other=0.0)
    return found.to(tl.float32) if UPCAST else found


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels."""
    return not isinstance(load_rows, triton.JITFunction)


def upcast(x: Tensor) -> bool:
    """The interpreter's products of bfloat16 are wrong."""
    return interpreted() and x.dtype != torch.float32


def features(e: int, most: int) -> int:
    """Of a row at once; a product wants 16 at least."""
    return max(16, min(most, triton.next_power_of_2(e)))


def as_compiled(
    fn: Any, constexprs: dict[str, Any], pointers: dict[str, str], floats: tuple[str, ...], warps: int
) -> dict:
    """What a compiler needs to build a kernel without a device, as a launch has it; sizes are multiples of 16."""
    sized = {a: "i32:16" for a in fn.arg_names if "stride" in a or a in ("M", "R", "e")}
    types = {**sized, **dict.fromkeys(constexprs, "constexpr"), **dict.fromkeys(floats, "fp32"), **pointers}
    signature = {name: types.get(name, "i32") for name in fn.arg_names}
    return {"fn": fn, "signature": signature, "constexprs": constexprs, "num_warps": warps, "num_stages": 3}
