"""What the presets hold equal in every study: the data, the network around the layers that are studied, the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

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
        name: "cpu" or "paper".
        data: the data sets.
        network: name and arguments of the network; its layers go by `slot`.
        slot: the argument that takes a layer's notation.
        recipes: by data set.
        seeds: how often every trial is trained.
        text: what the network is, for the report.
    """

    name: str
    data: tuple[Data, ...]
    network: Mapping[str, object]
    slot: str
    recipes: Mapping[str, Recipe]
    seeds: int
    text: str

    def grid(self, layers: Mapping[Label, str], axis: str, **labels: Label) -> list[Trial]:
        """A trial for every layer and data set.

        Args:
            layers: notation by value on the axis.
            axis: what the values are of.
            labels: more labels, equal for all.
        """
        return [
            Trial(
                {"data": data.name, axis: value, **labels}, {**self.network, self.slot: layer}, data, self.recipe(data)
            )
            for data in self.data
            for value, layer in layers.items()
        ]

    def recipe(self, data: Data) -> Recipe:
        """How a data set is trained on."""
        return self.recipes[data.name]

    def only(self, *names: str) -> Preset:
        """The preset with these data sets alone."""
        return replace(self, data=tuple(data for data in self.data if data.name in names))


SMALL = Recipe(epochs=12, batch_size=50, lr=2e-3, weight_decay=0.01, warmup_epochs=1.0, device="cpu")
"""For a few thousand images: chosen on convolution alone, by the validation images."""

PUBLISHED = Recipe(
    epochs=150, batch_size=256, lr=1e-4, weight_decay=0.01, warmup_epochs=0.0, schedule="constant", clip_grad_norm=1.0
)
"""ConvNN's CIFAR recipe: AdamW, no schedule, no augmentation (from the authors' logs)."""

CPU = Preset(
    "cpu",
    (Data("digits"), Data("cifar10", limit=2000)),
    {"name": "plain"},
    "operation",
    {"digits": SMALL, "cifar10": SMALL},
    seeds=3,
    text="The network is a VGG in small (nearfold.models.PlainNet): a convolutional stem to at most 16 x 16 positions, "
    "two layers of 16 channels, max pooling, two of 32, two linear layers; batch normalisation and ReLU after each.",
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

PRESETS = {preset.name: preset for preset in (CPU, PAPER)}
