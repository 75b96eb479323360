"""Named operations: the catalogue behind `nearfold ops`, and functions that build the usual ones."""

from __future__ import annotations

from dataclasses import dataclass

from nearfold.grammar.notation import parse
from nearfold.grammar.operation import Operation


@dataclass(frozen=True)
class Entry:
    """One row of the catalogue: how an operator of the field is spelled here, and the three words in prose."""

    name: str
    title: str
    notation: str
    words: tuple[str, str, str]
    source: str

    @property
    def operation(self) -> Operation:
        """The parsed operation."""
        return parse(self.notation)


_ENTRIES = (
    Entry(
        "conv",
        "Convolution 3x3",
        "window(3) | box | kernel",
        ("a fixed window", "dense square", "one shared kernel"),
        "nn.Conv2d",
    ),
    Entry(
        "conv_strided",
        "Strided convolution",
        "window(3, stride=2) | box | kernel",
        ("a fixed window, every other position", "dense square", "one shared kernel"),
        "nn.Conv2d",
    ),
    Entry(
        "conv_dilated",
        "Dilated convolution",
        "window(3, dilation=2) | box | kernel",
        ("a fixed window with holes", "dilated square", "one shared kernel"),
        "arXiv 1511.07122",
    ),
    Entry(
        "depthwise",
        "Depthwise convolution",
        "window(3) | box | depthwise",
        ("a fixed window", "dense square", "one kernel per channel"),
        "arXiv 1610.02357",
    ),
    Entry(
        "separable",
        "Depthwise-separable convolution",
        "window(3) | box | separable",
        ("a fixed window", "dense square", "one kernel per channel, then a pointwise map"),
        "arXiv 1610.02357",
    ),
    Entry(
        "conv_causal",
        "Causal convolution (1-D)",
        "window(3) | causal | kernel",
        ("a fixed window that ends at the position", "causal", "one shared kernel"),
        "arXiv 1609.03499",
    ),
    Entry(
        "conv_nearest",
        "Convolution as nearest neighbours",
        "nearest(9, position, padding=1) | box | kernel",
        ("the 9 nearest in space", "raster order", "one shared kernel"),
        "arXiv 2511.14137",
    ),
    Entry(
        "attention",
        "Self-attention",
        "all | row | softmax(heads=4)",
        ("everywhere", "one slot per position", "similarity, softmaxed"),
        "arXiv 1706.03762",
    ),
    Entry(
        "attention_causal",
        "Causal self-attention",
        "all | causal | softmax(heads=4)",
        ("everywhere before", "causal row", "similarity, softmaxed"),
        "arXiv 1706.03762",
    ),
    Entry(
        "attention_strided",
        "Strided sparse attention",
        "all | strided(4) | softmax(heads=4)",
        ("every 4th position", "strided row", "similarity, softmaxed"),
        "arXiv 1904.10509",
    ),
    Entry(
        "attention_local",
        "Local (neighbourhood) attention",
        "window(7) | box | softmax(heads=4)",
        ("a fixed window", "dense square", "similarity, softmaxed"),
        "arXiv 1906.05909",
    ),
    Entry(
        "kvt",
        "k-NN attention (KVT)",
        "nearest(9, scaled) | ranked | softmax(heads=4)",
        ("the 9 most similar", "by rank", "similarity, softmaxed"),
        "arXiv 2106.00515",
    ),
    Entry(
        "convnn",
        "ConvNN",
        "nearest(9, cosine, self) | ranked | kernel",
        ("itself and the 8 most similar", "by rank", "one shared kernel"),
        "arXiv 2511.14137",
    ),
    Entry(
        "convnn_random",
        "ConvNN, random candidates",
        "nearest(9, cosine, random(32), self) | ranked | kernel",
        ("itself and the 8 most similar of 32 drawn", "by rank", "one shared kernel"),
        "arXiv 2511.14137",
    ),
    Entry(
        "convnn_attention",
        "ConvNN attention",
        "nearest(9, scaled) | ranked | softmax(heads=4)*depthwise",
        ("the 9 most similar", "by rank", "similarity, softmaxed, times one kernel per channel"),
        "arXiv 2606.14725",
    ),
    Entry(
        "blend",
        "Between the ends",
        "nearest(9, blend(0.5), self) | ranked | kernel",
        ("the 9 nearest in space and features", "by rank", "one shared kernel"),
        "arXiv 2511.14137",
    ),
    Entry(
        "branch",
        "Hybrid branch",
        "branch(0.5, nearest(9, cosine, self) | ranked | kernel, window(3) | box | kernel, mix)",
        (
            "half the channels the most similar, half a window",
            "by rank, and dense square",
            "kernels, mixed by a pointwise map",
        ),
        "arXiv 2511.14137",
    ),
    Entry(
        "acmix",
        "ACmix",
        "a*(window(7, scaled(relative), mode=reflect) | box | softmax(heads=4, project=qkv))"
        " + b*(window(3) | box | shift(4))",
        ("a fixed window, twice", "dense squares", "similarity and a generated kernel, shared projections"),
        "arXiv 2111.14556",
    ),
)

CATALOGUE: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}


def preset(name: str) -> Operation:
    """The operation of a catalogue entry.

    >>> print(preset("convnn"))
    nearest(9, cosine, self) | ranked | kernel
    """
    if name not in CATALOGUE:
        raise ValueError(f"preset: no entry {name!r}; choose from: {', '.join(CATALOGUE)}")
    return CATALOGUE[name].operation
