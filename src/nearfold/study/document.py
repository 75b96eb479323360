"""What the pages of all studies are made of: templates that escape whatever they are given, and the tables in them.

A page is one HTML document that asks for nothing outside itself, for a screen of any width, light or dark, and for
print. Names of data, labels and stored results come from anywhere, so no text reaches a page but through a template
with autoescaping; only what `nearfold.study.plots.svg` drew is taken as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from jinja2 import Environment
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


class Line(NamedTuple):
    """A line of a table, shaded where it is the best."""

    cells: Sequence[Cell]
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: above it.
        head: of its columns.
        lines: of its body.
        heads: the column that says what a line is about.
        left: the columns that lean left.
        sorts: whether a click on a column's head sorts.
    """

    caption: str
    head: Sequence[str]
    lines: Sequence[Line]
    heads: int = 0
    left: Sequence[int] = (0,)
    sorts: bool = False


@dataclass(frozen=True)
class Chart:
    """A figure: what `nearfold.study.plots.svg` drew, its name, and what to say under it."""

    picture: Markup
    label: str
    caption: str


@functools.cache
def _templates() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).parent / "templates"
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **view: Any) -> str:
    """A page from a template of the folder `templates`.

    >>> page = render("study.html.jinja", title="what a template needs and is not given is an error")
    Traceback (most recent call last):
    jinja2.exceptions.UndefinedError: 'study' is undefined
    """
    page = _templates().get_template(template).render(view)
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
