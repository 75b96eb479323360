"""Convolutions with a kernel as long as the map: Hyena and S4D along tokens, spectra over images."""

from __future__ import annotations

from nearfold._numbers import flag
from nearfold.grammar import Basic, Weight
from nearfold.grammar import words as W
from nearfold.grammar.similarity import Dot
from nearfold.nn.mixer import Mixer, TokenMixer


class Hyena(TokenMixer):
    """Hyena's operator of order 2 (arXiv 2302.10866): (B, N, D) -> (B, N, D), each token reading those up to itself.

    Args:
        embed_dim: D.
        width: numbers between the maps of the MLP that makes the filter.
        length: tokens that its decays and frequencies are measured by; longer inputs are taken, too.
        num_heads: of query, key and value (arXiv 2310.18780); default: one for every channel, the paper's.
        backend: "auto", or a backend's name.

    Query, key and value stand for the paper's projections x1, x2 and v, without their short convolutions.

    >>> import torch
    >>> Hyena(16, 8, length=64)(torch.randn(2, 9, 16)).shape
    torch.Size([2, 9, 16])
    """

    def __init__(
        self,
        embed_dim: int,
        width: int = 64,
        length: int = 1024,
        *,
        num_heads: int | None = None,
        backend: str = "auto",
    ) -> None:
        gates = W.Identity(heads=embed_dim if num_heads is None else num_heads)
        operation = Basic(W.All(Dot()), W.Causal(), Weight(gates, W.Hyena(width, length)))
        super().__init__(operation, embed_dim, backend=backend)


class S4D(TokenMixer):
    """A diagonal state space (arXiv 2206.11893): (B, N, D) -> (B, N, D), a kernel and a skip for every channel.

    Args:
        embed_dim: D.
        state: numbers of the state per channel, in conjugate pairs.
        bidirectional: a second kernel reads what comes after.
        backend: "auto", or a backend's name.

    The parameters have the names of S4D's public code, with axes before them for the ways that a kernel goes. Its
    activation and output map stand around it.

    >>> import torch
    >>> S4D(16, 8)(torch.randn(2, 9, 16)).shape
    torch.Size([2, 9, 16])
    """

    def __init__(self, embed_dim: int, state: int = 64, *, bidirectional: bool = False, backend: str = "auto") -> None:
        shape = W.Row() if flag("bidirectional", bidirectional) else W.Causal()
        super().__init__(Basic(W.All(), shape, Weight(kernel=W.S4D(state))), embed_dim, backend=backend)


class SpectralConv2d(Mixer):
    """The spectral convolution of Fourier neural operators (arXiv 2010.08895): (B, C, H, W) -> (B, O, H, W).

    Args:
        in_channels: C.
        out_channels: O; default C.
        modes: lowest frequencies that have weights, per axis or for both.
        backend: "auto", or a backend's name.

    >>> import torch
    >>> SpectralConv2d(4, 6, modes=3)(torch.randn(2, 4, 9, 8)).shape
    torch.Size([2, 6, 9, 8])
    """

    def __init__(
        self, in_channels: int, out_channels: int | None = None, modes: W.Size = 12, *, backend: str = "auto"
    ) -> None:
        super().__init__(
            Basic(W.All(), W.Row(), Weight(kernel=W.Spectral(modes))), in_channels, out_channels, backend=backend
        )


class GlobalFilter2d(Mixer):
    """GFNet's global filter (arXiv 2107.00645): (B, C, H, W) -> (B, C, H, W), a learned spectrum for every channel.

    Args:
        channels: C.
        size: of the map that the spectrum is for; for others it is interpolated.
        backend: "auto", or a backend's name.

    >>> import torch
    >>> GlobalFilter2d(4, 14)(torch.randn(2, 4, 14, 14)).shape
    torch.Size([2, 4, 14, 14])
    """

    def __init__(self, channels: int, size: W.Size = 14, *, backend: str = "auto") -> None:
        super().__init__(Basic(W.All(), W.Row(), Weight(kernel=W.GlobalFilter(size))), channels, backend=backend)
