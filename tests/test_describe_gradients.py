"""The comparison with gradients, on a network of what the tables do not name; and that it finds what is wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from gradients import check
from torch import Tensor, nn

from nearfold.grammar import parse
from nearfold.recognise import describe, observe, walk
from nearfold.recognise.foreign import Match

C = 8


class Standardised(nn.Conv2d):
    """A convolution whose kernel is made of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(
            x, self.weight - self.weight.mean(), self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class SameConv(nn.Conv2d):
    """It pads as its input asks, more behind than before."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for n, k, s in zip(x.shape[:1:-1], self.kernel_size, self.stride, strict=True):
            more = max((-(-n // s) - 1) * s + k - n, 0)
            pads += [more // 2, more - more // 2]
        return self._conv_forward(F.pad(x, pads), self.weight, self.bias)


class Response(nn.Module):
    """A norm of the map, over each channel's length; its weights are zero at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        length = x.norm(dim=(2, 3), keepdim=True)
        return x + self.weight * x * length / (length.mean(1, keepdim=True) + 1e-6)


class Talking(nn.Module):
    """Attention of images by 1x1 convolutions, whose heads talk, with a learned bias for every pair."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.qkv, self.mix, self.out = nn.Conv2d(C, 3 * C, 1), nn.Linear(2, 2), nn.Conv2d(C, C, 1)
        self.bias, self.choice = nn.Parameter(torch.randn(positions)), torch.arange(positions).repeat(positions, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(2).unflatten(1, (3, 2, C // 2)).unbind(1)
        scores = q.mT @ k / C**0.5 + self.bias[self.choice.to(self.bias.device)]
        weights = self.mix(scores.movedim(1, -1)).movedim(-1, 1).softmax(-1)
        return self.out((v @ weights.mT).flatten(1, 2).view_as(x))


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, C, 3, padding=1), nn.BatchNorm2d(C), nn.GELU(), Standardised(C, C, 3, padding=1),
        SameConv(C, C, 3, stride=2, bias=False), nn.MaxPool2d(3, 2, ceil_mode=True), nn.Upsample(scale_factor=2),
        nn.AvgPool2d(3, 1, 1), Response(), Talking(100), nn.GroupNorm(2, C), nn.AvgPool2d(2, divisor_override=3),
        nn.Conv2d(C, C, 1),
    )  # fmt: skip


SAID = [
    ("0", "window(3) | box | kernel", "3"), ("3", "window(3) | box | kernel", "5"),
    ("4", "window(3, stride=2, padding=0) | box | kernel", "7"),
    ("5", "window(3, stride=2, padding=0) | box | max", "11"),
    ("7", "window(3) | box | ones", "<=15"), ("8", "all | row | mean", "all"),
    ("9", "all | row | softmax(heads=2)", "all"), ("10", "all | row | mean", "all"),
    ("11", "window(2, stride=2, padding=0) | box | ones", "all"),
]  # fmt: skip


def test_what_no_table_names_is_said_and_true():
    found, tally = check(network(), (3, 19, 19), most=9)
    assert found.unknown == ()
    assert [(row.name, row.notation, row.field) for row in found.rows] == SAID
    assert tally.wrong == [] and tally.left == []
    assert tally.words == len(SAID) and tally.fields == 5
    assert any("Upsample" in kind for kind in found.pointwise)


def test_what_no_table_names_counts_what_it_is():
    rows = {row.name: row for row in describe(network(), (3, 19, 19)).rows}
    assert [rows[name].c_d for name in ("3", "8", "9", "10")] == [3, 0, 4, 0]
    assert rows["9"].c_p == rows["9"].parameters / 1e6 == (4 * C * C + 4 * C + 6 + 100) / 1e6
    assert "its heads are mixed" in rows["9"].note and "a bias is added" in rows["9"].note
    assert "made of its own parameters" in rows["3"].note and "zeros around it" in rows["4"].note


def said(notation: str) -> Match:
    return Match(parse(notation))


LIES = {
    "a larger window": ("Conv2d", "window(5) | box | kernel"),
    "a smaller window": ("Conv2d", "window(2, padding=1) | box | kernel"),
    "a wider window": ("Conv2d", "window(3, dilation=2) | box | kernel"),
    "moved": ("Conv2d", "window(3, padding=0) | box | kernel"),
    "everywhere": ("Conv2d", "all | row | mean"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_row_that_is_wrong_is_found(lie, monkeypatch):
    kind, notation = LIES[lie]
    monkeypatch.setitem(walk.ALL_RULES, f"torch.nn.modules.conv.{kind}", lambda module: said(notation))
    model = nn.Sequential(nn.Conv2d(3, C, 3, padding=1), nn.ReLU())
    assert len(check(model, (3, 9, 9))[1].wrong) == 1


def test_a_layer_that_is_not_pointwise_is_found(monkeypatch):
    monkeypatch.setitem(walk.ALL_RULES, "torch.nn.modules.conv.Conv2d", lambda module: said("window(1) | box | kernel"))
    (wrong,) = check(nn.Sequential(nn.Conv2d(3, C, 3, padding=1), nn.ReLU()), (3, 9, 9))[1].wrong
    assert wrong.startswith("0 (Conv2d), pointwise: besides its own, it reads")


def test_a_field_that_is_wrong_is_found(monkeypatch):
    monkeypatch.setattr(observe, "through", lambda place, op, before, after, axis: place)
    model = nn.Sequential(nn.Conv2d(3, C, 3, padding=1), nn.ReLU())
    assert check(model, (3, 9, 9))[1].wrong == ["0 (Conv2d): field 1 is said, along axis 0 it is 3"]


# --- what is close to these, and is something else


class Strongest(nn.Module):
    """A norm by the largest value: no mean says what a position depends on."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.amax((2, 3), keepdim=True)


class Covariance(nn.Module):
    """Channels that are weighed by how they vary together: more than the mean of each and of its square."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(2)
        return (rows @ rows.mT).softmax(-1) @ rows


class Unmapped(nn.Module):
    """Attention among its own inputs; where they are large, every position sees itself alone."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(2).mT
        return ((rows @ rows.mT).tanh() @ rows).mT.view_as(x)


class Gated(nn.Conv2d):
    """Its kernel depends on its input."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * x.mean(), self.bias)


class Twice(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight, self.bias).relu()


class Ranked(Talking):
    """Attention to a part of its positions."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(2).unflatten(1, (3, 2, C // 2)).unbind(1)
        return self.out((v[..., :50] @ (q.mT @ k[..., :50]).softmax(-1).mT).flatten(1, 2).view_as(x))


class Masked(Talking):
    """Attention that looks at nothing behind it."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(2).unflatten(1, (3, 2, C // 2)).unbind(1)
        scores = q.mT @ k
        hidden = torch.ones(scores.shape[-2:], device=x.device, dtype=torch.bool).triu(1)
        return self.out((v @ scores.masked_fill(hidden, -torch.inf).softmax(-1).mT).flatten(1, 2).view_as(x))


class Swapped(Talking):
    """Weights that spend other values than those at their keys."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(2).unflatten(1, (3, 2, C // 2)).unbind(1)
        return self.out((v.flip(-1) @ (q.mT @ k).softmax(-1).mT).flatten(1, 2).view_as(x))


class Sums(Talking):
    """The softmax is over queries."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(2).unflatten(1, (3, 2, C // 2)).unbind(1)
        return self.out((v @ (q.mT @ k).softmax(-2).mT).flatten(1, 2).view_as(x))


class Doubled(Talking):
    """Two attentions in one forward: one row would hide one of them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


OTHERS = {
    "largest": Strongest(), "covariance": Covariance(), "attention without maps": Unmapped(),
    "a kernel of the input": Gated(C, C, 3, padding=1),
    "more than a convolution": Twice(C, C, 3, padding=1), "bilinear": nn.Upsample(scale_factor=2, mode="bilinear"),
    "a part of the keys": Ranked(100), "masked": Masked(100), "other values": Swapped(100), "over queries": Sums(100),
    "two of them": Doubled(100),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_close_to_a_rule_is_unknown(name):
    found = describe(nn.Sequential(nn.Conv2d(3, C, 1), OTHERS[name]), (3, 10, 10))
    assert [one.name for one in found.unknown] == ["1"]
    assert found.rows == ()


@pytest.mark.parametrize("module", [Strongest(), Gated(C, C, 3), Twice(C, C, 3)])
def test_what_is_close_to_a_rule_is_unknown_without_a_run(module):
    assert [one.name for one in describe(nn.Sequential(module)).unknown] == ["0"]


class Decided(nn.Module):
    """Attention among its own inputs: of large numbers every position sees itself alone, of small ones all do."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        return (x @ x.mT).softmax(-1) @ x


def test_a_softmax_that_has_decided_is_no_pointwise_layer():
    assert [one.kind for one in describe(Decided()).unknown] == ["Decided"]


def test_a_norm_whose_weights_are_zero_is_no_pointwise_layer():
    assert [row.notation for row in describe(Response()).rows] == ["all | row | mean"]
    assert [row.notation for row in describe(nn.BatchNorm2d(4, track_running_stats=False)).rows] == ["all | row | mean"]
