"""The fourteen operators that data are asked about, that a search starts from, and that the study of both compares."""

from __future__ import annotations

from collections.abc import Mapping

from nearfold.grammar import CATALOGUE, parse
from nearfold.study.grid import Label

FOURTEEN: Mapping[str, str] = {
    "convolution 3x3": CATALOGUE["conv"].notation,
    "dilated convolution": CATALOGUE["conv_dilated"].notation,
    "depthwise 5x5": "window(5) | box | depthwise",
    "deformable convolution": CATALOGUE["deformable"].notation,
    "involution": "window(5) | box | generated(groups=4)",
    "neighbourhood attention": "window(5) | box | softmax(heads=4)",
    "self-attention": CATALOGUE["attention"].notation,
    "KVT": CATALOGUE["kvt"].notation,
    "ConvNN": CATALOGUE["convnn"].notation,
    "blend 0.5": CATALOGUE["blend"].notation,
    "hybrid": CATALOGUE["branch"].notation,
    "ACmix": "a*(window(5, scaled(relative), mode=reflect) | box | softmax(heads=4, project=qkv))"
    " + b*(window(3) | box | shift(4))",
    "selective scan": CATALOGUE["mamba"].notation,
    "token mixing": "all | row | table(64)",
}
"""Notation by title. Windows of 5, so that a map of 8 x 8 is more than one of them."""

FAMILIES: Mapping[Label, str] = {
    **dict.fromkeys(list(FOURTEEN)[:6], "space"),
    **dict.fromkeys(("self-attention", "KVT", "ConvNN"), "features"),
    **dict.fromkeys(("blend 0.5", "selective scan", "token mixing"), "between"),
    **dict.fromkeys(("hybrid", "ACmix"), "both"),
}
"""By title, a key of `nearfold.study.plots.FAMILIES`."""


def sized(notation: str, positions: int) -> str:
    """A notation whose tables are for so many positions.

    >>> sized("all | row | table(64)", 100), sized("all | row | softmax", 100)
    ('all | row | table(100)', 'all | row | softmax')
    """
    return str(parse(notation).map(lambda part: part.sized(positions)))
