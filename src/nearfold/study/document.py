"""What a study's page and texts are made of: templates that escape whatever they are given, tables, numbers as words.

A page is one HTML document that asks for nothing outside itself, for a screen of any width, light or dark, and for
print. Names of data, labels and stored results come from anywhere, so no text reaches a page but through a template
with autoescaping; only what `nearfold.study.plots.svg` drew is taken as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from nearfold._pages import environment

if TYPE_CHECKING:
    from jinja2 import Template
    from markupsafe import Markup


class Cell(NamedTuple):
    """A cell of a table.

    Attributes:
        text: what it shows.
        sort: what it is sorted by; None: its text.
        kind: a class of page.css.
        dot: colour of a dot before the text, a class of page.css.
        code: whether the text is code.
    """

    text: str
    sort: float | str | None = None
    kind: str = ""
    dot: str = ""
    code: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: above it.
        head: of its columns.
        lines: of its body, a cell for every column.
        heads: the column that says what a line is about.
        left: the columns that lean left.
        sorts: whether a click on a column's head sorts.
    """

    caption: str
    head: Sequence[str]
    lines: Sequence[Sequence[Cell]]
    heads: int = 0
    left: Sequence[int] = (0,)
    sorts: bool = False

    def text(self, only: Sequence[str]) -> str:
        """Aligned columns for a terminal.

        Args:
            only: heads of the columns to show; those that the table has not are left out.

        >>> print(Table("", ("a", "n"), [[Cell("x"), Cell("10")], [Cell("yy"), Cell("9")]]).text(("a", "n")))
        a    n
        --  --
        x   10
        yy   9
        """
        there, lines = self._columns(only)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * width for width in widths])
        lean = [str.ljust if i in self.left else str.rjust for i in there]
        return "\n".join(
            "  ".join(to(cell, width) for to, cell, width in zip(lean, line, widths, strict=True)).rstrip()
            for line in lines
        )

    def markdown(self, only: Sequence[str]) -> str:
        """Columns in Markdown, the caption as the head of the first.

        Args:
            only: as in `text`.
        """
        there, lines = self._columns(only)
        lines = [[markdown(text) for text in line] for line in [[self.caption, *lines[0][1:]], *lines[1:]]]
        lines.insert(1, ["---" if i in self.left else "---:" for i in there])
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def _columns(self, only: Sequence[str]) -> tuple[list[int], list[list[str]]]:
        """Which columns these are, and their texts, the heads first."""
        there = [self.head.index(head) for head in only if head in self.head]
        lines = [self.head, *([cell.text for cell in line] for line in self.lines)]
        return there, [[line[i] for i in there] for line in lines]


@dataclass(frozen=True)
class Chart:
    """A figure: what `nearfold.study.plots.svg` drew, its name, and what to say under it."""

    picture: Markup
    label: str
    caption: str


def template(name: str) -> Template:
    """One of the folder `templates`, which comes with the package in whatever form it is installed."""
    return environment("nearfold.study").get_template(name)


def render(name: str, **view: Any) -> str:
    """A page from a template of the folder `templates`.

    >>> render("study.html.jinja", title="what a template needs and is not given is an error")
    Traceback (most recent call last):
    jinja2.exceptions.UndefinedError: 'study' is undefined
    """
    page = template(name).render(view)
    return page.encode("utf-8", "backslashreplace").decode()  # names of files may hold what is not Unicode


def markdown(text: str) -> str:
    r"""A text for a line or a cell of Markdown, none of it read as markup.

    >>> markdown("a|b <i> $x_1$")
    'a\\|b &lt;i&gt; \\$x\\_1\\$'
    """
    for character in "\\`*_[]|$~#!":
        text = text.replace(character, "\\" + character)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return " ".join(text.split()).encode("utf-8", "backslashreplace").decode()


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


def first(text: str) -> str:
    """A text as the beginning of a sentence.

    >>> first("self-attention is best")
    'Self-attention is best'
    """
    return text[:1].upper() + text[1:]


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
