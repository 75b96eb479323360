"""ACmix's claim (arXiv 2111.14556): convolution and attention that share their projections gain at equal cost."""

from __future__ import annotations

from nearfold.study.catalogue.matched import flops, matched
from nearfold.study.catalogue.presets import Preset
from nearfold.study.grid import Label, Study

ATTENTION = "window(7, scaled(relative), mode=reflect) | box | softmax(heads=4, project=qkv)"
SHIFTS = "window(3) | box | shift(4)"

LAYERS: dict[Label, str] = {
    "convolution": "window(3) | box | kernel",
    "attention": ATTENTION,
    "sum, nothing shared": f"a*({ATTENTION}) + b*(branch(1.0, {SHIFTS}, {SHIFTS}))",
    "sum with a 3x3 convolution": f"a*({ATTENTION}) + b*(window(3) | box | kernel)",
    "ACmix": f"a*({ATTENTION}) + b*({SHIFTS})",
}


def shared(p: Preset) -> Study:
    """Sharing projections."""
    return Study(
        "shared",
        p.name,
        "Does it pay to share projections between convolution and attention?",
        "A 3x3 convolution, attention in a 7x7 window, their sum with projections of its own for each half, and "
        "ACmix, whose halves share them, at equal FLOPs.",
        "ACmix gains over convolution and over attention at equal cost: +0.9 to +2.5 points on ImageNet for ResNets, "
        "+0.5 and +0.6 for Swin (arXiv 2111.14556).",
        [trial for data in p.data for trial in matched(LAYERS, "layer", data, p.recipe(data), flops)],
        p.seeds,
        "layer",
        "ACmix",
        (
            "The network is the small one of the spectrum study (nearfold.models.SpectrumNet): convolutional stem, "
            "position code, two residual blocks of 32 channels. Its pointwise MLPs are as wide as it takes for all "
            "layers to cost the same FLOPs per image, within 5 %.",
        ),
    )


STUDIES = (shared,)
