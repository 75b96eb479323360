"""What the presets hold equal in every study: the data, the network around the layers that are studied, the recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nearfold.study.grid import Data, Label, Trial
from nearfold.train import Recipe

CONV = "window(3) | box | kernel"
NEAREST = "nearest(9, cosine, self) | ranked | kernel"


def hybrid(nearest: str = NEAREST, ratio: float = 0.5) -> str:
    """ConvNN's layer: a share of the channels by nearest neighbours, the others by convolution, mixed by a 1x1.

    >>> hybrid(ratio=0.25)[:40]
    'branch(0.25, nearest(9, cosine, self) | '
    """
    return f"branch({ratio}, {nearest}, {CONV}, mix)"


@dataclass(frozen=True)
class Preset:
    """A size at which the studies of the seeds can be run.

    Attributes:
        name: a key of `PRESETS`.
        data: the data sets.
        network: name and arguments of the network; its layers go by `slot`.
        slot: the argument that takes a layer's notation.
        recipes: by data set.
        seeds: how often every trial is trained.
        text: what the network is, for the report.
        kind: of network, in the labels of the data sets; the usual one has none.
    """

    name: str
    data: tuple[Data, ...]
    network: Mapping[str, object]
    slot: str
    recipes: Mapping[str, Recipe]
    seeds: int
    text: str
    kind: str = ""

    def grid(self, layers: Mapping[Label, str], axis: str, **labels: Label) -> list[Trial]:
        """A trial for every layer and data set.

        Args:
            layers: notation by value on the axis.
            axis: what the values are of.
            labels: more labels, equal for all.
        """
        return [
            Trial(
                {"data": data.name + self.kind, axis: value, **labels},
                {**self.network, self.slot: layer},
                data,
                self.recipe(data),
            )
            for data in self.data
            for value, layer in layers.items()
        ]

    def recipe(self, data: Data) -> Recipe:
        """How a data set is trained on."""
        return self.recipes[data.name]

    @property
    def vit(self) -> Preset:
        """The same size for a vision transformer."""
        return VITS[self.name]

    def only(self, *names: str) -> Preset:
        """The preset with these data sets alone."""
        return replace(self, data=tuple(data for data in self.data if data.name in names))


SMALL = Recipe(epochs=12, batch_size=50, lr=2e-3, weight_decay=0.01, warmup_epochs=1.0, device="cpu")
"""For a few thousand images: chosen on convolution alone, by the validation images."""

PUBLISHED = Recipe(
    epochs=150, batch_size=256, lr=1e-4, weight_decay=0.01, warmup_epochs=0.0, schedule="constant", clip_grad_norm=1.0
)
"""ConvNN's CIFAR recipe: AdamW, no schedule, no augmentation (from the authors' logs)."""

FAST = Recipe(
    epochs=10, batch_size=500, optimizer="muon", lr=0.05, momentum=0.8, weight_decay=0.0, warmup_epochs=2.0,
    schedule="linear", label_smoothing=0.1, clip_grad_norm=0.0, precision="bfloat16", channels_last=True,
)  # fmt: skip
"""For all of CIFAR-10 in minutes on two cores: chosen on convolution alone, by the validation images."""

SUBSET = Data("cifar10", limit=1500, test_limit=3000, validation=1 / 3)
"""1,000 images to train on, and 500 to choose by: with 100, the choice is a lottery."""

IMAGENET = Recipe(
    epochs=300,
    batch_size=1024,
    lr=1e-3,
    weight_decay=0.05,
    warmup_epochs=20,
    label_smoothing=0.1,
    clip_grad_norm=5.0,
    augment="resized_erasing",
    mixup=0.8,
    cutmix=1.0,
    precision="bfloat16",
)
"""Swin's settings (arXiv 2103.14030), which all three systems start from on ImageNet."""

CPU = Preset(
    "cpu",
    (Data("digits"), SUBSET),
    {"name": "plain"},
    "operation",
    {"digits": SMALL, "cifar10": replace(SMALL, epochs=30)},
    seeds=3,
    text="The network is a VGG in small (nearfold.models.PlainNet): a convolutional stem to at most 16 x 16 positions, "
    "two layers of 16 channels, max pooling, two of 32, two linear layers; batch normalisation and ReLU after each.",
)

STRONG = Preset(
    "strong",
    (Data("cifar10"),),
    {"name": "resnet8s_conv"},
    "layer",
    {"cifar10": FAST},
    seeds=5,
    text="The network is ResNet-8 (nearfold.models.resnet8): a stem that whitens patches, three groups of 32, 128 and "
    "128 channels, each a 3x3 convolution that pools to half the side and a residual layer, which is what is "
    "exchanged. All 45,000 training images.",
)

PAPER = Preset(
    "paper",
    (Data("cifar10"), Data("cifar100")),
    {"name": "vgg11_conv"},
    "layer",
    {"cifar10": PUBLISHED, "cifar100": PUBLISHED},
    seeds=3,
    text="The network is the published one: VGG-11 at 32 px, every 3x3 convolution replaced.",
)

VITS = {
    "cpu": replace(
        CPU,
        data=(SUBSET,),
        network={"name": "vit_tiny_attention", "width": 48, "depth": 3, "patch": 4, "heads": 1},
        slot="layer",
        recipes={"cifar10": replace(SMALL, epochs=30, lr=1e-3)},
        text="The transformer is a small ViT: 64 patches of 4 x 4 pixels and a class token, 3 blocks of 48 features, "
        "one head.",
        kind=", ViT",
    ),
    "strong": replace(
        STRONG,
        network={"name": "vit_mini32_attention"},
        recipes={
            "cifar10": Recipe(
                epochs=20,
                batch_size=250,
                lr=2e-3,
                weight_decay=0.05,
                warmup_epochs=2.0,
                precision="bfloat16",
            )
        },
        text="The transformer is a small ViT: 64 patches of 4 x 4 pixels and a class token, 6 blocks of 96 features, "
        "one head.",
        kind=", ViT",
    ),
    "paper": replace(
        PAPER,
        data=(Data("cifar10", image_size=224), Data("cifar100", image_size=224)),
        network={"name": "vit_tiny_attention", "heads": 1},
        text="The transformer is the published one: ViT-Tiny with one head on images resized to 224 px, patches of 16.",
        kind=", ViT",
    ),
}


def under(trials: Sequence[Trial], changes: Mapping[str, Mapping[str, Any]]) -> list[Trial]:
    """The trials under several recipes, each in panels of its own.

    Args:
        trials: of all.
        changes: fields of the recipe, by what is added to the data's name.
    """
    return [
        replace(
            trial,
            labels=trial.labels | {"data": f"{trial.labels['data']}{text}"},
            recipe=replace(trial.recipe, **fields),
        )
        for text, fields in changes.items()
        for trial in trials
    ]


PRESETS = {preset.name: preset for preset in (CPU, STRONG, PAPER)}
