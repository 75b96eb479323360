"""What a stored result must look like. Results are read from files, and files may have been written by anybody."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Number:
    """A finite number between two ends; `whole`: an integer."""

    low: float = 0.0
    high: float = math.inf
    whole: bool = False

    def fits(self, value: object) -> bool:
        """Whether a value read from JSON is such a number."""
        kinds = (int,) if self.whole else (int, float)
        return (
            isinstance(value, kinds)
            and not isinstance(value, bool)
            and self.low <= value <= min(self.high, LARGEST)  # false of nan
        )

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        return f"{kind} of at least {self.low:g}" + ("" if math.isinf(self.high) else f" and at most {self.high:g}")


LARGEST = 1e300
SHARE, AMOUNT, COUNT = Number(0, 1), Number(), Number(whole=True)
POSITIVE = Number(1e-12)

FIELDS: dict[str, dict[str, Number]] = {
    "train": {
        **dict.fromkeys(
            ("train_accuracy", "train_accuracy_last", "val_accuracy", "test_accuracy", "test_accuracy_last"), SHARE
        ),
        **dict.fromkeys(("best_epoch", "epochs", "steps"), COUNT),
        **dict.fromkeys(("seconds", "images_per_second", "train_loss"), AMOUNT),
    },
    "cost": {
        "parameters": COUNT, "flops": COUNT, "latency_ms": POSITIVE, "images_per_second": POSITIVE,
        "peak_memory_mib": AMOUNT,
    },
}  # fmt: skip
"""The numbers in the result of a task (`nearfold.study.tasks.TASKS`)."""


def checked(result: Any, task: str, *, whole: bool = True) -> dict[str, Any]:
    """The result, if it is one of the task.

    Args:
        result: as read from JSON.
        task: a key of `FIELDS`; of another task only that it is an object.
        whole: whether every field must be there.

    Raises:
        ValueError: it is not; the message names the field.

    >>> checked({"latency_ms": "<b>"}, "cost", whole=False)
    Traceback (most recent call last):
    ValueError: latency_ms must be a number of at least 1e-12, got '<b>'
    """
    if not isinstance(result, Mapping):
        raise ValueError(f"it must be an object with names and values, got {type(result).__name__}")
    for name, number in FIELDS.get(task, {}).items():
        if name not in result:
            if whole:
                raise ValueError(f"{name} is missing")
        elif not number.fits(result[name]):
            shown = repr(result[name])
            raise ValueError(f"{name} must be {number}, got {shown if len(shown) < 60 else shown[:57] + '...'}")
    if task == "cost" and (unknown := set(result) - set(FIELDS[task])):
        raise ValueError(f"no run leaves {', '.join(sorted(map(repr, unknown)))}")
    return dict(result)
