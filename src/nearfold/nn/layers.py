"""The names people type. Each builds an `Operation` and hands it to the general layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from nearfold.grammar import Basic, Branch, Weight
from nearfold.grammar.notation import parse_word
from nearfold.grammar.similarity import Scaled, Similarity
from nearfold.grammar.word import WORDS
from nearfold.grammar.words import All, Box, Candidates, Dense, Kernel, Nearest, Ranked, Rho, Row, Softmax, Window
from nearfold.nn.mixer import Mixer, TokenMixer
from nearfold.nn.shuffle import Shuffled

RHOS = ("softmax", "identity", "inverse", "mean", "ones")


def _nearest(k: int, similarity: str | Similarity, candidates: str | Candidates, weight: Weight, **path: Any) -> Basic:
    """One k-nearest-neighbour operation from the arguments the layers share; ``path``: others of `Nearest`."""
    nearest = Nearest(k, parse_word("similarity", similarity), parse_word("candidates", candidates), **path)
    return Basic(nearest, Ranked(), weight)


class _ConvNN(Shuffled):
    """ConvNN over any grid; see `ConvNN2d`."""

    _ndim = 2
    elsewhere: ClassVar[Mapping[str, str]] = {
        "rho": 'Mixer("nearest(9, cosine, self) | ranked | softmax(project=none)*kernel", 64)',
        "kernel": 'Mixer("nearest(9, cosine, self) | ranked | separable", 64)',
        "shape": 'Mixer("nearest(9, cosine, self) | box | kernel", 64)',
        "include_self": 'Mixer("nearest(9, cosine) | ranked | kernel", 64)',
        "recall": 'Mixer("nearest(9, cosine, self, recall=0.95) | ranked | kernel", 64)',
    }

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        k: int = 9,
        *,
        stride: int | tuple[int, ...] = 1,
        padding: int = 0,
        groups: int = 1,
        bias: bool = True,
        similarity: str | Similarity = "cosine",
        candidates: str | Candidates = "all",
        shuffle: str = "none",
        shuffle_scale: int = 2,
        backend: str = "auto",
    ) -> None:
        weight = Weight(kernel=Dense(groups))
        operation = _nearest(k, similarity, candidates, weight, include_self=True, stride=stride, padding=padding)
        super().__init__(
            operation, in_channels, out_channels, ndim=self._ndim, bias=bias, backend=backend, shuffle=shuffle,
            shuffle_scale=shuffle_scale,
        )  # fmt: skip


class ConvNN2d(_ConvNN):
    """Convolution over the k most similar positions instead of a window: stands where an nn.Conv2d stood.

    Args:
        in_channels: channels of the input (B, in_channels, H, W).
        out_channels: channels of the output.
        k: neighbours, the position itself included.
        stride: outputs on a strided grid; int or (rows, columns).
        padding: border of zero positions that are candidates like any other.
        groups: of the kernel, as in nn.Conv2d.
        bias: a learned bias.
        similarity: notation of a similarity: cosine, euclidean, dot, scaled, position, blend(0.35),
            cosine(coordinates) ...
        candidates: all, random(64), grid(8), window(7).
        shuffle: none, before, after or both: pixel-unshuffle before, pixel-shuffle after.
        shuffle_scale: its factor.
        backend: "auto", or a backend's name.

    It is the public ConvNN layer's operation (arXiv 2511.14137): no projections, the position itself in slot 0, rho
    = 1, a dense kernel (out_channels, in_channels, k) with bias: `nearest(9, cosine, self) | ranked | kernel`. Other
    weights and slots are said to `Mixer` by an operation.

    >>> import torch
    >>> ConvNN2d(16, 32, k=9)(torch.randn(1, 16, 8, 8)).shape
    torch.Size([1, 32, 8, 8])
    """


class ConvNN1d(_ConvNN):
    """`ConvNN2d` over sequences (B, C, N).

    >>> import torch
    >>> ConvNN1d(16, 32, k=5, stride=2)(torch.randn(1, 16, 9)).shape
    torch.Size([1, 32, 5])
    """

    _ndim = 1


class ConvNN3d(_ConvNN):
    """`ConvNN2d` over volumes or videos (B, C, D, H, W).

    >>> import torch
    >>> ConvNN3d(8, 16, k=5)(torch.randn(1, 8, 3, 4, 5)).shape
    torch.Size([1, 16, 3, 4, 5])
    """

    _ndim = 3


class ConvNNAttention(TokenMixer):
    """ConvNN attention: the k best keys of every query, softmaxed, times a kernel over ranks. (B, N, D) -> (B, N, D).

    Args:
        embed_dim: D.
        num_heads: heads; each selects its own neighbours.
        k: neighbours.
        bias: biases on the projections.
        similarity: scaled (default), dot, cosine, euclidean, scaled(coordinates) ...
        candidates: all, random(32), grid(12), window(7).
        rho: softmax, identity, inverse or ones, without arguments: heads come from num_heads.
        kernel: depthwise (starts as ones: exactly k-NN attention), separable, kernel, or none.
        include_self: the token itself is slot 0.
        recall: below 1, an approximate search is enough that is expected to find this share of the neighbours.
        backend: "auto", or a backend's name.

    Source: arXiv 2606.14725. The public code exchanges query and key: see `nearfold.compat`.

    >>> import torch
    >>> ConvNNAttention(32, 4, k=9)(torch.randn(2, 17, 32)).shape
    torch.Size([2, 17, 32])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        k: int = 9,
        *,
        bias: bool = True,
        similarity: str | Similarity = "scaled",
        candidates: str | Candidates = "all",
        rho: str = "softmax",
        kernel: str | Kernel | None = "depthwise",
        include_self: bool | float = False,
        recall: float = 1.0,
        backend: str = "auto",
    ) -> None:
        operation = _attention(num_heads, k, similarity, candidates, rho, kernel, include_self, recall)
        super().__init__(operation, embed_dim, bias=bias, backend=backend)


def _attention(
    num_heads: int,
    k: int,
    similarity: str | Similarity,
    candidates: str | Candidates,
    rho: str,
    kernel: str | Kernel | None,
    include_self: bool | float,
    recall: float = 1.0,
) -> Basic:
    if rho not in RHOS:
        raise ValueError(f"rho must be one of {', '.join(RHOS)}, got {rho!r}")
    weigh = WORDS["rho"][rho](heads=num_heads, project="qkvo")  # type: ignore[call-arg]
    assert isinstance(weigh, Rho)
    if kernel == "kernel":
        kernel = Dense(groups=num_heads)  # heads stay apart, as in attention
    weight = Weight(weigh, None if kernel in (None, "none") else parse_word("kernel", kernel))
    return _nearest(k, similarity, candidates, weight, include_self=include_self, recall=recall)


class KVTAttention(TokenMixer):
    """k-NN attention: softmax over the k best keys only (arXiv 2106.00515). (B, N, D) -> (B, N, D).

    Args:
        embed_dim: D.
        num_heads: heads.
        k: keys kept for every query; all of them where there are fewer.
        bias: biases on the projections.
        recall: below 1, an approximate search is enough that is expected to find this share of the k keys.
        backend: "auto", or a backend's name.

    >>> import torch
    >>> KVTAttention(32, 4, k=100)(torch.randn(2, 17, 32)).shape
    torch.Size([2, 17, 32])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        k: int = 100,
        *,
        bias: bool = True,
        recall: float = 1.0,
        backend: str = "auto",
    ) -> None:
        operation = Basic(Nearest(k, Scaled(), recall=recall), Ranked(), Weight(Softmax(heads=num_heads)))
        super().__init__(operation, embed_dim, bias=bias, backend=backend)


class BranchingConv2d(Mixer):
    """Hybrid layer: ``ratio`` of the output channels from ConvNN, the others from a convolution, then mixed 1x1.

    Args:
        in_channels: channels both halves read.
        out_channels: int(ratio * out_channels) from ConvNN, the others from the convolution.
        kernel_size: of the convolution; int or (rows, columns).
        k: neighbours of ConvNN.
        ratio: 0 (convolution) to 1 (ConvNN).
        stride: outputs on a strided grid.
        groups: of both kernels.
        bias: learned biases.
        similarity: as in `ConvNN2d`.
        candidates: as in `ConvNN2d`.
        mix: the pointwise map after the two, which the public layer always has (arXiv 2511.14137).
        backend: "auto", or a backend's name.

    >>> import torch
    >>> BranchingConv2d(16, 32, ratio=0.25)(torch.randn(1, 16, 8, 8)).shape
    torch.Size([1, 32, 8, 8])
    """

    elsewhere: ClassVar[Mapping[str, str]] = {
        "padding": 'Mixer("branch(0.5, nearest(9, cosine, self, padding=1) | ranked | kernel, '
        'window(3) | box | kernel, mix)", 64)',
        "dilation": 'Mixer("branch(0.5, nearest(9, cosine, self) | ranked | kernel, '
        'window(3, dilation=2) | box | kernel, mix)", 64)',
    }

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        k: int = 9,
        ratio: float = 0.5,
        *,
        stride: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        similarity: str | Similarity = "cosine",
        candidates: str | Candidates = "all",
        mix: bool = True,
        backend: str = "auto",
    ) -> None:
        weight = Weight(kernel=Dense(groups))
        convnn = _nearest(k, similarity, candidates, weight, include_self=True, stride=stride)
        window = Basic(Window(kernel_size, stride=stride), Box(), weight)
        operation = Branch(ratio, convnn, window, mix)
        super().__init__(operation, in_channels, out_channels, bias=bias, backend=backend)


class BranchingAttention(TokenMixer):
    """``ratio`` of the channels from ConvNN attention, the others from attention, then mixed. (B, N, D) -> (B, N, D).

    Args:
        embed_dim: D; both halves read all of it, and num_heads must divide each half.
        num_heads: heads of each half.
        k: neighbours of the ConvNN half.
        ratio: 0 (attention) to 1 (ConvNN attention).
        bias: learned biases.
        similarity: as in `ConvNNAttention`.
        candidates: as in `ConvNNAttention`.
        kernel: as in `ConvNNAttention`.
        mix: the linear map after the two.
        backend: "auto", or a backend's name.

    >>> import torch
    >>> BranchingAttention(32, 4, ratio=0.5)(torch.randn(2, 17, 32)).shape
    torch.Size([2, 17, 32])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        k: int = 9,
        ratio: float = 0.5,
        *,
        bias: bool = True,
        similarity: str | Similarity = "scaled",
        candidates: str | Candidates = "all",
        kernel: str | Kernel | None = "depthwise",
        mix: bool = True,
        backend: str = "auto",
    ) -> None:
        sparse = _attention(num_heads, k, similarity, candidates, "softmax", kernel, False)
        dense = Basic(All(), Row(), Weight(Softmax(heads=num_heads)))
        super().__init__(Branch(ratio, sparse, dense, mix), embed_dim, bias=bias, backend=backend)
