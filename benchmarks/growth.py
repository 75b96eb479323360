"""Time of exact and approximate selection over 4096 to 65536 positions: `python -m benchmarks.growth [noise ...]`.

The index is forced at every size, so that the table shows from where on it pays; recall is measured on 2048
queries drawn afresh. Data: `conv`, 64 features of two random convolutions over a photograph; `patches`, its 5x5
patches; `noise`, 64 Gaussian features. "dot" is attention: query and key are two random projections of them to 64.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor

from nearfold.kernels import approximate, engine
from nearfold.kernels.select import select


def photograph(size: int) -> Tensor:
    """(1, 3, size, size)."""
    pixels = torch.from_numpy(load_sample_images().images[0].copy()).permute(2, 0, 1)[None].float() / 255
    return F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)


def features(kind: str, size: int) -> Tensor:
    """(size^2, d)."""
    generator = torch.Generator().manual_seed(0)
    if kind == "noise":
        return torch.randn(size * size, 64, generator=generator)
    x = photograph(size)
    if kind == "patches":
        return F.unfold(x - x.mean((2, 3), keepdim=True), 5, padding=2)[0].T.contiguous()
    x = F.batch_norm(x, None, None, training=True)
    for before in (3, 64):
        weight = torch.randn(64, before, 3, 3, generator=generator) * (2 / (9 * before)) ** 0.5
        x = F.relu(F.batch_norm(F.conv2d(x, weight, padding=1), None, None, training=True))
    return x[0].flatten(1).T.contiguous()


def operands(metric: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key (1, 1, N, e)."""
    if metric == "cosine":
        x = F.normalize(x, dim=1)
    if metric != "dot":
        return x[None, None], x[None, None]
    generator = torch.Generator().manual_seed(1)
    x = F.layer_norm(x, x.shape[1:])
    q, k = torch.randn(2, x.shape[1], 64, generator=generator) * x.shape[1] ** -0.5
    return (x @ q)[None, None], (x @ k)[None, None]


def search(metric: str, query: Tensor, key: Tensor, recall: float, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """k = 9 neighbours of every query, or of some."""
    at = torch.arange(query.shape[2]) if rows is None else rows
    query = query if rows is None else query[:, :, rows]
    n = key.shape[2]
    return select(query, key, 9, metric, False, at, torch.arange(n), [n], [0, -1, 1], False, float("-inf"), recall)


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Median."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def main(kinds: list[str], sizes: tuple[int, ...] = (64, 90, 128, 181, 256), recall: float = 0.95) -> None:
    """Print the table."""
    approximate.CLUSTERS = dict.fromkeys(approximate.CLUSTERS, 1)
    print(f"{engine.describe()}, {torch.get_num_threads()} threads, recall={recall}")
    for kind in kinds:
        for metric in ("cosine", "euclidean", "dot"):
            for size in sizes:
                query, key = operands(metric, features(kind, size))
                repeats = 3 if size < 181 else 1
                exact = milliseconds(lambda q=query, k=key, m=metric: search(m, q, k, 1.0), repeats)  # type: ignore
                index = milliseconds(lambda q=query, k=key, m=metric: search(m, q, k, recall), repeats)  # type: ignore
                rows = torch.randperm(size * size, generator=torch.Generator().manual_seed(2))[:2048]
                truth = search(metric, query, key, 1.0, rows)[1]
                found = search(metric, query, key, recall)[1][:, :, rows]
                share = (truth[..., None] == found[..., None, :]).any(-1).float().mean()
                print(
                    f"{kind:8s} {metric:9s} N={size * size:5d} exact {exact:6.0f} ms, approximate {index:6.0f} ms "
                    f"({exact / index:4.1f}x), recall {share:.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main(sys.argv[1:] or ["conv", "patches", "noise"])
