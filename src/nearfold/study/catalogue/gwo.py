"""GWO's claims (doi 10.5281/zenodo.17103133): what generalizes once it has memorised, and the benchmark's table."""

from __future__ import annotations

from dataclasses import replace

from nearfold.grammar import CATALOGUE
from nearfold.study.catalogue.matched import matched, parameters
from nearfold.study.catalogue.presets import SUBSET, Preset
from nearfold.study.catalogue.readings import benchmark_answer, benchmark_verdict, memorise_answer
from nearfold.study.grid import Data, Label, Study, Trial
from nearfold.study.results import MEMORISED
from nearfold.train import Recipe

SEEDS = 5

OPERATORS: dict[Label, str] = {
    "convolution": "window(3) | box | kernel",
    "depthwise": "window(3) | box | separable",
    "deformable": "deformable(3) | box | kernel",
    "involution": "window(7) | box | generated(groups=4)",
    "ConvNN": "nearest(9, cosine, self) | ranked | kernel",
    "KVT": "nearest(9, scaled) | ranked | softmax(heads=4)",
    "attention": "all | row | softmax(heads=4)",
    "ACmix": CATALOGUE["acmix"].notation,
    "selective scan": "scan(state=16) | causal | selective",
}

MEMORISING: dict[str, tuple[Recipe, tuple[Data, ...], dict[str, int]]] = {
    "cpu": (
        Recipe(
            epochs=150, batch_size=50, lr=2e-3, weight_decay=0.0, warmup_epochs=1.0, schedule="constant",
            until=MEMORISED, device="cpu",
        ),
        (Data("digits", limit=700), Data("cifar10", limit=600, test_limit=5000)),
        {"width": 32, "depth": 2, "side": 8},
    ),
    "strong": (
        Recipe(
            epochs=100, batch_size=250, lr=2e-3, weight_decay=0.0, warmup_epochs=1.0, schedule="constant",
            until=MEMORISED, device="cpu",
        ),
        (Data("cifar10", limit=10_000, test_limit=10_000),),
        {"width": 64, "depth": 2, "side": 8},
    ),
    "paper": (
        Recipe(epochs=300, batch_size=128, lr=1e-3, weight_decay=0.0, schedule="constant", until=MEMORISED),
        (Data("cifar10"),),
        {"width": 128, "depth": 4, "side": 16},
    ),
}  # fmt: skip
"""Recipe, data and network by preset. Nothing about the experiment was published: the larger one is ours, too."""


def memorise(p: Preset) -> Study:
    """What is left of accuracy on new images."""
    recipe, sets, size = MEMORISING[p.name]
    trials = [trial for data in sets for trial in matched(OPERATORS, "operator", data, recipe, parameters, **size)]
    return Study(
        "memorise",
        p.name,
        "Which operators generalize once they have memorised?",
        "Nine operators in one network, at equal numbers of parameters, trained without regularisation until they "
        f"classify {100 * MEMORISED:g} % of their training images: how large is the gap to new images, and does "
        "complexity explain it?",
        "Operations whose complexity adapts (deformable convolution) show a much smaller gap than brute-force "
        "complexity (self-attention); no numbers were published (GWO).",
        trials,
        SEEDS,
        "operator",
        "attention",
        (
            "The network is the small one of the spectrum study (nearfold.models.SpectrumNet): convolutional stem, "
            f"position code, {size['depth']} residual blocks of {size['width']} channels on {size['side']} x "
            f"{size['side']} positions at most. Its pointwise MLPs are as wide as it takes for all operators to have "
            "the same number of parameters, within 5 %.",
            f"A run ends after the first epoch at whose end {100 * MEMORISED:g} % of the training images are "
            f"classified correctly in evaluation mode, or after {recipe.epochs} epochs. No weight decay, "
            "augmentation, dropout or schedule; the gap is train minus test accuracy of the last weights, and no "
            "epoch is chosen.",
        ),
        answer=memorise_answer,
        figure="gaps",
        measure="gap_last",
    )


PUBLISHED_RECIPE = Recipe(
    epochs=30, batch_size=64, optimizer="sgd", lr=1e-3, momentum=0.9, weight_decay=0.0, warmup_epochs=0.0,
    schedule="constant", clip_grad_norm=0.0,
)  # fmt: skip
BENCHMARK: dict[str, tuple[Recipe, Data]] = {
    "cpu": (
        Recipe(epochs=10, batch_size=64, lr=2e-3, weight_decay=0.01, warmup_epochs=1.0, device="cpu"),
        replace(SUBSET, image_size=16),
    ),
    "strong": (PUBLISHED_RECIPE, Data("cifar10")),
    "paper": (PUBLISHED_RECIPE, Data("cifar10")),
}

SPELLED = {
    "conv_causal": "window(3) | causal(axes=(0,)) | kernel",
    "sliding_window": "window(16) | causal(axes=(0,)) | softmax(heads=4)",
}
"""Operators for sequences, along the rows of a map."""
LEFT_OUT = {
    "cross_attention": "it reads a second input",
    "sapa": "it reads a second input",
    "mixer": "its table is for one number of positions, and the two layers see different ones",
    "sinks": "it is for sequences",
    "moba": "it is for sequences",
    "nsa_compressed": "it is for sequences",
    "nsa": "it is for sequences",
    **dict.fromkeys(
        ("linformer", "synthesizer_random", "synthesizer_dense", "vil"),
        "its tables or its map are for one number of positions, and the two layers see different ones",
    ),
    **dict.fromkeys(("attention_pooling", "slot_attention"), "its outputs are no map"),
}
PUBLISHED = {
    "conv": "window(3, padding=0) | box | kernel",
    "deformable": "deformable(3) | box | kernel",
    "separable": "window(3) | box | separable",
}
"""The three rows of the published table with the faults of its code: the plain convolution is unpadded."""


def benchmark(p: Preset) -> Study:
    """GWO's table."""
    recipe, data = BENCHMARK[p.name]
    operators = {name: SPELLED.get(name, entry.notation) for name, entry in CATALOGUE.items() if name not in LEFT_OUT}
    side = (data.image_size or 32) // 4  # of the map that the linear layers read, behind two poolings
    unpadded = ((data.image_size or 32) // 2 - 3) // 2
    repaired = [
        Trial(
            {"data": "cifar10, repaired", "operator": name},
            {"name": "gwo_conv", "layer": layer, "side": side, "embed": True},
            data,
            recipe,
        )
        for name, layer in operators.items()
    ]
    published = [
        Trial(
            {"data": "cifar10, as published", "operator": name},
            {"name": "gwo_conv", "layer": layer, "side": unpadded if name == "conv" else side},
            data,
            recipe,
        )
        for name, layer in PUBLISHED.items()
    ]
    left = "; ".join(f"{name}: {why}" for name, why in LEFT_OUT.items())
    return Study(
        "benchmark",
        p.name,
        "GWO's benchmark, as published and repaired, for every operator of the catalogue",
        "Accuracy over complexity, score = 100 accuracy% / (1 + Omega): does the ranking hold when all operators get "
        "the same network?",
        "StandardConv 69.31 %, Omega 6, score 990.14, tier B; DeformableConv 69.45 %, 8.003, 771.40, C; "
        "DepthwiseConv 61.35 %, 8, 681.67, C (GWO, CIFAR-10, 30 epochs).",
        [*published, *repaired],
        3,
        "operator",
        "conv",
        (
            "Two operator layers with max pooling, three linear layers (nearfold.models.gwo)"
            + (
                ""
                if data.image_size is None
                else f"; images are resized to {data.image_size} x {data.image_size} pixels"
            )
            + ". As published: the "
            "plain convolution is unpadded, so that its classifier is smaller. Repaired: every operator keeps the "
            "map and the number of channels, behind a 1x1 convolution that is the same for all; every seed trains a "
            "new model (the public code trains one model on).",
            "Omega is derived from the operator's words and parameters, without that 1x1 convolution.",
            f"Left out: {left}.",
        ),
        answer=benchmark_answer,
        verdict=benchmark_verdict,
        figure="ranking",
    )


STUDIES = (memorise, benchmark)
