"""Converted convolutions: what carries over exactly, and what does not."""

from __future__ import annotations

import pytest
import torch
from helpers.surgery import BOUND, NEAR, off
from torch import nn

from nearfold import Rule, convert

pytestmark = pytest.mark.usefixtures("float64")

CONVOLUTIONS = [
    # arguments of nn.Conv2d(4, 4, ...), the operation, grade
    ({"kernel_size": 3, "padding": 1}, "{self}", "exact"),
    ({"kernel_size": 3, "padding": 1}, "window(3) | box | kernel", "exact"),
    ({"kernel_size": 3, "padding": 1, "groups": 2}, "window(3) | box | kernel", "exact"),
    ({"kernel_size": 3, "padding": 1, "groups": 4}, "window(3) | box | kernel(groups=2)", "exact"),
    ({"kernel_size": 3, "padding": 1, "groups": 4}, "window(3) | box | kernel", "exact"),
    ({"kernel_size": 3, "padding": 1}, "window(7) | box | kernel", "exact"),
    ({"kernel_size": 3, "padding": 1, "groups": 4}, "window(7) | box | depthwise", "exact"),
    ({"kernel_size": (1, 3), "padding": (0, 1)}, "window((3, 5)) | box | kernel", "exact"),
    ({"kernel_size": 1}, "window(3, dilation=2) | box | kernel", "exact"),
    ({"kernel_size": 2, "padding": "same"}, "window(5) | box | kernel", "exact"),
    ({"kernel_size": 3, "padding": 2, "dilation": 2}, "window(5, dilation=2) | box | kernel", "exact"),
    ({"kernel_size": 3, "padding": 0}, "window(5, padding=1) | box | kernel", "exact"),
    ({"kernel_size": 3, "padding": 1, "stride": 2}, "window(5, stride=2) | box | kernel", "exact"),
    ({"kernel_size": 3, "padding": 1}, "deformable(3) | box | kernel", "exact"),
    ({"kernel_size": 3, "padding": 1}, "deformable(5) | box | modulated*kernel", "exact"),
    ({"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 2}, "deformable(3, dilation=2) | box | kernel(groups=2)",
     "exact"),
    ({"kernel_size": 3, "padding": 1}, "window(3) | box | experts(3)", "exact"),
    ({"kernel_size": 3, "padding": 1, "bias": False}, "nearest(9, position, padding=1) | box | kernel", "exact"),
    ({"kernel_size": 3, "padding": 1, "groups": 4}, "nearest(9, blend(0), padding=1) | box | depthwise", "exact"),
    ({"kernel_size": 3, "padding": 1, "stride": (2, 3)},
     "nearest(9, blend(0), padding=1, stride={stride}) | box | kernel", "exact"),
    ({"kernel_size": 5, "padding": 2}, "nearest(25, position(chebyshev), padding=2) | box | kernel", "exact"),
    ({"kernel_size": 3, "padding": 1}, "nearest(9, blend(0), padding=1, self) | box | kernel", "exact"),
    ({"kernel_size": 5, "padding": 2}, "nearest(25, position, padding=2) | ranked | kernel", "exact"),
    ({"kernel_size": 5, "padding": 2}, "nearest(25, position(chebyshev), self, padding=2) | ranked | kernel", "exact"),
    ({"kernel_size": 3, "padding": 2, "dilation": 2},
     "nearest(9, position(dilation=2), padding=2) | box | kernel", "exact"),
    ({"kernel_size": 3, "padding": 1}, f"({{self}}) + new*({NEAR})", "exact"),
    ({"kernel_size": 3, "padding": 1}, f"new*({NEAR}) + old*({{self}}) + 0.0*(window(5) | box | kernel)", "exact"),
    ({"kernel_size": 3, "padding": 1}, f"branch(0, {NEAR}, {{self}}, mix)", "exact"),
    ({"kernel_size": 3, "padding": 1},
     "branch(0.3, nearest(9, blend(0), padding=1) | box | kernel, window(5) | box | kernel, mix)", "exact"),
    ({"kernel_size": 3, "padding": 1}, f"branch(0.5, ({{self}}) + new*({NEAR}), {{self}})", "exact"),
    # similar
    ({"kernel_size": 3, "padding": 1}, NEAR, "approximate"),
    ({"kernel_size": 3, "padding": 1}, "nearest(5, cosine, self) | ranked | kernel", "approximate"),
    ({"kernel_size": 3, "padding": 1}, "nearest(12, blend(0.1)) | box | kernel", "approximate"),
    ({"kernel_size": 3, "padding": 1}, "nearest(9, blend(0)) | box | kernel", "approximate"),  # no border
    ({"kernel_size": 3, "padding": 1}, "nearest(9, blend(0), padding=1) | causal | kernel", "approximate"),
    ({"kernel_size": 3, "padding": 1}, "nearest(9, blend(0), padding=1, random(20)) | box | kernel", "approximate"),
    ({"kernel_size": 3, "padding": 1}, "nearest(9, blend(0), padding=1, stride=2) | box | kernel", "approximate"),
    ({"kernel_size": 7, "padding": 3}, "nearest(49, position, padding=3) | box | kernel", "approximate"),  # a disc
    ({"kernel_size": 3, "padding": 0}, "nearest(9, position, padding=1) | box | kernel", "approximate"),
    ({"kernel_size": 3, "padding": 0}, "nearest(9, position) | box | kernel", "approximate"),
    ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, "nearest(9, position, padding=1) | box | kernel",
     "approximate"),
    ({"kernel_size": 3, "padding": 1}, "window(3, dilation=2) | box | kernel", "approximate"),
    ({"kernel_size": 3, "padding": 1}, "window(3, stride=2) | box | kernel", "approximate"),
    ({"kernel_size": 3, "padding": 1}, "window(3, mode=reflect) | box | kernel", "approximate"),
    ({"kernel_size": 3, "padding": 1}, "window(3, padding=0) | box | kernel", "approximate"),
    ({"kernel_size": 5, "padding": 2}, "window(3) | box | kernel", "approximate"),
    ({"kernel_size": 3, "padding": 1}, "window(3) | box | mean*kernel", "approximate"),
    ({"kernel_size": 3, "padding": 1}, f"0.5*({{self}}) + new*({NEAR})", "approximate"),
    ({"kernel_size": 3, "padding": 1}, f"({{self}}) + ({NEAR})", "approximate"),
    ({"kernel_size": 3, "padding": 1}, f"branch(0.5, {NEAR}, {{self}}, mix)", "approximate"),
    # of another kind
    ({"kernel_size": 3, "padding": 1}, "all | row | softmax(heads=2)", "new weights"),
    ({"kernel_size": 3, "padding": 1}, "window(3) | box | depthwise", "new weights"),
    ({"kernel_size": 3, "padding": 1}, "window(3) | box | kernel(groups=2)", "new weights"),
    ({"kernel_size": 3, "padding": 1}, "window(3) | box | separable", "new weights"),
    ({"kernel_size": 3, "padding": 1}, "nearest(9, cosine) | ranked | kernel(coordinates)", "new weights"),
    ({"kernel_size": 3, "padding": 1}, "branch(0.5, {self}, {self}, split)", "new weights"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("arguments", "to", "grade"), CONVOLUTIONS)
def test_convolutions(arguments, to, grade):
    model = nn.Sequential(nn.Conv2d(4, 4, **arguments))
    x = torch.randn(2, 4, 8, 9)
    y = model(x)
    report = convert(model, Rule(to))
    (row,) = report.rows
    assert (row.status, row.grade) == ("replaced", grade), row
    mine = model(x)
    if grade == "exact":
        assert off(mine, y) <= BOUND
        assert report.difference(x) <= BOUND
        assert off(model(x[:, :, :5, :4]), report._changes[0].old(x[:, :, :5, :4])) <= BOUND  # at another size, too
    else:
        assert mine.shape != y.shape or off(mine, y) > 1e-3  # the grade is not modesty
    assert report.exact == (grade == "exact")
    assert bool(row.reason) == (grade == "approximate")


@pytest.mark.parametrize(("ndim", "to"), [
    (1, "nearest(5, position, padding=2) | box | kernel"),
    (1, "window(9) | box | kernel"),
    (3, "nearest(125, position(chebyshev), padding=2) | box | kernel"),
    (3, "deformable(5) | box | modulated*kernel"),
])  # fmt: skip
def test_convolutions_on_other_grids(ndim, to):
    model = nn.Sequential(getattr(nn, f"Conv{ndim}d")(2, 3, 5, padding=2))
    x = torch.randn(1, 2, *(9, 5, 6)[:ndim])
    y = model(x)
    assert convert(model, Rule(to)).exact
    assert off(model(x), y) <= BOUND


def test_a_convolution_by_rank_starts_with_the_middle():
    """Approximate weights are those of the slots in their order of distance, the position itself first."""
    conv = nn.Conv2d(4, 6, 3, padding=1)
    model = nn.Sequential(conv)
    assert convert(model, Rule("nearest(9, cosine, self) | ranked | kernel")).rows[0].grade == "approximate"
    assert torch.equal(model[0].weight, conv.weight.flatten(2)[:, :, [4, 1, 3, 5, 7, 0, 2, 6, 8]])
