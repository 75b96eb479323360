"""Names beside points: none covers another, a point or a bar, and none touches one."""

import itertools

import pytest
import torch

from nearfold.study.labels import ROOM, Point, name_points
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
    boxes = [text.get_window_extent(renderer) for text in axes.texts]
    boxes = [type(box).from_extents(box.x0, box.y0, box.x1, box.y1) for box in boxes]
    texts = [axes.texts[i].get_bbox_patch() for i in range(len(boxes))]
    assert texts == [None] * len(boxes) and len(boxes) >= min(crowd, 8) - 1
    inner = [_text_alone(text, renderer) for text in axes.texts]
    for one, other in itertools.combinations(inner, 2):
        assert not one.padded(ROOM).overlaps(other), "two names touch"
    for box, (x, y) in itertools.product(inner, axes.transData.transform(places)):
        assert not box.contains(x, y)


def _text_alone(text, renderer):
    """The extent of the letters, without the line to the point."""
    from matplotlib.text import Text

    return Text.get_window_extent(text, renderer)
