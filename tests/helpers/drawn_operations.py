"""Operations drawn from the registry: a new word is covered without touching a test."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pickle
import re
import types
import typing

from hypothesis import assume
from hypothesis import strategies as st

from nearfold.grammar import WORDS, Basic, Branch, Operation, Sum, Weight, parse
from nearfold.grammar.word import Word

ALL_WORDS = [cls for kind in WORDS.values() for cls in kind.values()]
SIMPLE = {bool: [False, True], int: [3, 1, 2], float: [0.5, 1.0], type(None): [None]}


def members(hint: object) -> list:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return [m for h in typing.get_args(hint) for m in members(h)]
    return [hint]


def is_word(member: object) -> bool:
    return isinstance(member, type) and issubclass(member, Word)


def builds(cls: type[Word], values: dict) -> bool:
    try:
        cls(**values)
    except ValueError:
        return False
    return True


@functools.cache
def plain(cls: type[Word]) -> dict:
    """Arguments that the word certainly takes: only those without a default."""
    hints = typing.get_type_hints(cls)
    needed = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
    pools = []
    for name in needed:
        pool = []
        for member in members(hints[name]):
            if is_word(member):
                pool += [other(**plain(other)) for other in list(WORDS[member.kind].values())[:1]]
            else:
                pool += SIMPLE.get(member, [])
        pools.append(pool)
    return next(
        values
        for values in (dict(zip(needed, chosen, strict=True)) for chosen in itertools.product(*pools))
        if builds(cls, values)
    )


def names_for(cls: type[Word], field: str, base: dict) -> list[str]:
    """The names an argument takes, read from the choices in its own error message."""
    try:
        cls(**{**base, field: "?"})
    except ValueError as error:
        tokens = re.findall(r"[a-z]+", str(error))
        tokens += [token[:n] for token in tokens for n in range(1, len(token))]
        return [token for token in dict.fromkeys(tokens) if builds(cls, {**base, field: token})]
    raise AssertionError(f"{cls.__name__}.{field} takes any name")


@functools.cache
def values_for(cls: type[Word], field: str, hint: object, axes: int) -> st.SearchStrategy:
    base, choices = plain(cls), []
    for member in members(hint):
        if member is bool:
            choices.append(st.booleans())
        elif member is int:
            choices.append(st.integers(1, 9) | st.integers(0, 2**31 - 1))
        elif member is float:
            choices.append(st.floats(0, 1) | st.floats(-1e18, 1e18))
        elif member is str:
            names = names_for(cls, field, base)
            assert names, f"{cls.__name__}.{field}: the message does not list the choices"
            choices.append(st.sampled_from(names))
        elif member is type(None):
            choices.append(st.none())
        elif typing.get_origin(member) is tuple:
            choices.append(st.tuples(*[st.integers(1, 9)] * axes))
        else:
            assert is_word(member), f"{cls.__name__}.{field}: teach this test to draw {member}"
            choices.append(words(member.kind))
    return st.one_of(choices)


@functools.cache
def word_of(cls: type[Word]) -> st.SearchStrategy[Word]:
    hints, required = typing.get_type_hints(cls), plain(cls)

    @st.composite
    def word(draw: st.DrawFn) -> Word:
        axes, values = draw(st.integers(1, 3)), {}
        for name in [field.name for field in dataclasses.fields(cls)]:
            if name in required or draw(st.booleans()):
                for _ in range(3):
                    values[name] = draw(values_for(cls, name, hints[name], axes))
                    if builds(cls, {**required, name: values[name]}):
                        break
        if builds(cls, {**required, **values}):
            return cls(**{**required, **values})
        fitting = dict(required)  # what goes together, one after another: to refuse all of it would leave few words
        for name, value in values.items():
            if builds(cls, {**fitting, name: value}):
                fitting[name] = value
        return cls(**fitting)

    return word()


@functools.cache
def words(kind: str) -> st.SearchStrategy[Word]:
    return st.one_of([word_of(cls) for cls in WORDS[kind].values()])


def fits(path: Word, shape: Word, weight: Weight) -> bool:
    try:
        Basic(path, shape, weight)
    except ValueError:
        return False
    return True


@st.composite
def basics(draw: st.DrawFn) -> Basic:
    path = draw(words("path"))
    shape = draw(st.one_of([word_of(WORDS["shape"][name]) for name in path.shapes]))
    for _ in range(4):
        weight = Weight(draw(words("rho")), draw(words("kernel")) if draw(st.booleans()) else None)
        if fits(path, shape, weight):
            return Basic(path, shape, weight)
    plainly = [Weight(cls(**plain(cls))) for cls in WORDS["rho"].values()]  # most weights do not go with most paths
    fitting = [weight for weight in plainly if fits(path, shape, weight)]
    assume(fitting)
    return Basic(path, shape, draw(st.sampled_from(fitting)))


NAMES = st.sampled_from(["a", "b", "rate_2", "branch", "window", "mix", "none"])
RATES = st.none() | st.floats(-9, 9) | st.floats(-1e18, 1e18) | st.integers(-9, 9) | NAMES


@st.composite
def sums(draw: st.DrawFn, operands: st.SearchStrategy[Operation]) -> Sum:
    terms = draw(st.lists(st.tuples(RATES, operands), min_size=2, max_size=3))
    named = [rate for rate, _ in terms if isinstance(rate, str)]
    assume(len(set(named)) == len(named))
    return Sum(tuple(terms))


OPERATIONS = st.recursive(
    basics(),
    lambda inner: sums(inner) | st.builds(Branch, st.floats(0, 1), inner, inner, st.booleans()),
    max_leaves=4,
)


def check_round_trip(op: Operation) -> None:
    text = str(op)
    again = parse(text)
    assert again == op
    assert type(again) is type(op)
    assert hash(again) == hash(op)
    assert str(again) == text
    # spaces do not matter (the sign of an exponent is part of its number)
    assert parse(re.sub(r"(?<!\de)[|*+(),=]", r" \g<0> ", text)) == op
    assert parse(text.replace(" | ", "|").replace(", ", ",").replace(" + ", "+")) == op
    assert pickle.loads(pickle.dumps(op)) == op
