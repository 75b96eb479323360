"""`nearfold::select` on a CUDA device: which search serves, and the gradients."""

from __future__ import annotations

from torch import Tensor

from nearfold.kernels import cuda
from nearfold.kernels.search import Search
from nearfold.kernels.triton import threshold, two_pass
from nearfold.kernels.triton.select_backward import select_backward
from nearfold.kernels.triton.threshold import refusal, refusal_of_rows

__all__ = ["refusal", "refusal_of_rows", "select", "select_backward"]


def select(query: Tensor, key: Tensor, search: Search) -> tuple[Tensor, Tensor]:
    """Scores (B, H, M, k) float32 and indices (B, H, M, k) int64, as `nearfold.kernels.select.select` defines them.

    Args:
        query: (B, H, M, e), float32, bfloat16 or float16, any strides.
        key: (B, H, R, e), same dtype.
        search: what is asked for; its metric is dot, cosine or euclidean.

    Raises:
        NotImplementedError: where `refusal` says why.
    """
    if cuda.search() == "threshold" or refusal(query, key, search) or two_pass.refusal(query, key, search):
        return threshold.select(query, key, search)
    return two_pass.select(query, key, search)[:2]
