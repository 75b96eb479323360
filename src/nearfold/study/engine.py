"""Doing the runs of a study: which are left, who does them, and what is said meanwhile."""

from __future__ import annotations

import contextlib
import functools
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nearfold._images import first_line
from nearfold.study.grid import Run
from nearfold.study.store import Store
from nearfold.study.tasks import TASKS, Place
from nearfold.train import Recipe

POLL_SECONDS = 2.0
"""How often to look whether a run that somebody else does has finished."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: a result, an error in one line, or neither: somebody else does it."""

    run: Run
    seconds: float
    result: dict[str, Any] | None = None
    error: str = ""


class Engine(Protocol):
    """Does runs side by side."""

    def outcomes(self, runs: Sequence[Run], place: Place) -> Iterator[Outcome]:
        """Do the runs, each claimed and recorded by `attempt`, and yield how they ended, as they end.

        What kills a process becomes an outcome with an error; the other runs go on.
        """


def attempt(run: Run, place: Place) -> Outcome:
    """Do a run that nobody else does and nobody has done; record its result or its error."""
    began = time.perf_counter()
    store = Store(place.root)
    with store.claim(run.config) as ours:
        if not ours:
            return Outcome(run, 0.0)
        if (result := store.load(run.config)) is not None:
            return Outcome(run, 0.0, result)
        try:
            weights = store.weights_path(run.config) if run.keep_weights else None
            work = store.work_path(run.config) if place.resumable else None
            result = TASKS[run.config["task"]](run.config, place, weights, work)
            store.save(run.config, result)
        except Exception as error:  # whatever it dies of: recorded, reported, and the others go on
            text = f"{type(error).__name__}: {first_line(error)}"
            return failed(run, place, began, text, "".join(traceback.format_exception(error)))
    return Outcome(run, time.perf_counter() - began, result)


def failed(run: Run, place: Place, began: float, error: str, trace: str = "") -> Outcome:
    """Record how a run failed, by whoever saw it."""
    with contextlib.suppress(OSError):  # where the disk is full, saying so is all that is left
        Store(place.root).save_failure(run.config, error, trace)
    return Outcome(run, time.perf_counter() - began, error=error)


def work_through(
    runs: Sequence[Run], place: Place, engine: Engine, *, retry: bool = False, say: Callable[[str], None] | None = None
) -> None:
    """Do the runs that have not finished; first, here and one after the other, those that must be alone.

    A run that fails leaves its error in the store and the others go on. What has finished stays, however this ends.

    Args:
        runs: of a study.
        place: where.
        engine: who.
        retry: do runs again that failed before.
        say: gets one line a run; None: print.
    """
    say = say or functools.partial(print, flush=True)
    store = Store(place.root)
    open_runs = [run for run in runs if store.load(run.config) is None]
    todo = [run for run in open_runs if retry or store.failure(run.config) is None]
    left_alone = len(open_runs) - len(todo)
    say(
        f"{len(runs) - len(open_runs)} of {len(runs)} runs have finished before, {len(todo)} to do; results in "
        f"{place.root}" + (f"; {left_alone} failed before and are left: --retry does them again" if left_alone else "")
    )
    measured = [(run, result) for run in runs if run.alone and (result := store.load(run.config)) is not None]
    clock = _Clock(todo, measured, getattr(engine, "jobs", None))
    for alone in (True, False):
        left = [run for run in todo if run.alone is alone]
        while left:
            elsewhere = []
            outcomes = (attempt(run, place) for run in left) if alone else engine.outcomes(left, place)
            for outcome in outcomes:
                if outcome.result is None and not outcome.error:
                    elsewhere.append(outcome.run)
                    continue
                say(clock.line(outcome))
            if elsewhere and len(elsewhere) == len(left):
                time.sleep(POLL_SECONDS)
            left = elsewhere


class _Clock:
    """Says how far it is, and how long it will take.

    A run takes as long as those of its group did. Where none of them has ended, it takes as long as others of its task,
    in proportion to its epochs and images and to the speed that was measured of its network. How many are done side by
    side the engine says, or it shows as they end.
    """

    def __init__(self, todo: Sequence[Run], measured: Sequence[tuple[Run, dict[str, Any]]], jobs: int | None) -> None:
        self._left = list(todo)
        self._total = len(todo)
        self._jobs = jobs
        self._began: float | None = None
        self._groups: dict[str, list[float]] = {}
        self._ended: dict[str, list[tuple[Run, float]]] = {}
        self._speeds: dict[str, float] = {}
        for run, result in measured:
            self._measure(run, result)

    def line(self, outcome: Outcome) -> str:
        self._left.remove(outcome.run)
        if outcome.seconds:
            if self._began is None and not outcome.run.alone:
                self._began = time.perf_counter() - outcome.seconds
            self._groups.setdefault(outcome.run.group, []).append(outcome.seconds)
            self._ended.setdefault(outcome.run.config["task"], []).append((outcome.run, outcome.seconds))
        if outcome.result is not None:
            self._measure(outcome.run, outcome.result)
        done = self._total - len(self._left)
        rest = self._rest()
        ending = f"   about {duration(rest)} left" if self._left and rest else ""
        what = f"FAILED: {outcome.error}" if outcome.result is None else _summary(outcome.result)
        width = len(str(self._total))
        return f"[{done:{width}}/{self._total}] {outcome.run.label}: {what}  {outcome.seconds:.1f} s{ending}"

    def _measure(self, run: Run, result: dict[str, Any]) -> None:
        if run.config["task"] == "cost":
            self._speeds[_network(run)] = result["images_per_second"]

    def _rest(self) -> float:
        """Seconds still to go; 0 where it cannot be said."""
        known = {group: statistics.fmean(seconds) for group, seconds in self._groups.items()}
        factors = {  # of the seconds that runs were expected to take
            task: sum(seconds for _, seconds in ended) / sum(self._expected(run) for run, _ in ended)
            for task, ended in self._ended.items()
        }
        if self._speeds:
            factors.setdefault("train", 1.0)
        if not all(run.group in known or run.config["task"] in factors for run in self._left):
            return 0.0
        seconds = {True: 0.0, False: 0.0}
        for run in self._left:
            took = known.get(run.group) or factors[run.config["task"]] * self._expected(run)
            seconds[run.alone] += took
        return seconds[True] + seconds[False] / self._side_by_side()

    def _side_by_side(self) -> float:
        """How many runs are done at a time."""
        if self._jobs is not None or self._began is None:
            return min(self._jobs or 1, len(self._left)) or 1
        done = sum(took for ended in self._ended.values() for run, took in ended if not run.alone)
        return done / (time.perf_counter() - self._began)

    def _expected(self, run: Run) -> float:
        """Seconds of a run by the speed that was measured of its network or of others; else what is in proportion."""
        if run.config["task"] != "train":
            return 1.0
        usual = statistics.fmean(self._speeds.values()) if self._speeds else 1.0
        images = run.config["data"]["fingerprint"]["train"][0]
        return Recipe.from_dict(run.config["recipe"]).epochs * images / self._speeds.get(_network(run), usual)


def _network(run: Run) -> str:
    """What a measurement and the training of the same network on the same data have in common."""
    return json.dumps([run.config["network"], run.config["data"]], sort_keys=True)


def _summary(result: dict[str, Any]) -> str:
    if "test_accuracy" in result:
        return f"test {100 * result['test_accuracy']:5.1f} %"
    if "images_per_second" in result:
        return f"{result['images_per_second']:,.0f} images/s"
    return "done"


def duration(seconds: float) -> str:
    """Seconds as one says them.

    >>> duration(8.2), duration(95), duration(5400)
    ('8 s', '1.6 min', '1.5 h')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
