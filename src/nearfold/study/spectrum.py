"""The study of `nearfold.study.catalogue.spectrum` on data, and in a folder, of one's own."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nearfold.study.catalogue.spectrum import DEPTH, RECIPE, SEEDS, SPECTRUM, WIDTH, Stop, along
from nearfold.study.engine import work_through
from nearfold.study.grid import Data
from nearfold.study.local import Local
from nearfold.study.plan import Plan, plan
from nearfold.study.tasks import load
from nearfold.train import Recipe
from nearfold.train.distributed import join

__all__ = ["DEPTH", "RECIPE", "SPECTRUM", "Settings", "Stop", "command_line", "open_study", "run"]


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
    seeds: int = SEEDS
    epochs: int = RECIPE.epochs
    only: tuple[str, ...] = ()
    width: int = WIDTH
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
    def name(self) -> str:
        """Of the data set."""
        return Path(self.data).resolve().name

    @property
    def stops(self) -> tuple[Stop, ...]:
        """The operators to run, in the order of the spectrum."""
        return tuple(stop for stop in SPECTRUM if not self.only or stop.name in self.only)

    @property
    def folder(self) -> Path:
        """Where results go."""
        return self.out or Path("runs") / f"spectrum-{self.name}"

    @property
    def recipe(self) -> Recipe:
        """The recipe of every run, but for the seed."""
        warmup = min(RECIPE.warmup_epochs, self.epochs)
        return replace(RECIPE, epochs=self.epochs, warmup_epochs=warmup, device=self.device)


def open_study(settings: Settings) -> Plan:
    """Load the data and look for what is missing before any training; nothing is trained.

    Raises:
        ValueError: the data cannot be read, the device is not there, or an operator does not work at this
            width: found out now, and not in one run after the other.
        ImportError: the package that reads this data is not installed.
    """
    join(settings.device)
    data = Data(settings.name, limit=settings.limit)
    sizes = {data: load(settings.data, data).size}
    study = along(sizes, settings.recipe, seeds=settings.seeds, width=settings.width, stops=settings.stops)
    return plan(study, settings.folder, {data.name: settings.data})


def run(study: Plan, *, jobs: int = 1, say: Callable[[str], None] | None = None) -> None:
    """Measure the operators, then do the runs that have not finished, all operators of seed 0 first.

    What failed before is tried again.

    Args:
        study: from `open_study`.
        jobs: runs side by side, as in `nearfold.study.local.Local`.
        say: gets one line a run; None: print.
    """
    work_through(study.runs, study.place, Local(jobs), retry=True, say=say)


def command_line(settings: Settings) -> str:
    """The command that asks for a study with these settings.

    >>> command_line(Settings(seeds=5, only=("conv", "kvt")))
    'nearfold study spectrum --seeds 5 --only conv,kvt'
    """
    words = ["nearfold", "study", "spectrum"]
    usual = asdict(Settings())
    for name, value in asdict(settings).items():
        if value != usual[name]:
            words += [f"--{name}", ",".join(value) if isinstance(value, tuple) else str(value)]
    return shlex.join(words)
