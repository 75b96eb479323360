"""Words for whole blocks of the grid as neighbours."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, ClassVar

from nearfold.grammar.paths import Path, Size
from nearfold.grammar.similarity import Dot, Scaled, Similarity
from nearfold.grammar.word import as_tuple, check, positive, sizes

if TYPE_CHECKING:
    from nearfold.grammar.operation import Basic


@dataclass(frozen=True)
class NearestBlocks(Path):
    """The ``k`` blocks of ``size`` positions whose mean key is most similar to the query, with all their positions.

    The grid is cut into blocks from its start; those at its end are cut short. ``self`` puts the block that holds the
    query first and takes it out of the search. With ``pooled`` the queries of a block are averaged, too, and choose
    together. Under `causal` only whole blocks before the query's own compete, for a mean of later keys would tell of
    them. No gradient goes through a choice.

    Source: MoBA (arXiv 2502.13189, eq. 5 to 7), whose own block always counts; VSA (arXiv 2505.13389), pooled, on tiles
    of a video; the selected branch of NSA (arXiv 2502.11089).
    """

    word = "nearest_blocks"
    examples: ClassVar[dict[str, str]] = {
        "blocks_moba": "nearest_blocks(2, 3, self) | causal | softmax(heads=2)",
        "blocks_any": "nearest_blocks(2, 2, dot) | box | softmax(heads=2)",
        "blocks_pooled": "nearest_blocks(3, 2, self, pooled) | ranked | softmax(heads=2)",
        "blocks_mean": "nearest_blocks(2, (2, 3)) | ranked | mean",
    }
    primitive = ("CONTENT_AWARE", 2)
    shapes = ("ranked", "box", "causal")
    takes_kernel = False
    searches = True
    joins = False
    in_line = True
    k: int
    size: Size
    similarity: Similarity = field(default=Scaled(), metadata={"positional": True})
    include_self: bool = field(default=False, metadata={"notation": "self"})
    pooled: bool = False

    def __post_init__(self) -> None:
        positive(self, k=self.k)
        sizes(self, size=self.size)
        plain = isinstance(self.similarity, (Dot, Scaled)) and not (
            self.similarity.relative or self.similarity.bias != "none"
        )
        check(plain, self, "similarity", str(self.similarity), "dot or scaled, without relative and bias")

    def slot_shape(self, ndim: int) -> tuple[int, ...]:
        return (self.k * prod(as_tuple(self.size, ndim, "size")),)

    def require(self, op: Basic) -> None:
        super().require(op)
        if op.shape.causal and isinstance(self.size, tuple) and len(self.size) > 1:
            raise ValueError(f"nearest_blocks | causal is for sequences: give size as one number, got {self}")
