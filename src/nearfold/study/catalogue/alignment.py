"""Which operator for which data: tasks whose structure is known, and a few real ones, against the catalogue."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from nearfold.structures import PREFIX, STRUCTURES, structure
from nearfold.study.catalogue.aligned import readers
from nearfold.study.catalogue.matched import SHAPES, mlps, parameters
from nearfold.study.catalogue.presets import Preset
from nearfold.study.fourteen import FAMILIES, FOURTEEN, sized
from nearfold.study.grid import Data, Label, Study, Trial
from nearfold.train import Recipe

SIDE, WIDTH, DEPTH = 8, 32, 2
"""Positions a side at most, channels and blocks of the network."""

ALIGNED: Mapping[str, str] = {
    "texture": "convolution 3x3",
    "stripes": "depthwise 5x5",
    "scales": "dilated convolution",
    "translated": "convolution 3x3",
    "rotated": "deformable convolution",
    "pairs": "self-attention",
    "offset": "depthwise 5x5",
    "retrieval": "KVT",
    "alike": "KVT",
    "copy": "token mixing",
    "selective": "selective scan",
    "induction": "self-attention",
    "tracking": "selective scan",
    "composed": "selective scan",
    "points": "ConvNN",
    "permuted": "token mixing",
    "characters": "convolution 3x3",
    "photographs": "convolution 3x3",
    "digits": "convolution 3x3",
    "cifar10": "convolution 3x3",
}
"""For every task the operator whose words are most like those the task was made from. Written down before any run."""

RECIPE = Recipe(epochs=5, batch_size=32, lr=5e-3, weight_decay=0.05, warmup_epochs=1.0, device="cpu")
FEW = replace(RECIPE, epochs=12)
"""For the 1,200 digits: as many steps."""
DATA = {
    **{
        Data(PREFIX + name, limit=3600, test_limit=1000, validation=1 / 6): RECIPE
        for name in STRUCTURES
        if name != "permuted"
    },
    Data(PREFIX + "permuted", validation=1 / 6): FEW,
    Data("digits", validation=1 / 6): FEW,
    Data("cifar10", limit=3600, test_limit=1000, validation=1 / 6, image_size=16): RECIPE,
}
VERDICT, ANSWER = readers(ALIGNED)
SEEDS = {"cpu": 5, "strong": 10, "paper": 10}


def alignment(p: Preset) -> Study:
    """Fourteen operators on twenty tasks."""
    return Study(
        "alignment",
        p.name,
        "From data to operator",
        "Which operator for which data? Tasks whose structure is known, since they were made from it, and real ones: "
        "the same small network around fourteen operators, with equal parameters.",
        "An operation generalizes best when its path, shape and weight mirror the structure of the data (GWO, "
        "structural alignment). Claimed, not measured there.",
        [trial for data, recipe in DATA.items() for trial in _trials(data, recipe)],
        SEEDS[p.name],
        "operator",
        "convolution 3x3",
        (
            f"The network is small: a stem that cuts patches, a position code, {DEPTH} residual blocks of {WIDTH} "
            "channels (norm, the operator, then a pointwise MLP), average pooling, a linear classifier. Positions "
            "exchange nothing outside the operator. The MLPs are so wide that all networks of a task have the same "
            "number of parameters.",
            "The recipe is one for all and was chosen before the runs, by few trials of convolution and "
            "self-attention: long enough for an operator that fits, not for every one to find a way round.",
            "Tasks and their aligned operators were written down before any run of the study.",
        ),
        answer=ANSWER,
        verdict=VERDICT,
        figure="matrix",
        families=FAMILIES,
    )


SECONDS = Path(__file__).parent / "alignment.json"
"""What an epoch of every network of the study takes, by task and operator; recipes/alignment_seconds.py measures it."""


def alignment_time(p: Preset) -> Study:
    """The same, trained equally long: as many epochs as fit into the time of the operator in the middle."""
    study = alignment(p)
    measured = json.loads(SECONDS.read_text(encoding="utf-8"))
    return replace(
        study,
        name="alignment_time",
        title="From data to operator, at equal time",
        question="Which operator for which data, if all are trained equally long? The networks of the study of data "
        "and operators; cheap operators see the images more often.",
        trials=[_as_long(trial, measured["seconds"][trial.panel]) for trial in study.trials],
        protocol=(
            *study.protocol,
            "Every operator has as many epochs, whole ones and at least one, as fit into the time that the one in the "
            "middle takes for the epochs of the other study, the warm-up in proportion. What an epoch takes was "
            f"measured on {measured['processor']}, one thread, before the runs.",
        ),
    )


def _as_long(trial: Trial, seconds: Mapping[str, float]) -> Trial:
    """The trial with as many epochs as fit into the budget of its task.

    Args:
        trial: of the study at equal epochs.
        seconds: what an epoch takes, by operator.
    """
    epochs = epochs_within(trial.recipe.epochs * statistics.median(seconds.values()), seconds[trial.title])
    warmup = trial.recipe.warmup_epochs * epochs / trial.recipe.epochs
    return replace(trial, recipe=replace(trial.recipe, epochs=epochs, warmup_epochs=warmup))


def epochs_within(budget: float, one: float) -> int:
    """Whole epochs nearest to a budget of seconds, at least one, of which each takes so many.

    >>> epochs_within(10, 2.1), epochs_within(10, 30)
    (5, 1)
    """
    return max(1, round(budget / one))


def _trials(data: Data, recipe: Recipe) -> list[Trial]:
    height, width = _size(data)
    stride = max(1, height // SIDE)
    positions = (height // stride) * (width // stride)
    layers: dict[Label, str] = {title: sized(notation, positions) for title, notation in FOURTEEN.items()}
    hidden = mlps(layers, WIDTH, DEPTH, "digits", 1, parameters, plain=WIDTH)
    network = {"name": "spectrum", "width": WIDTH, "depth": DEPTH, "stride": stride, "kernel": stride}
    return [
        Trial(
            {"data": data.name.removeprefix(PREFIX), "operator": title},
            network | {"operation": layer, "hidden": hidden[title]},
            data,
            recipe,
        )
        for title, layer in layers.items()
    ]


def _size(data: Data) -> tuple[int, int]:
    """Height and width of the images."""
    if data.name.startswith(PREFIX):
        return structure(data.name).size[1:]
    return (data.image_size, data.image_size) if data.image_size else (SHAPES[data.name][1], SHAPES[data.name][2])


STUDIES = (alignment, alignment_time)
