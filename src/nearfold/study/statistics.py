"""Intervals and differences for a few seeds: Student's t, paired by seed, Holm's correction for several comparisons.

Three seeds alone say little: the half-width of a 95 % interval is t(2) s / sqrt(3) = 2.48 s. Many settings with the
same three seeds say more, if one grants that they scatter alike: the spread is then estimated from all of them (a
two-way layout of settings and seeds, the analysis of a randomised block design), and t has as many degrees of freedom.
Nothing here knows what the numbers mean.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval at `LEVEL`; without an interval (nan) where there is one value only.

    One value has no interval even where the spread is known from others: it would be drawn around a value that nothing
    of its own supports.

    Attributes:
        mean: of the values.
        low: lower end of the interval.
        high: upper end.
        n: how many values.
        p: probability of a mean as far from 0, if the true mean were 0 (two-sided); nan for one value.
    """

    mean: float
    low: float
    high: float
    n: int
    p: float

    @property
    def half(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2

    @property
    def arms(self) -> tuple[float, float]:
        """How far the interval reaches below and above the mean, which an end that was cut makes unequal."""
        return self.mean - self.low, self.high - self.mean

    def cut(self, low: float, high: float) -> Estimate:
        """The same with the interval ended at what values can be.

        >>> Estimate(0.98, 0.94, 1.02, 3, 0.0).cut(0.0, 1.0).high
        1.0
        """
        if math.isnan(self.low):
            return self
        return replace(self, low=max(low, self.low), high=min(high, self.high))


@dataclass(frozen=True)
class Spread:
    """A standard deviation that several settings share.

    Attributes:
        deviation: of one value.
        freedom: degrees of freedom it was estimated with.
    """

    deviation: float
    freedom: int


def estimate(values: Sequence[float], spread: Spread | None = None) -> Estimate:
    """The mean of independent values, with Student's interval.

    Args:
        values: at least one.
        spread: of a value, where it is known better than from these values alone.

    >>> e = estimate([1.0, 2.0, 3.0])
    >>> round(e.mean, 2), round(e.low, 2), round(e.high, 2), round(e.p, 3)
    (2.0, -0.48, 4.48, 0.074)
    """
    from scipy import stats

    n = len(values)
    mean = statistics.fmean(values)
    if n < 2:
        return Estimate(mean, math.nan, math.nan, n, math.nan)
    if spread is None:
        spread = Spread(statistics.stdev(values), n - 1)
    error = spread.deviation / math.sqrt(n)
    half = float(stats.t.ppf((1 + LEVEL) / 2, spread.freedom)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, spread.freedom)) if error else float(mean == 0)
    return Estimate(mean, mean - half, mean + half, n, p)


def within(settings: Sequence[Mapping[int, float]]) -> Spread | None:
    """The spread of a value around its setting's mean, from all settings; None where no setting has two values.

    >>> within([{0: 1.0, 1: 3.0}, {0: 5.0, 1: 5.0}])
    Spread(deviation=1.0, freedom=2)
    """
    freedom = sum(len(values) - 1 for values in settings if values)
    if not freedom:
        return None
    squares = sum(statistics.pvariance(values.values()) * len(values) for values in settings if values)
    return Spread(math.sqrt(squares / freedom), freedom)


def between(settings: Sequence[Mapping[int, float]]) -> Spread | None:
    """The spread of the difference of two settings at one seed, from all settings.

    What a setting and a seed add up to is taken away; what is left is the residual of the two-way layout. With two
    settings this is the standard deviation of their differences.

    Args:
        settings: value by seed; those with one seed say nothing, of the others the seeds that all have are used.

    Returns:
        None where there are fewer than two settings or common seeds.

    >>> found = between([{0: 1.0, 1: 2.0, 2: 4.0}, {0: 0.0, 1: 2.0, 2: 2.0}])
    >>> round(found.deviation, 6), found.freedom
    (1.0, 2)
    """
    settings = [values for values in settings if len(values) > 1]
    seeds = sorted(set.intersection(*(set(values) for values in settings))) if settings else []
    if len(settings) < 2 or len(seeds) < 2:
        return None
    freedom = (len(settings) - 1) * (len(seeds) - 1)
    of_setting = [statistics.fmean(values[seed] for seed in seeds) for values in settings]
    of_seed = [statistics.fmean(values[seed] for values in settings) for seed in seeds]
    mean = statistics.fmean(of_setting)
    residuals = (
        values[seed] - a - b + mean
        for values, a in zip(settings, of_setting, strict=True)
        for seed, b in zip(seeds, of_seed, strict=True)
    )
    return Spread(math.sqrt(2 * sum(r * r for r in residuals) / freedom), freedom)


def paired(a: Mapping[int, float], b: Mapping[int, float], spread: Spread | None = None) -> Estimate:
    """The mean of a - b over the seeds that both have.

    Args:
        a: value by seed.
        b: value by seed.
        spread: of a difference at one seed (`between`); None: from these differences alone.

    Raises:
        ValueError: they share no seed.

    >>> round(paired({0: 0.9, 1: 0.8, 2: 0.7}, {0: 0.8, 1: 0.7, 3: 0.1}).mean, 3)
    0.1
    """
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        raise ValueError(f"no seed in common: {sorted(a)} and {sorted(b)}")
    return estimate([a[seed] - b[seed] for seed in seeds], spread)


def changed_share(better: int, worse: int, n: int) -> Estimate:
    """The difference of two shares of the same `n` things, some of which changed, with Agresti and Min's interval.

    It adds half a change of each kind, so that no change among few things is not taken for none among all.

    Args:
        better: things that are right now and were wrong.
        worse: things that are wrong now and were right.
        n: of all things, at least one.

    >>> e = changed_share(1, 3, 200)
    >>> round(e.mean, 3), round(e.low, 3), round(e.high, 3)
    (-0.01, -0.032, 0.012)
    """
    from scipy import stats

    more, less, total = better + 0.5, worse + 0.5, n + 2
    centre = (more - less) / total
    error = math.sqrt(more + less - (more - less) ** 2 / total) / total
    half = float(stats.norm.ppf((1 + LEVEL) / 2)) * error
    return Estimate((better - worse) / n, centre - half, centre + half, n, math.nan)


def sampling(share: float, n: int) -> float:
    """The standard deviation of a share of `n` things over other draws of so many.

    Two of each kind are added (Agresti and Coull), so that a share of 1 among few is not taken for certain.

    >>> round(sampling(0.9, 400), 3), round(sampling(1.0, 16), 3)
    (0.015, 0.067)
    """
    centre = (share * n + 2) / (n + 4)
    return math.sqrt(centre * (1 - centre) / (n + 4))


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p values: below 0.05 where a difference is found among all of them, at 5 % in all.

    Values that are nan (one seed) stay nan and count as no comparison.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    ranked = sorted((p, i) for i, p in enumerate(ps) if not math.isnan(p))
    adjusted = list(ps)
    highest = 0.0
    for rank, (p, i) in enumerate(ranked):
        highest = max(highest, min(1.0, (len(ranked) - rank) * p))
        adjusted[i] = highest
    return adjusted


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, gain) that no other one beats, gaining as much for less or more for no more.

    In the order of cost.

    >>> pareto([(1.0, 0.5), (2.0, 0.4), (3.0, 0.9), (3.0, 0.8)])
    [0, 2]
    """
    best = -math.inf
    front = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[i][1] > best:
            front.append(i)
            best = points[i][1]
    return front
