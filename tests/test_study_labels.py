"""Names beside points: none covers another, a point or a bar, and none touches one."""

import itertools

import pytest
import torch
from matplotlib.text import Text

from nearfold.study.labels import Point, name_points
from nearfold.study.plots import new_figure


@pytest.mark.parametrize("crowd", [2, 8, 20])
@pytest.mark.parametrize("seed", range(3))
def test_names_keep_apart_from_each_other_and_from_the_points(crowd, seed):
    g = torch.Generator().manual_seed(seed)
    figure = new_figure(9.2, 3.9)
    axes = figure.subplots()
    places = (50 + 4 * torch.randn(crowd, 2, generator=g)).tolist()
    axes.plot(*zip(*places, strict=True), "o")
    axes.set(xlim=(30, 70), ylim=(30, 70))
    points = [Point(x, y, y - 1, y + 1, f"operator number {i}", "#2f6db3") for i, (x, y) in enumerate(places)]
    name_points(axes, points)
    renderer = figure.canvas.get_renderer()
    assert len(axes.texts) >= min(crowd, 8) - 1
    letters = [_letters(text, renderer) for text in axes.texts]
    for one, other in itertools.combinations(letters, 2):
        assert not one.padded(4).overlaps(other), "two names touch"
    for box, (x, y) in itertools.product(letters, axes.transData.transform(places)):
        assert not box.contains(x, y)


def _letters(text, renderer):
    """Where the letters stand, without the line to the point."""
    text.update_positions(renderer)
    return Text.get_window_extent(text, renderer)
