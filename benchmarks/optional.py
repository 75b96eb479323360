"""Peers that need something more: FlexAttention (a C++ compiler), NATTEN, scikit-learn, FAISS.

Each function makes a peer, and raises ImportError or RuntimeError where that cannot be: then it is listed as absent.
None of them runs a backward pass on the CPU.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers import joined, projected
from nearfold.nn import Mixer

BLOCK = 32  # of FlexAttention's mask: the fastest of 32, 64 and 128 on (16, 64, 32, 32), 7x7


def _first(forward: Callable[[Tensor], Tensor], like: Tensor) -> None:
    """One call, in which a missing compiler shows; FlexAttention says then that it is slow without torch.compile."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        warnings.filterwarnings("ignore", message="return_lse is deprecated", category=FutureWarning)
        forward(like)


def flex_neighbourhood(
    layer: Mixer, like: Tensor, window: int, heads: int, compiled: bool = True
) -> Callable[[Tensor], Tensor]:
    """Attention in a window of square images by FlexAttention, compiled unless told otherwise."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    size = like.shape[2]

    def near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        rows, columns = (i // size - j // size).abs(), (i % size - j % size).abs()
        return (rows <= window // 2) & (columns <= window // 2)

    mask = create_block_mask(near, None, None, size * size, size * size, device="cpu", BLOCK_SIZE=BLOCK)
    attend = torch.compile(flex_attention) if compiled else flex_attention

    def forward(x: Tensor) -> Tensor:
        with torch.no_grad():
            q, k, v = (t.contiguous() for t in projected(layer, x.flatten(2).transpose(1, 2), heads))
            return joined(layer, attend(q, k, v, block_mask=mask)).transpose(1, 2).unflatten(2, (size, size))

    _first(forward, like)  # compiles for this very shape
    return forward


def natten_neighbourhood(layer: Mixer, like: Tensor, window: int, heads: int) -> Callable[[Tensor], Tensor]:
    """Attention in a window by NATTEN's na2d, which on the CPU is FlexAttention without torch.compile."""
    from natten import na2d  # type: ignore[import-not-found]

    def forward(x: Tensor) -> Tensor:
        with torch.no_grad():
            q, k, v = projected(layer, x.flatten(2).transpose(1, 2), heads)
            maps = (t.transpose(1, 2).unflatten(1, tuple(like.shape[2:])).contiguous() for t in (q, k, v))
            y = na2d(*maps, kernel_size=window)
            return joined(layer, y.flatten(1, 2).transpose(1, 2)).transpose(1, 2).unflatten(2, tuple(like.shape[2:]))

    _first(forward, like)
    return forward


def sklearn_search(k: int) -> Callable[[Tensor, Tensor], Tensor]:
    """scikit-learn's exact search; building it is not timed."""
    from sklearn.neighbors import NearestNeighbors

    @functools.lru_cache(1)
    def index(key: Tensor) -> NearestNeighbors:
        return NearestNeighbors(n_neighbors=k, algorithm="brute").fit(key.numpy())

    return lambda query, key: torch.from_numpy(index(key).kneighbors(query.numpy())[1])


def sklearn_tree() -> Callable[[Tensor, int], Tensor]:
    """scikit-learn's k-d tree of points among themselves, built anew at every call, as ours is."""
    from sklearn.neighbors import NearestNeighbors

    def search(points: Tensor, k: int) -> Tensor:
        tree = NearestNeighbors(n_neighbors=k, algorithm="kd_tree").fit(points.numpy())
        return torch.from_numpy(tree.kneighbors(points.numpy(), return_distance=False))

    return search


def faiss_search(k: int) -> Callable[[Tensor, Tensor], Tensor]:
    """FAISS's exact search (IndexFlatL2); building it is not timed."""
    import faiss

    @functools.lru_cache(1)
    def index(key: Tensor) -> faiss.IndexFlatL2:
        faiss.omp_set_num_threads(torch.get_num_threads())
        made = faiss.IndexFlatL2(key.shape[1])
        made.add(key.numpy())
        return made

    return lambda query, key: torch.from_numpy(index(key).search(query.numpy(), k)[1])
