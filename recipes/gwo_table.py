"""The three rows of GWO's published table at their own size: all of CIFAR-10, 30 epochs (two hours on two cores).

nearfold study run recipes/gwo_table.py --data cifar10=path/to/cifar10
"""

from nearfold.study.catalogue import Preset
from nearfold.study.catalogue.gwo import BENCHMARK, PUBLISHED
from nearfold.study.catalogue.readings import benchmark_answer, benchmark_verdict
from nearfold.study.grid import Study, Trial


def study(preset: Preset) -> Study:
    """The rows with the faults of the published code, and the plain convolution padded as the others are."""
    recipe, data = BENCHMARK["paper"]
    side = 8  # of the map that the linear layers read, behind two poolings
    layers = {
        "StandardConv, as published": (PUBLISHED["conv"], side - 2),
        "StandardConv, padded": ("window(3) | box | kernel", side),
        "DeformableConv": (PUBLISHED["deformable"], side),
        "DepthwiseConv": (PUBLISHED["separable"], side),
    }
    return Study(
        "gwo-table",
        preset.name,
        "GWO's table at its own size",
        "Two operator layers and three linear ones on all of CIFAR-10, as in the public code: are the published "
        "accuracies found again, and what is left of the order when the plain convolution is padded like the others?",
        "StandardConv 69.31 %, DeformableConv 69.45 %, DepthwiseConv 61.35 % (GWO, one model trained on by all seeds).",
        [
            Trial({"data": "cifar10", "operator": name}, {"name": "gwo_conv", "layer": layer, "side": at}, data, recipe)
            for name, (layer, at) in layers.items()
        ],
        seeds=3,
        axis="operator",
        reference="StandardConv, as published",
        protocol=(
            "Two operator layers with max pooling, three linear layers (nearfold.models.gwo). The plain convolution is "
            "unpadded in the public code, so that its classifier is smaller. Every seed trains a new model; a tenth of "
            "the training images is held out to choose the epoch by.",
        ),
        answer=benchmark_answer,
        verdict=benchmark_verdict,
        figure="ranking",
    )
