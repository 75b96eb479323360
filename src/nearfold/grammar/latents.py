"""Learned keys, queries and weights that belong to no position: mixed keys, seeds, latents, landmarks, synthesizers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from nearfold.grammar.paths import All, Path, Size
from nearfold.grammar.similarity import Dot, Scaled, Similarity
from nearfold.grammar.weights import Rho, require_projections
from nearfold.grammar.word import check, positive, sizes

if TYPE_CHECKING:
    from nearfold.grammar.operation import Basic


@dataclass(frozen=True)
class Projected(Path):
    """``n`` mixtures of all positions, learned: keys and values are mapped along the positions, each by its own table.

    A grid of exactly ``inputs`` positions. Source: Linformer (arXiv 2006.04768, eq. 7), whose heads share the tables.
    """

    word = "projected"
    examples: ClassVar[dict[str, str]] = {
        "projected_dot": "projected(5, 42, dot) | row | softmax(heads=4, scale=0.2, kv=2)",
    }
    primitive = ("GLOBAL_INDEXED", 1)
    shapes = ("row",)
    rhos = ("softmax",)
    takes_kernel = False
    joins = False
    n: int
    inputs: int
    similarity: Similarity = field(default=Scaled(), metadata={"positional": True})

    def __post_init__(self) -> None:
        positive(self, n=self.n, inputs=self.inputs)
        plain = isinstance(self.similarity, (Dot, Scaled)) and not self.similarity.placed
        check(plain, self, "similarity", str(self.similarity), "dot or scaled, without positions")

    def sized(self, positions: int) -> Path:
        return replace(self, inputs=positions)


class _OfAll(Rho):
    """A rho that makes alpha of keys itself, for path all as it is."""

    primitive = ("DYNAMIC_ATTENTION", 2)
    paths = ("all",)
    takes_kernel = False

    def require(self, op: Basic) -> None:
        super().require(op)
        if op.path != All() or op.shape.word != "row":
            raise ValueError(f"{self.word} goes with all | row, without arguments of all, got {op.path} | {op.shape}")


@dataclass(frozen=True)
class Seeds(_OfAll):
    """alpha[m, j] = softmax over positions j of s_m . k_j / sqrt(d): ``n`` learned queries ask, and are the outputs.

    A map goes in, one row of ``n`` outputs comes out. ``competing``: a softmax over the seeds first, whose shares are
    then divided by their sum over the positions: what a position gives one seed it gives no other.

    Sources: pooling by multihead attention (arXiv 1810.00825, eq. 12), and what Perceiver's latents read first (arXiv
    2103.03206); one step of slot attention (arXiv 2006.15055, algorithm 1), competing.
    """

    word = "seeds"
    examples: ClassVar[dict[str, str]] = {
        "all_seeds": "all | row | seeds(3, heads=2)",
        "all_seeds_competing": "all | row | seeds(4, competing)",
    }
    default_projections = "kvo"
    n: int
    heads: int = 1
    competing: bool = False
    project: str | None = None

    def __post_init__(self) -> None:
        require_projections(self)
        positive(self, n=self.n)


@dataclass(frozen=True)
class Latents(_OfAll):
    """alpha = softmax(K L^T) softmax(L K^T): ``n`` learned latents L gather from all positions and hand back to all.

    Source: FLARE (arXiv 2508.12594), whose scores have no scale; linear in the positions.
    """

    word = "latents"
    examples: ClassVar[dict[str, str]] = {
        "all_latents": "all | row | latents(3, heads=2)",
    }
    default_projections = "kvo"
    n: int
    heads: int = 1
    project: str | None = None

    def __post_init__(self) -> None:
        require_projections(self)
        positive(self, n=self.n)


@dataclass(frozen=True)
class Nystrom(_OfAll):
    """alpha = softmax(Q K'^T) pinv(softmax(Q' K'^T)) softmax(Q' K^T), scores scaled, for landmarks Q' and K'.

    The landmarks are the mean queries and keys of ``size`` bins along every axis, as F.adaptive_avg_pool cuts them; the
    pseudo-inverse is six steps of an iteration: linear in the positions, an approximation of softmax.
    Source: Nystromformer (arXiv 2102.03902, eq. 13 and 14), without its convolution of the values, a term of a sum.
    """

    word = "nystrom"
    examples: ClassVar[dict[str, str]] = {
        "all_nystrom": "all | row | nystrom(2, heads=2)",
    }
    takes_keys = False  # an absent landmark would make the matrix that is inverted singular
    size: Size
    heads: int = 1
    project: str | None = None

    def __post_init__(self) -> None:
        sizes(self, size=self.size)
        require_projections(self)


@dataclass(frozen=True)
class Synthesized(_OfAll):
    """alpha = softmax of numbers that no key had a part in, for a grid of exactly ``inputs`` positions.

    A learned table for every head (the random synthesizer); with ``hidden`` the query's own features through two maps
    with a ReLU between (the dense one). Source: arXiv 2005.00743, 3.2 and 3.3.
    """

    word = "synthesized"
    examples: ClassVar[dict[str, str]] = {
        "all_synthesized": "all | row | synthesized(42, heads=2, project=none)",
        "all_synthesized_hidden": "all | row | synthesized(42, heads=2, hidden=3)",
    }
    primitive = ("SHARED_KERNEL", 1)
    needs_score = False
    default_projections = "vo"
    inputs: int
    heads: int = 1
    hidden: int | None = None
    project: str | None = None

    def __post_init__(self) -> None:
        require_projections(self)
        positive(self, inputs=self.inputs)
        if self.hidden is not None:
            positive(self, hidden=self.hidden)

    @property
    def dynamic(self) -> bool:  # type: ignore[override]
        """Whether the input makes the numbers."""
        return self.hidden is not None

    @property
    def primitives(self) -> dict[str, float]:
        """A learned table, or numbers made by the input."""
        return {"SHARED_KERNEL": 1} if self.hidden is None else {"DYNAMIC_KERNEL": 2}

    def sized(self, positions: int) -> Rho:
        return replace(self, inputs=positions)
