"""From a study to its runs: the data are loaded, the networks tried, and every run gets its configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from nearfold.options import meant
from nearfold.study.grid import Run, Study, Trial, costing, training
from nearfold.study.results import Results, collect
from nearfold.study.store import Store
from nearfold.study.tasks import Place, Sources, build, load, source_of
from nearfold.train import ImageData, StreamData, require_trainable
from nearfold.train.checkpoint import fingerprint
from nearfold.train.data import comes_along


@dataclass(frozen=True)
class Plan:
    """A study with its data found and its runs laid out.

    Attributes:
        study: with the trials whose data are there.
        missing: data sets that nobody said where to find; their trials are left out.
        training: by (index of the trial, seed).
        costs: by index of the trial.
        place: where the runs leave their results.
        facts: a sentence about every data set.
        tested: number of test images, by data set as labelled.
    """

    study: Study
    missing: tuple[str, ...]
    training: dict[tuple[int, int], Run]
    costs: dict[int, Run]
    place: Place
    facts: tuple[str, ...]
    tested: dict[str, int]

    @property
    def runs(self) -> list[Run]:
        """All of them: costs, then seed by seed."""
        return [
            *self.costs.values(),
            *(self.training[key] for key in sorted(self.training, key=lambda k: (k[1], k[0]))),
        ]

    @property
    def results(self) -> Results:
        """What the store has now."""
        return collect(self.study, self.training, self.costs, Store(self.place.root), self.tested)


def plan(study: Study, root: Path, sources: Sources, *, resumable: bool = False, workers: int = 0) -> Plan:
    """Load the data and look for what is missing before any training; nothing is trained.

    Args:
        study: the study.
        root: of the store.
        sources: folder by name of a data set; those that come along need none.
        resumable: as in `Place`.
        workers: as in `Place`.

    Raises:
        ValueError: a source is of no data set of the study, none of them is there, one cannot be read, or a network
            does not work on its images: found out now, and not in one run after the other.
    """
    names = dict.fromkeys(trial.data.name for trial in study.trials)
    if unknown := [name for name in sources if name not in names]:
        raise ValueError(
            f"--data {unknown[0]}={sources[unknown[0]]}: no data set of the study {study.name!r} is called so; its "
            f"data sets are {', '.join(names)}{meant(unknown[0], names)}"
        )
    missing = tuple(name for name in names if not comes_along(name) and name not in sources)
    trials = [trial for trial in study.trials if trial.data.name not in missing]
    if not trials:
        source_of(missing[0], sources)  # raises
    datas = {trial.data: load(source_of(trial.data.name, sources), trial.data) for trial in trials}
    prints = {data: fingerprint(loaded) for data, loaded in datas.items()}
    for trial in trials:
        _try(trial, datas[trial.data])
    study = replace(study, trials=trials)
    runs = {
        (index, seed): training(
            trial, seed, prints[trial.data], keep_weights=(study.looks or study.weights) and seed == 0
        )
        for index, trial in enumerate(trials)
        for seed in range(study.seeds)
    }
    costs = {i: costing(trial, prints[trial.data]) for i, trial in enumerate(trials)} if study.cost else {}
    facts = tuple(dict.fromkeys(_fact(datas[trial.data], trial) for trial in trials))
    tested = {trial.panel: _sizes(datas[trial.data])["test"] for trial in trials}
    return Plan(study, missing, runs, costs, Place(root, dict(sources), resumable, workers), facts, tested)


def _try(trial: Trial, data: ImageData | StreamData) -> None:
    """Build the network and run it, on the meta device: cheap at any size."""
    try:
        require_trainable(lambda: build(trial.network, data), (data.channels, *data.size))
    except ValueError as error:
        raise ValueError(f"{trial.title}: {error}") from error


def _sizes(data: ImageData | StreamData) -> dict[str, int]:
    splits = data.splits if isinstance(data, StreamData) else {"train": data.train, "val": data.val, "test": data.test}
    return {name: len(split) for name, split in splits.items()}


def _fact(data: ImageData | StreamData, trial: Trial) -> str:
    height, width = data.size
    sizes = _sizes(data)
    subset = "" if trial.data.limit is None else ": a subset, the same for all seeds"
    return (
        f"{trial.data.name}: images of {height} x {width} pixels, {len(data.classes)} classes; {sizes['train']:,} to "
        f"train on, {sizes['val']:,} held out to choose epochs and settings, {sizes['test']:,} to test{subset}."
    )
