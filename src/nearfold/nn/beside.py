"""Class and register tokens in front of a map of tokens that look around themselves."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from nearfold._numbers import integer
from nearfold.grammar import Basic, Weight
from nearfold.grammar.word import with_arguments
from nearfold.grammar.words import Beside, Box, Size, Softmax, Window
from nearfold.kernels.names import require_tensors
from nearfold.lower.plan import run
from nearfold.nn.mixer import TokenMixer


class TokenGridAttention(TokenMixer):
    """Tokens that read everything, and a map that reads them and a window: (B, T + H * W, D) -> the same.

    Args:
        embed_dim: D.
        num_heads: heads.
        window: positions of the map per axis that one of its positions reads; int or (rows, columns).
        tokens: T, which come first: class token, registers.
        grid: (H, W) of inputs that come without; any other may be named at a call.
        dilation: steps between the positions of the window.
        bias: biases on the projections.
        backend: "auto", or a backend's name.

    All that a position reads is in one softmax. Source: Vision Longformer's global tokens (arXiv 2103.15358), with one
    set of projections; registers: arXiv 2309.16588.

    >>> import torch
    >>> layer = TokenGridAttention(32, 4, 3, tokens=5, grid=(7, 8))
    >>> layer(torch.randn(2, 5 + 7 * 8, 32)).shape, layer(torch.randn(2, 5 + 4 * 4, 32), grid=(4, 4)).shape
    (torch.Size([2, 61, 32]), torch.Size([2, 21, 32]))
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        window: Size = 7,
        *,
        tokens: int = 1,
        grid: tuple[int, int] = (14, 14),
        dilation: Size = 1,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        path = Beside(integer("tokens", tokens, 0), grid, Window(window, dilation=dilation))
        super().__init__(Basic(path, Box(), Weight(Softmax(heads=num_heads))), embed_dim, bias=bias, backend=backend)

    def on(self, grid: tuple[int, int]) -> Basic:
        """The operation for another map."""
        (op,) = self.operation.parts
        return replace(op, path=with_arguments(op.path, grid=grid))

    def forward(  # type: ignore[override]
        self, x: Tensor, mask: Tensor | None = None, *, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """x (B, T + H * W, D) -> the same; ``grid`` is (H, W), ``mask`` which positions there are (B, T + H * W)."""
        require_tensors(x=x)
        if grid is None:
            return super().forward(x, None, mask)
        if x.dim() != 3 or x.shape[2] != self.in_channels:
            raise ValueError(f"x must be (B, T + H * W, {self.in_channels}) for this layer, got shape {tuple(x.shape)}")
        params = self.tensors()
        self._require_dtype(x, params)
        y = run(self.on(grid), params, self.prepare(x), self.made_channels, self.backend, mask=mask)
        return y.transpose(1, 2)
