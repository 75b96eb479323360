"""The reference: every public name, from its docstring. A public name without one stops the build."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Iterator
from types import ModuleType

import griffe

import nearfold
from docsite.doctests import fenced
from docsite.pages import Staged

PACKAGES = (
    "nearfold", "nearfold.grammar", "nearfold.nn", "nearfold.lower", "nearfold.look", "nearfold.recognise",
    "nearfold.surgery", "nearfold.examine", "nearfold.explorer",
    "nearfold.models", "nearfold.train", "nearfold.export", "nearfold.compat", "nearfold.extend",
)  # fmt: skip
"""Packages whose ``__all__`` is the library's public face."""
MODULES = ("nearfold.testing",)
"""Modules without an ``__all__`` whose public functions and classes are meant to be called."""
OPTIONS = """\
    options:
      heading_level: 2"""


def public(module: ModuleType) -> list[str]:
    """The public names of a module, in its own order.

    >>> import nearfold.look
    >>> public(nearfold.look)
    ['DEFAULT', 'load_image', 'look', 'looks', 'mixing_matrix']
    """
    if hasattr(module, "__all__"):
        return [name for name in module.__all__ if name != "__version__"]
    return [
        name for name, value in vars(module).items()
        if not name.startswith("_") and inspect.isroutine(value) | inspect.isclass(value)
        and value.__module__ == module.__name__
    ]  # fmt: skip


def undocumented(module: ModuleType) -> Iterator[str]:
    """Public names, and methods and properties of public classes, that say nothing about themselves.

    A method that overrides one has its docstring; what is neither a function nor a class is described by the string
    under it, which a running program cannot see.
    """
    for name in public(module):
        value = getattr(module, name)
        where = f"{module.__name__}.{name}"
        if not (inspect.isroutine(value) or inspect.isclass(value)):
            if not _read()[where.removeprefix("nearfold.")].has_docstring:
                yield where
            continue
        if not inspect.getdoc(value) or (inspect.isclass(value) and not vars(value).get("__doc__")):
            yield where
        if inspect.isclass(value) and value.__module__.startswith("nearfold"):
            for inner, member in inspect.getmembers(value):
                own = getattr(member, "fget", member)
                ours = (getattr(own, "__module__", None) or "").startswith("nearfold")
                is_said = inspect.isroutine(member) or isinstance(member, property)
                if not inner.startswith("_") and is_said and ours and not inspect.getdoc(member) and inner != "forward":
                    yield f"{where}.{inner}"


@functools.cache
def _read() -> griffe.Module:
    """The library as mkdocstrings reads it: its sources, not its objects."""
    found = griffe.load(
        "nearfold", search_paths=[*nearfold.__path__, f"{nearfold.__path__[0]}/.."], resolve_aliases=True
    )
    assert isinstance(found, griffe.Module)
    return found


def write(staged: Staged) -> None:
    """Put one page for each package, and the page that lists them.

    Raises:
        ValueError: public names have no docstring; one a line.
    """
    missing: list[str] = []
    rows, where = [], {}
    for title in (*PACKAGES, *MODULES):
        module = importlib.import_module(title)
        missing += undocumented(module)
        first = (module.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
        if not first:
            missing.append(title)
        names, place = public(module), f"api/{title.removeprefix('nearfold.')}.md"
        # a name that stands in several packages is described once
        own = [name for name in names if where.setdefault(id(getattr(module, name)), title) == title]
        lines = [f"# {title}", "", fenced(inspect.cleandoc(module.__doc__ or "")), ""]
        for name in names:
            if name in own:
                lines += [f"::: {title}.{name}", OPTIONS, ""]
            else:
                home = where[id(getattr(module, name))]
                lines += [
                    f"## {name}",
                    "",
                    f"See [{home}.{name}]({home.removeprefix('nearfold.')}.md#{home}.{name}).",
                    "",
                ]
        staged.put(place, "\n".join(lines))
        rows.append(f"| [{title}]({place.removeprefix('api/')}) | {first} | {', '.join(f'`{n}`' for n in names)} |")
    if missing:
        raise ValueError("\n".join(f"{name} has no docstring" for name in dict.fromkeys(missing)))
    head = ["# Reference", "", "Every public name. The examples are doctests and run with the quick tests.", ""]
    table = ["| package | what it is | names |", "|---|---|---|", *rows, ""]
    staged.put("api/index.md", "\n".join(head + table))
    places = [f"api/{title.removeprefix('nearfold.')}.md" for title in (*PACKAGES, *MODULES)]
    staged.lists["api"] = {"": ["api/index.md", *places]}
