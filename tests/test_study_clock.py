"""What is said of the time that is left, where the seconds of every run are given."""

import re

import pytest

from nearfold.study import engine
from nearfold.study.engine import Outcome, _Clock
from nearfold.study.grid import Run

SPEEDS = {"fast": 100.0, "slow": 25.0}
IMAGES, EPOCHS = 300, 6


def config(task, network):
    return {
        "task": task, "network": {"name": network}, "recipe": {"epochs": EPOCHS},
        "data": {"name": "digits", "fingerprint": {"train": [IMAGES, 1, 8, 8, 0]}},
    }  # fmt: skip


COSTS = [Run(config("cost", name), f"{name}, cost", "cost", alone=True) for name in SPEEDS]
TRAINING = [Run(config("train", name), f"{name}, seed {s}", name) for s in range(3) for name in SPEEDS]


def measured(run):
    return {"images_per_second": SPEEDS[run.config["network"]["name"]]}


def said(line):
    """Seconds that are left by a line; None where it does not say."""
    found = re.search(r"about ([\d.]+) (s|min|h) left$", line)
    return found and float(found[1]) * {"s": 1, "min": 60, "h": 3600}[found[2]]


def test_the_time_that_is_left_is_said_from_the_first_measurement_on():
    """It used to take the seconds of a measurement for those of a training run: one minute instead of ten."""
    clock = _Clock([*COSTS, *TRAINING], [], jobs=2)
    whole = 3 * IMAGES * EPOCHS * (1 / 100 + 1 / 25) / 2
    assert said(clock.line(Outcome(COSTS[0], 2.0, measured(COSTS[0])))) == pytest.approx(
        2 + 6 * IMAGES * EPOCHS / 100 / 2, rel=0.05
    )  # as if both were fast, while nothing else is known
    assert said(clock.line(Outcome(COSTS[1], 2.0, measured(COSTS[1])))) == pytest.approx(whole, rel=0.05)
    took = 1.5 * IMAGES * EPOCHS / 100  # half as long again as was measured, and so will the others
    rest = 1.5 * whole - took / 2
    assert said(clock.line(Outcome(TRAINING[0], took, {"test_accuracy": 0.5}))) == pytest.approx(rest, rel=0.05)


def test_a_group_that_has_ended_says_more_than_what_was_measured():
    clock = _Clock(TRAINING, [(run, measured(run)) for run in COSTS], jobs=1)
    for run, seconds in zip(TRAINING, (10.0, 90.0, 10.0), strict=False):  # fast, slow, fast: nine times, not four
        line = clock.line(Outcome(run, seconds, {"test_accuracy": 0.5}))
    assert said(line) == pytest.approx(1 * 10 + 2 * 90, rel=0.05)


def test_without_measurements_runs_are_taken_to_be_alike():
    clock = _Clock(TRAINING, [], jobs=1)
    assert said(clock.line(Outcome(TRAINING[0], 10.0, error="no memory"))) == pytest.approx(5 * 10, rel=0.05)


def test_where_the_engine_does_not_say_how_many_the_rate_shows(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(engine.time, "perf_counter", lambda: now[0])
    clock = _Clock(TRAINING, [], jobs=None)
    lines = []
    for run in TRAINING[:4]:  # all four begin at 990 and end at 1000
        lines.append(clock.line(Outcome(run, 10.0, {"test_accuracy": 0.5})))
    assert said(lines[-1]) == pytest.approx(2 * 10 / 4, rel=0.05)


def test_nothing_is_said_where_nothing_is_known():
    """A measurement that failed, and training of which none has ended: no speed, no seconds."""
    clock = _Clock([*COSTS, *TRAINING], [], jobs=1)
    assert said(clock.line(Outcome(COSTS[0], 0.3, error="RuntimeError: no"))) is None
    assert said(_Clock(TRAINING[:1], [], 1).line(Outcome(TRAINING[0], 1.0, {}))) is None
