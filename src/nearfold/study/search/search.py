"""The search: the known operators, the generations, and the finalists of both, trained anew and compared once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from nearfold.study import given
from nearfold.study.catalogue.spectrum import RECIPE
from nearfold.study.engine import Engine
from nearfold.study.fourteen import FOURTEEN, sized
from nearfold.study.grid import Data
from nearfold.study.search.budget import Budget, Networks, OverBudget
from nearfold.study.search.halving import Halving, Tried, rungs
from nearfold.study.search.layers import START, LayerNetworks, LayerSpace, layers_of, text_of
from nearfold.study.search.propose import Proposer
from nearfold.study.search.runs import Clock, Runs, Spent
from nearfold.study.search.space import Space
from nearfold.study.statistics import Estimate, paired
from nearfold.study.tasks import Place, build, load
from nearfold.train import ImageData, Recipe
from nearfold.train.checkpoint import fingerprint
from nearfold.train.evaluation import evaluate

VALIDATION = 1 / 3
"""Share of the training images held out: a search chooses by them again and again."""
UNSEEN = 0.1
"""The same where a trained network is given: the share, and so the images, that `nearfold train` holds out."""
GENTLY = 0.1
"""Learning rate of a trained network, as a share of that of a fresh one."""
SEED = 0
"""Of the runs that choose; finalists are trained with the seeds after it."""


@dataclass(frozen=True)
class Settings:
    """What a search is asked to do.

    Attributes:
        data: what `nearfold.train.load_data` takes.
        budget: of every network.
        limit: at most so many training images, those held out included, and test images; None: all.
        trials: operations that are proposed and trained, besides those of `start`.
        generation: so many at a time.
        epochs: of a run at full length.
        width: channels of the small networks.
        depth: their blocks.
        model: a trained network whose layers are exchanged instead, as `nearfold.study.given.load` takes it.
        weights: of `model`.
        layers: a shell pattern for the names of the layers that may be exchanged.
        mean: of each channel, 0..1, that `model` was trained with; None: as `nearfold.study.given.given` says.
        std: the same, of the spread.
        lr: largest learning rate; None: that of the spectrum study, a tenth of it where `model` is given.
        finalists: of each side, trained anew.
        seeds: of every finalist.
        minutes: no generation begins when what has been trained, and the finalists, take longer; None: no limit.
        start: notation by title: the known operators; None: `nearfold.study.fourteen.FOURTEEN`, and for the layers of
            `model` some more (`nearfold.study.search.layers.START`).
        out: folder of results.
        device: as in `Recipe`.

    Raises:
        ValueError: a number is too small, or there is nothing to start from.
    """

    data: str
    budget: Budget
    limit: int | None = None
    trials: int = 54
    generation: int = 9
    epochs: int = 12
    width: int = 32
    depth: int = 2
    finalists: int = 3
    seeds: int = 5
    minutes: float | None = None
    model: str | None = None
    weights: Path | None = None
    layers: str = "*"
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    lr: float | None = None
    start: Mapping[str, str] | None = None
    out: Path = Path("runs/search")
    device: str = "cpu"

    def __post_init__(self) -> None:
        least = {"trials": 1, "generation": 1, "epochs": 1, "width": 1, "depth": 1, "finalists": 1, "seeds": 2}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise ValueError(f"Settings.{name} must be at least {number}, got {getattr(self, name)}")
        of_model = (self.weights, self.mean, self.std) != (None, None, None) or self.layers != "*"
        if self.model is None and of_model:
            raise ValueError("weights=, layers=, mean= and std= are of a trained network: give model=, too")
        if self.model is not None and (self.width, self.depth) != (Settings.width, Settings.depth):
            raise ValueError("width= and depth= are of the small networks, and model= has its own: leave them out")
        if self.start is not None and not self.start:
            raise ValueError("Settings.start must name an operator: the search is compared with the best of them")

    @property
    def recipe(self) -> Recipe:
        """Of a run at full length: that of the spectrum study."""
        lr = self.lr or RECIPE.lr * (1.0 if self.model is None else GENTLY)
        warmup = min(1.0, self.epochs / 6)
        return replace(RECIPE, epochs=self.epochs, warmup_epochs=warmup, lr=lr, device=self.device)

    @property
    def validation(self) -> float:
        """Share of the training images that is held out."""
        return VALIDATION if self.model is None else UNSEEN


@dataclass(frozen=True)
class Finalist:
    """An operation whose network was trained anew.

    Attributes:
        side: ``"search"`` or ``"known"``.
        title: of a known operator; empty for others.
        tried: the operation, its network, and what it had in the search.
        results: by seed.
    """

    side: str
    title: str
    tried: Tried
    results: Mapping[int, Mapping[str, Any]]

    @property
    def chosen_by(self) -> float:
        """Mean validation accuracy of the new seeds."""
        return fmean(result["val_accuracy"] for result in self.results.values())

    @property
    def test(self) -> dict[int, float]:
        """Test accuracy by seed. To be looked at once."""
        return {seed: result["test_accuracy"] for seed, result in self.results.items()}


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        settings: what was asked.
        data: what it was trained on.
        networks: around its operations.
        known: the operators of the start, trained at full length; those over the budget are in `left_out`.
        left_out: titles of known operators that were not trained, and why.
        outside: titles of known operators that the space does not hold: trained and compared, they guide nothing.
        tried: the operations that were proposed and trained, in their order.
        refused: proposals that were not trained, by reason.
        finalists: of both sides, each in the order of validation.
        spent: by ``"known"``, ``"search"`` and ``"finalists"``.
        runs: the runs, which know where weights are.
        kept: as in `Search`.
        before: as in `Search`.
    """

    settings: Settings
    data: ImageData
    networks: Networks | LayerNetworks
    known: Mapping[str, Tried]
    left_out: Mapping[str, str]
    outside: Sequence[str]
    tried: Sequence[Tried]
    refused: Mapping[str, int]
    finalists: Sequence[Finalist]
    spent: Mapping[str, Spent]
    runs: Runs
    kept: Mapping[str, str] = field(default_factory=dict)
    before: float | None = None

    def best(self, side: str) -> Finalist:
        """The finalist of a side with the highest validation accuracy."""
        return max((one for one in self.finalists if one.side == side), key=lambda one: one.chosen_by)

    @property
    def winner(self) -> Finalist:
        """The finalist with the highest validation accuracy of all; of equals, the known one."""
        return max((self.best("known"), self.best("search")), key=lambda one: one.chosen_by)

    @property
    def difference(self) -> Estimate:
        """Test accuracy of the best of the search minus that of the best known operator, paired by seed."""
        return paired(self.best("search").test, self.best("known").test).cut(-1.0, 1.0)


@dataclass(frozen=True)
class Search:
    """A search with its data, and its network, found.

    Attributes:
        settings: what is asked.
        data: what is trained on.
        name: of the data.
        networks: around the operations.
        space: of what is proposed.
        start: what is trained first, by title: an operation, or a plan for layers.
        left_out: why, by title, of known operators that no layer can be.
        kept: why, by name, of layers of a network that is given, that can have no other operator.
        before: share of the validation images that this network gets right as it is, before it is trained on.
    """

    settings: Settings
    data: ImageData
    name: str
    networks: Networks | LayerNetworks
    space: Space | LayerSpace
    start: Mapping[str, str]
    left_out: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)
    before: float | None = None

    def run(self, engine: Engine, say: Callable[[str], None] = print) -> Found:
        """Do what is left of the search. What has finished stays, however this ends, and is never done again.

        Args:
            engine: who trains.
            say: gets the lines.

        Raises:
            ImportError: Optuna is not installed.
            ValueError: no known operator fits the budget, or too many runs failed for a comparison.
        """
        s = self.settings
        lengths = rungs(s.epochs)
        space = self.space
        described = Data(self.name, limit=s.limit, validation=s.validation)
        place = Place(s.out, {self.name: s.data})
        runs = Runs(described, fingerprint(self.data), s.recipe, place, engine, Clock(self._planned(lengths), say))
        known, left_out = self._known(runs)
        outside = [title for title, one in known.items() if space.parameters(one.notation) is None]
        proposer = Proposer(space, first=len(known) - len(outside) + 1)  # the first generation is drawn at random
        for one in known.values():
            proposer.know(one.notation, one.values)
        halving = Halving(proposer, self.networks, runs, lengths, SEED, {one.notation: one for one in known.values()})
        tried = self._generations(halving)
        whole = sorted((one for one in tried if s.epochs in one.values), key=lambda one: -one.rank[1])
        if not tried and s.minutes is not None:
            raise ValueError(
                f"minutes={s.minutes:g} is no time for one generation beside the known operators and the finalists: "
                "give more, or fewer finalists and seeds; what has finished stays"
            )
        if not whole:
            raise ValueError(f"nothing was proposed that fits {s.budget} and trains: see {s.out}/failed")
        titled = {one.notation: title for title, one in known.items()}
        sides = {"known": sorted(known.values(), key=lambda one: -one.rank[1]), "search": whole}
        finalists = self._finals(runs, sides, titled)
        return Found(
            s, self.data, self.networks, known, left_out, outside, tried, dict(halving.refused), finalists,
            runs.spent, runs, self.kept, self.before,
        )  # fmt: skip

    def _planned(self, lengths: Sequence[int]) -> int:
        """Epochs of everything, where nothing is left out."""
        s = self.settings
        halved = sum(epochs * s.trials / 3**rung for rung, epochs in enumerate(lengths))
        return round(halved + s.epochs * (len(self.start) + 2 * s.finalists * s.seeds))

    def _known(self, runs: Runs) -> tuple[dict[str, Tried], dict[str, str]]:
        """Train the operators of the start at full length."""
        s = self.settings
        networks, left_out, latencies = {}, dict(self.left_out), {}
        for title, text in self.start.items():
            try:
                networks[title] = self.networks.around(text)
            except (OverBudget, ValueError) as error:
                left_out[title] = str(error)
        if s.budget.measured:
            for title, cost in zip(list(networks), runs.costs(list(networks.values())), strict=True):
                if cost is None or cost["latency_ms"] > s.budget.most:
                    left_out[title] = "could not be measured" if cost is None else f"takes {cost['latency_ms']:.2f} ms"
                    del networks[title]
                else:
                    latencies[title] = cost["latency_ms"]
        found = {}
        for (title, network), result in zip(
            networks.items(), runs.train("known", list(networks.values()), s.epochs, [SEED]), strict=True
        ):
            if SEED in result:
                found[title] = Tried(
                    text_of(network), network, {s.epochs: result[SEED]["val_accuracy"]}, latencies.get(title)
                )
            else:
                left_out[title] = "its training failed"
        if not found and networks:
            raise ValueError(
                f"every training of the {len(networks)} known operators within {s.budget} failed: see {s.out}/failed"
            )
        if not found:
            why = "; ".join(f"{title}: {reason}" for title, reason in list(left_out.items())[:3])
            raise ValueError(f"no known operator can be trained within {s.budget}: {why}")
        best = max(found, key=lambda title: found[title].values[s.epochs])
        runs.clock.line(
            f"known operators, {len(found)} x {s.epochs} epochs: best {100 * found[best].values[s.epochs]:.1f} % of "
            f"the validation images, {best}"
        )
        return found, left_out

    def _generations(self, halving: Halving) -> list[Tried]:
        """Generation after generation, until there are enough trials, or no time or nothing new."""
        s = self.settings
        tried: list[Tried] = []
        generation = 0
        while len(tried) < s.trials and not self._late(halving.runs):
            generation += 1
            name = f"trials {len(tried) + 1} to {min(len(tried) + s.generation, s.trials)} of {s.trials}"
            new = halving.generation(min(s.generation, s.trials - len(tried)), name, halving.runs.clock.line)
            if not new:
                halving.runs.clock.say("nothing new is proposed: the search ends here")
                break
            tried += new
        return tried

    def _late(self, runs: Runs) -> bool:
        """Whether the finalists would end after the time that there is. By the runs on file, so that it stays so."""
        s = self.settings
        if s.minutes is None:
            return False
        spent = sum(runs.spent.values(), Spent())
        finals = 2 * s.finalists * s.seeds * s.epochs * spent.seconds / max(1, spent.epochs)
        return (spent.seconds + finals) / getattr(runs.engine, "jobs", 1) > 60 * s.minutes

    def _finals(self, runs: Runs, sides: Mapping[str, Sequence[Tried]], titled: Mapping[str, str]) -> list[Finalist]:
        s = self.settings
        entered = [(side, one) for side, ranked in sides.items() for one in ranked[: s.finalists]]
        seeds = range(SEED + 1, SEED + 1 + s.seeds)
        results = runs.train("finalists", [one.network for _, one in entered], s.epochs, seeds)
        found = [
            Finalist(side, titled.get(one.notation, ""), one, result)
            for (side, one), result in zip(entered, results, strict=True)
            if len(result) == s.seeds
        ]
        for side in sides:
            if not any(one.side == side for one in found):
                raise ValueError(f"every finalist of the side {side!r} has a run that failed: see {s.out}/failed")
        runs.clock.planned = runs.clock.done
        runs.clock.line(f"finalists, {len(found)} x {s.seeds} seeds x {s.epochs} epochs: done")
        return sorted(found, key=lambda one: (one.side, -one.chosen_by))


OWN = (
    "data", "limit", "budget", "epochs", "width", "depth", "model", "weights", "layers", "mean", "std", "lr",
)  # fmt: skip
"""Settings that make two searches different ones."""


def written(settings: Settings) -> dict[str, Any]:
    """Settings as JSON has them."""
    told = asdict(settings) | {"out": str(settings.out), "start": dict(settings.start or {})}
    told["weights"] = None if settings.weights is None else str(settings.weights)
    for name in ("mean", "std"):
        told[name] = None if told[name] is None else list(told[name])
    return told


def _require_own(settings: Settings) -> None:
    """ValueError where the results would take the place of those of another search."""
    path = settings.out / "result.json"
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8")).get("settings", {})
        now = {name: value for name, value in written(settings).items() if name in OWN}
        other = {name: before.get(name) for name, value in now.items() if before.get(name) != value}
        if other:
            whose = ", ".join(f"{name}: {value}" for name, value in other.items())
            raise ValueError(f"out={settings.out} has the results of another search ({whose}): name another folder")


def open_search(settings: Settings) -> Search:
    """Load the data and the network, and look for what is missing before any training; nothing is trained.

    Raises:
        ValueError: the data or the model cannot be read or do not fit, or the folder has the results of another search.
    """
    s = settings
    _require_own(s)
    name = os.path.basename(os.path.realpath(s.data))
    data = load(s.data, Data(name, s.limit, validation=s.validation))
    assert isinstance(data, ImageData)
    if s.model is None:
        small = Networks(data, s.budget, s.width, s.depth)
        positions = small.grid[0] * small.grid[1]
        start = {title: sized(notation, positions) for title, notation in (s.start or FOURTEEN).items()}
        return Search(s, data, name, small, Space(s.width, small.grid), start)
    network = given.given(s.model, s.weights, s.mean, s.std)
    model = build(network, data)
    given.require_classifier(model, data, s.model)
    before = evaluate(model, data.val, data)[1]
    layers, kept, left_out = layers_of(model, (data.channels, *data.size), s.start or START, s.layers)
    space = LayerSpace(layers)
    return Search(
        s, data, name, LayerNetworks(data, s.budget, network), space, space.everywhere(s.start or START), left_out,
        kept, before,
    )  # fmt: skip
