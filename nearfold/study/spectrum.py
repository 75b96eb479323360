"""The main job: one small network, its mixing layer swapped along the spectrum, everything else equal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import nearfold
from nearfold.grammar import CATALOGUE, parse
from nearfold.models import SpectrumNet, stem_stride
from nearfold.study.measure import measure
from nearfold.study.store import Store
from nearfold.study.table import Row, make_row
from nearfold.train import ImageData, Recipe, fit, load_data, prepare, save_weights
from nearfold.train.checkpoint import fingerprint
from nearfold.train.distributed import join


@dataclass(frozen=True)
class Stop:
    """One operator of the spectrum.

    Attributes:
        name: what it is called on the command line.
        title: what it is called in tables and plots.
        notation: the Operation.
        family: a key of `nearfold.study.plots.FAMILIES`.
    """

    name: str
    title: str
    notation: str
    family: str


def _known(name: str, title: str, family: str) -> Stop:
    return Stop(name, title, CATALOGUE[name].notation, family)


def _blend(lam: float) -> Stop:
    notation = f"nearest(9, blend({lam:g}), self) | ranked | kernel"
    return Stop(f"blend-{lam:g}", f"blend λ = {lam:g}", notation, "between")


SPECTRUM: tuple[Stop, ...] = (
    _known("conv", "convolution 3x3", "space"),
    _known("separable", "depthwise + pointwise", "space"),
    *(_blend(lam) for lam in (0.0, 0.25, 0.5, 0.75, 1.0)),
    _known("convnn", "ConvNN, all", "features"),
    _known("convnn_random", "ConvNN, random 32", "features"),
    _known("kvt", "KVT, k = 9", "features"),
    _known("attention", "self-attention", "features"),
    _known("branch", "branch, half and half", "both"),
    _known("acmix", "ACmix", "both"),
)
"""The operators in their order along the spectrum, from space to features; last, those that do both."""

RECIPE = Recipe(epochs=15, batch_size=64, lr=3e-3, weight_decay=0.05, warmup_epochs=1.0)
"""Equal for every operator and every data set. No augmentation: it would hide the gap that is measured."""

DEPTH = 2
"""Blocks of the network, so mixing layers in a row."""


@dataclass(frozen=True)
class Settings:
    """What a study is asked to do.

    Attributes:
        data: what `nearfold.train.load_data` takes.
        limit: at most so many training (and test) images; None: all.
        seeds: number of seeds, counted from 0.
        epochs: passes over the training images.
        only: names of the operators to run; empty: all.
        width: channels of the network.
        out: folder of results; None: runs/spectrum-DATA.
        device: as in `Recipe`.

    Raises:
        ValueError: a number below 1, or an operator that is not part of the spectrum.
    """

    data: str = "digits"
    limit: int | None = None
    seeds: int = 3
    epochs: int = RECIPE.epochs
    only: tuple[str, ...] = ()
    width: int = 32
    out: Path | None = None
    device: str = RECIPE.device

    def __post_init__(self) -> None:
        for name in ("seeds", "epochs", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        known = [stop.name for stop in SPECTRUM]
        for name in self.only:
            if name not in known:
                raise ValueError(
                    f"only: no operator {name!r} in the spectrum; choose from {', '.join(known)}"
                )

    @property
    def stops(self) -> tuple[Stop, ...]:
        """The operators to run, in the order of the spectrum."""
        return tuple(stop for stop in SPECTRUM if not self.only or stop.name in self.only)

    @property
    def folder(self) -> Path:
        """Where results go."""
        return self.out or Path("runs") / f"spectrum-{Path(self.data).resolve().name}"

    @property
    def recipe(self) -> Recipe:
        """The recipe of every run, but for the seed."""
        warmup = min(RECIPE.warmup_epochs, self.epochs)
        return replace(RECIPE, epochs=self.epochs, warmup_epochs=warmup, device=self.device)


@dataclass(frozen=True)
class Run:
    """One operator with one seed, and the configuration that decides its result."""

    stop: Stop
    seed: int
    recipe: Recipe
    config: Mapping[str, Any] = field(hash=False)

    @property
    def label(self) -> str:
        """For messages."""
        return f"{self.stop.title}, seed {self.seed}"


@dataclass(frozen=True)
class Study:
    """A study and what is on disk of it.

    Attributes:
        settings: what was asked.
        data: the images.
        store: the results.
        runs: all that was asked for, all operators with seed 0 first: an interrupted study is of use.
    """

    settings: Settings
    data: ImageData
    store: Store
    runs: tuple[Run, ...]

    @property
    def finished(self) -> list[Run]:
        """Runs with a result."""
        return [run for run in self.runs if self.store.load(run.config) is not None]

    @property
    def failures(self) -> list[tuple[str, str]]:
        """Label and error of runs that failed and have not succeeded since."""
        errors = ((run.label, self.store.failure(run.config)) for run in self.runs)
        return [(label, error) for label, error in errors if error is not None]

    def rows(self) -> list[Row]:
        """One row an operator that has a result."""
        rows = []
        for order, stop in enumerate(SPECTRUM, start=1):
            loaded = (self.store.load(run.config) for run in self.runs if run.stop == stop)
            results = [result for result in loaded if result is not None]
            if results:
                rows.append(make_row(results, order=order, **asdict(stop)))
        return rows


def open_study(settings: Settings) -> Study:
    """Load the data and list the runs; nothing is trained.

    Raises:
        ValueError: the data cannot be read, the device is not there, or an operator does not work at this
            width: found out now, and not in one run after the other.
        ImportError: the package that reads this data is not installed.
    """
    join(settings.device)
    data = load_data(settings.data, limit=settings.limit)
    for stop in settings.stops:
        build(stop, data, settings.width)
    return Study(settings, data, Store(settings.folder), tuple(_runs(settings, data)))


def run(study: Study, say: Callable[[str], None] = print) -> None:
    """Do the runs of a study that have not finished, one after the other.

    A run that fails leaves its error in the store and the study goes on. What has finished stays, however
    the study ends.

    Args:
        study: from `open_study`.
        say: gets one line a run.
    """
    todo = [run for run in study.runs if study.store.load(run.config) is None]
    if len(todo) < len(study.runs):
        say(
            f"{len(study.runs) - len(todo)} of {len(study.runs)} runs have finished before; {len(todo)} to do"
        )
    seconds: dict[str, list[float]] = {}
    for number, one in enumerate(todo, start=1):
        start = time.perf_counter()
        try:
            result = _train(one, study.data, study.store)
        except Exception as error:  # whatever an operator dies of: recorded, reported, and the others go on
            study.store.save_failure(one.config, error)
            outcome = f"FAILED: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            study.store.save(one.config, result)
            outcome = f"test {100 * result['test_accuracy']:5.1f} %"
        taken = time.perf_counter() - start
        seconds.setdefault(one.stop.name, []).append(taken)
        left = _time_left(todo[number:], seconds)
        say(
            f"[{number:{len(str(len(todo)))}}/{len(todo)}] {one.stop.title:22} seed {one.seed}  {outcome}"
            f"  {taken:5.1f} s" + (f"   about {duration(left)} left" if left else "")
        )


def build(stop: Stop, data: ImageData, width: int) -> SpectrumNet:
    """The network of the study around one operator, for images of one data set."""
    return SpectrumNet(
        parse(stop.notation), data.channels, len(data.classes),
        width=width, depth=DEPTH, stride=stem_stride(data.size),
    )  # fmt: skip


def duration(seconds: float) -> str:
    """Seconds as one says them.

    >>> duration(8.2), duration(95), duration(5400)
    ('8 s', '1.6 min', '1.5 h')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _runs(settings: Settings, data: ImageData) -> Iterator[Run]:
    for seed in range(settings.seeds):
        for stop in settings.stops:
            recipe = replace(settings.recipe, seed=seed)
            config = {
                "study": "spectrum",
                "version": nearfold.__version__,
                "operation": str(parse(stop.notation)),
                "recipe": recipe.to_dict(),
                "data": fingerprint(data),
                "model": {"width": settings.width, "depth": DEPTH, "stride": stem_stride(data.size)},
            }
            yield Run(stop, seed, recipe, config)


def _train(one: Run, data: ImageData, store: Store) -> dict[str, Any]:
    """Train one network, measure it, and keep the weights of seed 0 for the picture."""
    torch.manual_seed(one.seed)
    model = build(one.stop, data, one.config["model"]["width"])
    done = fit(model, data, one.recipe, progress=False)
    device = next(model.parameters()).device
    rows = slice(one.recipe.batch_size)
    images = prepare(data.train.images[rows].to(device), data)
    cost = measure(model, images, data.train.labels[rows].to(device))
    if one.seed == 0:
        store.weights_path(one.config).parent.mkdir(parents=True, exist_ok=True)
        save_weights(model, store.weights_path(one.config))
    kept = ("train_accuracy", "val_accuracy", "test_accuracy", "test_accuracy_last", "train_loss",
            "best_epoch", "steps", "seconds", "history")  # fmt: skip
    return {**{name: getattr(done, name) for name in kept}, "cost": asdict(cost)}


def _time_left(todo: Sequence[Run], seconds: Mapping[str, Sequence[float]]) -> float:
    """Seconds that the runs will take, from runs of the same operator, or of all where there was none."""
    all_seconds = [s for each in seconds.values() for s in each]
    average = sum(all_seconds) / len(all_seconds)
    return sum(
        sum(seconds[r.stop.name]) / len(seconds[r.stop.name]) if r.stop.name in seconds else average
        for r in todo
    )
