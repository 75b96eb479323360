"""The figure that stands first: a line for every setting, with its value, its interval and its seeds on one axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nearfold.study.statistics import Estimate


@dataclass(frozen=True)
class Mark:
    """A line of the figure.

    Attributes:
        title: of the setting.
        value: where its mark stands.
        low: lower end of the interval; None: there is none.
        high: its upper end.
        number: the value as text.
        interval: the interval as text.
        dots: single seeds.
        found: whether a difference was found: the mark is filled.
        colour: a class of page.css.
    """

    title: str
    value: float
    low: float | None
    high: float | None
    number: str
    interval: str = ""
    dots: Sequence[float] = ()
    found: bool = False
    colour: str = "blue"


@dataclass(frozen=True)
class Forest:
    """The figure.

    Attributes:
        caption: above it.
        unit: of its numbers.
        note: below it.
        marks: its lines.
        zero: where the line of the reference is drawn.
        ticks: of the axis, made from the marks.
    """

    caption: str
    unit: str
    note: str
    marks: Sequence[Mark]
    zero: float | None = None
    ticks: Sequence[float] = field(init=False)

    def __post_init__(self) -> None:
        values = [v for m in self.marks for v in (m.value, m.low, m.high, *m.dots) if v is not None]
        values += [] if self.zero is None else [self.zero]
        object.__setattr__(self, "ticks", round_ticks(min(values), max(values)))

    def at(self, value: float) -> float:
        """Where a value stands, in percent of the axis, which ends a little outside its first and last tick."""
        low, high = self.ticks[0], self.ticks[-1]
        return round(6 + 88 * (value - low) / (high - low), 3)

    def rest(self, value: float) -> float:
        """How far a value is from the right end of the axis."""
        return round(100 - self.at(value), 3)

    def show(self, tick: float) -> str:
        """A tick as text."""
        return f"{tick:+g}".replace("-", "−") if self.zero == 0 and tick else f"{tick:g}"


def round_ticks(low: float, high: float) -> list[float]:
    """Two to five round numbers, the first and last of which enclose everything.

    >>> round_ticks(-1.3, 3.8), round_ticks(90.2, 98.7), round_ticks(5.0, 5.0 + 1e-15)
    ([-2.0, 0.0, 2.0, 4.0], [90.0, 92.5, 95.0, 97.5, 100.0], [4.0, 4.5, 5.0, 5.5, 6.0])
    """
    if high - low < 1e-6:  # what equal numbers differ by is no span to divide
        low, high = low - 1, high + 1
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    for step in (power, 2 * power, 2.5 * power, 5 * power, 10 * power, 20 * power):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first <= 4:
            return [round(i * step, 10) for i in range(first, last + 1)]
    raise AssertionError((low, high))


def interval(e: Estimate, show: Callable[[float], str]) -> str:
    """An interval of shares as text; empty where there is none."""
    return "" if math.isnan(e.low) else f"({show(e.low)} to {show(e.high)})"


def ends(e: Estimate) -> tuple[float | None, float | None]:
    """The ends of an interval in percent or points; None where there is none."""
    return (None, None) if math.isnan(e.low) else (100 * e.low, 100 * e.high)
