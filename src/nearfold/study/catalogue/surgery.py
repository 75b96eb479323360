"""Surgery on a trained network: its convolutions become hybrids, or walk towards features, and are fine-tuned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nearfold.study.catalogue.presets import FAST, SUBSET, Preset
from nearfold.study.grid import Data, Study, Trial

NETWORK = {"name": "resnet8s_conv", "pretrained": True}
LAYERS = "groups.*.layer"
FIELD = "nearest(9, blend(0), padding=1) | box | kernel"
"""The convolution itself, said as nine neighbours in space."""
AS_IT_WAS = "convolution"
OPERATIONS: dict[str, dict[str, Any]] = {
    AS_IT_WAS: {},
    **{f"lambda to {to:g}": {"convert": FIELD, "along": {"lam": [0.0, to]}} for to in (0.1, 0.25, 0.5, 1.0)},
    "plus ConvNN": {"convert": "({self}) + near*(nearest(9, cosine, self) | ranked | kernel)"},
    "plus attention": {"convert": "({self}) + near*(all | row | softmax(heads=4))"},
}
"""What is done to the network, by its name. All but the last step of a walk start as the network that was trained."""


def surgery(p: Preset) -> Study:
    """Exchanged layers, fine-tuned."""
    data = SUBSET if p.name == "cpu" else Data("cifar10")
    recipe = replace(FAST, epochs=3, lr=0.01, warmup_epochs=0.5, augment="crop_flip")
    return Study(
        "surgery",
        p.name,
        "What does surgery on a trained network bring?",
        "A trained convolutional network is fine-tuned as it is, with its residual layers walking from space to "
        "features, and with neighbours or attention added at a rate that starts at zero.",
        "The spectrum between convolution and attention is continuous (arXiv 2511.14137); no numbers were published "
        "for walking along it with trained weights.",
        [
            Trial(
                {"data": "cifar10", "network": name},
                NETWORK | changes | ({"layers": LAYERS} if changes else {}),
                data,
                recipe,
            )
            for name, changes in OPERATIONS.items()
        ],
        p.seeds,
        "network",
        AS_IT_WAS,
        (
            "The network is resnet8s_conv with the weights that come along (docs/models). Its three residual layers "
            f"are exchanged by nearfold.convert, weights kept, and all is trained on for {recipe.epochs} epochs by one "
            "recipe; a walk takes the first two thirds of the steps.",
            "Seeds decide order and augmentation; the weights at the start are the same, so that the spread is smaller "
            "than that of networks trained from nothing.",
        ),
    )


STUDIES = (surgery,)
