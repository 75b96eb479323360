"""Errors of the notation point at the place and name the choices; values are checked from Python too."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
from helpers.drawn_operations import ALL_WORDS
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nearfold.grammar import CATALOGUE, Basic, Branch, NotationError, Sum, Weight, parse
from nearfold.grammar.notation import SHOWN, parse_word
from nearfold.grammar.similarity import Blend, Cosine, Position, Scaled
from nearfold.grammar.vocabulary import misuse
from nearfold.grammar.words import (
    All,
    Box,
    Dense,
    Grid,
    Nearby,
    Nearest,
    Ones,
    Random,
    Ranked,
    Row,
    Separable,
    Shift,
    Softmax,
    Strided,
    Window,
)

MISUSE = misuse()

# --- errors point at the place and name the choices

WRONG = [
    ("", 0, "empty notation; write path | shape | weight"),
    (
        "windw(3) | box | kernel",
        0,
        "'windw' is not a path (did you mean window?); choose from: window, all, block, scan, nearest",
    ),
    ("kernel", 0, "'kernel' is not the name of an operator"),
    ("kernel | box", 0, "'kernel' is not a path"),
    ("swim", 0, "did you mean swin?"),
    ("a*convn + b*(conv)", 2, "did you mean convnn"),
    ("$", 0, "'$' is not a path"),
    ("window(3) / box | kernel", 10, "expected '|' between path and shape, found '/'"),
    ("window(3) | box", 15, "expected '|' between shape and weight, found 'the end'"),
    ("window(3) | bx | kernel", 12, "'bx' is not a shape (did you mean box?); choose from: box, ranked, row"),
    ("all(stride=2) | row | table(4)", 0, "has a row for every output already; leave stride out"),
    ("window(3) | row | kernel", 0, "shape row does not go with path window; it takes one of: box, causal"),
    ("all | row | kernel", 0, "a kernel needs a fixed number of slots"),
    ("window(3) | box | soft", 18, "'soft' is not a rho or kernel"),
    ("all | row | softmax*softmax", 20, "'softmax' is not a kernel; choose from: kernel, depthwise"),
    ("window(3) | box | (kernel)", 18, "'(' is not a rho or kernel"),
    ("window | box | kernel", 0, "window needs size: window(size, similarity)"),
    ("window() | box | kernel", 7, "window needs size"),
    ("nearest(self) | ranked | kernel", 12, "nearest needs k"),
    ("nearest(9, blend) | ranked | kernel", 11, "blend needs lam: blend(lam, metric)"),
    ("nearest(9, random) | ranked | kernel", 11, "random needs r: random(r)"),
    ("window(3) | box | shift", 18, "shift needs heads"),
    ("window(3 | box | kernel", 9, "expected ',' or ')' in window(...), found '|'"),
    (
        "window(3, foo=1) | box | kernel",
        10,
        "window has no argument 'foo'; it takes: size, similarity, stride",
    ),
    ("window(3, strid=2) | box | kernel", 10, "no argument 'strid' (did you mean stride?)"),
    ("window(3, stride=2, stride=2) | box | kernel", 20, "window: stride is given twice"),
    ("window(3, stride) | box | kernel", 10, "window: stride needs a value: stride=..."),
    ("window(3) | box | kernel(groups)", 25, "kernel: groups needs a value"),
    (
        "window(3, euclidean, cosine) | box | softmax",
        21,
        "window takes no such argument: 'cosine'; it takes: size",
    ),
    ("window(3) | box | kernel(2)", 25, "kernel takes no such argument: '2'; it takes: groups, coordinates"),
    (
        "window(0) | box | kernel",
        0,
        "window: size must be a positive integer or a tuple of them, one per axis, got size=0",
    ),
    ("window((3, 3), stride=(1,)) | box | kernel", 0, "tuples must have one entry per axis each"),
    ("window((3, ) | box | kernel", 13, "expected ',' or ')' in window(...)"),
    ("window(((3, 3), 3)) | box | kernel", 8, "expected an integer, found '('"),
    ("window(()) | box | kernel", 0, "window: size must be a positive integer or a tuple of them"),
    ("window(3, padding=) | box | kernel", 18, "expected an integer or a name, found ')'"),
    ("window(3, padding=0) | causal | kernel", 0, "pads on the left only"),
    ("window(" + "9" * 5000 + ") | box | kernel", 7, "a number of 5000 digits is too long"),
    ("nearest(9.5, cosine) | ranked | kernel", 0, "nearest: k must be a positive integer, got k=9.5"),
    (
        "nearest(9, cosin) | ranked | kernel",
        11,
        "'cosin' is not a similarity (did you mean cosine?); choose from: dot",
    ),
    ("nearest(9, cosine(coord)) | ranked | kernel", 18, "cosine takes no such argument: 'coord'"),
    (
        "nearest(9, cosine(coordinates=1)) | ranked | kernel",
        11,
        "coordinates must be one of raw, sinusoidal, fourier, learned, got coordinates=1",
    ),
    (
        "nearest(9, blend(1.5)) | ranked | kernel",
        11,
        "lam must be between 0 (space) and 1 (features), got lam=1.5",
    ),
    (
        "nearest(9, position(manhattan)) | ranked | kernel",
        11,
        "metric must be euclidean or chebyshev, got metric=",
    ),
    ("nearest(9, window(4)) | ranked | kernel", 11, "window: size must be odd, got size=4"),
    ("nearest(9, self=maybe) | ranked | kernel", 16, "expected a flag or a number, found 'maybe'"),
    (
        "nearest(9, again=1) | ranked | kernel",
        0,
        "nearest: again must be given together with self, got again=1",
    ),
    (
        "nearest(9, self=1e999) | ranked | kernel",
        0,
        "self must be a finite number, at most 1e+18 in size, got self=inf",
    ),
    ("nearest(9, scaled(relative)) | ranked | kernel", 0, "use scaled(coordinates)"),
    ("all | row | softmax(heads=two)", 26, "expected an integer, found 'two'"),
    (
        "all | row | softmax(head=2)",
        20,
        "no argument 'head' (did you mean heads?); it takes: heads, scale, project",
    ),
    (
        "all | row | softmax(project=ovq)",
        12,
        "project must be none or letters of qkvo in this order, got project='ovq'",
    ),
    (
        "all | row | softmax(project=3)",
        12,
        "project must be none or letters of qkvo in this order, got project=3",
    ),
    ("all | row | softmax extra", 20, "expected '+' or the end, found 'extra'"),
    ("all | row | softmax +", 21, "'the end' is not a path"),
    ("all | row | softmax)", 19, "expected '+' or the end, found ')'"),
    ("(all | row | softmax", 20, "expected ')' to close the operation, found 'the end'"),
    ("(all | row | softmax) + (all | bx | softmax)", 31, "'bx' is not a shape"),
    ("0.5*(all | row | softmax)", 0, "a rate belongs to a sum: a*(...) + b*(...)"),
    ("a*(all | row | softmax) + a*(all | row | softmax)", 0, "needs a name of its own, got a, a"),
    ("1e999*(all | row | softmax) + (all | row | softmax)", 0, "a finite number"),
    ("a*b*(all | row | softmax)", 2, "'b' is not a path"),
    (
        "branch(all | row | softmax, all | row | softmax)",
        7,
        "branch starts with its ratio, a number between 0 and 1",
    ),
    (
        "branch(2, all | row | softmax, all | row | softmax)",
        0,
        "ratio must be between 0 (all second) and 1 (all first), got 2",
    ),
    ("branch(0.5, all | row | softmax)", 31, "expected ',' between the two operands, found ')'"),
    ("branch(0.5, all | row | softmax, all | row | softmax, max)", 52, "only the flags mix and split may follow"),
    ("branch(0.5, all | row | softmax, all | row | softmax, mix, mix)", 57, "only the flags mix and split may follow"),
    ("branch 0.5", 7, "expected '(' after branch: branch(ratio, A, B)"),
    ("(" * 3000, 50, "at most 50 deep"),
    ("branch(0.5," * 3000, 11 * 50, "at most 50 deep"),
]


@pytest.mark.parametrize(("text", "position", "fragment"), WRONG, ids=[text[:50] for text, _, _ in WRONG])
def test_wrong_notation_is_pointed_at(text, position, fragment):
    with pytest.raises(NotationError) as caught:
        parse(text)
    error = caught.value
    message, shown, caret = str(error).rsplit("\n", 2)
    assert fragment in message
    assert error.text == text
    assert error.position == position
    assert caret.strip() == "^"
    if len(text) <= SHOWN:
        assert shown == f"  {text}" and len(caret) == position + 3
    else:  # the part around the place
        assert shown.startswith("  ...") and shown[5:-3] in text
        assert (shown + " ")[len(caret) - 1] == (text + ".")[position]


def test_positions_count_in_the_text_that_is_shown():
    with pytest.raises(NotationError) as caught:
        parse("window(3)\n   | bx\n   | kernel")
    assert caught.value.text == "window(3) | bx | kernel"
    assert caught.value.position == 12


def test_the_error_crosses_process_boundaries():
    with pytest.raises(NotationError) as caught:
        parse("window(3) | bx | kernel")
    error = pickle.loads(pickle.dumps(caught.value))
    assert (str(error), error.text, error.position) == (str(caught.value), caught.value.text, 12)


@pytest.mark.parametrize("text", [None, 3, b"window(3) | box | kernel", ["window"], parse("all | row | ones")])
def test_only_text_is_parsed(text):
    with pytest.raises(ValueError, match=f"text must be a str in the notation, got {type(text).__name__}"):
        parse(text)


def test_parse_word():
    assert parse_word("similarity", "blend(0.3)") == Blend(0.3)
    assert parse_word("similarity", Cosine()) == Cosine()
    # `window` is a path and a set of candidates: the kind decides
    assert parse_word("candidates", "window(5)") == Nearby(5)
    with pytest.raises(ValueError, match=r"similarity must be one of dot, .*got random\(3\) \(a candidates\)"):
        parse_word("similarity", Random(3))
    with pytest.raises(ValueError, match="similarity must be notation or a word, got 3"):
        parse_word("similarity", 3)
    for text, position in (("", 0), ("cosin", 0), ("cosine cosine", 7), ("blend(0.3", 9)):
        with pytest.raises(NotationError) as caught:
            parse_word("similarity", text)
        assert caught.value.position == position


# --- values are validated where they enter, from Python too

BOX, CONV = Box(), Weight(kernel=Dense())
BAD_VALUES = [
    (
        lambda: Window(0),
        "window: size must be a positive integer or a tuple of them, one per axis, got size=0",
    ),
    (lambda: Window(3.0), "size=3.0"),
    (lambda: Window(True), "size=True"),
    (lambda: Window(()), "size=()"),
    (lambda: Window((3, 0)), "size=(3, 0)"),
    (lambda: Window([3, 3]), "size=[3, 3]"),
    (lambda: Window(3, stride=0), "stride=0"),
    (lambda: Window(3, dilation=-1), "dilation=-1"),
    (lambda: Window(3, padding=-1), "padding must be"),
    (lambda: Window(3, padding="valid"), "padding='valid'"),
    (lambda: Window(3, padding=()), "padding=()"),
    (lambda: Window(3, mode="wrap"), "mode must be zeros, reflect or inside, got mode='wrap'"),
    (lambda: Window(3, similarity="cosine"), "similarity='cosine'"),
    (lambda: Window((3, 3), stride=(1, 1, 1)), "one entry per axis"),
    (lambda: All(stride=0), "all: stride must be"),
    (lambda: All("cosine"), "similarity must be a similarity"),
    (lambda: Nearest(0), "nearest: k must be a positive integer, got k=0"),
    (lambda: Nearest(True), "k=True"),
    (
        lambda: Nearest(9, candidates="all"),
        "candidates must be all, random, grid or window, got candidates='all'",
    ),
    (lambda: Nearest(9, include_self="yes"), "self must be a finite number, got self='yes'"),
    (lambda: Nearest(9, include_self=float("nan")), "self=nan"),
    (lambda: Nearest(9, include_self=True, again=float("inf")), "again=inf"),
    (lambda: Nearest(9, again=0.0), "again must be given together with self"),
    (lambda: Nearest(9, padding=-1), "padding=-1"),
    (lambda: Nearest(9, Scaled(relative=True)), "use scaled(coordinates)"),
    (lambda: Random(0), "random: r must be a positive integer, got r=0"),
    (lambda: Grid(2, inset=-1), "grid: inset must be an integer >= 0, got inset=-1"),
    (lambda: Nearby(4), "window: size must be odd, got size=4"),
    (lambda: Strided(0), "strided: step must be a positive integer, got step=0"),
    (lambda: Softmax(heads=0), "softmax: heads must be a positive integer, got heads=0"),
    (lambda: Softmax(scale=float("nan")), "scale must be a finite number, at most 1e+18 in size, got scale=nan"),
    (lambda: Softmax(scale="1"), "scale='1'"),
    (lambda: Ones(project="vk"), "project must be none or letters of qkvo in this order, got project='vk'"),
    (lambda: Ones(project=""), "project=''"),
    (lambda: Ones(project=3), "project=3"),
    (lambda: Dense(groups=0), "kernel: groups must be a positive integer, got groups=0"),
    (lambda: Dense(coordinates=2), "coordinates must be one of raw, sinusoidal, fourier, learned, got coordinates=2"),
    (lambda: Separable(coordinates="yes"), "coordinates='yes'"),
    (lambda: Shift(0), "shift: heads must be"),
    (lambda: Shift(2, interleaved=1), "interleaved must be true or false, got interleaved=1"),
    (lambda: Cosine(coordinates=1), "cosine: coordinates must be one of raw, sinusoidal, fourier, learned"),
    (lambda: Blend(-0.1), "lam must be between 0 (space) and 1 (features), got lam=-0.1"),
    (lambda: Blend("half"), "blend: lam must be a finite number, got lam='half'"),
    (lambda: Blend(0.5, "dot"), "metric must be euclidean or cosine, got metric='dot'"),
    (lambda: Blend(0.5, unit=1), "unit must be true or false, got unit=1"),
    (lambda: Position("cosine"), "metric must be euclidean or chebyshev, got metric='cosine'"),
    (lambda: Position(dilation=0), "position: dilation must be a positive integer, got dilation=0"),
    (
        lambda: Weight("softmax"),
        "rho must be one of ones, identity, softmax, inverse, normalized, mean, max, generated, modulated, table",
    ),
    (lambda: Weight(Ones(), Softmax()), "kernel must be one of kernel, depthwise, separable, experts, shift"),
    (lambda: Basic("window", BOX, CONV), "path must be a Path, got 'window'"),
    (lambda: Basic(Window(3), Ranked(), CONV), "shape ranked does not go with path window"),
    (lambda: Basic(All(), Row(), CONV), "a kernel needs a fixed number of slots"),
    (lambda: Basic(Window(3), BOX, Weight(Softmax(), Shift(2))), "shift goes with window | box, rho ones"),
    (lambda: Sum(()), "at least two terms, got 0"),
    (lambda: Sum(((None, "a"), (None, "b"))), "a sum's terms are operations, got 'a'"),
    (
        lambda: Sum((("a b", CONVOLUTION), (None, CONVOLUTION))),
        "rate must be a name, a finite number or None (at most 1e+18), got 'a b'",
    ),
    (lambda: Sum(((float("nan"), CONVOLUTION), (None, CONVOLUTION))), "got nan"),
    (lambda: Sum(((True, CONVOLUTION), (None, CONVOLUTION))), "got True"),
    (
        lambda: Branch(1.5, CONVOLUTION, CONVOLUTION),
        "ratio must be between 0 (all second) and 1 (all first), got 1.5",
    ),
    (lambda: Branch(float("nan"), CONVOLUTION, CONVOLUTION), "got nan"),
    (lambda: Branch("half", CONVOLUTION, CONVOLUTION), "ratio must be a number, got 'half'"),
    (lambda: Branch(0.5, "a", CONVOLUTION), "operands are operations, got 'a'"),
]
CONVOLUTION = Basic(Window(3), BOX, CONV)


@pytest.mark.parametrize(("make", "fragment"), BAD_VALUES, ids=[fragment[:40] for _, fragment in BAD_VALUES])
def test_bad_values_are_named(make, fragment):
    with pytest.raises(ValueError) as caught:
        make()
    assert fragment in str(caught.value)


# --- nothing else than NotationError ever comes out

PIECES = st.sampled_from(
    [
        *"|*+(),=-. ",
        "branch",
        "mix",
        "self",
        "true",
        "1",
        "0",
        "0.5",
        "1e9",
        "-3",
        "a",
        "²",
        "٣",
        "\x00",
        "\n",
    ]
    + [cls.word for cls in ALL_WORDS]
    + sorted({f.name for cls in ALL_WORDS for f in dataclasses.fields(cls)})
)


def check_only_notation_errors(text: str) -> None:
    try:
        op = parse(text)
    except NotationError as error:
        assert 0 <= error.position <= len(error.text)
        return
    assert parse(str(op)) == op


@given(st.text(max_size=60) | st.lists(PIECES, max_size=30).map("".join) | st.lists(PIECES, max_size=30).map(" ".join))
@settings(max_examples=300, deadline=None)
@example("window(3) | box | kernel" + "(" * 5000)
@example("nearest(" * 5000)
@example("٣*(all | row | ones) + ٣*(all|row|ones)")
def test_any_text_gives_an_operation_or_a_notation_error(text):
    check_only_notation_errors(text)


@given(
    st.sampled_from([entry.notation for entry in CATALOGUE.values()]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3), PIECES | st.text(max_size=2)), min_size=1, max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_mutated_notation_gives_an_operation_or_a_notation_error(text, edits):
    for where, removed, inserted in edits:
        at = int(where * len(text))
        text = text[:at] + inserted + text[at + removed :]
    check_only_notation_errors(text)


# --- every word


@pytest.mark.parametrize("text", MISUSE)
def test_every_word_refuses_what_it_does_not_know_or_go_with(text):
    with pytest.raises(ValueError) as caught:
        parse(text)
    assert MISUSE[text] in str(caught.value)
