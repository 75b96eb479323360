"""Attention in windows and blocks of a grid (B, C, *grid), and over tokens (B, N, D)."""

from __future__ import annotations

from torch import Tensor, nn

from nearfold._numbers import flag, integer
from nearfold.grammar import Basic, Weight
from nearfold.grammar.similarity import Elu, Scaled
from nearfold.grammar.words import All, Block, Box, Causal, Normalized, Row, Shape, Softmax, Strided, Table, Window
from nearfold.kernels.names import require_tensors
from nearfold.nn.mixer import Mixer, TokenMixer


class _Neighborhood(Mixer):
    """Neighbourhood attention on any number of axes; see `NeighborhoodAttention2d`."""

    _ndim = 2

    def __init__(
        self,
        channels: int,
        num_heads: int,
        kernel_size: int | tuple[int, ...] = 7,
        *,
        dilation: int | tuple[int, ...] = 1,
        step: int | tuple[int, ...] = 1,
        causal_axes: tuple[int, ...] = (),
        relative_bias: bool = False,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        similarity = Scaled(bias="table" if flag("relative_bias", relative_bias) else "none")
        window = Window(kernel_size, similarity, dilation=dilation, mode="inside", step=step)
        shape: Shape = Box() if isinstance(causal_axes, tuple) and not causal_axes else Causal(causal_axes)
        operation = Basic(window, shape, Weight(Softmax(heads=num_heads)))
        super().__init__(operation, channels, ndim=self._ndim, bias=bias, backend=backend)


class NeighborhoodAttention2d(_Neighborhood):
    """Attention to the nearest positions in space: a window that stays inside the grid, as in NATTEN.

    Args:
        channels: of input and output (B, channels, H, W).
        num_heads: heads.
        kernel_size: positions per axis; int or one per axis.
        dilation: steps between them.
        step: this many queries in a row share the window of the one in their middle (NATTEN calls it stride; there is
            still one output per position). With step = kernel_size it is attention in blocks.
        causal_axes: axes along which the window ends at the query; 0 is the first.
        relative_bias: a learned number per head and offset is added to the scores.
        bias: biases on the projections.
        backend: "auto", or a backend's name.

    Sources: arXiv 2204.07143, eq. 4; 2209.15001 (dilation); 2504.16922 (step). Where the grid, or a dilated line of it,
    is smaller than the window, all of it is read.

    >>> import torch
    >>> NeighborhoodAttention2d(16, 4, 5, dilation=2)(torch.randn(1, 16, 12, 11)).shape
    torch.Size([1, 16, 12, 11])
    """


class NeighborhoodAttention1d(_Neighborhood):
    """`NeighborhoodAttention2d` over sequences (B, C, N).

    >>> import torch
    >>> NeighborhoodAttention1d(16, 4, 5, causal_axes=(0,))(torch.randn(1, 16, 9)).shape
    torch.Size([1, 16, 9])
    """

    _ndim = 1


class NeighborhoodAttention3d(_Neighborhood):
    """`NeighborhoodAttention2d` over volumes or videos (B, C, D, H, W).

    >>> import torch
    >>> NeighborhoodAttention3d(16, 4, 3, causal_axes=(0,))(torch.randn(1, 16, 4, 5, 6)).shape
    torch.Size([1, 16, 4, 5, 6])
    """

    _ndim = 3


class BlockAttention2d(Mixer):
    """Attention inside blocks of the grid: Swin's window attention, and with ``shift`` its shifted windows.

    Args:
        channels: of input and output (B, channels, H, W).
        num_heads: heads.
        block_size: positions per axis; int or (rows, columns).
        shift: moves the blocks' borders, from 0 to block_size - 1; Swin takes half the size in every other layer.
        relative_bias: a learned number per head and offset is added to the scores.
        padded: maps that the blocks do not divide are filled up with zeros at their end, which take part, as in Swin's
            public code, torchvision and timm; without it the blocks at the border are cut short and attend among
            themselves.
        bias: biases on the projections.
        backend: "auto", or a backend's name.

    Along an axis that one block covers nothing is shifted. Source: arXiv 2103.14030, 3.2.

    >>> import torch
    >>> BlockAttention2d(16, 4, 7, shift=3)(torch.randn(1, 16, 14, 15)).shape
    torch.Size([1, 16, 14, 15])
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        block_size: int | tuple[int, int] = 7,
        *,
        shift: int | tuple[int, int] = 0,
        relative_bias: bool = True,
        padded: bool = False,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        similarity = Scaled(bias="table" if flag("relative_bias", relative_bias) else "none")
        operation = Basic(Block(block_size, similarity, shift, padded), Box(), Weight(Softmax(heads=num_heads)))
        super().__init__(operation, channels, bias=bias, backend=backend)


POSITIONS = {"none": Scaled(), "rotary": Scaled(rotary=True), "alibi": Scaled(bias="alibi")}


class SelfAttention(TokenMixer):
    """Multi-head self-attention over tokens (B, N, D) -> (B, N, D).

    Args:
        embed_dim: D.
        num_heads: heads of the queries.
        kv_heads: heads of keys and values, each shared by num_heads / kv_heads of the queries' (arXiv 2305.13245); one:
            multi-query attention (1911.02150). Default num_heads.
        positions: none, rotary (2104.09864) or alibi (2108.12409).
        causal: every token sees itself and those before it only.
        bias: biases on the projections.
        backend: "auto", or a backend's name.

    >>> import torch
    >>> SelfAttention(32, 4, kv_heads=2, positions="rotary", causal=True)(torch.randn(2, 9, 32)).shape
    torch.Size([2, 9, 32])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        kv_heads: int | None = None,
        positions: str = "none",
        causal: bool = False,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        if positions not in POSITIONS:
            raise ValueError(f"positions must be one of {', '.join(POSITIONS)}, got {positions!r}")
        weight = Weight(Softmax(heads=num_heads, kv=kv_heads))
        operation = Basic(All(POSITIONS[positions]), Causal() if flag("causal", causal) else Row(), weight)
        super().__init__(operation, embed_dim, bias=bias, backend=backend)


class CrossAttention(TokenMixer):
    """Queries from one sequence, keys and values from another: forward(x (B, N, D), context (B, N', D')) -> (B, N, D).

    Args:
        embed_dim: D.
        num_heads: heads of the queries.
        context_dim: D', default embed_dim.
        kv_heads: as in `SelfAttention`.
        bias: biases on the projections.
        backend: "auto", or a backend's name.

    >>> import torch
    >>> CrossAttention(32, 4, context_dim=24)(torch.randn(2, 9, 32), torch.randn(2, 5, 24)).shape
    torch.Size([2, 9, 32])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        context_dim: int | None = None,
        kv_heads: int | None = None,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        operation = Basic(All(cross=True), Row(), Weight(Softmax(heads=num_heads, kv=kv_heads)))
        super().__init__(operation, embed_dim, bias=bias, backend=backend, context_dim=context_dim)


class LocalCrossAttention2d(Mixer):
    """Queries of one map, keys and values in a window of another: forward(x (B, C, H, W), context (B, C', H', W')).

    Args:
        channels: C, of x and of the output (B, C, H, W).
        num_heads: heads.
        kernel_size: positions of the context per axis, around the one where the query lies; int or (rows, columns).
        context_channels: C', default C.
        dilation: steps between them.
        bias: biases on the projections.
        backend: "auto", or a backend's name.

    The maps may have any sizes: both cover the same ground. With a finer x it is upsampling that x guides (SAPA, arXiv
    2209.12866, whose values are not projected: `Mixer("sapa", C)`).

    >>> import torch
    >>> LocalCrossAttention2d(16, 4, 3, context_channels=8)(torch.randn(1, 16, 8, 8), torch.randn(1, 8, 4, 4)).shape
    torch.Size([1, 16, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        kernel_size: int | tuple[int, int] = 5,
        *,
        context_channels: int | None = None,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        operation = Basic(Window(kernel_size, dilation=dilation, cross=True), Box(), Weight(Softmax(heads=num_heads)))
        super().__init__(operation, channels, bias=bias, backend=backend, context_channels=context_channels)


class SlidingWindowAttention(TokenMixer):
    """Attention to the tokens in a window (arXiv 2004.05150): (B, N, D) -> (B, N, D).

    Args:
        embed_dim: D.
        num_heads: heads.
        window: tokens in the window: the last ones, the token itself included, or those around it.
        causal: the window ends at the token (default); otherwise the token is in its middle.
        bias: biases on the projections.
        backend: "auto", or a backend's name.

    >>> import torch
    >>> SlidingWindowAttention(32, 4, window=5)(torch.randn(2, 9, 32)).shape
    torch.Size([2, 9, 32])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        window: int = 256,
        *,
        causal: bool = True,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        operation = Basic(
            Window(window), Causal() if flag("causal", causal) else Box(), Weight(Softmax(heads=num_heads))
        )
        super().__init__(operation, embed_dim, bias=bias, backend=backend)


class StridedAttention(TokenMixer):
    """Attention to every ``step``-th token, counted from the token itself (arXiv 1904.10509): (B, N, D) -> (B, N, D).

    Args:
        embed_dim: D.
        num_heads: heads.
        step: tokens from one to the next.
        bias: biases on the projections.
        backend: "auto", or a backend's name.

    >>> import torch
    >>> StridedAttention(32, 4, step=3)(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    """

    def __init__(self, embed_dim: int, num_heads: int, step: int, *, bias: bool = True, backend: str = "auto") -> None:
        operation = Basic(All(), Strided(step), Weight(Softmax(heads=num_heads)))
        super().__init__(operation, embed_dim, bias=bias, backend=backend)


class LinearAttention(TokenMixer):
    """Attention without softmax, linear in the number of tokens (arXiv 2006.16236): (B, N, D) -> (B, N, D).

    Args:
        embed_dim: D.
        num_heads: heads.
        causal: every token sees itself and those before it only.
        bias: biases on the projections.
        backend: "auto", or a backend's name.

    >>> import torch
    >>> LinearAttention(32, 4, causal=True)(torch.randn(2, 9, 32)).shape
    torch.Size([2, 9, 32])
    """

    def __init__(
        self, embed_dim: int, num_heads: int, *, causal: bool = False, bias: bool = True, backend: str = "auto"
    ) -> None:
        operation = Basic(
            All(Elu()), Causal() if flag("causal", causal) else Row(), Weight(Normalized(heads=num_heads))
        )
        super().__init__(operation, embed_dim, bias=bias, backend=backend)


class TokenMLP(nn.Module):
    """MLP-Mixer's token mixing (arXiv 2105.01601, eq. 1): two tables with a GELU between. (B, N, D) -> (B, N, D).

    Args:
        tokens: N, the only length it takes.
        hidden: rows between the two tables; default 4 N.
        bias: a learned bias for every row.

    >>> import torch
    >>> TokenMLP(9, 16)(torch.randn(2, 9, 32)).shape
    torch.Size([2, 9, 32])
    """

    def __init__(self, tokens: int, hidden: int | None = None, *, bias: bool = True) -> None:
        super().__init__()
        tokens = integer("tokens", tokens)
        hidden = 4 * tokens if hidden is None else integer("hidden", hidden)
        # one table for all channels: the number of channels is not a number of parameters
        self.expand = Mixer(Basic(All(), Row(), Weight(Table(tokens, hidden))), 1, ndim=1, bias=bias)
        self.contract = Mixer(Basic(All(), Row(), Weight(Table(hidden, tokens))), 1, ndim=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        require_tensors(x=x)
        if x.dim() != 3:
            raise ValueError(f"x must be (B, N, D) for this layer, got shape {tuple(x.shape)}")
        B, _, D = x.shape
        rows = x.transpose(1, 2).flatten(0, 1)[:, None]
        y: Tensor = self.contract(nn.functional.gelu(self.expand(rows)))
        return y[:, 0].unflatten(0, (B, D)).transpose(1, 2)
