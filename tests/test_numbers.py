"""Every number of a word, a layer, a function, a network and a recipe: NumPy's are taken, and each has a range."""

import dataclasses
import typing

import numpy as np
import pytest
import torch
from helpers.drawn_operations import builds, members
from helpers.drawn_operations import plain as required

from nearfold import NotationError, mixing_matrix, models, parse
from nearfold._numbers import MOST
from nearfold.grammar import Branch, Sum
from nearfold.grammar.word import WORDS
from nearfold.look import looks
from nearfold.lower import apply, explain
from nearfold.nn import (
    ConvNN1d,
    ConvNN2d,
    ConvNNAttention,
    KVTAttention,
    Mixer,
    SelfAttention,
    TokenMLP,
    deform_conv,
    knn_attention,
)
from nearfold.train import Recipe

CLASSES = [cls for kind in WORDS.values() for cls in kind.values()]
FIELDS = [
    (cls, f.name, hint)
    for cls in CLASSES
    for f in dataclasses.fields(cls)
    for hint in members(typing.get_type_hints(cls)[f.name])
    if hint in (int, float, bool)
]
HUGE = [10**400, -(10**400), 10**5000, 2**63, float("inf"), float("nan"), 1e300]
SCALARS = {
    int: [np.int64(3), np.int8(3), np.uint16(3), np.array(3), torch.tensor(3)],
    float: [np.float64(0.5), np.float32(0.5), np.array(0.5), torch.tensor(0.5)],
    bool: [np.bool_(True), np.array(True), torch.tensor(True)],
}


@pytest.mark.parametrize(("cls", "name", "kind"), FIELDS, ids=[f"{c.__name__}.{n}-{k.__name__}" for c, n, k in FIELDS])
def test_numbers_of_words(cls, name, kind):
    base = required(cls)
    written = cls.__dataclass_fields__[name].metadata.get("notation", name)
    own = {int: 3, float: 0.5, bool: True}[kind]
    # a number that goes with another argument only (again, rank ...) is tried where it is taken by itself
    if builds(cls, base | {name: own}):
        for given in SCALARS[kind]:
            made = cls(**base | {name: given})
            assert made == cls(**base | {name: own}) and type(getattr(made, name)) is kind
            assert hash(made) == hash(cls(**base | {name: own})) and str(made) == str(cls(**base | {name: own}))
    for given in HUGE if kind is not bool else []:
        if given == 2**63 and "float" in str(cls.__dataclass_fields__[name].type):
            continue
        with pytest.raises(ValueError, match=written) as refused:
            cls(**base | {name: given})
        assert len(str(refused.value)) < 300
    if kind is int and not builds(cls, base | {name: True}):  # where a flag is no choice of its own
        for flag in (np.bool_(True), torch.tensor(True), 1.0, np.float32(1)):
            with pytest.raises(ValueError):
                cls(**base | {name: flag})


@pytest.mark.parametrize("digits", [20, 400, 5000])
@pytest.mark.parametrize(
    "text",
    [
        "window({}) | box | kernel",
        "window(3, dilation={}) | box | kernel",
        "window((3, {})) | box | kernel",
        "nearest({}, cosine) | ranked | kernel",
        "nearest(9, cosine, random({})) | ranked | kernel",
        "nearest(9, cosine, self=-{}) | ranked | kernel",
        "all | row | softmax(heads={})",
        "all | row | softmax(scale={})",
        "all | row | softmax(scale=1e{})",
        "all | row | table({})",
        "all | strided({}) | softmax",
        "scan(state={}) | causal | selective",
        "{}*(all | row | softmax) + (all | row | softmax)",
        "branch({}, all | row | softmax, all | row | softmax)",
        "window(3) | causal(axes=({},)) | softmax",
    ],
)
def test_huge_numbers_of_the_notation(text, digits):
    with pytest.raises(NotationError) as refused:
        parse(text.format("1" + "0" * (digits - 1)))
    assert len(str(refused.value)) < 700


def test_numbers_of_operations():
    row = parse("all | row | softmax")
    assert Sum(((np.float32(0.5), row), (None, row))) == Sum(((0.5, row), (None, row)))
    assert Branch(np.float64(0.5), row, row, np.bool_(True)) == Branch(0.5, row, row, True)
    for rate in (10**400, np.inf, True, np.bool_(True)):
        with pytest.raises(ValueError, match="rate"):
            Sum(((rate, row), (None, row)))
    for flags in ({"mix": 1}, {"split": "yes"}, {"ratio": 10**400}, {"ratio": np.bool_(True)}):
        with pytest.raises(ValueError, match=next(iter(flags))):
            Branch(**{"ratio": 0.5, "first": row, "second": row} | flags)


def test_layers_take_numpys_numbers():
    n, x = np.int64, torch.randn(1, 8, 5, 6)
    for make in (
        lambda i, b: ConvNN2d(i(8), i(8), k=i(9), stride=(i(2), i(1)), groups=i(2), bias=b(True)),
        lambda i, b: Mixer("window(3) | box | softmax(heads=2)", i(8), i(6), ndim=i(2), bias=b(False)),
    ):
        torch.manual_seed(0)
        mine = make(np.int64, np.bool_)
        torch.manual_seed(0)
        theirs = make(int, bool)
        assert str(mine) == str(theirs) and torch.equal(mine(x), theirs(x))
    t = torch.randn(1, 7, 8)
    assert TokenMLP(n(7), np.int32(9))(t).shape == KVTAttention(n(8), n(2), n(3))(t).shape == t.shape
    given = {"include_self": np.bool_(False), "recall": np.float32(0.75)}
    assert ConvNNAttention(n(8), n(2), **given)(t).shape == t.shape
    assert SelfAttention(n(8), np.uint8(2), kv_heads=n(1), causal=np.bool_(True))(t).shape == t.shape
    q = torch.randn(1, 2, 6, 4)
    torch.testing.assert_close(
        knn_attention(q, q, q, n(3), scale=np.float32(0.5)), knn_attention(q, q, q, 3, scale=0.5)
    )
    offset, weight = torch.zeros(1, 18, 3, 2), torch.randn(2, 8, 3, 3)
    moved = [deform_conv(x, offset, weight, stride=stride, padding=n(0)) for stride in ((n(1), n(2)), [1, 2])]
    assert torch.equal(*moved)
    assert explain("window(3) | box | kernel", (n(1), n(8), n(5), n(6)), n(4)).out_shape == (1, 4, 5, 6)
    for bad in (True, np.bool_(True), 2.0, np.float32(2), np.arange(3), "2", None, 10**400, 2**31):
        with pytest.raises(ValueError, match="in_channels"):
            ConvNN1d(bad, 8)
        with pytest.raises(ValueError, match="k must be"):
            knn_attention(q, q, q, bad)


def test_networks_and_recipes_take_numpys_numbers():
    net = models.create("resnet18_hybrid", num_classes=np.int64(7), in_chans=np.int32(1), width=np.int64(8)).eval()
    assert net(torch.zeros(1, 1, 16, 16)).shape == (1, 7)
    for name, bad in (("num_classes", np.bool_(True)), ("in_chans", 10**400), ("img_size", (np.float32(3), 3))):
        with pytest.raises(ValueError, match=name):
            models.create("resnet18_hybrid", **{name: bad})
    drawn = Recipe(epochs=np.int64(5), lr=np.float32(0.5), seed=np.uint32(3), deterministic=np.bool_(True))
    assert drawn == Recipe(epochs=5, lr=0.5, seed=3, deterministic=True)
    assert [type(v) for v in drawn.to_dict().values()] == [type(v) for v in Recipe().to_dict().values()]
    for name, bad in (("epochs", np.bool_(True)), ("batch_size", 2**31), ("lr", 10**400), ("seed", 10**5000)):
        with pytest.raises(ValueError, match=f"Recipe.{name}"):
            Recipe(**{name: bad})


NOT_TENSORS = [[[1.0]], np.zeros((1, 8, 4, 4), np.float32), "x", None, 3, {}, (torch.zeros(1, 8, 4),)]


@pytest.mark.parametrize("given", NOT_TENSORS, ids=lambda g: type(g).__name__)
def test_what_is_no_tensor_is_named(given):
    x, q, w = torch.zeros(1, 8, 4, 4), torch.zeros(1, 2, 5, 4), torch.zeros(2, 8, 3, 3)
    layer, cross = ConvNN2d(8, 8), Mixer("nearest(3, cross) | ranked | softmax", 8)
    offset = torch.zeros(1, 18, 2, 2)
    for name, call in (
        ("x", lambda: layer(given)),
        ("x", lambda: KVTAttention(8, 2)(given)),
        ("x", lambda: TokenMLP(4)(given)),
        ("x", lambda: apply("window(3) | box | mean", {}, given)),
        ("x", lambda: looks(layer, given, (0, 0))),
        ("x", lambda: mixing_matrix(layer, given)),
        ("query", lambda: knn_attention(given, q, q, 2)),
        ("value", lambda: knn_attention(q, q, given, 2)),
        ("offset", lambda: deform_conv(x, given, w)),
        ("weight", lambda: deform_conv(x, offset, given)),
        ("context", lambda: cross(x, given)),
        ("mask", lambda: deform_conv(x, offset, w, mask=given)),
    ):
        if given is not None or name not in ("context", "mask"):  # which may be left out
            with pytest.raises(ValueError, match=f"^{name} "):
                call()
    if not isinstance(given, str):
        for call in (lambda: Mixer(given, 8), lambda: explain(given, (1, 8, 4, 4)), lambda: apply(given, {}, x)):
            with pytest.raises(ValueError, match="operation must be"):
                call()


def test_shapes_that_hold_nothing_or_do_not_fit():
    z = torch.zeros
    x, offset, weight = z(1, 2, 4, 4), z(1, 18, 2, 2), z(2, 2, 3, 3)
    for message, call in (
        ("features", lambda: knn_attention(z(1, 1, 3, 0), z(1, 1, 5, 0), z(1, 1, 5, 2), 2)),
        ("keys", lambda: knn_attention(z(1, 1, 3, 4), z(1, 1, 0, 4), z(1, 1, 0, 2), 2)),
        ("scale", lambda: knn_attention(*[z(1, 1, 3, 4)] * 3, 2, scale=10**400)),
        ("channels", lambda: deform_conv(x, offset, z(2, 0, 3, 3))),
        ("slots", lambda: deform_conv(x, offset, z(2, 2, 0, 3))),
        ("bias must be", lambda: deform_conv(x, offset, weight, torch.ones(4, 2))),
        ("bias must be", lambda: deform_conv(x, offset, weight, torch.ones(1))),
        ("offset must be", lambda: deform_conv(x, z(1, 0, 2, 2), weight)),
        ("stride", lambda: deform_conv(x, offset, weight, stride=0)),
        ("ndim=4", lambda: Mixer("deformable(3) | box | kernel", 4, ndim=4)),
        ("ndim", lambda: Mixer("all | row | softmax", 4, ndim=10**6)),
        ("shape", lambda: explain("all | row | softmax", (1, 8, 10**19, 4))),
        ("shape", lambda: explain("all | row | softmax", "1,8,4,4")),
        ("dtype", lambda: explain("all | row | softmax", (1, 8, 4, 4), dtype=torch.int64)),
        ("out_channels", lambda: explain("all | row | softmax", (1, 8, 4, 4), 2.5)),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_parameter_too_large_to_hold_is_refused():
    for text in (
        "window(1000000001) | box | kernel",
        f"all | row | table({MOST})",
        "nearest(2147483647) | ranked | kernel",
    ):
        with pytest.raises(ValueError, match="would hold"):
            Mixer(text, 1024)
