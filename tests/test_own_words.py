"""Words from outside the package: they run as the library's own do, and wrong ones are named."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from nearfold import parse, testing
from nearfold.extend import (
    KernelMeaning,
    Path,
    PathMeaning,
    Rho,
    RhoMeaning,
    Similarity,
    register,
    register_path,
    register_rho,
)
from nearfold.grammar.similarity import Scaled
from nearfold.grammar.word import WORDS
from nearfold.grammar.words import Softmax, Window
from nearfold.nn import Mixer


@pytest.fixture
def words(own_words):
    """A path of two slots (the position before and itself) and a rho (half the score), for one test."""

    @dataclass(frozen=True)
    class Before(Path):
        word = "before"
        shapes = ("box",)
        similarity: Similarity = field(default=Scaled(), metadata={"positional": True})

        def slot_shape(self, ndim: int) -> tuple[int, ...]:
            return (2,)

    @dataclass(frozen=True)
    class Half(Rho):
        word = "half"
        heads: int = 1
        project: str | None = None

    register_path(Before, before)
    register_rho(Half, lambda rho, score, valid: score.masked_fill(~valid, 0) / 2)
    return Before, Half


def before(path, grid, device):
    at = torch.arange(torch.Size(grid).numel(), device=device)[:, None] - torch.tensor([1, 0], device=device)
    return at, at >= 0


@pytest.mark.parametrize(
    "weight", ["mean", "ones*kernel", "depthwise", "softmax(heads=2)", "half(heads=2)*kernel", "half*separable"]
)
@pytest.mark.parametrize("grid", [(1,), (7,), (3, 5)])
@pytest.mark.usefixtures("words")
def test_every_backend_is_the_oracle(weight, grid):
    assert (
        testing.conform(f"before(dot) | box | {weight}" if "half" in weight else f"before | box | {weight}", grid)
        < 1e-12
    )


@pytest.mark.usefixtures("words")
def test_the_oracle_is_the_definition():
    x = torch.randn(2, 1, 6, dtype=torch.float64)
    y = Mixer("before | box | half(project=none)", 1, ndim=1).double()(x)
    last = torch.nn.functional.pad(x, (1, 0))[..., :-1]
    assert torch.allclose(y, (x * last * last + x * x * x) / 2)


@pytest.mark.usefixtures("words")
def test_it_compiles_in_one_graph():
    layer = Mixer("before | box | softmax(heads=2)", 4).double()
    testing.check_compiled(layer, [torch.randn(2, 4, n, 5, dtype=torch.float64) for n in (3, 4, 6)])


def test_what_a_path_reads_is_checked(words):
    path, _ = words
    layer, x = Mixer("before | box | mean", 2, ndim=1), torch.randn(1, 2, 4)
    wrong = {
        "reads position 4 of 4": lambda *a: (before(*a)[0] + 1, before(*a)[1] | True),
        r"must read int64 positions \(4, slots\)": lambda *a: (before(*a)[0].int(), before(*a)[1]),
        r"got torch.int64 \(3, 2\)": lambda *a: tuple(t[1:] for t in before(*a)),
    }
    for why, reads in wrong.items():
        register_path(path, reads)
        with pytest.raises(ValueError, match=why):
            layer(x)


def test_a_word_that_is_made_anew_is_the_one_that_is_read(words):
    """As in a notebook, whose cell runs again."""
    first, _ = words
    assert type(parse("before | box | mean").path) is first

    @dataclass(frozen=True)
    class Before(first):
        word = "before"

    assert type(parse("before | box | mean").path) is Before
    with pytest.raises(ValueError, match="word='window' is a path of the library already; give Mine another"):
        type("Mine", (Path,), {"word": "window"})
    assert WORDS["path"]["window"] is Window


def test_only_words_from_outside_are_registered(words):
    path, rho = words
    for given in (Window, rho, path(), "before", Path):
        with pytest.raises(ValueError, match="path"):
            register_path(given, before)
    for given in (Softmax, path, Rho):
        with pytest.raises(ValueError, match="rho"):
            register_rho(given, lambda rho, score, valid: score)


def test_a_word_without_a_meaning_says_so(own_words):
    @dataclass(frozen=True)
    class Unsaid(Path):
        word = "unsaid"
        shapes = ("box",)

    op = parse("unsaid | box | mean")
    with pytest.raises(ValueError, match="path unsaid has no meaning yet: register one for Unsaid"):
        Mixer(op, 4)


def test_a_meaning_is_of_the_words_kind(words):
    path, rho = words
    for word, meaning in ((path, RhoMeaning()), (rho, PathMeaning()), (rho, KernelMeaning()), (Window, PathMeaning())):
        with pytest.raises(ValueError, match=r"must be a class with a word|is the library's own"):
            register(word, meaning)
    for meaning in (None, PathMeaning, "table"):
        with pytest.raises(ValueError, match="meaning must be an object of a class that derives from PathMeaning"):
            register(path, meaning)
