"""Rhos whose shares are exactly zero but for a few slots: how many, the scores decide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nearfold.grammar.weights import Shares


@dataclass(frozen=True)
class Sparsemax(Shares):
    """alpha = the point of the simplex that is nearest to scale * score: max(score - tau, 0), which adds up to one.

    Source: arXiv 1602.02068, eq. 1; ``kv`` as of softmax.
    """

    word = "sparsemax"
    examples: ClassVar[dict[str, str]] = {
        "all_sparsemax_strided": "all(cosine, stride=2) | strided(2) | sparsemax(heads=2, scale=3.0)",
        "window_sparsemax": "window((3, 5), dot) | box | sparsemax(heads=2)*depthwise",
        "nearest_sparsemax": "nearest(5, dot) | causal | sparsemax(heads=4, kv=2)",
    }


@dataclass(frozen=True)
class Entmax(Shares):
    """alpha = entmax over the slots of scale * score, with 1.5 for its order: max(score / 2 - tau, 0) squared.

    Between softmax (order 1) and sparsemax (order 2). Source: arXiv 1905.05702, eq. 8; ``kv`` as of softmax.
    """

    word = "entmax"
    examples: ClassVar[dict[str, str]] = {
        "all_entmax_cross": "all(cross) | row | entmax(heads=4, kv=2)",
        "block_entmax": "block((2, 3), cosine) | box | entmax(heads=2, scale=4.0)",
        "union_entmax": "window(3, dot) & nearest(5, dot) | ranked | entmax(heads=2)",
    }
