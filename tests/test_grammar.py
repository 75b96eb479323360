"""The notation says what an operation is, and says it again: every word, the catalogue, and drawn operations."""

from __future__ import annotations

import dataclasses

import pytest
from helpers.drawn_operations import ALL_WORDS, OPERATIONS, check_round_trip, word_of
from hypothesis import given, settings

from nearfold.grammar import CATALOGUE, Basic, Branch, Sum, Weight, parse, preset
from nearfold.grammar.notation import parse_word
from nearfold.grammar.similarity import Blend, Cosine, Scaled
from nearfold.grammar.words import Box, Depthwise, Grid, Identity, Nearby, Nearest, Random, Ranked, Softmax, Window


@given(OPERATIONS)
@settings(max_examples=120, deadline=None)
def test_generated_operations_round_trip(op):
    check_round_trip(op)


@pytest.mark.parametrize("cls", ALL_WORDS, ids=lambda cls: f"{cls.kind}-{cls.word}")
def test_every_word_round_trips(cls):
    @given(word_of(cls))
    @settings(max_examples=20, deadline=None)
    def check(word):
        assert parse_word(cls.kind, str(word)) == word
        assert {word: 1}[parse_word(cls.kind, str(word))] == 1
        # every argument may also be given by name
        given_by_name = ", ".join(
            f"{f.metadata.get('notation', f.name)}={notation(getattr(word, f.name))}"
            for f in dataclasses.fields(cls)
            if getattr(word, f.name) is not None
        )
        assert parse_word(cls.kind, f"{cls.word}({given_by_name})") == word

    check()


def notation(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(str, value))})"
    return str(value).lower() if isinstance(value, bool) else repr(value) if isinstance(value, float) else str(value)


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_catalogue_round_trips_and_is_spelled_canonically(name):
    entry = CATALOGUE[name]
    check_round_trip(entry.operation)
    assert preset(name) == entry.operation
    assert str(entry.operation) == entry.notation
    assert entry.name == name
    assert all((*entry.words, entry.title, entry.source))


def test_an_unknown_preset_names_the_choices():
    with pytest.raises(ValueError, match=r"no 'conve' \(did you mean conv.*its names: conv, conv_strided"):
        preset("conve")


def test_notation_says_what_the_words_say():
    assert parse("window((3, 5), dilation=2, padding=(1, 0), mode=reflect) | box | depthwise") == Basic(
        Window((3, 5), dilation=2, padding=(1, 0), mode="reflect"), Box(), Weight(kernel=Depthwise())
    )
    assert parse("nearest(9, blend(0.25, cosine, unit), random(64), self=0.5, again=-1) | ranked | identity") == Basic(
        Nearest(9, Blend(0.25, "cosine", True), Random(64), include_self=0.5, again=-1.0),
        Ranked(),
        Weight(Identity()),
    )
    # candidates and similarity find their place by what they are
    assert parse("nearest(9, grid(3)) | ranked | kernel").path == Nearest(9, Cosine(), Grid(3))
    assert parse("nearest(9, window(5), scaled) | ranked | kernel").path == Nearest(9, Scaled(), Nearby(5))
    assert parse("all(cosine) | row | softmax(heads=4, scale=2)").weight == Weight(Softmax(heads=4, scale=2.0))
    assert (
        parse("window(3) | box | kernel") == parse("window(3)|box|ones*kernel") == parse(" window( 3,) |\nbox | kernel")
    )
    assert parse("nearest(3, self) | ranked | kernel") == parse("nearest(3, self=true) | ranked | kernel")
    a, b = parse("window(3) | box | kernel"), parse("all | row | softmax")
    assert parse(f"2*({a}) + w*({b}) + ({a})") == Sum(((2.0, a), ("w", b), (None, a)))
    assert parse(f"branch(.25, {a}, 1e-3*({a}) + {b}, mix)") == Branch(0.25, a, Sum(((0.001, a), (None, b))), True)


def test_different_operations_are_different():
    seen = {entry.operation for entry in CATALOGUE.values()}
    assert len(seen) == len(CATALOGUE)
    # 1.0 == True and 0.0 == False in Python, but these are four different paths
    texts = ["cosine", "cosine, self", "cosine, self=1.0", "cosine, self=0.0"]
    assert len({parse(f"nearest(9, {text}) | ranked | kernel") for text in texts}) == 4


def test_operations_are_frozen():
    op = parse("window(3) | box | kernel")
    with pytest.raises(dataclasses.FrozenInstanceError):
        op.path.size = 5
    with pytest.raises(dataclasses.FrozenInstanceError):
        op.shape = Ranked()
