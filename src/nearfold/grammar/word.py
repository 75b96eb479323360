"""What a word is: a frozen dataclass whose fields are its arguments, registered under its kind."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from nearfold._numbers import LARGEST, MOST, plain, shown

if TYPE_CHECKING:
    from nearfold.grammar.operation import Basic

WORDS: dict[str, dict[str, type[Word]]] = {}
"""Every word of the notation, by kind and then by its spelling."""


class Word:
    """Base of all words: knows its notation and registers itself under its kind."""

    kind: ClassVar[str]
    word: ClassVar[str]
    registered: ClassVar[int] = 0  # words so far: what was read before one came, or came anew, is read again
    primitive: ClassVar[tuple[str, float]] = ("", 0)  # what it adds to the descriptive complexity, see `complexity`
    examples: ClassVar[dict[str, str]] = {}  # notations by name, in which all that it can do is tested
    takes_keys: ClassVar[bool] = True  # whether positions of the map may be absent, as a mask of the keys says
    dynamic: ClassVar[bool] = False  # whether it makes what a slot reads, or its number, anew for every input

    def require(self, op: Basic) -> None:
        """ValueError where the word does not go with the others of an operation."""

    @property
    def primitives(self) -> dict[str, float]:
        """Scores by primitive, in GWO's sense (doi 10.5281/zenodo.17103133)."""
        name, score = self.primitive
        return {name: score} if name else {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "word" in cls.__dict__:
            if not (isinstance(cls.word, str) and re.fullmatch("[a-z][a-z0-9_]*", cls.word)):
                raise ValueError(f"word must be small letters, digits and _, so that it can be read, got {cls.word!r}")
            known = WORDS.setdefault(cls.kind, {})
            there = known.get(cls.word)
            if there is not None and there.__module__.startswith("nearfold.") and cls.__module__ != there.__module__:
                raise ValueError(
                    f"word={cls.word!r} is a {cls.kind} of the library already; give {cls.__name__} another"
                )
            known[cls.word] = cls
            Word.registered += 1
        own = cls.__dict__.get("__post_init__")
        if own is not None:  # a word's own checks come after those of every word, which it need not call

            @functools.wraps(own)
            def checked(self: Word) -> None:
                Word.__post_init__(self)
                own(self)

            cls.__post_init__ = checked  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        """Numbers become Python's own (NumPy's are taken), and stay in a range; flags are flags."""
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            given, name = getattr(self, f.name), f.metadata.get("notation", f.name)
            value = plain(given)
            if value is not given:
                object.__setattr__(self, f.name, value)
            if f.type in ("bool", bool):
                check(type(value) is bool, self, name, value, "true or false")
            real = "float" in str(f.type)
            most = f.metadata.get("most", LARGEST if real else MOST)
            rule = f"a finite number, at most {LARGEST:g} in size" if real else f"at most {most}"
            for n in value if isinstance(value, tuple) else (value,):
                if type(n) in (int, float):
                    check(abs(n) <= most, self, name, value, rule)

    def __str__(self) -> str:
        parts = []
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            name = f.metadata.get("notation", f.name)
            if f.default is dataclasses.MISSING or f.metadata.get("always"):
                parts.append(f"{name}={_value(value)}" if f.metadata.get("named") else _value(value))
            elif value == f.default and type(value) is type(f.default):
                continue
            elif value is True:
                parts.append(name)
            elif f.metadata.get("positional"):
                parts.append(_value(value))
            else:
                parts.append(f"{name}={_value(value)}")
        return self.word + (f"({', '.join(parts)})" if parts else "")


def _value(value: object) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_value, value)) + ")"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, float) else str(value)


def check(ok: bool, word: Word, name: str, value: object, rule: str) -> None:
    """ValueError naming the word, the argument and its value, unless ``ok``."""
    if not ok:
        raise ValueError(f"{word.word}: {name} must be {rule}, got {name}={shown(value)}")


W = TypeVar("W", bound=Word)


def with_arguments(word: W, **arguments: Any) -> W:
    """The same word with other arguments.

    >>> from nearfold.grammar.words import Window
    >>> print(with_arguments(Window(3, dilation=2), size=5))
    window(5, dilation=2)
    """
    found: W = dataclasses.replace(word, **arguments)  # type: ignore[type-var]
    return found


def one_of(given: Word | None, words: tuple[str, ...]) -> bool:
    """Whether a word is one of these; no names allow any."""
    return not words or (given is not None and given.word in words)


def positive(word: Word, **values: Any) -> None:
    """Each must be a positive integer."""
    for name, value in values.items():
        check(type(value) is int and value >= 1, word, name, value, "a positive integer")


def sizes(word: Word, **values: Any) -> None:
    """Each must be a positive integer, or a tuple of them with one entry per axis."""
    for name, value in values.items():
        entries = value if isinstance(value, tuple) else (value,)
        ok = len(entries) > 0 and all(type(v) is int and v >= 1 for v in entries)
        check(ok, word, name, value, "a positive integer or a tuple of them, one per axis")


def as_tuple(value: int | tuple[int, ...], ndim: int, name: str) -> tuple[int, ...]:
    """One entry per axis; ValueError when a tuple has another length."""
    if isinstance(value, int):
        return (value,) * ndim
    if len(value) != ndim:
        raise ValueError(f"{name}={value} has {len(value)} entries, but the input has {ndim} grid axes")
    return value


def all_ones(value: int | tuple[int, ...]) -> bool:
    """Whether a size is 1 on every axis."""
    return set(value if isinstance(value, tuple) else (value,)) == {1}


def number(word: Word, name: str, value: object) -> None:
    """Must be a finite number."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    check(ok, word, name, value, "a finite number")
