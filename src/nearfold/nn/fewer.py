"""Attention through fewer keys or through features, to learned queries, with a halo; and gates of channels."""

from __future__ import annotations

from nearfold._numbers import flag
from nearfold.grammar import Basic, Weight
from nearfold.grammar import words as W
from nearfold.grammar.similarity import Scaled
from nearfold.nn.mixer import Mixer, TokenMixer


class LinformerAttention(TokenMixer):
    """Attention to a few learned mixtures of all tokens (arXiv 2006.04768): (B, N, D) -> (B, N, D), linear in N.

    Args:
        embed_dim: D.
        num_heads: heads, which share the mixtures.
        tokens: N, the only length it takes.
        mixtures: keys and values that are left.
        bias: biases on the projections.
        backend: "auto", or a backend's name.

    >>> import torch
    >>> LinformerAttention(16, 4, tokens=20, mixtures=5)(torch.randn(2, 20, 16)).shape
    torch.Size([2, 20, 16])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        tokens: int,
        mixtures: int = 256,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        operation = Basic(W.Projected(mixtures, tokens), W.Row(), Weight(W.Softmax(heads=num_heads)))
        super().__init__(operation, embed_dim, bias=bias, backend=backend)


class PerformerAttention(TokenMixer):
    """Softmax attention estimated by random features (arXiv 2009.14794): (B, N, D) -> (B, N, D), linear in N.

    Args:
        embed_dim: D.
        num_heads: heads.
        features: random features; the more, the nearer to softmax.
        causal: every token sees itself and those before it only.
        seed: of the features, which are drawn once.
        bias: biases on the projections.
        backend: "auto", or a backend's name.

    >>> import torch
    >>> PerformerAttention(16, 4, causal=True)(torch.randn(2, 9, 16)).shape
    torch.Size([2, 9, 16])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        features: int = 64,
        causal: bool = False,
        seed: int = 0,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        shape = W.Causal() if flag("causal", causal) else W.Row()
        operation = Basic(W.All(W.Favor(features, seed)), shape, Weight(W.Normalized(heads=num_heads)))
        super().__init__(operation, embed_dim, bias=bias, backend=backend)


class NystromAttention(TokenMixer):
    """Softmax attention through landmarks (arXiv 2102.03902): (B, N, D) -> (B, N, D), linear in N.

    Args:
        embed_dim: D.
        num_heads: heads.
        landmarks: mean queries and keys of as many segments.
        bias: biases on the projections.
        backend: "auto", or a backend's name.

    The paper's convolution of the values is not part of it.

    >>> import torch
    >>> NystromAttention(16, 4, landmarks=3)(torch.randn(2, 9, 16)).shape
    torch.Size([2, 9, 16])
    """

    def __init__(
        self, embed_dim: int, num_heads: int, *, landmarks: int = 64, bias: bool = True, backend: str = "auto"
    ) -> None:
        operation = Basic(W.All(), W.Row(), Weight(W.Nystrom(landmarks, heads=num_heads)))
        super().__init__(operation, embed_dim, bias=bias, backend=backend)


class AttentionPool(TokenMixer):
    """Learned queries that read all tokens (arXiv 1810.00825, 2103.03206): (B, N, D) -> (B, seeds, D).

    Args:
        embed_dim: D.
        num_heads: heads.
        seeds: learned queries, one output each.
        competing: a softmax over the seeds first, as slot attention has it (arXiv 2006.15055).
        bias: biases on the projections.
        backend: "auto", or a backend's name.

    >>> import torch
    >>> AttentionPool(16, 4, seeds=2)(torch.randn(3, 9, 16)).shape
    torch.Size([3, 2, 16])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        seeds: int = 1,
        competing: bool = False,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        operation = Basic(W.All(), W.Row(), Weight(W.Seeds(seeds, num_heads, competing)))
        super().__init__(operation, embed_dim, bias=bias, backend=backend)


class HaloAttention2d(Mixer):
    """Blocks that also read a border around them (arXiv 2103.12731): (B, C, H, W) -> (B, C, H, W).

    Args:
        channels: C.
        num_heads: heads.
        block_size: positions per axis; int or (rows, columns).
        halo: positions more on every side; int or (rows, columns).
        relative_bias: a learned number per head and offset is added to the scores.
        bias: biases on the projections.
        backend: "auto", or a backend's name.

    What lies outside the map is not read. (timm's code reads zeros there, which take their share of the softmax.)

    >>> import torch
    >>> HaloAttention2d(16, 4, 4, 1)(torch.randn(1, 16, 9, 10)).shape
    torch.Size([1, 16, 9, 10])
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        block_size: int | tuple[int, int] = 8,
        halo: int | tuple[int, int] = 3,
        *,
        relative_bias: bool = True,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        path = W.Block(block_size, Scaled(bias="table" if flag("relative_bias", relative_bias) else "none"), halo=halo)
        super().__init__(Basic(path, W.Box(), Weight(W.Softmax(heads=num_heads))), channels, bias=bias, backend=backend)


class SqueezeExcite2d(Mixer):
    """A gate for every channel, made by the means of all channels: (B, C, H, W) -> (B, C, H, W).

    Args:
        channels: C.
        reduction: of the channels between the two maps (arXiv 1709.01507).
        span: one convolution over so many neighbouring channels in their place (ECA, arXiv 1910.03151).
        bias: biases on the two maps.
        backend: "auto", or a backend's name.

    >>> import torch
    >>> SqueezeExcite2d(16, 4)(torch.randn(1, 16, 9, 10)).shape
    torch.Size([1, 16, 9, 10])
    """

    def __init__(
        self, channels: int, reduction: int = 16, *, span: int | None = None, bias: bool = True, backend: str = "auto"
    ) -> None:
        operation = Basic(W.Window(1), W.Box(), Weight(kernel=W.Excite(reduction, span)))
        super().__init__(operation, channels, bias=bias, backend=backend)
