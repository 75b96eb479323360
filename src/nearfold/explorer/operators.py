"""The operators of the explorer's page: what each is called, how it is written, which sliders it hears."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

GRID = 28
"""Patches along each side of the photograph."""
CHOICES: Mapping[str, tuple[int, ...]] = {"k": (1, 4, 9, 25, 81), "window": (3, 5, 7, 11), "heads": (1, 2, 8)}
"""The sliders that choose between graphs, and their values."""
START: Mapping[str, int] = {"k": 9, "window": 7, "heads": 1}
"""Where they stand at first."""
LAMBDA = 0.5
"""Where the slider that is an input of its graph stands at first."""


@dataclass(frozen=True)
class Operator:
    """One picture of the page.

    Attributes:
        name: short, for links and files.
        title: above the picture.
        notation: of the operation; {k}, {window} and {heads} stand for the sliders, {lambda} for the one that is an
            input.
        words: where it looks, in which form, and what it values.
        formula: what an output is.
    """

    name: str
    title: str
    notation: str
    words: str
    formula: str

    @property
    def hears(self) -> tuple[str, ...]:
        """The sliders of `CHOICES` that its notation names."""
        return tuple(name for name in CHOICES if "{" + name + "}" in self.notation)

    @property
    def blends(self) -> bool:
        """Whether lambda is an input of its graphs."""
        return "{lambda}" in self.notation

    def variants(self) -> Iterator[dict[str, int]]:
        """Every setting of the sliders that it hears."""
        for values in itertools.product(*(CHOICES[name] for name in self.hears)):
            yield dict(zip(self.hears, values, strict=True))

    def written(self, lam: float = LAMBDA, **chosen: int) -> str:
        """The notation at a setting of the sliders.

        >>> OPERATORS["kvt"].written(k=4)
        'nearest(4, scaled) | ranked | softmax'
        """
        text = self.notation.replace("{lambda}", f"{lam:g}")
        for name, value in chosen.items():
            text = text.replace("{" + name + "}", str(value))
        return text

    def key(self, **chosen: int) -> str:
        """The name of a graph.

        >>> OPERATORS["attention"].key(heads=2)
        'attention-heads2'
        """
        return "-".join([self.name, *(f"{name}{chosen[name]}" for name in self.hears)])


_SOFT = "yᵢ = Σⱼ softmaxⱼ(qᵢ·kⱼ / √d) vⱼ"

OPERATORS: Mapping[str, Operator] = {
    operator.name: operator
    for operator in (
        Operator(
            "conv",
            "Convolution",
            "window({window}) | box | kernel",
            "Reads a window around the position, a weight for each place in it. The photograph is not asked.",
            "yᵢ = Σₛ Wₛ vᵢ₊ₛ,  s in the window",
        ),
        Operator(
            "local",
            "Local attention",
            "window({window}) | box | softmax",
            "Reads the same window, and weighs by likeness.",
            f"{_SOFT},  j in the window of i",
        ),
        Operator(
            "attention",
            "Self-attention",
            "all | row | softmax(heads={heads})",
            "Reads every position, and weighs by likeness.",
            f"{_SOFT},  all j",
        ),
        Operator(
            "kvt",
            "k-NN attention",
            "nearest({k}, scaled) | ranked | softmax",
            "Reads only the k positions that are most alike, and weighs by likeness.",
            f"{_SOFT},  j among the k best",
        ),
        Operator(
            "convnn",
            "ConvNN",
            "nearest({k}, cosine, self) | ranked | kernel",
            "A convolution over the k positions that are most alike: each rank has a weight of its own.",
            "yᵢ = Σᵣ Wᵣ v of the r-th best of i,  r = 1 … k",
        ),
        Operator(
            "blend",
            "Between the ends",
            "nearest({k}, blend({lambda}, learned), self) | ranked | softmax",
            "Lambda leads from near in space (0) to alike in features (1).",
            "near = (1 − λ) · in space + λ · in features;  yᵢ = Σⱼ softmaxⱼ(near) vⱼ,  j among the k nearest",
        ),
        Operator(
            "hybrid",
            "Hybrid layer",
            "branch(0.5, nearest({k}, cosine, self) | ranked | kernel, window(3) | box | kernel)",
            "Half of the channels are a convolution, half read the positions that are most alike.",
            "y = [ConvNN of the first half, convolution of the second]",
        ),
        Operator(
            "swin",
            "Swin's blocks",
            "block(7) | box | softmax(heads={heads})",
            "The map is cut into blocks of 7 × 7; attention stays within the block.",
            f"{_SOFT},  j in the block of i",
        ),
        Operator(
            "grid",
            "MaxViT's grid",
            "block(7, spread) | box | softmax(heads={heads})",
            "As many positions as a block has, spread over the whole map.",
            f"{_SOFT},  j on the lattice of i",
        ),
        Operator(
            "linear",
            "Linear attention",
            "all(elu) | row | normalized(heads={heads})",
            "Reads every position by a product of features, without a softmax: cheap, and a haze.",
            "yᵢ = Σⱼ φ(qᵢ)·φ(kⱼ) vⱼ / Σⱼ φ(qᵢ)·φ(kⱼ)",
        ),
        Operator(
            "deformable",
            "Deformable convolution",
            "deformable(5) | box | modulated*kernel",
            "The places of the window move: here uphill, towards brighter patches.",
            "yᵢ = Σₛ mᵢₛ Wₛ v at i + s + Δᵢₛ",
        ),
        Operator(
            "mamba",
            "Mamba's scan",
            "scan(state=16) | causal | selective",
            "Reads all that came before, row by row, and forgets by a decay.",
            "yᵢ = Σⱼ≤ᵢ Cᵢ·(Aⱼ₊₁ … Aᵢ) Bⱼ vⱼ",
        ),
    )
}
"""By name, in the order of the page."""
