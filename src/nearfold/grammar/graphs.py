"""Words of graph convolutions: kernels that see what a slot reads next to the query's own value.

Shape legend: x_i the query's own value, x_j what a slot reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from nearfold.grammar.weights import Kernel
from nearfold.grammar.word import check, number, positive

if TYPE_CHECKING:
    from nearfold.grammar.operation import Basic


class _Edges(Kernel):
    """A kernel that makes of x_i and x_j what the slot brings; it has no numbers for slots."""

    edges = True

    def require(self, op: Basic) -> None:
        if op.path.word in ("all", "scan", "deformable") or op.cross:
            raise ValueError(
                f"{self.word} reads neighbours next to the query's own position, which path {op.path} does not have; "
                "use nearest(k), window(size), block, first, scattered, axial, or several with &"
            )


@dataclass(frozen=True)
class Relative(_Edges):
    """A map of [x_i, sum of alpha (x_j - x_i)]: what the slots read, seen from the query, beside its own value.

    With ``max`` it is the max-relative convolution of vision GNNs (arXiv 2206.00272; arXiv 1904.03751). A group of the
    map reads the same channels of both.
    """

    word = "relative"
    examples: ClassVar[dict[str, str]] = {
        "relative_attention": "nearest(4, dot, self) | ranked | softmax(heads=2)*relative(groups=2)",
        "relative_window": "window(3, stride=2) | box | mean*relative",
        "relative_sum": "window(3) & nearest(4, euclidean) | box | relative",
        "relative_scores": "window((2, 3), dot) | box | softmax(heads=2, project=v)*relative",
        "max_union": "axial(0) & first(2) | box | max",
    }
    primitive = ("POINTWISE", 1)
    groups: int = 1

    def __post_init__(self) -> None:
        positive(self, groups=self.groups)


@dataclass(frozen=True)
class Edge(_Edges):
    """A perceptron of every pair, f([x_i, x_j - x_i]): EdgeConv (arXiv 1801.07829).

    One map and a leaky ReLU of this ``slope``, as the paper's networks have them (without their batch norm); with
    ``hidden`` channels between, a map, the ReLU and another map.
    """

    word = "edge"
    examples: ClassVar[dict[str, str]] = {
        "edge_mean": "nearest(5, euclidean, stride=2) | ranked | mean*edge(slope=0.0)",
        "edge_hidden": "nearest(4, cosine) | ranked | max*edge(hidden=5)",
        "edge_hidden_mean": "block(3, shift=1) | box | mean*edge(hidden=5, slope=0.1)",
        "edge_attention": "window(3, mode=inside) | box | softmax*edge",
        "edge_sum": "nearest(3, dot, padding=1) | causal | edge",
    }
    primitive = ("SHARED_KERNEL", 1)
    hidden: int = 0
    slope: float = 0.2

    @property
    def primitives(self) -> dict[str, float]:
        """The map, and the second one where there are hidden channels."""
        return {"SHARED_KERNEL": 1, "POINTWISE": 1 if self.hidden else 0}

    def __post_init__(self) -> None:
        check(type(self.hidden) is int and self.hidden >= 0, self, "hidden", self.hidden, "an integer >= 0")
        number(self, "slope", self.slope)
        check(0 <= self.slope <= 1, self, "slope", self.slope, "from 0 (ReLU) to 1")
        object.__setattr__(self, "slope", float(self.slope))

    def require(self, op: Basic) -> None:
        super().require(op)
        if op.weight.rho.heads != 1:
            raise ValueError(f"edge maps all channels of a pair together; leave heads out, got {op.weight}")
