"""From single runs to one row an operator, and from rows to a table: text, Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nearfold.study.document import markdown


@dataclass(frozen=True)
class Row:
    """One operator over all its seeds. Accuracies are fractions, one entry a seed, in the order of the seeds.

    Attributes:
        name: short name, as on the command line.
        title: label in tables and plots.
        notation: the Operation.
        family: where it stands on the spectrum.
        order: place along the spectrum, from 1.
        test: test accuracy of the weights that the validation images chose.
        train: accuracy of the same weights on the images they were trained on, without augmentation.
        parameters: trainable numbers.
        flops: per image, forward.
        latency_ms: one image, forward, as `nearfold.study.measure.Cost` has it.
        images_per_second: forward and backward, as `nearfold.study.measure.Cost` has it.
        peak_memory_mib: of one training step, likewise.
        seeds: which they are; none: 0, 1, ...
    """

    name: str
    title: str
    notation: str
    family: str
    order: int
    test: tuple[float, ...]
    train: tuple[float, ...]
    parameters: int
    flops: int
    latency_ms: float
    images_per_second: float
    peak_memory_mib: float
    seeds: tuple[int, ...] = ()

    @property
    def by_seed(self) -> dict[int, float]:
        """Test accuracy by seed."""
        return dict(zip(self.seeds or range(self.n), self.test, strict=True))

    @property
    def n(self) -> int:
        """Number of seeds."""
        return len(self.test)

    @property
    def gap(self) -> tuple[float, ...]:
        """Train minus test accuracy of every seed."""
        return tuple(a - b for a, b in zip(self.train, self.test, strict=True))


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return statistics.fmean(values)


def spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation (n - 1), or None where one value has no spread.

    >>> spread([1.0, 2.0, 3.0]), spread([1.0])
    (1.0, None)
    """
    return statistics.stdev(values) if len(values) > 1 else None


def make_row(
    results: Mapping[int, Mapping[str, Any]],
    cost: Mapping[str, Any],
    *,
    name: str,
    title: str,
    notation: str,
    family: str,
    order: int,
) -> Row:
    """The row of one operator from its finished runs by seed (at least one) and its cost."""
    return Row(
        name=name,
        title=title,
        notation=notation,
        family=family,
        order=order,
        test=tuple(r["test_accuracy"] for r in results.values()),
        train=tuple(r["train_accuracy"] for r in results.values()),
        seeds=tuple(results),
        **cost,
    )


def percent(values: Sequence[float]) -> str:
    """Mean and spread in percent.

    >>> percent([0.90, 0.92]), percent([0.5])
    ('91.0 ± 1.4', '50.0')
    """
    sd = spread(values)
    return f"{100 * mean(values):.1f}" + ("" if sd is None else f" ± {100 * sd:.1f}")


def seeds(n: int) -> str:
    """A number of seeds.

    >>> seeds(1), seeds(5)
    ('1 seed', '5 seeds')
    """
    return f"{n} seed" if n == 1 else f"{n} seeds"


def names(titles: Sequence[str]) -> str:
    """Titles as a list in a sentence.

    >>> names(["a", "b", "c"])
    'a, b and c'
    """
    return titles[0] if len(titles) == 1 else ", ".join(titles[:-1]) + " and " + titles[-1]


def count(value: float) -> str:
    """A large number in three digits.

    >>> count(950), count(12_345), count(1_234_567)
    ('950', '12.3k', '1.23M')
    """
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            scaled = value / size
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f}{unit}"
    return f"{value:.0f}"


COLUMNS = (
    "#", "operator", "test acc. %", "train acc. %", "gap, points", "seeds", "parameters", "FLOPs/image",
    "images/s", "peak MiB",
)  # fmt: skip


def cells(row: Row) -> tuple[str, ...]:
    """The texts of one row, in the order of `COLUMNS`."""
    return (
        str(row.order),
        row.title,
        percent(row.test),
        percent(row.train),
        percent(row.gap),
        str(row.n),
        count(row.parameters),
        count(row.flops),
        count(row.images_per_second),
        f"{row.peak_memory_mib:.1f}",
    )


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 2) -> str:
    """Aligned columns for a terminal; the first `left` columns lean left, the others right.

    >>> print(text_table(("a", "n"), [("x", "10"), ("yy", "9")], left=1))
    a    n
    --  --
    x   10
    yy   9
    """
    lines = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def markdown_table(rows: Sequence[Row]) -> str:
    """The table in Markdown, with the notation of every operator as its last column."""
    header = (*COLUMNS, "notation")
    # A bar ends a cell in Markdown tables, also inside code: it is escaped.
    body = [(*map(markdown, cells(row)), f"`{row.notation}`".replace("|", "\\|")) for row in rows]
    align = ("---", "---", *("---:" for _ in header[2:-1]), "---")
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, align, *body)) + "\n"
