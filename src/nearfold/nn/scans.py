"""Selective state spaces: along tokens (B, N, D), and over images in several orders (B, C, H, W)."""

from __future__ import annotations

from nearfold.grammar import Basic, Operation, Sum, Weight
from nearfold.grammar.words import ORDERS, Causal, Scan, Selective
from nearfold.nn.mixer import Mixer, TokenMixer


class SelectiveScan(TokenMixer):
    """A state-space recurrence whose step, input and output maps depend on the tokens: (B, N, D) -> (B, N, D).

    Args:
        embed_dim: D.
        state: numbers of the state, per channel.
        num_heads: None: every channel has decays and a step of its own (Mamba, arXiv 2312.00752, algorithm 2); a
            number: the channels of a head share one decay and step (Mamba-2, arXiv 2405.21060), which is made of matrix
            products and affords larger states.
        rank: of the map that makes the steps, without heads; default D / 16.
        reverse: from the last token to the first.
        backend: "auto", or a backend's name.

    It is the scan alone: gates, short convolution and in and out projections of Mamba's block stand around it. The
    parameters have the names and layouts of Mamba's code: x_proj makes (dt, B, C), dt_proj, A_log, D.

    >>> import torch
    >>> SelectiveScan(32, state=8)(torch.randn(2, 9, 32)).shape
    torch.Size([2, 9, 32])
    """

    def __init__(
        self,
        embed_dim: int,
        state: int = 16,
        *,
        num_heads: int | None = None,
        rank: int | None = None,
        reverse: bool = False,
        backend: str = "auto",
    ) -> None:
        operation = Basic(Scan(state, reverse=reverse), Causal(), Weight(Selective(num_heads, rank)))
        super().__init__(operation, embed_dim, backend=backend)


class SelectiveScan2d(Mixer):
    """`SelectiveScan` over the positions of an image (B, C, H, W), in one order or in four, whose results are added.

    Args:
        channels: of input and output.
        state: numbers of the state, per channel.
        order: cross (rows and columns, each in both directions, with parameters of their own: VMamba's SS2D, arXiv
            2401.10166), raster, columns, or snake (rows, every other one backwards).
        num_heads: as in `SelectiveScan`.
        rank: as in `SelectiveScan`.
        backend: "auto", or a backend's name.

    >>> import torch
    >>> SelectiveScan2d(16, state=4)(torch.randn(1, 16, 6, 7)).shape
    torch.Size([1, 16, 6, 7])
    """

    def __init__(
        self,
        channels: int,
        state: int = 16,
        *,
        order: str = "cross",
        num_heads: int | None = None,
        rank: int | None = None,
        backend: str = "auto",
    ) -> None:
        if order not in ("cross", *ORDERS):
            raise ValueError(f"order must be one of cross, {', '.join(ORDERS)}, got {order!r}")

        def scan(order: str, reverse: bool = False) -> Basic:
            return Basic(Scan(state, order, reverse), Causal(), Weight(Selective(num_heads, rank)))

        operation: Operation
        if order == "cross":
            terms = [scan(way, back) for back in (False, True) for way in ("raster", "columns")]
            operation = Sum(tuple((None, term) for term in terms))
        else:
            operation = scan(order)
        super().__init__(operation, channels, backend=backend)
