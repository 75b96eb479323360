"""Similarities: what "near" means.

Each one reduces to a metric on embedded vectors: ``similarity(q_i, k_j) = metric(query_i, key_j)`` with
``metric`` dot, or minus the euclidean or chebyshev distance. The embedding costs O(N d), so the oracle and
every fast lowering share it, and a new similarity is one class here.

Shape legend: B batch, H heads, N positions, d features of one head, a grid axes, e embedded features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold._kept import kept
from nearfold.grammar.word import Word, check, number, one_of, positive

if TYPE_CHECKING:
    from nearfold.grammar.operation import Basic


@dataclass(frozen=True)
class Place:
    """The grid that queries and keys live on, as coordinates."""

    grid: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype

    def index(self) -> Tensor:
        """Integer coordinates (N, a), raster order."""
        return _index(self.grid, self.device)

    def exact(self) -> Tensor:
        """Centred coordinates (N, a) in steps of one position: whole and half numbers, whose ties are exact."""
        return _exact(self.grid, self.device, self.dtype)

    @property
    def step(self) -> float:
        """How far neighbouring positions are apart where the longest axis runs from -1 to 1."""
        return 2 / max(max(self.grid) - 1, 1)

    def unit(self) -> Tensor:
        """Coordinates (N, a), each axis from -1 to 1, last axis first (x before y), as ConvNN and ACmix do."""
        return _from_minus_one_to_one(self.grid, self.device, self.dtype)


@kept
def _index(grid: tuple[int, ...], device: torch.device) -> Tensor:
    axes = [torch.arange(n, device=device) for n in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(grid))


@kept
def _exact(grid: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    axes = [torch.arange(n, device=device, dtype=dtype) - (n - 1) / 2 for n in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(grid))


@kept
def _from_minus_one_to_one(grid: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    if torch.compiler.is_compiling():  # torch.linspace would make every size of the grid a graph of its own
        axes = [torch.arange(n, device=device, dtype=dtype) * (2 / max(n - 1, 1)) - 1 for n in grid]
    else:
        axes = [torch.linspace(-1, 1, n, device=device, dtype=dtype) for n in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], -1).reshape(-1, len(grid))


BANDS = 4  # frequencies of the positional encodings, per axis
LEARNED = 8  # features of the learned one


def _raw(place: Place, weight: Tensor | None) -> Tensor:
    return place.unit()


def _waves(angle_Na: Tensor, frequency_b: Tensor) -> Tensor:
    """Sines, then cosines, of every axis at every frequency: (N, 2 * bands * a)."""
    turns = (angle_Na[..., None] * frequency_b).flatten(1)
    return torch.cat([turns.sin(), turns.cos()], -1)


def _sinusoidal(place: Place, weight: Tensor | None) -> Tensor:
    frequency_b = 10000.0 ** (-torch.arange(BANDS, device=place.device, dtype=place.dtype) / BANDS)
    return _waves(place.index().to(place.dtype), frequency_b)


def _fourier(place: Place, weight: Tensor | None) -> Tensor:
    frequency_b = math.pi * 2.0 ** torch.arange(BANDS, device=place.device, dtype=place.dtype)
    return _waves(place.unit(), frequency_b)


def _learned(place: Place, weight: Tensor | None) -> Tensor:
    assert weight is not None
    return F.linear(_fourier(place, None).to(weight.dtype), weight)


ENCODINGS = {"raw": _raw, "sinusoidal": _sinusoidal, "fourier": _fourier, "learned": _learned}


def encoding_name(coordinates: bool | str) -> str:
    """Name of a positional encoding: the flag alone means the raw coordinates."""
    return "raw" if coordinates is True else str(coordinates)


def check_coordinates(word: Any) -> None:
    """ValueError unless the word's ``coordinates`` is a flag or names an encoding."""
    given = word.coordinates
    check(isinstance(given, bool) or given in ENCODINGS, word, "coordinates", given, f"one of {', '.join(ENCODINGS)}")
    if given == "raw":
        object.__setattr__(word, "coordinates", True)


def encode(coordinates: bool | str, place: Place, weight: Tensor | None) -> Tensor:
    """Every position of the grid as features (N, p).

    raw: each axis from -1 to 1 (a features). sinusoidal: sine and cosine of the index times 10000^(-j/4), j = 0..3
    (arXiv 1706.03762). fourier: of the raw coordinate times pi 2^j (arXiv 2006.10739), 8 a features each. learned: a
    learned pointwise map ``weight`` (8, 8 a) of the fourier features. All of them fit any grid.
    """
    return ENCODINGS[encoding_name(coordinates)](place, weight)


def encoded_features(coordinates: bool | str, ndim: int) -> int:
    """Number p of features that `encode` makes; 0 without coordinates."""
    if coordinates is False:
        return 0
    return {"raw": ndim, "learned": LEARNED}.get(encoding_name(coordinates), 2 * BANDS * ndim)


def _append(x_BHNd: Tensor, coordinates: bool | str, place: Place, params: dict[str, Tensor]) -> Tensor:
    code_Np = encode(coordinates, place, params.get("encoding_weight")).to(x_BHNd.dtype)
    return torch.cat([x_BHNd, code_Np.expand(*x_BHNd.shape[:2], *code_Np.shape)], -1)


def angles(place: Place, pairs: int, rotary: bool | float) -> Tensor:
    """By how much each pair of features is turned at each position (N, a, pairs); see `rotated`."""
    axes = len(place.grid)
    base = float(rotary) if rotary is not True else 10000.0 if axes == 1 else 100.0
    frequency_p = base ** (-torch.arange(pairs, device=place.device, dtype=place.dtype) / pairs)
    return place.index().to(place.dtype)[..., None] * frequency_p


def rotated(x_BHNd: Tensor, place: Place, rotary: bool | float = True) -> Tensor:
    """Pairs of features turned by angles that grow with the position, the axes taking turns (arXiv 2104.09864).

    d / (2 a) pairs for each of the a axes, at frequencies base^(-j / pairs). The base is what ``rotary`` says; unless
    that is a number, 100 as in arXiv 2403.13298 for images, and 10000 on one axis, as in language models. Features
    (j, j + half) of an axis' share make a pair.
    """
    axes = len(place.grid)
    pairs = x_BHNd.shape[-1] // (2 * axes)
    angle_Nap = angles(place, pairs, rotary)
    cos, sin = angle_Nap.cos().to(x_BHNd.dtype), angle_Nap.sin().to(x_BHNd.dtype)
    first, second = x_BHNd.unflatten(-1, (axes, 2, pairs)).unbind(-2)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -2).flatten(-3)


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
            own_BHN1 = (q_BHNe * self._position(place, params, q_BHNe)).sum(-1, keepdim=True)
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
            p_dN = self._position(place, params, k_BHNd).neg().T
            k_BHNd = (k_BHNd.transpose(2, 3) + p_dN).transpose(2, 3)
        return q_BHNd, k_BHNd, scale

    def _position(self, place: Place, params: dict[str, Tensor], like: Tensor) -> Tensor:
        """p (N, d), in the dtype of ``like``."""
        weight_da = params["position_weight"]
        return F.linear(place.unit().to(weight_da.dtype), weight_da, params.get("position_bias")).to(like.dtype)


@dataclass(frozen=True)
class Cosine(Similarity):
    """q . k / (|q| |k|); a zero vector has similarity 0 to everything."""

    word = "cosine"
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
    placed = True
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
