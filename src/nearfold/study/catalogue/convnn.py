"""ConvNN's claims (arXiv 2511.14137, 2606.14725): k, candidates, ratio, blend, similarity, aggregation."""

from __future__ import annotations

from typing import Any

from nearfold.study.catalogue.presets import CONV, Preset, hybrid, under
from nearfold.study.grid import Authors, Label, Study

HYBRID = (
    "The layer is ConvNN's hybrid: half the channels by nearest neighbours, half by a 3x3 convolution, mixed by a 1x1."
)
VGG = {"arg_model": "vgg11", "arg_dataset": "cifar10", "arg_layer": "Branching", "arg_kernel_size": "3"}
FEATURES = {"arg_similarity_type": "Col", "arg_aggregation_type": "Col"}
NINE = VGG | {"arg_branch_ratio": "0.5", "arg_K": "9", "arg_sampling_type": "all"}
RUN = "the authors' VGG-11 on CIFAR-10, one run each"
VIT = "the authors' ViT-Tiny with ConvNN attention on CIFAR-10, one run each"


def k(p: Preset) -> Study:
    """How many neighbours."""
    layers: dict[Label, str] = {
        float(n): hybrid(f"nearest({n}, cosine, self) | ranked | kernel") for n in (1, 3, 5, 9, 16, 25)
    }
    return Study(
        "k",
        p.name,
        "How many neighbours should a ConvNN layer read?",
        "From 1 to 25 nearest neighbours, everything else equal: is there a best number?",
        "A middle k is best: about 9 (arXiv 2511.14137).",
        p.grid(layers, "k"),
        p.seeds,
        "k",
        9.0,
        (p.text, HYBRID, "More neighbours are more weights: the kernel of the nearest-neighbour half has k slots."),
        authors=(
            Authors(
                "cifar10",
                ("arg_K",),
                VGG
                | FEATURES
                | {"arg_branch_ratio": "0.5", "arg_sampling_type": "all", "arg_magnitude_type": "cosine"},
                RUN,
            ),
        ),
    )


def sampled(form: str = "") -> str:
    """ConvNN's attention over tokens, with one head.

    >>> sampled(", random(32)")
    'nearest(9, scaled, random(32)) | ranked | softmax(heads=1)*depthwise'
    """
    return f"nearest(9, scaled{form}) | ranked | softmax(heads=1)*depthwise"


def candidates(p: Preset) -> Study:
    """Among which positions."""
    forms = {
        "all": "",
        "random 4": ", random(4)",
        "random 12": ", random(12)",
        "random 32": ", random(32)",
        "grid 4 x 4": ", grid(4)",
        "grid 8 x 8": ", grid(8)",
    }
    layers: dict[Label, str] = {
        name: hybrid(f"nearest({4 if name == 'random 4' else 9}, cosine{form}, self) | ranked | kernel")
        for name, form in forms.items()
    }
    layers["convolution"] = CONV
    tokens: dict[Label, str] = {
        "all": sampled(),
        "random 12": sampled(", random(12)"),
        "random 32": sampled(", random(32)"),
        "grid 32": sampled(", grid(32)"),
        "attention": "attention",
    }
    vit = p.vit
    return Study(
        "candidates",
        p.name,
        "Among which positions should neighbours be searched?",
        "All positions, a random sample drawn anew at every training step, or a fixed grid: which generalizes best, in "
        "a convolutional network against convolution, and in a vision transformer against attention?",
        "Random candidates are best and cost least; in ViT they beat attention, which all candidates do not: 79.96 % "
        "against 77.12 % and 73.88 % on CIFAR-10 (arXiv 2511.14137, the authors' logs, single runs).",
        [*p.grid(layers, "candidates"), *vit.grid(tokens, "candidates")],
        p.seeds,
        "candidates",
        "all",
        (
            p.text,
            HYBRID,
            vit.text,
            "Random candidates are drawn in training only; evaluation searches all positions and is deterministic. "
            "With 4 candidates k is 4, with all others 9. A grid of tokens is along the sequence.",
        ),
        authors=(
            Authors(
                "cifar10, ViT", ("arg_layer", "arg_sampling_type", "arg_num_samples"),
                {
                    "arg_model": "VIT", "arg_dataset": "cifar10", "arg_K": "9", "arg_convolution_type": "depthwise",
                    "arg_layer": ("Attention", "ConvNNAttention"),
                },
                VIT,
                {
                    "Attention all -1": "attention", "ConvNNAttention all -1": "all",
                    "ConvNNAttention random 32": "random 32", "ConvNNAttention spatial 32": "grid 32",
                },
            ),
        ),
        references={data.name + vit.kind: "attention" for data in vit.data},
    )  # fmt: skip


def ratio(p: Preset) -> Study:
    """How much of the layer."""
    layers: dict[Label, str] = {n / 8: hybrid(ratio=n / 8) for n in range(9)}
    return Study(
        "ratio",
        p.name,
        "How much of a layer should look at similar positions?",
        "The share of channels that ConvNN's hybrid gives to nearest neighbours, from none to all: is there a best "
        "one?",
        "A ratio near one half wins: 81.68 % at 0.5 against 80.24 % at 0 and 54.52 % at 1 on CIFAR-10 (the authors' "
        "logs, one run each).",
        p.grid(layers, "ratio"),
        p.seeds,
        "ratio",
        0.0,
        (p.text, "Every ratio has the 1x1 that mixes the two halves, also 0 and 1, so that depth does not differ."),
        authors=(
            Authors(
                "cifar10", ("arg_branch_ratio",),
                VGG | FEATURES | {"arg_K": "9", "arg_sampling_type": "all", "arg_magnitude_type": "cosine"}, RUN,
            ),
        ),
    )  # fmt: skip


def blend(p: Preset) -> Study:
    """Between space and features."""
    layers: dict[Label, str] = {
        lam: hybrid(f"nearest(9, blend({lam}), self) | ranked | kernel") for lam in (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)
    }
    return Study(
        "blend",
        p.name,
        "Is there something to gain between looking in space and looking in features?",
        "Neighbours by lambda parts of features and 1 - lambda parts of position: 0 is a window, 1 is ConvNN.",
        "The spectrum between the ends is continuous, and its middle is useful (arXiv 2511.14137: Loc_Col).",
        p.grid(layers, "lambda"),
        p.seeds,
        "lambda",
        1.0,
        (p.text, HYBRID),
        authors=(),
    )


def similarity(p: Preset) -> Study:
    """By which measure."""
    layers: dict[Label, str] = {
        name: hybrid(f"nearest(9, {word}, self) | ranked | kernel")
        for name, word in (
            ("cosine", "cosine"),
            ("Euclidean", "euclidean"),
            ("dot product", "dot"),
            ("position", "position"),
        )
    }
    return Study(
        "similarity",
        p.name,
        "What should similar mean?",
        "Cosine, Euclidean distance or dot product of the features; position alone as the control.",
        "None was claimed to win; the authors ran cosine and Euclidean side by side.",
        p.grid(layers, "similarity"),
        p.seeds,
        "similarity",
        "cosine",
        (p.text, HYBRID),
        authors=(
            Authors(
                "cifar10", ("arg_magnitude_type",),
                NINE | FEATURES, RUN,
                {"euclidean": "Euclidean"},
            ),
        ),
    )  # fmt: skip


def aggregation(p: Preset) -> Study:
    """What is done with the neighbours."""
    forms = {
        "kernel": "kernel",
        "kernel, with positions": "kernel(coordinates)",
        "separable": "separable",
        "softmax and kernel": "softmax*kernel",
    }
    layers: dict[Label, str] = {
        name: hybrid(f"nearest(9, cosine, self) | ranked | {form}") for name, form in forms.items()
    }
    return Study(
        "aggregation",
        p.name,
        "What should be done with the neighbours that were found?",
        "A full kernel over them, with their positions appended or not, a separable one, or one that "
        "similarity weighs.",
        "Appending positions to the values (Loc_Col) is an option of the public code without a claim.",
        p.grid(layers, "aggregation"),
        p.seeds,
        "aggregation",
        "kernel",
        (p.text, HYBRID, "Parameters differ: see the table."),
        authors=(
            Authors(
                "cifar10", ("arg_aggregation_type",),
                NINE | {"arg_similarity_type": "Loc_Col"}, RUN,
                {"Col": "kernel", "Loc_Col": "kernel, with positions"},
            ),
        ),
    )  # fmt: skip


LAYERS: dict[Label, str] = {
    "convolution": CONV,
    "hybrid, all": hybrid(),
    "hybrid, random 32": hybrid("nearest(9, cosine, random(32), self) | ranked | kernel"),
}
TOKENS: dict[Label, str] = {"attention": "attention", "ConvNN, random 32": sampled(", random(32)")}


def augmentation(p: Preset) -> Study:
    """Does it survive."""
    p, vit = p.only(*(data.name for data in p.data if data.name != "digits")), p.vit
    changes: dict[str, dict[str, Any]] = {
        "no augmentation": {},
        "crop and flip": {"augment": "crop_flip"},
        "strong recipe": STRONG[p.name],
    }
    named = {f", {text}": fields for text, fields in changes.items()}
    trials = [trial for q, layers in ((p, LAYERS), (vit, TOKENS)) for trial in under(q.grid(layers, "layer"), named)]
    return Study(
        "augmentation",
        p.name,
        "Do the gains survive augmentation?",
        "Convolution against hybrids with all and with random candidates, and in a vision transformer attention "
        "against random candidates, without augmentation as published, with crops and flips, and with a strong recipe.",
        "The published gains are from runs without augmentation, where whatever regularises helps.",
        trials,
        p.seeds,
        "layer",
        "convolution",
        (
            p.text,
            vit.text,
            "The strong recipe: " + ", ".join(f"{name} = {value}" for name, value in STRONG[p.name].items()) + ".",
        ),
        references={f"{data.name}{vit.kind}, {text}": "attention" for data in vit.data for text in changes},
    )


STRONG: dict[str, dict[str, Any]] = {
    "cpu": {"augment": "crop_flip", "label_smoothing": 0.1, "mixup": 0.2, "epochs": 45},
    "strong": {"augment": "crop_flip", "label_smoothing": 0.1, "epochs": 20},
    "paper": {"augment": "randaugment", "label_smoothing": 0.1, "schedule": "cosine", "warmup_epochs": 5.0, "lr": 1e-3},
}
"""What the strong recipe changes. RandAugment costs a millisecond an image: too much for a CPU."""

STUDIES = (k, candidates, ratio, blend, similarity, aggregation, augmentation)
