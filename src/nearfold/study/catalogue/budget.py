"""What to choose for a given budget: accuracy against latency, FLOPs and memory over k, candidates and ratio."""

from __future__ import annotations

from nearfold.study.catalogue.presets import CONV, Preset, hybrid
from nearfold.study.catalogue.readings import budget_answer, budget_verdict
from nearfold.study.grid import Label, Study


def budget(p: Preset) -> Study:
    """Accuracy against cost."""
    layers: dict[Label, str] = {"convolution": CONV}
    for k in (3, 9, 25):
        for ratio in (0.25, 0.5):
            layers[f"k {k}, all, ratio {ratio}"] = hybrid(f"nearest({k}, cosine, self) | ranked | kernel", ratio)
    for form, word in (("random 32", "random(32)"), ("grid 4 x 4", "grid(4)")):
        layers[f"k 9, {form}, ratio 0.5"] = hybrid(f"nearest(9, cosine, {word}, self) | ranked | kernel")
    layers["k 9, window 7, ratio 0.5"] = hybrid("nearest(9, cosine, window(7), self) | ranked | kernel")
    return Study(
        "budget",
        p.name,
        "Which layer for which budget?",
        "Accuracy against measured latency, FLOPs and memory over k, candidates and ratio: which settings does no "
        "other beat, and which one fits a given budget?",
        "Random candidates and branching give ConvNN's accuracy at a fraction of its cost (arXiv 2511.14137).",
        p.grid(layers, "setting"),
        p.seeds,
        "setting",
        "convolution",
        (
            p.text,
            "Latency is that of one image's forward pass in evaluation mode, memory that of a training step, both "
            "measured alone on the machine named below, one thread on a CPU.",
        ),
        answer=budget_answer,
        verdict=budget_verdict,
        cost=True,
        figure="costs",
    )


STUDIES = (budget,)
