"""A new path, rho or kernel is one file: the package needs no more, and asks nobody which word it is."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

import nearfold
from nearfold import mixing_matrix, parse, testing
from nearfold.grammar import vocabulary
from nearfold.grammar.complexity import c_d, primitives
from nearfold.grammar.word import Word
from nearfold.lower import explain, looks
from nearfold.nn import Mixer
from nearfold.recognise import c_p

PACKAGE = Path(nearfold.__file__).parent
TOYS = {path.stem: path for path in (Path(__file__).parent / "toys").glob("*.py")}
EXAMPLES = {
    "path": ("salient", "salient_softmax"),
    "rho": ("fading", "fading_kernel", "fading_block"),
    "kernel": ("lowrank", "lowrank_attention", "lowrank_nearest", "lowrank_block"),
}
ALL = [(kind, name) for kind, names in EXAMPLES.items() for name in names]


@pytest.fixture
def loaded(own_words, monkeypatch):
    """The toys' modules by kind, as somebody's own files."""

    def load(kind):
        spec = importlib.util.spec_from_file_location(f"toy_{kind}", TOYS[kind])
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def toy(request, loaded):
    """A notation with a toy word."""
    kind, name = request.param
    loaded(kind)
    return vocabulary.cases()[name]


every_case = pytest.mark.parametrize("toy", ALL, indirect=True, ids=str)
WORDS = [(kind, names[0]) for kind, names in EXAMPLES.items()]
every_word = pytest.mark.parametrize("toy", WORDS, indirect=True)


@pytest.mark.parametrize("kind", TOYS)
def test_one_file_and_the_registration_are_all(kind):
    tree = ast.parse(TOYS[kind].read_text())
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    named = {name for name in imported if name.startswith("nearfold")}
    assert named == {"nearfold.extend"}
    (word,) = re.findall(r'^    word = "(\w+)"$', TOYS[kind].read_text(), re.M)
    assert [path for path in PACKAGE.rglob("*.py") if re.search(rf"\b{word}\b", path.read_text())] == []


@every_case
@pytest.mark.parametrize("grid", testing.GRIDS, ids=str)
def test_every_backend_is_the_oracle(toy, grid):
    testing.conform(toy, grid)


def test_the_backends_that_serve_the_library_serve_the_toys(loaded):
    for kind in TOYS:
        loaded(kind)
    found = {
        name: testing.backends_of(parse(vocabulary.cases()[name]), 2, torch.float64)[1:]
        for names in EXAMPLES.values()
        for name in names
    }
    assert found == {
        "salient": [],
        "salient_softmax": [],
        "fading": ["gather"],
        "fading_kernel": ["gather"],
        "fading_block": ["gather"],
        "lowrank": ["conv", "gather"],
        "lowrank_attention": ["gather", "local"],
        "lowrank_nearest": ["knn"],
        "lowrank_block": ["gather"],
    }


@every_case
def test_gradients_are_derivatives(toy):
    testing.check_gradients(toy, (4, 4))


@every_case
def test_it_compiles_in_one_graph(toy):
    layer, x = testing.make(toy, (6, 5), torch.float32)
    testing.check_compiled(layer, [x])


@every_case
def test_all_else_answers(toy):
    op = parse(toy)
    assert parse(str(op)) == op
    assert c_d(op) == sum(primitives(op).values()) >= 3
    assert str(explain(op, (1, 8, 6, 5))).startswith(str(op))
    layer, x = testing.make(op, (6, 5))
    layer.eval()
    rows = mixing_matrix(layer, x)
    assert rows.shape[0] == 2 and rows.shape[3] == 30 and rows.isfinite().all()
    one = looks(layer, x, (0, 0))
    assert one.shape == (2, 6, 5) and torch.allclose(one.sum((1, 2)), torch.ones(2, dtype=torch.float64))
    again = Mixer(op, 8).double()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))


@pytest.mark.parametrize(
    "toy", [pytest.param(word, marks=[pytest.mark.slow] * (i > 0)) for i, word in enumerate(WORDS)], indirect=True
)
def test_its_examples_make_cases_misuse_and_the_page(toy):
    (word,) = (type(word).word for word in vocabulary.words_in(parse(toy)) if type(word).__module__.startswith("toy"))
    assert f"{word}x" in {w for said in vocabulary.misuse() for w in re.findall(r"\w+", said)}
    assert f"| `{word}` |" in vocabulary.page()
    for said, why in vocabulary.misuse().items():
        with pytest.raises(ValueError) as caught:
            parse(said)
        assert why in str(caught.value)


@pytest.mark.parametrize("toy", [("path", "salient")], indirect=True)
@pytest.mark.usefixtures("toy")
def test_the_path_is_its_definition():
    layer, x = testing.make("salient(3) | ranked | mean(project=none)", (4, 3))
    weight, bias = layer.salience_weight, layer.salience_bias
    salience = (x.flatten(2) * weight.view(1, -1, 1)).sum(1) + bias
    best = salience.argsort(-1, descending=True)[:, :3]
    wanted = torch.stack([row[:, at].mean(1) for row, at in zip(x.flatten(2), best, strict=True)])
    y = layer(x)
    assert y.shape == (2, 8, 2, 2)
    torch.testing.assert_close(y, wanted[..., None, None].expand_as(y))
    assert c_p("salient(3) | ranked | mean", 8, 8) == 9e-6


@pytest.mark.parametrize("toy", [("rho", "fading")], indirect=True)
@pytest.mark.usefixtures("toy")
def test_the_rho_is_its_definition():
    layer, x = testing.make("window(3, padding=0) | box | fading(2)", (9,))
    rate = layer.fading_rate
    wanted = torch.cat(
        [sum(torch.exp(-rate[h] * s) * half[..., s : s + 7] for s in range(3)) for h, half in enumerate(x.split(4, 1))],
        1,
    )
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("toy", [("kernel", "lowrank")], indirect=True)
@pytest.mark.usefixtures("toy")
def test_the_kernel_is_its_definition():
    layer, x = testing.make("window(3) | box | lowrank(2)", (6, 5))
    inner = torch.nn.functional.conv2d(x, layer.weight, padding=1)
    wanted = torch.nn.functional.conv2d(inner, layer.left_weight[..., None, None], layer.bias)
    torch.testing.assert_close(layer(x), wanted)


# --- who asks which word it is

WORDS = {cls.__name__ for cls in vocabulary.words()} | {
    cls.__name__ for word in vocabulary.words() for cls in word.__mro__ if issubclass(cls, Word) and cls is not Word
}
KNOWING = ("grammar/", "lower/words/", "lower/backends/")  # the language, the words' own files, and what serves words


def asked(path: Path) -> int:
    """How often a file asks which word it has, by class or by name."""
    count = 0
    tree = ast.parse(path.read_text())
    ours = {a.asname or a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module
            and n.module.startswith("nearfold.grammar") for a in n.names}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
            classes = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)} & ours
            count += bool(classes & WORDS)
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            names = any(isinstance(side, ast.Attribute) and side.attr == "word" for side in sides)
            count += names and any(isinstance(side, ast.Constant | ast.Tuple) for side in sides)
    return count


def test_hardly_anybody_asks_which_word_it_is():
    """These numbers may go down only: what depends on a word belongs into its file."""
    found = {path.relative_to(PACKAGE).as_posix(): asked(path) for path in PACKAGE.rglob("*.py")}
    outside = {name: count for name, count in found.items() if count and not name.startswith(KNOWING)}
    assert sum(outside.values()) <= 12, outside
    assert not [name for name in outside if name.startswith("lower/")]
