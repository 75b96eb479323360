"""`block`: positions that look at one another and at nobody else are attention in small pieces.

Blocks of the grid (Swin's windows, MaxViT's grids), and the residues of strided attention.

Shape legend: B batch, H heads, P pieces, n positions of a piece, e embedded features, a grid axes.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.grammar.word import all_ones, as_tuple
from nearfold.grammar.words import All, Block, Softmax, Strided
from nearfold.kernels.attention import attention
from nearfold.kernels.names import DOT_LIKE
from nearfold.lower.bias import has_bias, score_bias
from nearfold.lower.call import Call, count_positions
from nearfold.lower.geometry import crop, surely
from nearfold.lower.verdict import Facts, Verdict
from nearfold.lower.words.block import block_shift

NAME = "block"


def supports(facts: Facts) -> Verdict:
    """Softmax of a dot-like similarity over blocks, or over every step-th position."""
    op = facts.op
    strided = isinstance(op.path, All) and isinstance(op.shape, Strided) and not op.cross
    if not (isinstance(op.path, Block) or strided):
        return Verdict.no(f"{op.path.word} | {op.shape.word} does not part the positions")
    if not all_ones(getattr(op.path, "stride", 1)):
        return Verdict.no("outputs are on a strided grid")
    if not isinstance(op.weight.rho, Softmax) or op.weight.kernel is not None:
        return Verdict.no(f"weight is {op.weight}, not softmax alone")
    if op.path.similarity.reduced not in DOT_LIKE:
        return Verdict.no(f"similarity {op.path.similarity.word} is not a dot product")
    if getattr(op.path, "halo", 0) not in (0, (0,) * facts.ndim):
        return Verdict.no("blocks with a halo overlap")
    if strided and has_bias(op):
        return Verdict.no("the bias is another one for every piece")
    if getattr(op.path, "spread", False) and op.path.similarity.bias == "alibi":
        return Verdict.no("distances are those of the map, not of a piece")
    return Verdict.yes("F.scaled_dot_product_attention of every piece by itself", "roundoff", keys=False)


class _Blocks:
    """Blocks of the grid: padded to whole ones, cut, and put together again."""

    def __init__(self, call: Call) -> None:
        path, self.ndim, self.grid = call.op.path, call.ndim, call.grid
        assert isinstance(path, Block)
        self.size, self.spread = as_tuple(path.size, self.ndim, "size"), path.spread
        shift = block_shift(path, self.grid)
        self.before = tuple((n - s) % n for n, s in zip(self.size, shift, strict=True))
        self.many = tuple((g + b + n - 1) // n for g, b, n in zip(self.grid, self.before, self.size, strict=True))
        counts = zip(self.many, self.size, self.grid, self.before, strict=True)
        self.after = tuple(k * n - g - b for k, n, g, b in counts)
        self.whole = all(surely(b == 0) for b in self.before + self.after)
        self.pieces = count_positions(self.many)
        # of open sizes it cannot be proved that what is padded is never less than nothing, nor, with torch 2.9, that
        # blocks along two axes are blocks: positions are picked by number, and what is outside is masked
        self.open = torch.compiler.is_compiling() and not self.whole

    def cut(self, x: Tensor) -> Tensor:
        """(B, H, N, e) -> (B, P, H, n, e)."""
        if self.open:
            at = torch.zeros((), dtype=torch.long, device=x.device)
            for place, n in zip(self._places(x.device), self.grid, strict=True):
                at = at * n + place.clamp(0, n - 1)
            return x.index_select(2, at.flatten()).unflatten(2, at.shape).permute(0, 2, 1, 3, 4)
        x = x.unflatten(2, self.grid)
        if not self.whole:
            pads = [n for b, a in list(zip(self.before, self.after, strict=True))[::-1] for n in (b, a)]
            x = F.pad(x, [0, 0, *pads])
        B, H, e = x.shape[0], x.shape[1], x.shape[-1]
        outer, inner = (self.size, self.many) if self.spread else (self.many, self.size)
        x = x.reshape(B, H, *(k for pair in zip(outer, inner, strict=True) for k in pair), e)
        a = self.ndim
        first, second = (3, 2) if self.spread else (2, 3)  # which piece, and where in it
        x = x.permute(0, *range(first, first + 2 * a, 2), 1, *range(second, second + 2 * a, 2), 2 + 2 * a)
        return x.reshape(B, self.pieces, H, count_positions(self.size), e)

    def _places(self, device: torch.device) -> list[Tensor]:
        """Coordinates, axis by axis, of the positions (P, n) of every piece; some are outside the grid."""
        piece = torch.arange(self.pieces, device=device)[:, None]
        inner = torch.arange(count_positions(self.size), device=device)
        pairs = list(zip(_digits(piece, self.many), _digits(inner, self.size), strict=True))
        if self.spread:
            return [i * k + p for (p, i), k in zip(pairs, self.many, strict=True)]
        return [p * n + i - b for (p, i), n, b in zip(pairs, self.size, self.before, strict=True)]

    def join(self, x: Tensor) -> Tensor:
        """(B, P, H, n, e) -> (B, H * e, *grid)."""
        B, _, H, _, e = x.shape
        a = self.ndim
        if self.open:
            piece = inner = torch.zeros((), dtype=torch.long, device=x.device)
            here = _digits(torch.arange(count_positions(self.grid), device=x.device), self.grid)
            for at, b, n, k in zip(here, self.before, self.size, self.many, strict=True):
                which, where = (at % k, at // k) if self.spread else ((at + b) // n, (at + b) % n)
                piece, inner = piece * k + which, inner * n + where
            x = x.permute(0, 2, 4, 1, 3).flatten(3, 4).flatten(1, 2)
            return x.index_select(2, piece * count_positions(self.size) + inner).unflatten(2, self.grid)
        x = x.reshape(B, *self.many, H, *self.size, e)
        first, second = (a + 2, 1) if self.spread else (1, a + 2)
        order = (0, a + 1, 2 * a + 2, *(k for i in range(a) for k in (first + i, second + i)))
        x = x.permute(order).reshape(B, H * e, *(m * n for m, n in zip(self.many, self.size, strict=True)))
        return crop(x, self.before, self.grid)

    def mask(self, like: Tensor) -> Tensor | None:
        """Positions that are inside the grid: (P, 1, 1, n), or None where all are."""
        if self.whole:
            return None
        inside = [(at >= 0) & (at < n) for at, n in zip(self._places(like.device), self.grid, strict=True)]
        return functools.reduce(torch.logical_and, inside)[:, None, None]


def _digits(number: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """The coordinates of places on a grid, counted row by row."""
    found: list[Tensor] = []
    for n in sizes[::-1]:
        found.append(number % n)
        number = number // n
    return found[::-1]


class _Residues:
    """Every step-th position in raster order."""

    def __init__(self, call: Call) -> None:
        shape = call.op.shape
        assert isinstance(shape, Strided)
        self.step, self.grid = shape.step, call.grid
        self.total = count_positions(call.grid)
        self.many = (self.total + self.step - 1) // self.step
        self.after = self.many * self.step - self.total

    def cut(self, x: Tensor) -> Tensor:
        """(B, H, N, e) -> (B, step, H, n, e)."""
        if torch.compiler.is_compiling():  # as for blocks
            x = x.index_select(2, self._places(x.device).clamp(max=self.total - 1))
        else:
            x = F.pad(x, [0, 0, 0, self.after])
        return self._pieces(x)

    def _places(self, device: torch.device) -> Tensor:
        return torch.arange(self.many * self.step, device=device)

    def _pieces(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.many, self.step)).permute(0, 3, 1, 2, 4)

    def join(self, x: Tensor) -> Tensor:
        """(B, step, H, n, e) -> (B, H * e, *grid)."""
        x = x.permute(0, 2, 4, 3, 1).flatten(3, 4)
        if torch.compiler.is_compiling():
            x = x.index_select(3, torch.arange(self.total, device=x.device))
        else:
            x = x[..., : self.total]
        return x.flatten(1, 2).unflatten(2, self.grid)

    def mask(self, like: Tensor) -> Tensor | None:
        """Positions that exist: (step, 1, 1, n), or None where all do."""
        if surely(self.after == 0):
            return None
        inside = (self._places(like.device) < self.total)[None, None, :, None]
        return self._pieces(inside)[0].transpose(-1, -2)


def _bias(call: Call, pieces: _Blocks, like: Tensor) -> Tensor | None:
    """The bias is the same in every block: that of one block by itself, where no shift is (H, n, n)."""
    if not has_bias(call.op):
        return None
    return score_bias(call.op, call.params, pieces.size, torch.empty(0), like)


def run(call: Call) -> Tensor:
    """(B, C, *grid)."""
    rho = call.op.weight.rho
    assert isinstance(rho, Softmax)
    pieces = _Blocks(call) if isinstance(call.op.path, Block) else _Residues(call)
    dtype = call.value.dtype
    query, key, scale = call.embedded_differences()
    value = call.value.flatten(2).unflatten(1, (call.heads, -1)).transpose(2, 3)
    B, H = value.shape[:2]
    query, key, value = (pieces.cut(t.to(dtype).expand(B, H, -1, -1)) for t in (query, key, value))
    mask = pieces.mask(value)
    bias = _bias(call, pieces, value) if isinstance(pieces, _Blocks) else None
    if bias is not None:
        bias = (bias * rho.scale).to(dtype)
        mask = bias if mask is None else bias.expand(mask.shape[0], *bias.shape).masked_fill(~mask, float("-inf"))
    P = query.shape[1]
    if mask is not None:
        mask = (
            mask.expand(P, mask.shape[-3], query.shape[3], key.shape[3])[None].expand(B, -1, -1, -1, -1).flatten(0, 1)
        )
    y = attention(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), mask, scale=scale * rho.scale)
    return pieces.join(y.unflatten(0, (B, P)))
