"""Words for outputs on a finer grid than the input's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nearfold.grammar.paths import Path, Size
from nearfold.grammar.word import check, sizes


@dataclass(frozen=True)
class Transposed(Path):
    """A window of fixed offsets on a grid ``up`` times as fine, of whose positions only every ``up``-th holds an input.

    Output o reads input i by slot s where o = up * i + dilation * s - padding: what a strided convolution's gradient
    does. ``padding`` is what is left out on each side of the output, or "same": ``up`` outputs for every input. Sizes
    are an int (every axis) or a tuple (one per axis).

    Source: learned upsampling (arXiv 1411.4038); the arithmetic of arXiv 1603.07285, chapter 4.
    """

    word = "transposed"
    examples: ClassVar[dict[str, str]] = {
        "transposed_same": "transposed((2, 3), up=2) | box | kernel(groups=2)",
        "transposed_sparse": "transposed(2, up=(3, 1), dilation=2) | box | separable",
        "transposed_padded": "transposed(4, up=(1, 2), padding=1) | box | depthwise",
        "transposed_bare": "transposed(2, up=2) | box | ones(project=v)",
        "transposed_experts": "transposed(3, up=2) | box | experts(2)",
        "transposed_placed": "transposed(3, up=2) | box | kernel(coordinates)",
    }
    primitive = ("STATIC_SLIDING", 1)
    shapes = ("box",)
    rhos = ("ones",)
    joins = False
    size: Size
    up: Size = 1
    dilation: Size = 1
    padding: Size | str = "same"

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes(self, size=self.size, up=self.up, dilation=self.dilation)
        pads = self.padding if isinstance(self.padding, tuple) else (self.padding,)
        ok = self.padding == "same" or (len(pads) > 0 and all(type(p) is int and p >= 0 for p in pads))
        check(ok, self, "padding", self.padding, '"same", an integer >= 0 or a tuple of them')
        given = (self.size, self.up, self.dilation, self.padding)
        if len({len(v) for v in given if type(v) is tuple}) > 1:
            raise ValueError(f"transposed: tuples must have one entry per axis each, got {self}")
