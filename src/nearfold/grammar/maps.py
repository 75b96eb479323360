"""Similarities that map query and key first: features of attention that is linear in the positions, and the key alone.

Shape legend: B batch, H heads, N positions, d features of one head, e embedded features, m random features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from nearfold._kept import kept
from nearfold._scrambled import scrambled
from nearfold.grammar.place import Place
from nearfold.grammar.similarity import Similarity
from nearfold.grammar.word import check, positive

if TYPE_CHECKING:
    from nearfold.grammar.operation import Basic


@dataclass(frozen=True)
class Key(Similarity):
    """The sum of the key's features, whoever asks: what a position weighs is said by the position alone.

    Under softmax with one head and its own key map it is the attention pooling of global context blocks (arXiv
    1904.11492), with a head for every channel and no maps SoftPool (arXiv 2101.00440).
    """

    word = "key"
    examples: ClassVar[dict[str, str]] = {
        "all_key_causal": "all(key) | causal | softmax(heads=2, project=vo)",
        "window_key": "window(3, key, mode=inside) | box | softmax(heads=4, project=k)*depthwise",
        "nearest_key": "nearest(4, key) | ranked | softmax(heads=2)",
    }

    def embed(self, q_BHNd: Tensor, k_BHNd: Tensor, place: Place, params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.ones_like(q_BHNd[..., :1]), k_BHNd.sum(-1, keepdim=True)


@dataclass(frozen=True)
class Relu(Similarity):
    """relu(q) . relu(k), which is never negative. ``reweighted``: times cos(pi (i - j) / 2 N), i and j in raster order.

    Sources: EfficientViT's linear attention (arXiv 2205.14756); cosFormer (arXiv 2202.08791, eq. 10), reweighted, N the
    number of positions.
    """

    word = "relu"
    examples: ClassVar[dict[str, str]] = {
        "all_relu_causal": "all(relu(reweighted)) | causal | normalized(heads=2)",
        "window_relu": "window(3, relu) | box | identity(heads=2)",
    }
    never_negative = True
    reweighted: bool = False

    @property
    def placed(self) -> bool:
        return self.reweighted

    def embed(self, q_BHNd: Tensor, k_BHNd: Tensor, place: Place, params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        query, key = torch.relu(q_BHNd), torch.relu(k_BHNd)
        if not self.reweighted:
            return query, key
        N = math.prod(place.grid)
        angle_N1 = torch.arange(N, device=query.device, dtype=query.dtype)[:, None] * (math.pi / 2 / N)
        # cos(a - b) = cos a cos b + sin a sin b
        return tuple(torch.cat([x * angle_N1.cos(), x * angle_N1.sin()], -1) for x in (query, key))  # type: ignore[return-value]


@dataclass(frozen=True)
class Efficient(Similarity):
    """softmax over its features of q . softmax over the positions of k: a query's weights add up to one by themselves.

    Source: efficient attention (arXiv 1812.01243, eq. 7).
    """

    word = "efficient"
    examples: ClassVar[dict[str, str]] = {
        "all_efficient": "all(efficient, cross) | row | identity(heads=2)",
    }
    never_negative = True
    takes_keys = False  # a key's share is one of all positions

    def require(self, op: Basic) -> None:
        if op.path.word != "all" or op.shape.word != "row":
            raise ValueError(f"efficient shares a key out among all positions: all(efficient) | row, got {op}")

    def embed(self, q_BHNd: Tensor, k_BHNd: Tensor, place: Place, params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.softmax(q_BHNd, -1), torch.softmax(k_BHNd, -2)


@dataclass(frozen=True)
class Favor(Similarity):
    """An estimate of exp(q . k / sqrt(d)) by ``features`` positive random features, which are drawn once by ``seed``.

    phi(x) = exp(w x - |x|^2 / 2) / sqrt(features) for x = q / d^(1/4), the rows w Gaussian, orthogonal in groups of d.
    Source: Performer's FAVOR+ (arXiv 2009.14794, eq. 7), whose rows may be drawn anew from time to time: another seed.
    """

    word = "favor"
    examples: ClassVar[dict[str, str]] = {
        "all_favor_causal": "all(favor(9, seed=1)) | causal | normalized(heads=2)",
        "window_favor": "window(3, favor(4)) | box | normalized(heads=2)",
    }
    never_negative = True
    features: int
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, features=self.features)
        check(type(self.seed) is int and self.seed >= 0, self, "seed", self.seed, "an integer >= 0")

    def embed(self, q_BHNd: Tensor, k_BHNd: Tensor, place: Place, params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        w_md = orthogonal(self.features, q_BHNd.shape[-1], self.seed, q_BHNd.device).to(q_BHNd.dtype)

        def phi(x_BHNd: Tensor) -> Tensor:
            x_BHNd = x_BHNd * x_BHNd.shape[-1] ** -0.25
            return torch.exp(x_BHNd @ w_md.T - x_BHNd.square().sum(-1, keepdim=True) / 2) * self.features**-0.5

        return phi(q_BHNd), phi(k_BHNd)


@kept
def orthogonal(rows: int, d: int, seed: int, device: torch.device) -> Tensor:
    """Gaussian vectors (rows, d), orthogonal in groups of d, float64; the same for a seed on every device and machine.

    >>> w = orthogonal(4, 3, 0, torch.device("cpu"))
    >>> (w[:3] @ w[:3].T - torch.diag(w[:3].square().sum(1))).abs().max().item() < 1e-12
    True
    """
    groups = -(-rows // d)
    stream = torch.arange(2 * groups * d * d, device=device) * 2 + 1
    uniform = (scrambled(stream ^ scrambled(torch.full_like(stream, seed & 0xFFFFFFFF))).double() + 0.5) / 2**32
    one, two = uniform.chunk(2)
    normal_gdd = ((-2 * one.log()).sqrt() * (2 * math.pi * two).cos()).view(groups, d, d)
    turned_gdd, lower_gdd = torch.linalg.qr(normal_gdd.mT)  # the columns of the first are the rows, made orthogonal
    directions_gdd = (turned_gdd * lower_gdd.diagonal(dim1=-2, dim2=-1).sign()[:, None]).mT
    # each as long as a Gaussian vector is: the rows before they were turned
    length_gd1 = normal_gdd.square().sum(-1, keepdim=True).sqrt()
    return (directions_gdd * length_gd1).flatten(0, 1)[:rows]


@dataclass(frozen=True)
class Unit(Similarity):
    """q . k of a head over the sizes of the whole query and key, all heads together.

    Under identity with a head for every channel it is Hydra attention (arXiv 2209.07484, eq. 6 and 9), without a matrix
    of scores at any number of heads. A zero vector has similarity 0 to everything.
    """

    word = "unit"
    examples: ClassVar[dict[str, str]] = {
        "all_unit_causal": "all(unit) | causal | identity(heads=4)",
        "nearest_unit_all_heads": "nearest(4, unit, self) | ranked | softmax(heads=2)",
    }

    def embed(self, q_BHNd: Tensor, k_BHNd: Tensor, place: Place, params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        query = _over_whole(q_BHNd)
        return query, query if q_BHNd is k_BHNd else _over_whole(k_BHNd)


def _over_whole(x_BHNd: Tensor) -> Tensor:
    norm_B1N1 = torch.linalg.vector_norm(x_BHNd, dim=(1, 3), keepdim=True)
    return x_BHNd / norm_B1N1.masked_fill(norm_B1N1 == 0, 1).clamp(min=1e-12)
