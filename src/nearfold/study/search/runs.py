"""The runs of a search: what is trained how long with which seed, done on an engine, and what that costs."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nearfold.study.engine import Engine, duration, work_through
from nearfold.study.grid import Data, Label, Run, Trial, costing, training
from nearfold.study.search.layers import text_of
from nearfold.study.store import Store
from nearfold.study.tasks import Place
from nearfold.train import Recipe

Config = Mapping[str, Any]


@dataclass
class Spent:
    """What one side of a search had: runs that finished, their epochs and their seconds; runs that failed."""

    runs: int = 0
    epochs: int = 0
    seconds: float = 0.0
    failed: int = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(*(a + b for a, b in zip(self._all, other._all, strict=True)))

    @property
    def _all(self) -> tuple[Any, ...]:
        return self.runs, self.epochs, self.seconds, self.failed


@dataclass
class Clock:
    """Says how far a search is. Time left goes by the epochs that were trained since this process began.

    Attributes:
        planned: epochs of all runs, as far as can be said.
        say: gets the lines.
        done: epochs that are done.
        trained: those of them that this process has trained.
        working: seconds that it has worked on them.
    """

    planned: int
    say: Callable[[str], None]
    done: int = 0
    trained: int = 0
    working: float = 0.0

    def line(self, text: str) -> None:
        """Say a line with the share that is done and the time left."""
        left = max(0, self.planned - self.done)
        rest = f", about {duration(left * self.working / self.trained)} left" if left and self.trained else ""
        self.say(f"{text}   [{min(1.0, self.done / self.planned):.0%}{rest}]")


@dataclass
class Runs:
    """Trains networks, and knows what has been spent.

    Attributes:
        data: what is trained on.
        fingerprint: of the data.
        recipe: at full length.
        place: of the store.
        engine: who trains.
        clock: says how far it is.
        spent: by side, or stage, of the search.
    """

    data: Data
    fingerprint: Config
    recipe: Recipe
    place: Place
    engine: Engine
    clock: Clock
    spent: dict[str, Spent] = field(default_factory=dict)

    def train(self, side: str, networks: Sequence[Config], epochs: int, seeds: Sequence[int]) -> list[dict[int, Any]]:
        """Train every network with every seed for so many epochs: result by seed, without those that failed.

        Args:
            side: whom it is spent on.
            networks: as `Trial` takes them.
            epochs: the whole recipe, warmup and decay of the rate included, is that long.
            seeds: of the runs. The weights of the first seed of several are kept.
        """
        runs = {
            (i, seed): training(
                self._trial(network, epochs), seed, self.fingerprint, keep_weights=len(seeds) > 1 and seed == seeds[0]
            )
            for i, network in enumerate(networks)
            for seed in seeds
        }
        self._do(list(runs.values()), epochs)
        store = Store(self.place.root)
        found: list[dict[int, Any]] = [{} for _ in networks]
        spent = self.spent.setdefault(side, Spent())
        for (i, seed), run in runs.items():
            result = store.load(run.config)
            if result is None:
                spent.failed += 1
                continue
            found[i][seed] = result
            spent.runs, spent.epochs = spent.runs + 1, spent.epochs + result["epochs"]
            spent.seconds += result["seconds"]
        return found

    def costs(self, networks: Sequence[Config]) -> list[dict[str, Any] | None]:
        """What every network costs, measured here and one after the other; None where that failed."""
        runs = [costing(self._trial(network, self.recipe.epochs), self.fingerprint) for network in networks]
        self._do(runs, 0)
        return [Store(self.place.root).load(run.config) for run in runs]

    def weights(self, network: Config, seed: int) -> Any:
        """Where the weights of a run at full length are, if they were kept."""
        run = training(self._trial(network, self.recipe.epochs), seed, self.fingerprint)
        return Store(self.place.root).weights_path(run.config)

    def _trial(self, network: Config, epochs: int) -> Trial:
        share = epochs / self.recipe.epochs
        recipe = replace(self.recipe, epochs=epochs, warmup_epochs=share * self.recipe.warmup_epochs)
        labels: dict[str, Label] = {
            "data": self.data.name,
            "operator": text_of(network),
            "epochs": float(epochs),
        }
        return Trial(labels, network, self.data, recipe)

    def _do(self, runs: Sequence[Run], epochs: int) -> None:
        store = Store(self.place.root)
        todo = sum(store.load(run.config) is None and store.failure(run.config) is None for run in runs)
        began = time.perf_counter()
        work_through(runs, self.place, self.engine, say=functools.partial(_failures, self.clock.say))
        self.clock.done += epochs * len(runs)
        if epochs:
            self.clock.trained += epochs * todo
            self.clock.working += time.perf_counter() - began


def _failures(say: Callable[[str], None], text: str) -> None:
    """Of what the engine says, what is worth a line here: test accuracies are not looked at before the end."""
    if "FAILED" in text:
        say(text)
