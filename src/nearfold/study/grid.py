"""What a study is: a question, and a grid of trials, each trained with several seeds.

A trial says everything in JSON: the network, the recipe, the data. A run is a trial with a seed; its configuration is
what its result is filed under, so that equal runs of two studies are one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nearfold.grammar import parse
from nearfold.models.pretrained import weights_of
from nearfold.study.measure import machine
from nearfold.study.plots import FAMILIES
from nearfold.train import Recipe

if TYPE_CHECKING:
    from nearfold.study.results import Results

Label = str | float
Config = Mapping[str, Any]
RESULTS = "0.1.0"
"""The first release whose runs come to what they come to now: to be raised when the same run would end otherwise."""


@dataclass(frozen=True)
class Data:
    """A data set of a study.

    Attributes:
        name: ``"digits"``, ``"made:NAME"`` (`nearfold.structures`), or a name whose folder the user gives:
            ``--data NAME=FOLDER``.
        limit: at most so many training images; None: all.
        test_limit: at most so many test images; None: as many as `limit`.
        validation: share of the training images held out to choose epochs and settings.
        image_size: pixels a side to resize to; None: as they are.
        stream: read while training (`nearfold.train.open_data`) instead of held in memory; needs `image_size`.
    """

    name: str
    limit: int | None = None
    test_limit: int | None = None
    validation: float = 0.1
    image_size: int | None = None
    stream: bool = False

    def __post_init__(self) -> None:
        if self.stream and (self.image_size is None or self.limit is not None or self.test_limit is not None):
            raise ValueError(f"data {self.name!r} that are streamed need an image_size and take no limit, got {self}")


@dataclass(frozen=True)
class Trial:
    """One point of a grid.

    Attributes:
        labels: where it stands: value by axis, as tables and figures show it. Trials differ in their labels.
        network: ``name`` and arguments: ``"plain"`` or ``"spectrum"`` (`nearfold.models.PlainNet`, `SpectrumNet`;
            ``operation``, ``width``, ...) or a name of `nearfold.models.list_models`.
        data: what it is trained on.
        recipe: how; the seed in it is not used.
    """

    labels: dict[str, Label]
    network: Config
    data: Data
    recipe: Recipe

    @property
    def title(self) -> str:
        """The labels, without the data set."""
        return ", ".join(shown(axis, value) for axis, value in self.labels.items() if axis != "data")

    @property
    def panel(self) -> str:
        """The data set, as labelled: what is compared with each other has the same."""
        return str(self.labels.get("data", self.data.name))


def shown(axis: str, value: Label) -> str:
    """A label as text: a number with its axis, a word by itself.

    >>> shown("k", 9), shown("layer", "convolution"), shown("ratio", 0.5)
    ('k = 9', 'convolution', 'ratio = 0.5')
    """
    return value if isinstance(value, str) else f"{axis} = {value:g}"


@dataclass(frozen=True)
class Authors:
    """Which of the authors' own runs answer the same question (`nearfold.study.authors`).

    Attributes:
        data: the data set, as labelled, beside whose results theirs are drawn.
        columns: of their table, that have the values of the study's axis; several are read as words with a space
            between.
        where: columns and the values that the others must have.
        values: our value by theirs, where they are spelled differently.
        text: what was run there.
    """

    data: str
    columns: Sequence[str]
    where: Mapping[str, str | tuple[str, ...]]
    text: str
    values: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A question, a grid and how to read it.

    Attributes:
        name: on the command line.
        preset: of this grid.
        title: of the report.
        question: a sentence or two.
        claim: what was published about it, and where.
        trials: the grid.
        seeds: how often every trial is trained.
        axis: the axis of the figures; others make lines or panels.
        reference: the value of `axis` that the others are compared with.
        references: by data set as labelled, where it is another one.
        protocol: sentences on what is held equal, and what is not.
        answer: from the results to the paragraphs of the answer; None: `compare.against_reference`.
        authors: whose runs are drawn behind.
        cost: measure latency, FLOPs and memory of every trial's network too.
        figure: a key of `nearfold.study.charts.CHARTS`.
        measure: what is compared: a name that `nearfold.study.results.Row.values` takes.
        verdict: from the results to the sentence that stands first; None: `headline.verdict` says what the comparisons
            with the reference come to.
        limits: from the results to sentences on what may be concluded, before those that are said of every study.
        families: by value of `axis`, a key of `nearfold.study.plots.FAMILIES`, by which marks are coloured.
        looks: whether the weights of seed 0 are kept, to show where every setting looks; networks are ``"spectrum"``.
        weights: whether the weights of seed 0 are kept for whoever wants them.
    """

    name: str
    preset: str
    title: str
    question: str
    claim: str
    trials: Sequence[Trial]
    seeds: int
    axis: str
    reference: Label
    protocol: Sequence[str] = ()
    answer: Callable[[Results], list[str]] | None = None
    authors: Sequence[Authors] = ()
    cost: bool = False
    references: Mapping[str, Label] = field(default_factory=dict)
    figure: str = "settings"
    measure: str = "test_accuracy"
    verdict: Callable[[Results], str] | None = None
    limits: Callable[[Results], list[str]] | None = None
    families: Mapping[Label, str] = field(default_factory=dict)
    looks: bool = False
    weights: bool = False

    def reference_on(self, data: str) -> Label:
        """What the settings on a data set, as labelled, are compared with."""
        return self.references.get(data, self.reference)

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")
        seen = [tuple(trial.labels.items()) for trial in self.trials]
        twice = [labels for labels in seen if seen.count(labels) > 1]
        if twice:
            raise ValueError(f"study {self.name!r}: two trials have the labels {dict(twice[0])}")
        for trial in self.trials:
            if self.axis not in trial.labels:
                raise ValueError(f"study {self.name!r}: the trial {dict(trial.labels)} has no label {self.axis!r}")
            if self.looks and (network := trial.network.get("name")) != "spectrum":
                raise ValueError(f"study {self.name!r}: looks=True wants networks called 'spectrum', got {network!r}")
        if unknown := set(self.families.values()) - set(FAMILIES):
            raise ValueError(
                f"study {self.name!r}: families must be among {', '.join(FAMILIES)}; got {', '.join(sorted(unknown))}"
            )


@dataclass(frozen=True)
class Run:
    """A trial with a seed, ready to be done anywhere.

    Attributes:
        config: all that decides the result, as JSON.
        label: for messages.
        group: runs that take about as long.
        keep_weights: whether the selected weights are kept.
        alone: whether other runs at the same time would spoil it.
    """

    config: Config = field(hash=False)
    label: str
    group: str
    keep_weights: bool = False
    alone: bool = False


def training(trial: Trial, seed: int, fingerprint: Config, *, keep_weights: bool = False) -> Run:
    """The run that trains a trial's network.

    Args:
        trial: the trial.
        seed: of weights, order, augmentation, dropout and sampled candidates.
        fingerprint: of the data (`nearfold.train.checkpoint.fingerprint`).
        keep_weights: as in `Run`.
    """
    config = _config("train", trial, fingerprint, changed(trial.recipe, Recipe()) | {"seed": seed})
    label = f"{trial.title} ({trial.panel}), seed {seed}"
    return Run(config, label, group=f"{trial.title} {trial.panel}", keep_weights=keep_weights)


def costing(trial: Trial, fingerprint: Config) -> Run:
    """The run that measures what a trial's network costs: neither seed nor epochs decide it, but the machine."""
    recipe = {"batch_size": trial.recipe.batch_size, "device": trial.recipe.device}
    config = _config("cost", trial, fingerprint, recipe) | {"machine": machine(trial.recipe.device)}
    return Run(config, f"{trial.title} ({trial.panel}), cost", group="cost", alone=True)


def _config(task: str, trial: Trial, fingerprint: Config, recipe: Config) -> dict[str, Any]:
    return {
        "version": RESULTS,
        "task": task,
        "network": canonical(trial.network),
        "data": changed(trial.data, Data(trial.data.name)) | {"name": trial.data.name, "fingerprint": fingerprint},
        "recipe": recipe,
    }


def changed(settings: Recipe | Data, usual: Recipe | Data) -> dict[str, Any]:
    """The fields that are not as usual, so that a new field leaves finished runs what they are.

    >>> changed(Recipe(epochs=3), Recipe())
    {'epochs': 3}
    """
    defaults = dataclasses.asdict(usual)
    return {name: value for name, value in dataclasses.asdict(settings).items() if value != defaults[name]}


def canonical(network: Config) -> dict[str, Any]:
    """A network's arguments with notations as the language prints them.

    >>> canonical({"name": "spectrum", "operation": "window(3)|box|kernel"})
    {'name': 'spectrum', 'operation': 'window(3) | box | kernel'}
    """
    notations = ("operation", "layer")  # "convert" is a rule, in which {self} may stand
    found = {
        name: str(parse(value)) if name in notations and "|" in str(value) else value for name, value in network.items()
    }
    if found.get("pretrained"):  # the weights, not that there are some, decide a run
        found["pretrained"] = weights_of(found["name"]).sha256
    return found
