"""C_D and C_P, derived: GWO's eight published figures, and what holds for every word."""

from __future__ import annotations

import importlib
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nearfold import CATALOGUE, parse
from nearfold.grammar.complexity import c_d, primitives
from nearfold.grammar.word import WORDS
from nearfold.lower.parameters import parameters
from nearfold.nn import Mixer
from nearfold.recognise import Complexity, c_p, complexity
from nearfold.recognise.command import import_library


def torchvision(module: str):
    """A module of torchvision, or a visible skip."""
    try:
        import_library("torchvision", "torchvision")
    except ImportError as error:
        pytest.skip(str(error))
    return importlib.import_module(f"torchvision.{module}")


# --- GWO's examples, in plain torch


class MixerBlock(nn.Module):
    """MLP-Mixer's block (arXiv 2105.01601, eq. 1)."""

    def __init__(self, tokens: int, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.token1, self.act1, self.token2 = nn.Linear(tokens, 32), nn.GELU(), nn.Linear(32, tokens)
        self.channel1, self.act2, self.channel2 = nn.Linear(channels, 48), nn.GELU(), nn.Linear(48, channels)

    def forward(self, x):
        x = x.transpose(1, 2)  # the library's layout: channels before positions
        x = x + self.token2(self.act1(self.token1(self.norm1(x).transpose(1, 2)))).transpose(1, 2)
        x = x + self.channel2(self.act2(self.channel1(self.norm2(x))))
        return x.transpose(1, 2)


class BasicBlock(nn.Module):
    """ResNet's block (arXiv 1512.03385)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet18(nn.Module):
    """The one for CIFAR: a 3x3 stem, no max-pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        plan = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
        self.blocks = nn.Sequential(*(BasicBlock(*sizes) for sizes in [*plan, (512, 512, 1)]))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 10)

    def forward(self, x):
        return self.head(self.pool(self.blocks(self.stem(x))).flatten(1))


def separable() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 16, 1))


PUBLISHED = {
    "StandardConv": (lambda: nn.Conv2d(3, 8, 3), (3, 8, 8), 3),
    "DepthwiseSeparable": (separable, (8, 8, 8), 4),
    "MLP-Mixer block": (lambda: MixerBlock(16, 12), (12, 16), 3),
    "self-attention": (lambda: nn.MultiheadAttention(64, 8), None, 4),
    "BasicBlock": (lambda: BasicBlock(8, 8, 1), (8, 8, 8), 6),
    "BasicBlock with projection": (lambda: BasicBlock(8, 16, 2), (8, 8, 8), 9),
    "ResNet-18": (ResNet18, (3, 32, 32), 60),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures(name):
    make, size, figure = PUBLISHED[name]
    found = complexity(make(), input_size=size)
    assert found.c_d == figure
    assert found.unknown == ()


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "MLP-Mixer block"])
def test_all_but_the_token_mlp_are_seen_without_an_input(name):
    make, _, figure = PUBLISHED[name]
    assert complexity(make()).c_d == figure


class Deformable(nn.Module):
    """A convolution for the offsets, next to the operator that takes them."""

    def __init__(self, operator: type[nn.Module], made: tuple[int, ...] = (18,)) -> None:
        super().__init__()
        for i, channels in enumerate(made):
            setattr(self, f"net{i}", nn.Conv2d(8, channels, 3, padding=1))
        self.deform = operator(8, 16, 3, padding=1)


def test_deformable_is_four_with_its_offset_net():
    operator = torchvision("ops").DeformConv2d
    found = complexity(Deformable(operator))
    assert (found.c_d, found.unknown) == (4, ())
    assert found.c_p == (18 * 8 * 9 + 18) / 1e6
    (row,) = found.rows
    assert row.notation == "deformable(3) | box | kernel"
    assert row.parameters == 18 * 8 * 9 + 18 + 16 * 8 * 9 + 16
    assert c_p("deformable(3) | box | kernel", 8, 16) == found.c_p
    assert complexity(Mixer("deformable(3) | box | kernel", 8, 16)).omega == found.omega


@pytest.mark.parametrize("made", [(27,), (18, 9)])
def test_deformable_with_a_mask(made):
    found = complexity(Deformable(torchvision("ops").DeformConv2d, made))
    (row,) = found.rows
    assert row.notation == "deformable(3) | box | modulated*kernel"
    assert found.c_p == 27 * (8 * 9 + 1) / 1e6


def test_deformable_says_so_when_nothing_makes_its_offsets():
    model = Deformable(torchvision("ops").DeformConv2d, (7,))
    deformed = next(row for row in complexity(model).rows if row.kind == "DeformConv2d")
    assert "given from outside" in deformed.note
    assert deformed.c_p == 0


def test_attention_generates_with_all_its_parameters():
    attention = nn.MultiheadAttention(64, 8)
    assert complexity(attention).c_p == sum(p.numel() for p in attention.parameters()) / 1e6
    assert c_p("all | row | softmax(heads=8)", 64, 64) == complexity(attention).c_p


def test_torchvision_resnet18_counts_no_pooling_and_no_classifier():
    found = complexity(torchvision("models").resnet18())
    assert (found.c_d, found.c_p, found.unknown) == (60, 0, ())
    pools = [row for row in found.rows if "pool" in row.name]
    assert len(pools) == 2 and all(row.c_d == 0 and "counts 0" in row.note for row in pools)


def test_pooling_that_keeps_the_map_is_a_mixing_layer_like_any_other():
    assert complexity(nn.AvgPool2d(3, 1, 1, count_include_pad=False)).c_d == 3
    assert complexity(nn.AvgPool2d(2)).c_d == 0


def test_a_pointwise_map_is_half_of_a_separable_one_only_directly_behind_a_depthwise():
    depthwise, pointwise = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)
    between = (nn.BatchNorm2d(8), nn.ReLU6(), nn.Dropout())
    assert complexity(nn.Sequential(depthwise, *between, pointwise)).c_d == 3 + 1
    assert complexity(nn.Sequential(depthwise, *between, pointwise, nn.Conv2d(4, 2, 1))).c_d == 3 + 1 + 3
    assert complexity(nn.Sequential(depthwise, nn.MaxPool2d(2), pointwise)).c_d == 3 + 3
    assert complexity(nn.Sequential(nn.Conv2d(8, 8, 3), pointwise)).c_d == 3 + 3
    assert complexity(nn.Sequential(depthwise, nn.Conv2d(8, 4, 1, groups=2))).c_d == 3 + 3
    assert complexity(nn.Sequential(depthwise, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))).c_d == 3


# --- Omega, score, tier


def omega(c_d: float, c_p: float = 0.0, alpha: float = 1.0) -> Complexity:
    return Complexity(c_d, c_p, alpha, (), ())


@pytest.mark.parametrize(
    ("c_d", "c_p", "accuracy", "score"), [(6, 0, 69.31, 990.14), (8, 0.003, 69.45, 771.40), (8, 0, 61.35, 681.67)]
)
def test_scores_of_the_published_table(c_d, c_p, accuracy, score):
    assert omega(c_d, c_p).score(accuracy) == pytest.approx(score, abs=0.01)


def test_the_table_counts_two_operators():
    """Two StandardConv layers and three nn.Linear: 6, two of the depthwise-separable ones: 8."""
    head = [nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)]
    plain = [nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)]
    assert complexity(nn.Sequential(*plain, *head), input_size=(3, 32, 32)).omega == 6
    assert complexity(nn.Sequential(separable(), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 16, 3, groups=16),
                                    nn.Conv2d(16, 4, 1), *head)).omega == 8  # fmt: skip


def test_alpha_weighs_what_generates():
    attention = nn.MultiheadAttention(64, 8)
    assert complexity(attention, alpha=0).omega == 4
    assert complexity(attention, alpha=10).omega == 4 + 10 * complexity(attention).c_p


@pytest.mark.parametrize(
    ("score", "tier"),
    [
        (1800, "S"),
        (1799.9, "A"),
        (1250, "A"),
        (1249.9, "B"),
        (990.14, "B"),
        (900, "B"),
        (771.4, "C"),
        (500, "C"),
        (499.9, "-"),
    ],
)
def test_tiers(score, tier):
    assert Complexity.tier(score) == tier


@pytest.mark.parametrize("accuracy", [-1, 100.1, math.nan])
def test_an_accuracy_is_in_percent(accuracy):
    with pytest.raises(ValueError, match="between 0 and 100"):
        omega(6).score(accuracy)


# --- every word


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_operation_has_a_finite_positive_complexity(name):
    op = CATALOGUE[name].operation
    scores = primitives(op)
    assert all(math.isfinite(score) and score > 0 for score in scores.values())
    assert c_d(op) == sum(scores.values()) >= 3 * len(op.parts)  # a path, a shape and a weight at least


@pytest.mark.parametrize("name", CATALOGUE)
def test_no_more_generates_than_there_is(name):
    op = CATALOGUE[name].operation
    for ndim in (1, 2):
        try:
            whole = sum(math.prod(p.shape) for p in parameters(op, 64, 64, ndim).values()) / 1e6
        except ValueError:  # some are for one number of axes
            continue
        assert 0 <= c_p(op, 64, 64, ndim) <= whole


# each pair: the second has one more idea than the first
RICHER = [
    ("window(3) | box | ones", "deformable(3) | box | ones"),
    ("window(3) | box | kernel", "window(3) | box | softmax"),
    ("window(3) | box | kernel", "window(3) | box | softmax*kernel"),
    ("window(3) | box | softmax", "window(3) | box | softmax*depthwise"),
    ("window(3) | box | depthwise", "window(3) | box | separable"),
    ("window(3) | box | mean", "window(3) | box | max"),
    ("window(3) | box | kernel", "nearest(9, cosine) | ranked | kernel"),
    ("deformable(3) | box | kernel", "deformable(3) | box | modulated*kernel"),
    ("all | row | mean", "all | row | softmax"),
    ("all | row | table(9)", "all | row | softmax"),
    ("window(3) | box | kernel", "branch(0.5, window(3) | box | kernel, window(5) | box | kernel)"),
]


@pytest.mark.parametrize(("plain", "richer"), RICHER)
def test_an_idea_more_is_more(plain, richer):
    assert c_d(parse(plain)) < c_d(parse(richer))


SAME = [
    ("window(3) | box | kernel", "window(7, stride=2, dilation=3, mode=reflect) | box | kernel(groups=2)"),
    ("window(3) | box | depthwise", "nearest(9, position) | box | depthwise"),
    ("window(3) | box | ones*kernel", "window(3) | box | kernel"),
    ("window(3) | box | separable", "window(3) | box | ones(project=o)*depthwise"),
    ("nearest(9, cosine) | ranked | kernel", "nearest(9, cosine, random(32), self) | ranked | kernel"),
    ("nearest(9, cosine) | ranked | kernel", "nearest(9, blend(1.0)) | ranked | kernel"),
    ("all | row | softmax", "all(scaled(rotary)) | row | softmax(heads=4)"),
    ("branch(1.0, window(3) | box | kernel, all | row | softmax)", "window(3) | box | kernel"),
    ("branch(0.0, window(3) | box | kernel, all | row | softmax)", "all | row | softmax"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_the_same_idea_is_the_same(one, other):
    assert c_d(parse(one)) == c_d(parse(other))


BLENDS = [
    "nearest(9, blend({})) | ranked | kernel",
    "nearest(9, blend({})) | ranked | softmax*kernel",
    "nearest(9, blend({})) | ranked | softmax",
    "window(3, blend({})) | box | softmax",
]


@pytest.mark.parametrize("words", BLENDS)
def test_a_blend_goes_smoothly_from_space_to_features(words):
    steps = [i / 100 for i in range(101)]
    scores = [primitives(parse(words.format(lam))) for lam in steps]
    for before, after in itertools.pairwise(scores):
        assert all(abs(before.get(name, 0) - after.get(name, 0)) <= 0.0501 for name in before | after)
    totals = [sum(score.values()) for score in scores]
    if "kernel" in words:
        assert all(a < b for a, b in itertools.pairwise(totals))
    assert scores[0].keys().isdisjoint({"CONTENT_AWARE", "DYNAMIC_ATTENTION"})


def test_the_blend_of_a_convnn_is_one_plus_lam():
    for lam in (0.0, 0.25, 1.0):
        assert c_d(parse(f"nearest(9, blend({lam})) | ranked | kernel")) == 1 + lam + 2


def test_sums_and_branches_add_up():
    a, b = "window(3) | box | kernel", "all | row | softmax"
    assert c_d(parse(f"x*({a}) + 0.5*({b})")) == c_d(parse(a)) + c_d(parse(b))
    assert c_d(parse(f"branch(0.5, {a}, {b})")) == c_d(parse(a)) + c_d(parse(b))
    assert c_d(parse(f"branch(0.5, {a}, {b}, mix)")) == c_d(parse(a)) + c_d(parse(b)) + 1


# --- what generates


@pytest.mark.parametrize(
    ("notation", "generating"),
    [
        ("window(3) | box | kernel", 0),
        ("window(3) | box | separable", 0),
        ("window(3) | box | shift(4)", 0),
        ("all | row | table(16)", 0),
        ("nearest(9, cosine) | ranked | kernel", 0),
        ("nearest(9, cosine) | ranked | ones(project=qk)*kernel", 2 * (64 * 64 + 64)),
        ("nearest(9, position) | ranked | ones(project=v)*kernel", 0),
        ("all | row | softmax(heads=4)", 4 * (64 * 64 + 64)),
        ("block(7, scaled(bias=table)) | box | softmax(heads=4)", 4 * (64 * 64 + 64) + 4 * 13 * 13),
        ("window(3) | box | generated(groups=4, reduction=4)", 16 * 64 + 16 + 36 * 16 + 36),
        ("window(3) | box | experts(4)", 16 * 64 + 4 * 16 + 4),
        ("scan(state=16) | causal | selective(heads=4)", (4 + 32) * 64 + 4 + 4),  # without the skip D
        ("scan(state=8) | causal | additive(heads=4)", 2 * 32 * 64),
        ("scan(state=8) | causal | delta(heads=4, decay=head)", (2 * 32 + 4 + 4) * 64 + 4 + 4),
        ("scan(state=8) | causal | mlstm(heads=4)", (2 * 32 + 4 + 4) * 64 + 4 + 4),
        ("scan(state=8) | causal | rwkv7(heads=4, rank=3)", 2 * 32 * 64 + 2 * (3 * 64 + 32 * 3 + 32) + 3 * 32),
    ],
)
def test_which_parameters_generate(notation, generating):
    assert c_p(notation, 64, 64) * 1e6 == pytest.approx(generating)
    assert complexity(Mixer(notation, 64, 64)).c_p * 1e6 == pytest.approx(generating)


def test_acmix_counts_its_shared_projections_once():
    op = CATALOGUE["acmix"].operation
    specs = parameters(op, 64, 64)
    assert {"query_weight", "key_weight", "value_weight"} <= specs.keys()
    assert c_p(op, 64, 64) * 1e6 == pytest.approx(3 * (64 * 64 + 64) + 16 * 2 + 16)


def test_a_model_keeps_its_mode_and_its_weights():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).train()
    model[2].eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    complexity(model, input_size=(3, 8, 8))
    assert [m.training for m in model] == [True, True, False]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_every_primitive_is_in_the_documentation():
    documented = (Path(__file__).parent.parent / "docs" / "complexity.md").read_text()
    table = set(re.findall(r"^\| ([A-Z_0-9]+)(?: \*)? \| [12] \|", documented, re.MULTILINE))
    of_words = {word.primitive[0] for kind in WORDS.values() for word in kind.values()} - {""}
    assert table == of_words | {"POINTWISE"}
