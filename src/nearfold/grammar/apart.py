"""Rhos that weigh every score by itself: the slots of a query do not compete."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nearfold.grammar.weights import Rho, require_projections
from nearfold.grammar.word import positive


@dataclass(frozen=True)
class Sigmoid(Rho):
    """alpha = sigmoid(score - log n), n the number of valid slots: each slot is weighed by itself.

    Source: sigmoid attention (arXiv 2409.04431, eq. 3, with its bias b = -log n).
    """

    word = "sigmoid"
    examples: ClassVar[dict[str, str]] = {
        "all_sigmoid_causal": "all(dot) | causal | sigmoid(heads=2)",
        "nearest_sigmoid": "nearest(5, cosine) | ranked | sigmoid(heads=2)*depthwise",
    }
    primitive = ("DYNAMIC_ATTENTION", 2)
    heads: int = 1
    project: str | None = None

    def __post_init__(self) -> None:
        require_projections(self)


@dataclass(frozen=True)
class Rectified(Rho):
    """alpha = relu(score / n) ** power, n the number of valid slots: zero where a score is negative.

    Sources: ReLU attention in vision transformers (arXiv 2309.08586), power 1; the squared ReLU of the gated attention
    unit (arXiv 2202.10447), power 2.
    """

    word = "relu"
    examples: ClassVar[dict[str, str]] = {
        "all_rectified_causal": "all | causal | relu(heads=2, power=2)",
        "window_rectified": "window(3, dot) | box | relu(heads=2)",
    }
    primitive = ("DYNAMIC_ATTENTION", 2)
    heads: int = 1
    power: int = 1
    project: str | None = None

    def __post_init__(self) -> None:
        require_projections(self)
        positive(self, power=self.power)
