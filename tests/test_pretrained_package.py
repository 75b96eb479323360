"""The weights in the package: every record's file is there, is the one that was trained, and loads."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from nearfold._torchvision import load
from nearfold.models import create
from nearfold.models.hub import WEIGHTS
from nearfold.models.pretrained import FOLDER, pretrained, weights_of

CARDS = Path(__file__).parents[1] / "docs" / "models"
MOST = 3_000_000
"""Bytes of a file of weights."""


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*")))
def test_it_is_whole_and_has_a_card(name):
    entry = pretrained()[name]
    assert weights_of(name) == entry
    assert (entry.folder / WEIGHTS).stat().st_size <= MOST
    assert create(name, pretrained=True).num_classes == len(entry.classes)
    assert entry.accuracy == pytest.approx(entry.accuracies[str(entry.seed)], abs=0.005)  # rounded to bfloat16
    assert f"{entry.correct:,} of {entry.tested:,}" in (CARDS / f"{name}.md").read_text()


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*")))
def test_timm_loads_the_same(name):
    try:
        timm = load("timm")
    except ModuleNotFoundError:
        pytest.skip("timm is not installed")
    importlib.import_module("nearfold.models.timm")
    theirs, ours = timm.create_model(f"nearfold_{name}", pretrained=True), create(name, pretrained=True)
    assert all(torch.equal(a, b) for a, b in zip(theirs.state_dict().values(), ours.state_dict().values(), strict=True))
    assert timm.data.resolve_data_config({}, model=theirs)["mean"] == pretrained()[name].mean
    other = timm.create_model(f"nearfold_{name}", pretrained=True, num_classes=3)
    assert torch.equal(other.stem.weight, ours.stem.weight) and other.head.out_features == 3


def test_timm_is_told_where_there_are_none():
    try:
        timm = load("timm")
    except ModuleNotFoundError:
        pytest.skip("timm is not installed")
    importlib.import_module("nearfold.models.timm")
    with pytest.raises(ValueError, match="no weights come along for 'resnet18_conv'"):
        timm.create_model("nearfold_resnet18_conv", pretrained=True)
