"""What a run is and how far it is: what a checkpoint holds besides tensors, and the check that it holds that."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from nearfold.nn import Mixer
from nearfold.surgery import SpectrumSchedule
from nearfold.surgery.schedule import changed
from nearfold.train.record import PHASES, Metrics


@dataclass
class Run:
    """What changes while a run goes, apart from weights and optimizer; part of every checkpoint."""

    step: int = 0  # steps done, over all epochs; where this ends an epoch, the epoch is evaluated too
    loss_sum: float = 0.0  # over the steps of the epoch under way
    correct: float = 0.0  # likewise, images classified correctly
    phase_sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))  # likewise, seconds
    step_seconds: list[float] = field(default_factory=list)  # one for each step
    starts: list[int] = field(default_factory=list)  # steps done whenever the run was (re)started
    history: list[Metrics] = field(default_factory=list)  # one record for each epoch
    best_epoch: int = 0  # from 1
    best_weights: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory_mib: float = 0.0


TENSORS = ("step_seconds", "best_weights")
"""The fields of a `Run` that a checkpoint keeps as tensors."""

_IN_EPOCH = ("epoch", "step", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "images_per_second")


def restored(
    facts: Mapping[str, Any], step_seconds: list[float], best_weights: dict[str, Any], steps_per_epoch: int, until: bool
) -> Run:
    """Return the `Run` of a checkpoint.

    Args:
        facts: Its fields by name, as JSON gives them back, but for the `TENSORS`.
        step_seconds: One for each step.
        best_weights: By name.
        steps_per_epoch: Of the run.
        until: Whether every epoch has its accuracy on the training images evaluated.

    Raises:
        ValueError: A field is missing, of another type, or does not go with the others.
    """
    names = {f.name for f in fields(Run)} - set(TENSORS)
    if not isinstance(facts, dict) or facts.keys() != names:
        raise ValueError("what it says of the run is not what a run has")
    step, history, best = facts["step"], facts["history"], facts["best_epoch"]
    measured = {*_IN_EPOCH, *(f"seconds_{phase}" for phase in PHASES), "data_wait"}
    measured |= {"train_accuracy_evaluated"} if until else set()
    sums = facts["phase_sums"]
    holds = {
        "step": _counts(step) and step == len(step_seconds),
        "history": isinstance(history, list)
        and len(history) == (step // steps_per_epoch if _counts(step) else -1)
        and all(_is_epoch(record, measured) for record in history),
        "best_epoch": _counts(best) and isinstance(history, list) and bool(history) <= best <= len(history),
        "starts": isinstance(facts["starts"], list) and all(map(_counts, facts["starts"])),
        "phase_sums": isinstance(sums, dict) and set(sums) == set(PHASES) and all(map(_measures, sums.values())),
        **{name: _measures(facts[name]) for name in ("loss_sum", "correct", "seconds", "peak_memory_mib")},
        "best weights": bool(best_weights) == bool(history),
    }
    wrong = [name for name, held in holds.items() if not held]
    if wrong:
        raise ValueError(f"its {wrong[0]} is not that of a run")
    return Run(**facts, step_seconds=step_seconds, best_weights=best_weights)


def _counts(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def _measures(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_epoch(record: Any, measured: set[str]) -> bool:
    """Whether a record of the history is one of an epoch."""
    return (
        isinstance(record, dict)
        and record.keys() == measured | {"kind"}
        and record["kind"] == "epoch"
        and all(_measures(record[name]) for name in measured)
    )


def configuration(model: nn.Module, schedule: SpectrumSchedule | None = None) -> dict[str, str]:
    """Return what a model is made of, by the names of its modules: what no shape of a weight tells.

    An operation is there in the one spelling that the notation prints, and where a schedule moves it, as it starts.

    >>> configuration(nn.Sequential(nn.Conv2d(1, 4, 3, dilation=2), nn.Dropout(0.1)))["1"]
    'Dropout(p=0.1, inplace=False)'
    """
    plan = {} if schedule is None else schedule.plan
    said = {}
    for name, module in model.named_modules():
        text = module.extra_repr()
        if isinstance(module, Mixer) and isinstance(plan.get(name), dict):
            start = changed(module.operation, **{knob: ends[0] for knob, ends in plan[name].items()})
            text = text.replace(str(module.operation), str(start), 1)
        said[name or "the whole"] = f"{type(module).__name__}({re.sub(' at 0x[0-9a-f]+', '', text)})"
    frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    return said | ({"frozen weights": ", ".join(frozen)} if frozen else {})
