"""Similarities: what "near" means.

Each one reduces to a metric on embedded vectors: ``similarity(q_i, k_j) = metric(query_i, key_j)`` with
``metric`` dot, or minus the euclidean or chebyshev distance. The embedding costs O(N d), so the oracle and
every fast lowering share it, and a new similarity is one class here.

Shape legend: B batch, H heads, N positions, d features of one head, a grid axes, e embedded features.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.grammar.place import (  # noqa: F401  (all of them were here)
    BANDS,
    ENCODINGS,
    LEARNED,
    Place,
    angles,
    check_coordinates,
    encode,
    encoded_features,
    encoding_name,
    rotated,
)
from nearfold.grammar.word import Word, check, number, one_of, positive

if TYPE_CHECKING:
    from nearfold.grammar.operation import Basic


def _append(x_BHNd: Tensor, coordinates: bool | str, place: Place, params: dict[str, Tensor]) -> Tensor:
    code_Np = encode(coordinates, place, params.get("encoding_weight")).to(x_BHNd.dtype)
    return torch.cat([x_BHNd, code_Np.expand(*x_BHNd.shape[:2], *code_Np.shape)], -1)


def _unit(x: Tensor) -> Tensor:
    """Unit vectors along the last axis; a zero vector stays zero, and the gradient there stays bounded."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm == 0, 1).clamp(min=1e-12)


def _deviation(x_BHNd: Tensor) -> Tensor:
    """Unbiased standard deviation over positions and features (B, H, 1, 1), blind to NaN entries."""
    missing = x_BHNd.isnan()
    count = (~missing).sum((-2, -1), keepdim=True)
    filled = x_BHNd.masked_fill(missing, 0)
    mean = filled.sum((-2, -1), keepdim=True) / count.clamp(min=1)
    square = (filled - mean).masked_fill(missing, 0).square().sum((-2, -1), keepdim=True)
    # the floor under the root keeps the gradient finite when every feature is equal
    return (square / (count - 1).clamp(min=1)).clamp(min=1e-30).sqrt() + 1e-6


class Similarity(Word):
    """How alike a query and a key are: larger is nearer."""

    kind = "similarity"
    never_negative: ClassVar[bool] = False
    squared: bool = False
    coordinates: bool | str = False
    relative: bool = False
    rotary: bool | float = False
    bias: str = "none"
    learned: bool = False
    dilation: int = 1  # only positions whose offset is a multiple of it on every axis are candidates

    @property
    def placed(self) -> bool:
        """Whether the grid's positions play a part, which a query and a key of different inputs do not share."""
        return self.coordinates is not False

    @property
    def uses_features(self) -> bool:
        """Whether query and key features play a part."""
        return True

    @property
    def reduced(self) -> str:
        """The metric on embedded vectors: dot, cosine (dot of unit vectors), euclidean, chebyshev or gram."""
        return "dot"

    def embed(self, q_BHNd: Tensor, k_BHNd: Tensor, place: Place, params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Vectors whose metric is this similarity: query (B|1, H|1, N, e) and key (B|1, H|1, N, e)."""
        raise NotImplementedError

    def embed_ranked(
        self, q_BHNd: Tensor, k_BHNd: Tensor, place: Place, params: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, float | Tensor]:
        """As `embed`, and a positive factor (or one per head, (H, 1, 1)) of the scores, for a search.

        The factor does not change who is nearest; without it a similarity may find vectors whose ties are exact.
        """
        return *self.embed(q_BHNd, k_BHNd, place, params), 1.0

    def _appended(
        self, q_BHNd: Tensor, k_BHNd: Tensor, place: Place, params: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Query and key with the positions appended, where asked for."""
        if self.coordinates is False:
            return q_BHNd, k_BHNd
        query = _append(q_BHNd, self.coordinates, place, params)
        return query, query if q_BHNd is k_BHNd else _append(k_BHNd, self.coordinates, place, params)

    def embed_differences(
        self, q_BHNd: Tensor, k_BHNd: Tensor, place: Place, params: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, float]:
        """As `embed`, and a factor of the scores, for softmax: it sees only how the scores of one query differ."""
        return *self.embed(q_BHNd, k_BHNd, place, params), 1.0


@dataclass(frozen=True)
class Dot(Similarity):
    """q . k. ``coordinates`` appends the positions to query and key, encoded as `encode` says."""

    word = "dot"
    examples: ClassVar[dict[str, str]] = {
        "nearest_encoded": "nearest(5, dot(coordinates=learned)) | ranked | softmax*kernel(coordinates=learned)",
    }
    coordinates: bool | str = False

    def __post_init__(self) -> None:
        check_coordinates(self)

    def embed(self, q_BHNd: Tensor, k_BHNd: Tensor, place: Place, params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self._appended(q_BHNd, k_BHNd, place, params)


@dataclass(frozen=True)
class Scaled(Similarity):
    """q . k / sqrt(d), d the features of one head.

    ``coordinates`` appends the positions to query and key. ``relative`` adds ACmix's position term
    q_i . (p_i - p_j), p a learned pointwise map of the coordinates (arXiv 2111.14556, its public layer). ``rotary``
    turns query and key by their positions, on any number of axes (arXiv 2104.09864, 2403.13298); a number is the base
    of its frequencies. ``bias`` adds a number per head that depends on the offset only: a learned ``table`` (Swin,
    arXiv 2103.14030, eq. 4), for paths of a fixed extent, or ``alibi``: minus the distance times 2^(-8 h / heads),
    h = 1.. (arXiv 2108.12409).
    """

    word = "scaled"
    examples: ClassVar[dict[str, str]] = {
        "window_table": "window(3, scaled(bias=table), mode=inside, dilation=2) | box | softmax(heads=2, scale=0.5)",
        "window_alibi": "window(5, scaled(bias=alibi), stride=2) | box | softmax(heads=2)*depthwise",
        "all_alibi": "all(scaled(bias=alibi), stride=2) | strided(2) | softmax(heads=2)",
        "nearest_rotary": "nearest(5, scaled(rotary)) | ranked | softmax(heads=2, kv=1)",
    }
    biased: ClassVar[dict[str, tuple[str, ...]]] = {
        "none": (),
        "table": ("window", "block"),
        "alibi": ("window", "block", "all"),
    }  # the paths that each bias goes with; empty: any
    coordinates: bool | str = False
    relative: bool = False
    rotary: bool | float = False
    bias: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_coordinates(self)
        check(not (self.coordinates and self.relative), self, "relative", self.relative, "given without coordinates")
        if not isinstance(self.rotary, bool):
            number(self, "rotary", self.rotary)
            check(self.rotary > 1, self, "rotary", self.rotary, "a flag, or the base of its frequencies, above 1")
            object.__setattr__(self, "rotary", float(self.rotary))
        both = self.rotary and (self.coordinates is not False or self.relative)
        check(not both, self, "rotary", self.rotary, "given without coordinates and relative")
        check(self.bias in self.biased, self, "bias", self.bias, "none, table or alibi")

    def require(self, op: Basic) -> None:
        if self.bias == "none":
            return
        paths = self.biased[self.bias]
        if not (one_of(op.path, paths) and op.weight.rho.word == "softmax"):
            names = ", ".join(paths)
            raise ValueError(f"scaled(bias={self.bias}) goes with softmax over one of the paths {names}, got {op}")
        if self.bias == "table" and getattr(op.path, "mode", "") == "reflect":
            raise ValueError(f"scaled(bias=table) goes with mode=zeros or inside, got {op.path}")

    @property
    def placed(self) -> bool:
        return self.coordinates is not False or self.relative or self.rotary is not False or self.bias != "none"

    def embed(self, q_BHNd: Tensor, k_BHNd: Tensor, place: Place, params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        q_BHNe, k_BHNe, scale = self.embed_differences(q_BHNd, k_BHNd, place, params)
        q_BHNe = q_BHNe * scale
        if self.relative:  # q_i . p_i is the same for every key
            own_BHN1 = (q_BHNe * self.position(place, params, q_BHNe)).sum(-1, keepdim=True)
            q_BHNe = torch.cat([q_BHNe, own_BHN1], -1)
            k_BHNe = torch.cat([k_BHNe, torch.ones_like(k_BHNe[..., :1])], -1)
        return q_BHNe, k_BHNe

    def embed_differences(
        self, q_BHNd: Tensor, k_BHNd: Tensor, place: Place, params: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, float]:
        scale = q_BHNd.shape[-1] ** -0.5
        q_BHNd, k_BHNd = self._appended(q_BHNd, k_BHNd, place, params)
        if self.rotary:
            q_BHNd, k_BHNd = rotated(q_BHNd, place, self.rotary), rotated(k_BHNd, place, self.rotary)
        if self.relative:
            # features and positions swapped: for keys by planes the gradient's sum over batch and heads is then fast
            p_dN = self.position(place, params, k_BHNd).neg().T
            k_BHNd = (k_BHNd.transpose(2, 3) + p_dN).transpose(2, 3)
        return q_BHNd, k_BHNd, scale

    def position(self, place: Place, params: dict[str, Tensor], like: Tensor) -> Tensor:
        """ACmix's learned map of the coordinates, p (N, d), in the dtype of ``like``."""
        weight_da = params["position_weight"]
        return F.linear(place.unit().to(weight_da.dtype), weight_da, params.get("position_bias")).to(like.dtype)


@dataclass(frozen=True)
class Cosine(Similarity):
    """q . k / (|q| |k|); a zero vector has similarity 0 to everything."""

    word = "cosine"
    examples: ClassVar[dict[str, str]] = {
        "all_cosine": "all(cosine(coordinates), stride=2) | causal | softmax(heads=2)",
    }
    coordinates: bool | str = False

    def __post_init__(self) -> None:
        check_coordinates(self)

    def embed(self, q_BHNd: Tensor, k_BHNd: Tensor, place: Place, params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        same = q_BHNd is k_BHNd
        q_BHNd, k_BHNd = self._appended(q_BHNd, k_BHNd, place, params)
        q_BHNd = _unit(q_BHNd)
        return q_BHNd, q_BHNd if same else _unit(k_BHNd)


@dataclass(frozen=True)
class Euclidean(Similarity):
    """-|q - k|, or -|q - k|^2 when ``squared``."""

    word = "euclidean"
    examples: ClassVar[dict[str, str]] = {
        "window_euclidean": "window(3, euclidean, stride=2) | box | softmax(heads=2)*kernel",
        "all_euclidean": "all(euclidean) | row | softmax(heads=2)",
        "nearest_euclidean": "nearest(5, euclidean) | ranked | softmax(heads=2)*separable",
    }
    squared: bool = False
    coordinates: bool | str = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_coordinates(self)

    @property
    def reduced(self) -> str:
        return "euclidean"

    def embed(self, q_BHNd: Tensor, k_BHNd: Tensor, place: Place, params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self._appended(q_BHNd, k_BHNd, place, params)


def _positive(x: Tensor) -> Tensor:
    """elu(x) + 1, by hand: the strides of F.elu's gradient are not those that torch.compile foresees (torch 2.13)."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


@dataclass(frozen=True)
class Elu(Similarity):
    """(elu(q) + 1) . (elu(k) + 1), which is never negative: linear attention's (arXiv 2006.16236, eq. 7)."""

    word = "elu"
    never_negative = True

    def embed(self, q_BHNd: Tensor, k_BHNd: Tensor, place: Place, params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return _positive(q_BHNd), _positive(k_BHNd)


@dataclass(frozen=True)
class Position(Similarity):
    """Minus the distance between the positions themselves; features play no part.

    The unit is that of `Place.step`: the longest axis of the grid runs from -1 to 1, at every size, so that softmax
    over positions is as wide, as a share of the map, on a small grid as on a large one.
    ``metric`` is euclidean or chebyshev (the metric whose balls are square windows). With ``dilation`` d
    only positions whose offset is a multiple of d on every axis are candidates, as in a dilated convolution.
    """

    word = "position"
    examples: ClassVar[dict[str, str]] = {
        "window_position": "window(3, position) | box | softmax(project=none)",
        "nearest_chebyshev": "nearest(7, position(chebyshev), stride=2) | box | softmax(project=none)*depthwise",
        "nearest_dilated": "nearest(4, position(dilation=2)) | box | depthwise",
    }
    placed = True
    metric: str = field(default="euclidean", metadata={"positional": True})
    dilation: int = 1

    def __post_init__(self) -> None:
        check(self.metric in ("euclidean", "chebyshev"), self, "metric", self.metric, "euclidean or chebyshev")
        positive(self, dilation=self.dilation)

    def require(self, op: Basic) -> None:
        if self.dilation > 1 and op.path.word != "nearest":
            raise ValueError(f"position(dilation={self.dilation}) goes with nearest, got path {op.path}")

    @property
    def uses_features(self) -> bool:
        return False

    @property
    def reduced(self) -> str:
        return self.metric

    def embed(self, q_BHNd: Tensor, k_BHNd: Tensor, place: Place, params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        where_11Na = place.exact()[None, None] * place.step
        return where_11Na, where_11Na

    def embed_ranked(
        self, q_BHNd: Tensor, k_BHNd: Tensor, place: Place, params: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, float | Tensor]:
        exact_11Na = place.exact()[None, None]
        return exact_11Na, exact_11Na, place.step


@dataclass(frozen=True)
class Blend(Similarity):
    """From space (lam = 0) to features (lam = 1): the metric of [lam * f / std(f), (1 - lam) * position].

    ``std`` is over channels and positions of one sample and head (ConvNN's Loc_Col, arXiv 2511.14137). The positions'
    longest axis runs from -1 to 1 at every size of the grid and the others keep its proportions, so that lam = 0 is
    `position` exactly; ties between positions are exact at every lam. ``unit`` scales every axis to [-1, 1] on its own
    and breaks ties by rounding, as the public code does.

    ``learned`` makes lam a parameter, one for each head, that starts at the number given: ``blend_logit`` (heads,),
    whose sigmoid is lam, kept between 2e-9 and 1 - 2e-9. Its gradient comes through the scores that weigh (softmax,
    inverse ...); none goes through the choice of neighbours.
    """

    word = "blend"
    examples: ClassVar[dict[str, str]] = {
        "window_blend": "window(3, blend(0.5, cosine), padding=0) | box | softmax(heads=2)*depthwise",
        "nearest_blend": "nearest(50, blend(0.3, cosine), self) | causal | identity(heads=2)*kernel(coordinates)",
        "nearest_middle": "nearest(3, blend(0.7)) | ranked | separable",
        "nearest_learned": "nearest(4, blend(0.4, learned), self) | ranked | softmax(heads=2)*depthwise",
        "nearest_unit": "nearest(3, blend(0.7, unit)) | ranked | separable(groups=2)",
    }
    placed = True
    takes_keys = False  # its features are standardised over all positions
    lam: float
    metric: str = field(default="euclidean", metadata={"positional": True})
    unit: bool = False
    learned: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        number(self, "lam", self.lam)
        check(0 <= self.lam <= 1, self, "lam", self.lam, "between 0 (space) and 1 (features)")
        inner = not self.learned or 0.001 <= self.lam <= 0.999
        check(inner, self, "lam", self.lam, "from 0.001 to 0.999 where it is learned: at an end nothing pulls it away")
        check(self.metric in ("euclidean", "cosine"), self, "metric", self.metric, "euclidean or cosine")
        object.__setattr__(self, "lam", float(self.lam))

    @property
    def uses_features(self) -> bool:
        return self.lam > 0

    @property
    def reduced(self) -> str:
        # the public code breaks ties by the rounding of its own expression: `unit` keeps that
        return "gram" if self.unit and self.metric == "euclidean" else self.metric

    def embed(self, q_BHNd: Tensor, k_BHNd: Tensor, place: Place, params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        q_BHNe, k_BHNe, factor = self.embed_ranked(q_BHNd, k_BHNd, place, params)
        query = q_BHNe * factor
        return query, query if k_BHNe is q_BHNe else k_BHNe * factor

    def embed_ranked(
        self, q_BHNd: Tensor, k_BHNd: Tensor, place: Place, params: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, float | Tensor]:
        """The positions stay whole and half numbers, and the features take their scale: ties stay exact."""
        lam, rest = self._shares(params, q_BHNd.dtype)
        if self.unit:
            where_Na, factor = (rest * place.unit()).to(q_BHNd.dtype), None
        elif self.lam == 1:
            where_Na, factor = 0 * place.exact(), None
        else:
            where_Na, factor = place.exact().to(q_BHNd.dtype), rest * place.step
            lam = lam / factor
        if self.lam == 0 and self.metric == "cosine":  # normalised along the first axis: rounds as the public code does
            where_Na = F.normalize(where_Na.T.contiguous(), dim=0).T.contiguous()

        def joined(x_BHNd: Tensor) -> Tensor:
            if self.lam == 0:
                return where_Na[None, None]
            features = lam * (x_BHNd / _deviation(x_BHNd))
            both = torch.cat([features, where_Na.expand(*x_BHNd.shape[:2], *where_Na.shape[-2:])], -1)
            return _unit(both) if self.metric == "cosine" else both

        query = joined(q_BHNd)
        key = query if q_BHNd is k_BHNd else joined(k_BHNd)
        return query, key, 1.0 if factor is None or self.metric == "cosine" else factor

    def require(self, op: Basic) -> None:
        rho = op.weight.rho
        if self.learned and not rho.needs_score:
            raise ValueError(
                f"blend(learned) gets its gradient through the scores that weigh, and rho {rho.word} reads none: "
                f"use softmax, inverse or identity, such as {op.path} | {op.shape} | softmax; got {op}"
            )

    def _shares(self, params: dict[str, Tensor], dtype: torch.dtype) -> tuple[float | Tensor, float | Tensor]:
        """lam and 1 - lam; learned, one for each head (H, 1, 1)."""
        if not self.learned:
            return self.lam, 1 - self.lam
        logit_H11 = params["blend_logit"].to(dtype).clamp(-MOST, MOST)[:, None, None]
        return logit_H11.sigmoid(), (-logit_H11).sigmoid()


MOST = 20.0
"""A learned blend's logit counts up to here: beyond, a share of space or features would be lost in rounding."""
