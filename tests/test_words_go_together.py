"""What a word goes with is said by the word alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nearfold import parse
from nearfold.grammar import vocabulary, words
from nearfold.grammar.similarity import Scaled, Similarity
from nearfold.grammar.word import WORDS
from nearfold.grammar.words import Size


@pytest.fixture
def own_path(own_words):
    """A path of somebody else's, registered for one test."""

    @dataclass(frozen=True)
    class Ring(words.Path):
        word = "ring"
        shapes = ("box",)
        rhos = ("softmax", "mean")
        takes_kernel = False
        size: Size
        similarity: Similarity = field(default=Scaled(), metadata={"positional": True})

    return Ring


def test_names_that_a_word_goes_with_are_words():
    for path in WORDS["path"].values():
        assert path.shapes and set(path.shapes) <= set(WORDS["shape"]), path
        assert set(path.rhos) <= set(WORDS["rho"]), path
    for rho in WORDS["rho"].values():
        assert set(rho.paths) <= set(WORDS["path"]), rho
    assert set(Scaled.biased["alibi"]) <= set(WORDS["path"])


def test_a_path_from_outside_parses_and_says_what_it_goes_with(own_path):
    op = parse("ring(5, dot) | box | softmax(heads=2)")
    assert isinstance(op.path, own_path) and parse(str(op)) == op
    for notation, why in (
        ("ring(5) | row | softmax", "shape row does not go with path ring; it takes one of: box"),
        ("ring(5) | box | inverse", "ring goes with weight softmax or mean, got inverse"),
        ("ring(5) | box | softmax*kernel", "which ring with softmax does not have"),
        ("ring(5, dot) | box | mean", "nothing reads the similarity dot here"),
    ):
        with pytest.raises(ValueError, match=why):
            parse(notation)


def test_equal_operations_have_one_hash_here_and_after_a_pickle():
    import copy
    import pickle

    op, other = (parse("nearest(4, dot, self) | ranked | softmax*depthwise") for _ in range(2))
    assert hash(op) == hash(other) and op == other
    for twin in (pickle.loads(pickle.dumps(op)), copy.deepcopy(op)):
        assert "_hash" not in vars(twin)
        assert twin == op and hash(twin) == hash(op)
    fixed = parse("nearest(4, dot, self=1) | ranked | softmax*depthwise")
    assert fixed != op and fixed.path != op.path


def test_the_page_of_words_is_what_the_words_say():
    page = Path(__file__).parent.parent / "docs" / "words.md"
    assert page.read_text() == vocabulary.page(), "python -m nearfold.grammar.vocabulary > docs/words.md"
