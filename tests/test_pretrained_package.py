"""The weights in the package: every record's file is there, is the one that was trained, and loads."""

from __future__ import annotations

from pathlib import Path

import pytest

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
