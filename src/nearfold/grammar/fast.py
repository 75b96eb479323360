"""Rhos of fast weights: a matrix for each head that every position writes and reads.

What a head holds is S, of the path's ``state`` numbers (features of query and key) for every channel of its values:

    S_t = (diag(decay_t) + left_t right_t^T) S_{t-1} + key_t value_t^T,    y_t = S_t^T query_t,

so that alpha[i, j] = query_i (product of the steps after j, up to i) key_j.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from nearfold.grammar.weights import Rho, require_projections
from nearfold.grammar.word import check, positive

if TYPE_CHECKING:
    from nearfold.grammar.operation import Basic


@dataclass(frozen=True)
class FastWeights(Rho):
    """A rho that writes and reads a matrix; its own maps make queries and keys, so that ``project`` is v, o or vo."""

    dynamic = True
    primitive = ("FAST_WEIGHT", 2)
    paths = ("scan",)
    takes_kernel = False
    needs_score = False
    default_projections = ""
    decays: ClassVar[tuple[str, ...]] = ()  # the kinds of decay that it may have
    heads: int = 1
    project: str | None = None

    def __post_init__(self) -> None:
        require_projections(self)
        ok = self.project is None or not set("qk") & set(self.project.replace("none", ""))
        check(ok, self, "project", self.project, "v, o or vo")
        if self.decays:
            decay = getattr(self, "decay", None)
            check(decay in self.decays, self, "decay", decay, f"{', '.join(self.decays[:-1])} or {self.decays[-1]}")


@dataclass(frozen=True)
class Additive(FastWeights):
    """alpha[i, j] = query_i (decays from j + 1 to i) key_j / sqrt(state): what is written is added to what is left.

    ``decay`` is fixed, 1 - 2^(-5 - h) of head h (retention, arXiv 2307.08621), head, one made of the input
    for each head (gated retention, arXiv 2405.05254), or channel, one for each feature of the key (gated linear
    attention, arXiv 2312.06635). The first two turn pairs of features by their time, as rotary does.
    """

    word = "additive"
    examples: ClassVar[dict[str, str]] = {
        "additive_fixed": "scan(state=4, order=snake) | causal | additive(heads=2, project=vo)",
        "additive_head": "scan(state=6, order=columns, reverse) | causal | additive(heads=4, decay=head)",
        "additive_channel": "scan(state=5, reverse) | causal | additive(heads=2, decay=channel)",
    }
    decays = ("fixed", "head", "channel")
    decay: str = "fixed"

    def require(self, op: Basic) -> None:
        super().require(op)
        state = getattr(op.path, "state", 2)
        if self.decay != "channel" and state % 2:
            raise ValueError(
                f"{self} turns pairs of features, so that state must be even, got {op.path}; decay=channel takes any"
            )


@dataclass(frozen=True)
class Delta(FastWeights):
    """The delta rule: a share of what the state holds under a key is replaced with the value (arXiv 2406.06484).

    alpha[i, j] = query_i (product of decay_t (1 - beta_t key_t key_t^T), t from j + 1 to i) beta_j key_j / sqrt(state).
    ``decay`` is none (DeltaNet), head, one for each head (gated DeltaNet, arXiv 2412.06464), or channel, one for
    each feature of the key (Kimi delta attention, arXiv 2510.26692). Decays are made as Mamba's.
    """

    word = "delta"
    examples: ClassVar[dict[str, str]] = {
        "delta_plain": "scan(state=3, order=columns) | causal | delta(heads=2)",
        "delta_head": "scan(state=5, order=snake, reverse) | causal | delta(heads=2, project=vo, decay=head)",
        "delta_channel": "scan(state=4) | causal | delta(heads=4, decay=channel)",
    }
    decays = ("none", "head", "channel")
    decay: str = "none"


@dataclass(frozen=True)
class MLSTM(FastWeights):
    """The matrix memory of xLSTM: exponential input gates, forget gates, and a sum that normalises (arXiv 2405.04517).

    alpha[i, j] = c[i, j] / max(|sum over j of c[i, j]|, 1), where c[i, j] is query_i (forget gates from j + 1 to i)
    input gate_j key_j / sqrt(state).
    """

    word = "mlstm"
    examples: ClassVar[dict[str, str]] = {
        "mlstm_columns": "scan(state=3, order=columns, reverse) | causal | mlstm(heads=2, project=vo)",
    }


@dataclass(frozen=True)
class RWKV7(FastWeights):
    """The generalised delta rule of RWKV-7 (arXiv 2503.14456), its bonus for the position itself included.

    A decay and a learning rate for each feature, both made through ``rank`` numbers; what is removed is looked up by
    another key than the one that is written. Its shift of tokens stands in front of it.
    """

    word = "rwkv7"
    examples: ClassVar[dict[str, str]] = {
        "rwkv7_snake": "scan(state=3, order=snake) | causal | rwkv7(heads=2, rank=2, project=vo)",
    }
    rank: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, rank=self.rank)
