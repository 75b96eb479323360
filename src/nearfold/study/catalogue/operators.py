"""The seeds' operators in the same places of one network, on all of the data: without augmentation and with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nearfold.models.resnet8 import LAYERS
from nearfold.study.catalogue.convnn import sampled
from nearfold.study.catalogue.presets import Preset, under
from nearfold.study.grid import Label, Study

AUGMENTED: Mapping[str, dict[str, Any]] = {"": {}, ", crop and flip": {"augment": "crop_flip"}}
"""What the recipe of a panel changes, by what is added to its name."""
OPERATORS: Mapping[Label, str] = {layer.title: layer.notation for layer in LAYERS.values()}
TOKENS: Mapping[Label, str] = {"self-attention": "attention", "ConvNN, random 32": sampled(", random(32)")}
FAMILIES: Mapping[Label, str] = {
    **dict.fromkeys(("convolution", "deformable convolution", "neighbourhood attention"), "space"),
    **dict.fromkeys(("ConvNN", "ConvNN attention", "KVT", "self-attention"), "features"),
    **dict.fromkeys(("hybrid, all", "hybrid, random 32", "ACmix"), "both"),
    "selective scan, cross": "between",
}


def operators(p: Preset) -> Study:
    """Eleven operators in the same places."""
    p, vit = p.only(*(data.name for data in p.data if data.name != "digits")), p.vit
    return Study(
        "operators",
        p.name,
        "Eleven operators in the same places",
        "What stands in a network's mixing layers is exchanged, and nothing else: which operator is the most accurate, "
        "without augmentation, where the seeds' gains were published, and with it?",
        "A hybrid of convolution and ConvNN beats convolution, 81.68 % against 80.24 %, and random candidates beat all "
        "in VGG-11 on CIFAR-10; in ViT they beat attention, 79.96 % against 77.12 % (arXiv 2511.14137, the authors' "
        "logs, single runs without augmentation). ACmix gains over convolution and attention (arXiv 2111.14556).",
        under([*p.grid(OPERATORS, "operator"), *vit.grid(TOKENS, "operator")], AUGMENTED),
        p.seeds,
        "operator",
        "convolution",
        (
            p.text,
            vit.text,
            "Epochs are equal, so training time is not. The recipe was chosen on convolution alone, by the validation "
            "images: read what others lose as an upper bound of what they must lose.",
            "Random candidates are drawn in training only; evaluation searches all positions.",
        ),
        references={f"{data.name}{vit.kind}{text}": "self-attention" for data in vit.data for text in AUGMENTED},
        families=FAMILIES,
        weights=True,
    )


STUDIES = (operators,)
