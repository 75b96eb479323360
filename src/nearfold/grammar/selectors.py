"""Selectors: what chooses the neighbours where it is not what weighs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nearfold.grammar.word import Word, positive


class Selector(Word):
    """What `nearest` chooses by, with parameters of its own."""

    kind = "selector"


@dataclass(frozen=True)
class Indexer(Selector):
    """The lightning indexer: a few heads of small queries on one small key, sum over heads of w * relu(q . k).

    Queries, keys and the heads' weights w are maps of the input, and one choice holds for all heads of the layer. No
    gradient goes through a choice: `nearfold.nn.functional.indexer_loss` trains it.

    Source: DeepSeek-V3.2's sparse attention (arXiv 2512.02556, eq. 1).
    """

    word = "indexer"
    examples: ClassVar[dict[str, str]] = {
        "nearest_indexer": "nearest(4, scaled, by=indexer(2, 3)) | ranked | softmax(heads=2)",
        "nearest_indexer_causal": "nearest(3, dot, by=indexer(1, 4), self) | causal | softmax(heads=4)*depthwise",
    }
    heads: int
    size: int

    def __post_init__(self) -> None:
        positive(self, heads=self.heads, size=self.size)
