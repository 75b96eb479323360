"""The cases and their targets, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import build, language, recurrences, sampled, shares, small, sparse
from benchmarks.case import Case


@dataclass(frozen=True)
class Spec:
    """A case: its title, the function of `build` that makes it, and that function's arguments.

    ``small`` are arguments for a quick check of the whole chain; its speeds mean nothing.
    """

    title: str
    build: Callable[..., Case]
    full: dict[str, Any]
    small: dict[str, Any]


IMAGE, TINY_IMAGE = (16, 64, 32, 32), (2, 8, 8, 8)
PYRAMID = (8, 64, 56, 56)
DETR = (1, 256, 64, 64)
TOKENS, TINY_TOKENS = (16, 197, 192), (2, 21, 12)
LONG = (2, 3137, 192)
CORE, TINY_CORE = (1, 4, 4096, 64), (1, 2, 60, 8)

ONE_IMAGE, ONE_SEQUENCE = (1, 64, 8, 8), (1, 64, 192)


def _image_call(layer: str) -> Spec:
    full = {"shape": ONE_IMAGE, "layer": layer}
    return Spec(f"one call of {layer}", small.image, full, {"shape": (1, 8, 4, 4), "layer": layer})


def _token_call(layer: str) -> Spec:
    full = {"shape": ONE_SEQUENCE, "heads": 3, "layer": layer}
    return Spec(f"one call of {layer}", small.tokens, full, {"shape": (1, 9, 12), "heads": 3, "layer": layer})


CASES: dict[str, Spec] = {
    "knn": Spec("k-NN attention", build.knn_attention, {"shape": CORE, "k": 9}, {"shape": TINY_CORE, "k": 9}),
    "knn_k36": Spec("k-NN attention", build.knn_attention, {"shape": CORE, "k": 36}, {"shape": TINY_CORE, "k": 36}),
    "knn_16384": Spec(
        "k-NN attention",
        build.knn_attention,
        {"shape": (1, 4, 16384, 64), "k": 9, "naive": "samples", "pytorch_path": False},
        {"shape": (1, 2, 700, 8), "k": 9, "naive": "samples", "pytorch_path": False},
    ),
    "convnn_attention": Spec(
        "ConvNNAttention",
        build.convnn_attention,
        {"shape": TOKENS, "heads": 3, "k": 9},
        {"shape": TINY_TOKENS, "heads": 3, "k": 9},
    ),
    "kvt": Spec(
        "KVTAttention", build.kvt, {"shape": LONG, "heads": 3, "k": 100}, {"shape": TINY_TOKENS, "heads": 3, "k": 10}
    ),
    "convnn": Spec("ConvNN2d", build.convnn, {"shape": IMAGE, "k": 9}, {"shape": TINY_IMAGE, "k": 9}),
    "convnn_k36": Spec("ConvNN2d", build.convnn, {"shape": IMAGE, "k": 36}, {"shape": TINY_IMAGE, "k": 36}),
    "convnn_random": Spec(
        "ConvNN2d, random candidates",
        build.convnn_random,
        {"shape": IMAGE, "k": 9, "r": 64},
        {"shape": TINY_IMAGE, "k": 5, "r": 16},
    ),
    "convnn_memory": Spec(
        "ConvNN2d",
        build.convnn,
        {"shape": (8, 64, 64, 64), "k": 9, "conv": False, "pytorch_path": False},
        {"shape": (1, 8, 12, 12), "k": 9, "conv": False, "pytorch_path": False},
    ),
    "acmix": Spec(
        "ACmix2d",
        build.acmix,
        {"shape": IMAGE, "window": 7, "heads": 4},
        {"shape": TINY_IMAGE, "window": 5, "heads": 4},
    ),
    "neighbourhood": Spec(
        "neighbourhood attention",
        build.neighbourhood,
        {"shape": IMAGE, "window": 7, "heads": 4},
        {"shape": TINY_IMAGE, "window": 5, "heads": 4, "compiled": False},
    ),
    "neighbourhood_56": Spec(
        "neighbourhood attention",
        build.neighbourhood,
        {"shape": PYRAMID, "window": 7, "heads": 4, "compiled": False},
        {"shape": TINY_IMAGE, "window": 3, "heads": 4, "compiled": False},
    ),
    "neighbourhood_inside": Spec(
        "neighbourhood attention, windows inside",
        language.neighbourhood_inside,
        {"shape": PYRAMID, "window": 7, "heads": 4},
        {"shape": TINY_IMAGE, "window": 5, "heads": 4},
    ),
    "deformable": Spec(
        "deform_conv 3x3",
        language.deformable,
        {"shape": PYRAMID, "modulated": False},
        {"shape": TINY_IMAGE, "modulated": False},
    ),
    "deformable_v2": Spec(
        "deform_conv 3x3, modulated",
        language.deformable,
        {"shape": PYRAMID, "modulated": True},
        {"shape": TINY_IMAGE, "modulated": True},
    ),
    "deformable_layer": Spec(
        "DeformConv2d 3x3, modulated, as a layer",
        language.deformable_layer,
        {"shape": PYRAMID},
        {"shape": TINY_IMAGE},
    ),
    "deformable_attention": Spec(
        "deformable attention, one map",
        sampled.deformable_attention,
        {"shape": DETR, "heads": 8, "points": 4, "levels": 1},
        {"shape": TINY_IMAGE, "heads": 2, "points": 3, "levels": 1},
    ),
    "deformable_attention_4": Spec(
        "deformable attention, four maps",
        sampled.deformable_attention,
        {"shape": DETR, "heads": 8, "points": 4, "levels": 4},
        {"shape": TINY_IMAGE, "heads": 2, "points": 3, "levels": 2},
    ),
    "dcn_v3": Spec(
        "DCNv3 3x3, as a layer",
        sampled.dcn_v3,
        {"shape": PYRAMID, "groups": 4},
        {"shape": TINY_IMAGE, "groups": 2},
    ),
    "scan": Spec(
        "selective scan",
        language.scan,
        {"shape": (4, 4096, 192), "state": 16},
        {"shape": (2, 50, 12), "state": 5},
    ),
    "duality": Spec(
        "state-space duality",
        language.state_space_duality,
        {"shape": (2, 2048, 192), "heads": 6, "state": 64},
        {"shape": (2, 50, 12), "heads": 3, "state": 5},
    ),
    "gated_delta_rule": Spec(
        "gated delta rule",
        recurrences.gated_delta_rule,
        {"shape": (2, 4096, 8, 64)},
        {"shape": (2, 70, 3, 5)},
    ),
    "full_kernel": Spec(
        "depthwise convolution with a full kernel",
        language.full_kernel,
        {"shape": (8, 192, 56, 56)},
        {"shape": (2, 4, 7, 6)},
    ),
    "entmax": Spec(
        "entmax attention", shares.entmax, {"shape": (1, 4096, 64), "heads": 2}, {"shape": TINY_TOKENS, "heads": 3}
    ),
    "search": Spec("search alone", build.search, {"shape": (4096, 64), "k": 9}, {"shape": (60, 8), "k": 9}),
    "points": Spec(
        "knn of points in clouds",
        language.points,
        {"shape": (65536, 3), "k": 16, "clouds": 32},
        {"shape": (300, 3), "k": 5, "clouds": 4},
    ),
    "conv_tax": Spec("conv in the grammar", build.conv_tax, {"shape": IMAGE}, {"shape": TINY_IMAGE}),
    "attention_tax": Spec(
        "attention in the grammar",
        build.attention_tax,
        {"shape": TOKENS, "heads": 3},
        {"shape": TINY_TOKENS, "heads": 3},
    ),
    "union": Spec(
        "window, first and scattered in one softmax",
        sparse.union,
        {"shape": (1, 64, 8192), "heads": 4, "paths": "window(256, mode=inside) & first(4) & scattered(8)"},
        {"shape": (1, 8, 40), "heads": 2, "paths": "window(5) & first(2) & scattered(3)"},
    ),
    "indexed": Spec(
        "attention by an indexer",
        sparse.indexed,
        {"shape": (1, 256, 8192), "heads": 4, "k": 64, "by": "indexer(4, 32)"},
        {"shape": (1, 8, 90), "heads": 2, "k": 6, "by": "indexer(2, 3)"},
    ),
    "blocks": Spec(
        "attention to blocks of 64, causal",
        sparse.blocks,
        {"shape": (1, 64, 16384), "heads": 1, "k": 8, "size": 64},
        {"shape": (1, 8, 90), "heads": 2, "k": 3, "size": 8},
    ),
    **{f"small_{name.lower()}": _image_call(name) for name in small.IMAGE_LAYERS},
    **{f"small_{name.lower()}": _token_call(name) for name in small.TOKEN_LAYERS},
}

SHOWN = ("shape", "heads", "k", "r", "window", "state")  # arguments that a title tells


def arguments(spec: Spec, small: bool = False) -> dict[str, Any]:
    """What the case is made from."""
    return spec.small if small else spec.full


def title(name: str, small: bool = False) -> str:
    """What a reader calls a case.

    >>> title("convnn")
    'ConvNN2d (16, 64, 32, 32), k=9'
    """
    spec = CASES[name]
    given = arguments(spec, small)
    rest = [f"{a}={given[a]}" for a in SHOWN[1:] if a in given]
    return ", ".join([f"{spec.title} {given['shape']}", *rest])


def make(name: str, small: bool = False) -> Case:
    """A case, from a fixed seed."""
    torch.manual_seed(0)
    spec = CASES[name]
    return spec.build(**arguments(spec, small))
