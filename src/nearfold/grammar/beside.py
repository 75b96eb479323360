"""Tokens beside a map: class and register tokens that everybody reads, in front of a grid that looks around itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from nearfold.grammar.paths import Path, Size
from nearfold.grammar.similarity import Similarity
from nearfold.grammar.word import all_ones, check, one_of, sizes

if TYPE_CHECKING:
    from nearfold.grammar.operation import Basic


@dataclass(frozen=True)
class Beside(Path):
    """``tokens`` positions in front of a map of ``grid``: they read everything, the map reads them and along ``path``.

    The positions are those of a sequence, tokens first, then the map in raster order: exactly ``tokens`` plus those of
    the grid. All that a position reads is in one softmax. Sources: the global tokens of Vision Longformer (arXiv
    2103.15358, 3.1) and of ETC (arXiv 2004.08483); registers (arXiv 2309.16588) beside windows.
    """

    word = "beside"
    examples: ClassVar[dict[str, str]] = {
        "beside_window": "beside(2, (5, 8), window(3, dot)) | box | softmax(heads=2)",
        "beside_block": "beside(0, (6, 7), block((2, 3), cosine)) | box | softmax(heads=4, kv=2, scale=3.0)",
    }
    primitive = ("STATIC_SLIDING", 1)
    shapes = ("box",)
    rhos = ("softmax",)
    takes_kernel = False
    joins = False
    tokens: int
    grid: Size
    path: Path

    def __post_init__(self) -> None:
        check(type(self.tokens) is int and self.tokens >= 0, self, "tokens", self.tokens, "an integer >= 0")
        sizes(self, grid=self.grid)
        check(isinstance(self.path, Path), self, "path", self.path, "a path, such as window(7)")
        near, plain = self.path.similarity, one_of(self.path, ("window", "block", "axial"))
        moved = getattr(self.path, "cross", False) or getattr(self.path, "padded", False)
        same = getattr(self.path, "padding", "same") == "same" and all_ones(getattr(self.path, "stride", 1))
        check(
            plain and same and not moved and not near.placed and near.bias == "none",
            self, "path", str(self.path), "a window, block or axial path without stride, padding, cross and positions",
        )  # fmt: skip

    @property
    def similarity(self) -> Similarity:  # type: ignore[override]
        """That of the path on the map, for the tokens, too."""
        return self.path.similarity

    @property
    def positions(self) -> int:
        """Of the whole sequence."""
        return self.tokens + math.prod(self.grid if isinstance(self.grid, tuple) else (self.grid,))

    @property
    def primitives(self) -> dict[str, float]:
        """The map's path, and all positions for the tokens."""
        found = dict(self.path.primitives)
        if self.tokens:
            found["GLOBAL_INDEXED"] = found.get("GLOBAL_INDEXED", 0.0) + 1
        return found

    def sized(self, positions: int) -> Path:
        tokens = min(self.tokens, positions - 1)
        rest = positions - tokens
        if not isinstance(self.grid, tuple) or len(self.grid) != 2:
            return replace(self, tokens=positions - 1, grid=1) if self.positions != positions else self
        rows = max(n for n in range(1, math.isqrt(rest) + 1) if rest % n == 0)
        return self if self.positions == positions else replace(self, tokens=tokens, grid=(rows, rest // rows))

    def require(self, op: Basic) -> None:
        super().require(op)
        replace(op, path=self.path)  # what the map's own path cannot do
