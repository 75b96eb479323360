"""What a first hour with the library stumbled over: each is one clear line now."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import nearfold
from nearfold import Rule, cli, convert
from nearfold.extend import Path, register_path
from nearfold.nn import Mixer

SEVEN = "nearest(9, scaled) | ranked | softmax(heads=7)"


def test_layers_that_are_refused_are_warned_of():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1))
    rule = Rule("({self}) + near*(window(3) | box | softmax(heads=4))", kind="conv")
    with pytest.warns(UserWarning, match=r"1 of 2 layers that a rule asks for are refused and stay: 1: .*heads=4"):
        report = convert(model, rule)
    assert [row.status for row in report.rows] == ["replaced", "refused"]
    report.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="are refused"):
            convert(model, rule)
        assert isinstance(model[0], nn.Conv2d)
        convert(model[:1], rule)


def test_what_is_no_rule_and_no_model_is_named():
    with pytest.raises(ValueError, match=r"rules must be one Rule or several, such as Rule\(.*got 'nearest\(9\)'"):
        convert(nn.Sequential(nn.Conv2d(4, 4, 3)), "nearest(9)")
    with pytest.raises(ValueError, match=r"model must be an nn.Module, got 'resnet50'"):
        nearfold.describe("resnet50")


def test_a_model_that_does_not_take_the_images_is_not_our_fault(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text("from torch import nn\ndef net():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())\n")
    assert cli.main(["budget", f"{file}:net", "--data", "digits", "--limit", "8"]) == 2
    said = capsys.readouterr().err
    assert "mine.py:net does not take the images of --data digits, (1, 8, 8)" in said and "fault of" not in said


@pytest.mark.usefixtures("own_words")
def test_what_a_word_of_ones_own_lacks_is_named():
    @dataclass(frozen=True)
    class Corners(Path):
        word = "corners"
        shapes = ("box",)

    def reads(path, grid, device):
        last = torch.Size(grid).numel() - 1
        at = torch.tensor([0, grid[-1] - 1, last + 1 - grid[-1], last], device=device).expand(last + 1, 4)
        return at, torch.ones_like(at, dtype=torch.bool)

    register_path(Corners, reads)
    x = torch.arange(12.0).reshape(1, 1, 3, 4)
    assert torch.equal(Mixer("corners | box | mean", 1)(x), torch.full_like(x, 5.5))
    with pytest.raises(ValueError, match=r"corners has no size .*: give Corners a method slot_shape"):
        Mixer("corners | box | kernel", 1)
    register_path(Corners, lambda *a: reads(*a)[0])
    with pytest.raises(ValueError, match="corners: must read a pair of tensors"):
        Mixer("corners | box | mean", 1)(x)
    for name in ("My Word", "", "9x", "Corner"):
        with pytest.raises(ValueError, match="word must be small letters"):
            type("Named", (Path,), {"word": name})
    for shapes in ((), ("sqare",)):
        named = type("Named", (Path,), {"word": "named", "shapes": shapes})
        with pytest.raises(ValueError, match="path=Named: shapes must name some of box, ranked"):
            register_path(named, reads)
