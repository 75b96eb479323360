"""ACmix's claim (arXiv 2111.14556): convolution and attention that share their projections gain at equal cost."""

from __future__ import annotations

from nearfold.study.catalogue.matched import flops, matched
from nearfold.study.catalogue.presets import IMAGENET, Preset
from nearfold.study.grid import Data, Label, Study, Trial

ATTENTION = "window(7, scaled(relative), mode=reflect) | box | softmax(heads=4, project=qkv)"
SHIFTS = "window(3) | box | shift(4)"

LAYERS: dict[Label, str] = {
    "convolution": "window(3) | box | kernel",
    "attention": ATTENTION,
    "sum, nothing shared": f"a*({ATTENTION}) + b*(branch(1.0, {SHIFTS}, {SHIFTS}))",
    "sum with a 3x3 convolution": f"a*({ATTENTION}) + b*(window(3) | box | kernel)",
    "ACmix": f"a*({ATTENTION}) + b*({SHIFTS})",
}
NETWORKS = {
    "ResNet-50": {"as it was": "resnet50_conv", "ACmix": "acmix_resnet50"},
    "SAN-10": {"as it was": "san10", "ACmix": "acmix_san10"},
    "PVT-T": {"as it was": "pvt_tiny", "ACmix": "acmix_pvt_tiny"},
    "Swin-T": {"as it was": "swin_tiny", "ACmix": "acmix_swin_tiny"},
}
"""Published networks, and what ACmix made of them."""


def shared(p: Preset) -> Study:
    """Sharing projections."""
    trials, protocol = (_imagenet if p.name == "paper" else _small)(p)
    return Study(
        "shared",
        p.name,
        "Does it pay to share projections between convolution and attention?",
        "ACmix, whose convolution and attention share their projections, against "
        + (
            "a 3x3 convolution, attention in a 7x7 window, and their sum with projections of its own for each half, at "
            "equal FLOPs."
            if p.name != "paper"
            else "the networks that it was put into, on ImageNet."
        ),
        "ACmix gains over convolution and over attention at equal cost: +0.9 to +2.5 points on ImageNet for ResNets, "
        "+0.5 and +0.6 for Swin (arXiv 2111.14556).",
        trials,
        p.seeds,
        "layer",
        "ACmix",
        protocol,
    )


def _small(p: Preset) -> tuple[list[Trial], tuple[str, ...]]:
    return (
        [trial for data in p.data for trial in matched(LAYERS, "layer", data, p.recipe(data), flops)],
        (
            "The network is the small one of the spectrum study (nearfold.models.SpectrumNet): convolutional stem, "
            "position code, two residual blocks of 32 channels. Its pointwise MLPs are as wide as it takes for all "
            "layers to cost the same FLOPs per image, within 5 %.",
        ),
    )


def _imagenet(p: Preset) -> tuple[list[Trial], tuple[str, ...]]:
    data = Data("imagenet", validation=0.01, image_size=224, stream=True)
    return (
        [
            Trial({"data": f"imagenet, {title}", "layer": layer}, {"name": name}, data, IMAGENET)
            for title, layers in NETWORKS.items()
            for layer, name in layers.items()
        ],
        (
            "The networks are the published ones; parameters and FLOPs differ as published (nearfold models).",
            "The recipe is that of the published Swin rows, for all of them: that of the others is not in our sources.",
        ),
    )


STUDIES = (shared,)
