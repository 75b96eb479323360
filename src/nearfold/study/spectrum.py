"""The main job: one small network, its mixing layer swapped along the spectrum, everything else equal."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from nearfold.grammar import CATALOGUE, parse
from nearfold.models import SpectrumNet, stem_stride
from nearfold.study.engine import work_through
from nearfold.study.grid import Data, Run, Trial, costing, training
from nearfold.study.local import Local
from nearfold.study.store import Store
from nearfold.study.table import Row, make_row
from nearfold.study.tasks import Place
from nearfold.train import ImageData, Recipe, load_data
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
    *(_blend(lam) for lam in (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)),
    _known("convnn", "ConvNN all", "features"),
    _known("convnn_random", "ConvNN random 32", "features"),
    _known("kvt", "KVT k = 9", "features"),
    _known("attention", "self-attention", "features"),
    _known("branch", "branch conv + ConvNN", "both"),
    _known("acmix", "ACmix", "both"),
)
"""The operators in their order along the spectrum, from space to features; last, those that do both."""

RECIPE = Recipe(epochs=6, batch_size=32, lr=5e-3, weight_decay=0.05, warmup_epochs=1.0)
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
                raise ValueError(f"only: no operator {name!r} in the spectrum; choose from {', '.join(known)}")

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
class Study:
    """A study and what is on disk of it.

    Attributes:
        settings: what was asked.
        data: the images.
        store: the results.
        device: where the networks are trained.
    """

    settings: Settings
    data: ImageData
    store: Store
    device: torch.device

    @functools.cached_property
    def training(self) -> dict[tuple[int, str], Run]:
        """The runs that train, by seed and name of the operator, seed by seed."""
        prints = fingerprint(self.data)
        return {
            (seed, stop.name): training(self._trial(stop), seed, prints, keep_weights=seed == 0)
            for seed in range(self.settings.seeds)
            for stop in self.settings.stops
        }

    @functools.cached_property
    def costs(self) -> dict[str, Run]:
        """The runs that measure an operator's cost, by its name."""
        prints = fingerprint(self.data)
        return {stop.name: costing(self._trial(stop), prints) for stop in self.settings.stops}

    @property
    def place(self) -> Place:
        """Where runs find the data and leave their results."""
        return Place(self.store.root, {self.data.name: self.settings.data})

    def _trial(self, stop: Stop) -> Trial:
        network = {"name": "spectrum", "operation": stop.notation, **self.model}
        data = Data(self.data.name, limit=self.settings.limit)
        return Trial({"data": self.data.name, "operator": stop.title}, network, data, self.settings.recipe)

    @property
    def finished(self) -> list[Run]:
        """Training runs with a result."""
        return [run for run in self.training.values() if self.store.load(run.config) is not None]

    @property
    def failures(self) -> list[tuple[str, str]]:
        """Label and error of what failed and has not succeeded since: measurements, then runs."""
        tried = [*self.costs.values(), *self.training.values()]
        errors = ((run.label, self.store.failure(run.config)) for run in tried)
        return [(label, error) for label, error in errors if error is not None]

    @property
    def model(self) -> dict[str, int]:
        """What decides the network, but for the operator."""
        return {"width": self.settings.width, "depth": DEPTH, "stride": stem_stride(self.data.size)}

    def build(self, stop: Stop) -> SpectrumNet:
        """The network of the study around one operator, freshly initialised from torch's generator."""
        return SpectrumNet(parse(stop.notation), self.data.channels, len(self.data.classes), **self.model)

    def rows(self) -> list[Row]:
        """One row an operator that has a cost and a result."""
        rows = []
        for order, stop in enumerate(SPECTRUM, start=1):
            runs = {seed: run for (seed, name), run in self.training.items() if name == stop.name}
            loaded = {seed: self.store.load(run.config) for seed, run in runs.items()}
            results = {seed: result for seed, result in loaded.items() if result is not None}
            if results and (cost := self.store.load(self.costs[stop.name].config)) is not None:
                rows.append(make_row(results, cost, order=order, **asdict(stop)))
        return rows


def run(study: Study, *, jobs: int = 1, say: Callable[[str], None] | None = None) -> None:
    """Measure the operators, then do the runs that have not finished, all operators of seed 0 first.

    What failed before is tried again.

    Args:
        study: from `open_study`.
        jobs: runs side by side, as in `nearfold.study.local.Local`.
        say: gets one line a run; None: print.
    """
    work_through([*study.costs.values(), *study.training.values()], study.place, Local(jobs), retry=True, say=say)


def open_study(settings: Settings) -> Study:
    """Load the data and look for what is missing before any training; nothing is trained.

    Raises:
        ValueError: the data cannot be read, the device is not there, or an operator does not work at this
            width: found out now, and not in one run after the other.
        ImportError: the package that reads this data is not installed.
    """
    device = join(settings.device).device
    data = load_data(settings.data, limit=settings.limit)
    study = Study(settings, data, Store(settings.folder), device)
    for stop in settings.stops:
        study.build(stop)
    return study
