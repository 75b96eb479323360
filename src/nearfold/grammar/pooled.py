"""Words for fewer keys than positions, and for fewer that ask."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from nearfold.grammar.paths import All, Path, Size
from nearfold.grammar.similarity import Dot, Scaled, Similarity
from nearfold.grammar.weights import Rho, require_projections
from nearfold.grammar.word import check, sizes

if TYPE_CHECKING:
    from nearfold.grammar.operation import Basic


@dataclass(frozen=True)
class Pooled(Path):
    """The means of all blocks of ``size`` positions: a slot compares with a block's mean key and reads its mean value.

    The grid is cut into blocks from its start; those at its end are cut short. With ``bins`` there are ``size`` blocks
    along every axis, whatever its length, as F.adaptive_avg_pool cuts them: the cost is linear in the positions. Under
    `causal` a query reads the whole blocks that end before it or with it.

    Source: PVT v2's linear attention (arXiv 2106.13797), bins of 7; MViT's average pooling of keys and values (arXiv
    2104.11227); the compressed branch of NSA (arXiv 2502.11089, eq. 7) with the mean for its map.
    """

    word = "pooled"
    examples: ClassVar[dict[str, str]] = {
        "pooled_blocks": "pooled((2, 3)) | row | softmax(heads=2)",
        "pooled_bins": "pooled(3, dot, bins) | row | softmax(heads=2, kv=1)",
        "pooled_causal": "pooled(3) | causal | softmax(heads=2)",
    }
    primitive = ("GLOBAL_INDEXED", 1)
    shapes = ("row", "causal")
    rhos = ("softmax",)
    takes_kernel = False
    joins = False
    in_line = True
    size: Size
    similarity: Similarity = field(default=Scaled(), metadata={"positional": True})
    bins: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes(self, size=self.size)
        plain = isinstance(self.similarity, (Dot, Scaled)) and not (
            self.similarity.relative or self.similarity.bias != "none"
        )
        check(plain, self, "similarity", str(self.similarity), "dot or scaled, without relative and bias")

    def require(self, op: Basic) -> None:
        super().require(op)
        if op.shape.causal and (self.bins or (isinstance(self.size, tuple) and len(self.size) > 1)):
            raise ValueError(
                f"pooled | causal is for sequences in blocks: give size as one number and leave bins out, got {self}"
            )


@dataclass(frozen=True)
class Agent(Rho):
    """alpha = softmax(Q A^T) softmax(A K^T), scores scaled: agents A ask every key, and the queries ask the agents.

    The agents are the mean queries of ``size`` bins along every axis, as F.adaptive_avg_pool cuts them: the cost is
    linear in the positions. Source: arXiv 2312.08874, eq. 4, without its biases; its depthwise convolution of the
    values is a term of a sum.
    """

    word = "agent"
    examples: ClassVar[dict[str, str]] = {
        "agent_heads": "all | row | agent(3, heads=2)",
        "agent_axes": "all | row | agent((2, 9), project=v)",
    }
    primitive = ("DYNAMIC_ATTENTION", 2)
    paths = ("all",)
    takes_kernel = False
    size: Size
    heads: int = 1
    project: str | None = None

    def __post_init__(self) -> None:
        sizes(self, size=self.size)
        require_projections(self)

    def require(self, op: Basic) -> None:
        super().require(op)
        if op.path != All() or op.shape.word != "row":
            raise ValueError(f"agent goes with all | row, without arguments of all, got {op.path} | {op.shape}")
