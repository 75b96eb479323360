"""Where each setting looks: one image, one position, and what the first mixing layer reads for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nearfold.look import looks
from nearfold.models import SpectrumNet
from nearfold.study.plan import Plan
from nearfold.study.plots import THEME, new_figure, plain
from nearfold.study.store import Store
from nearfold.study.tasks import build, load, source_of
from nearfold.train import ImageData, load_weights, prepare

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Look:
    """What one setting reads for one output position.

    Attributes:
        title: of the setting.
        weights: (h, w), non-negative, sums to 1: how much it reads each position of its grid.
        at: the position (row, column) on that grid.
    """

    title: str
    weights: Tensor
    at: tuple[int, int]

    @property
    def positions(self) -> float:
        """Effective number of positions read: the exponential of the entropy of the weights.

        >>> round(Look("box", torch.full((3, 3), 1 / 9), (1, 1)).positions, 3)
        9.0
        """
        return float(torch.special.entr(self.weights.double()).sum().exp())

    @property
    def reach(self) -> float:
        """Mean distance from `at` to what is read, in positions of the grid.

        >>> round(Look("line", torch.tensor([[0.5, 0.0, 0.5]]), (0, 0)).reach, 3)
        1.0
        """
        h, w = self.weights.shape
        rows = torch.arange(h, device=self.weights.device).double()[:, None] - self.at[0]
        columns = torch.arange(w, device=self.weights.device).double()[None] - self.at[1]
        return float((torch.hypot(*torch.broadcast_tensors(rows, columns)) * self.weights.double()).sum())


@dataclass(frozen=True)
class Looks:
    """What the networks of a study read of one test image.

    Attributes:
        image: (C, H, W) uint8.
        label: what is on it, and of which data set it is.
        found: one a setting, in the order of the study.
        missing: settings of which there is none, and why.
    """

    image: Tensor
    label: str
    found: Sequence[Look]
    missing: Sequence[tuple[str, str]] = ()

    def to_json(self) -> dict[str, Any]:
        """As `from_json` reads it: a text for every row of a grid, so that a reader sees the grid."""
        return {
            "label": self.label,
            "image": [_lines(channel, "d") for channel in self.image],
            "found": [
                {"setting": look.title, "at": list(look.at), "weights": _lines(look.weights, ".3g")}
                for look in self.found
            ],
            "missing": [list(pair) for pair in self.missing],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Looks:
        """What `to_json` wrote, or anybody else.

        Raises:
            ValueError: an image or weights are none.

        >>> Looks.from_json({"label": "a 4", "image": [["0 256"]], "found": [], "missing": []})
        Traceback (most recent call last):
        ValueError: an image must be rows of numbers from 0 to 255, as many in each
        """
        channels = [_grid(channel, 255.0, "an image") for channel in content["image"]]
        if len({channel.shape for channel in channels}) != 1:
            raise ValueError("an image must have channels of one size")
        found = [_look(entry) for entry in content["found"]]
        missing = [(str(title), str(why)) for title, why in content["missing"]]
        return cls(torch.stack(channels).to(torch.uint8), str(content["label"]), found, missing)


def _look(entry: Mapping[str, Any]) -> Look:
    weights = _grid(entry["weights"], 1.0, "weights")
    row, column = entry["at"]
    if not (row in range(weights.shape[0]) and column in range(weights.shape[1]) and weights.sum() > 0):
        raise ValueError(f"weights must not all be 0, and be read at a position of theirs, got {entry['at']}")
    return Look(str(entry["setting"]), weights / weights.sum(), (int(row), int(column)))


def _lines(grid: Tensor, form: str) -> list[str]:
    return [" ".join(format(value, form) for value in row) for row in grid.tolist()]


def _grid(lines: Sequence[str], most: float, what: str) -> Tensor:
    rows = [[float(value) for value in line.split()] for line in lines]
    widths = {len(row) for row in rows}
    if len(widths) != 1 or 0 in widths or not all(0 <= value <= most for row in rows for value in row):
        raise ValueError(f"{what} must be rows of numbers from 0 to {most:g}, as many in each")
    return torch.tensor(rows)


def see(planned: Plan) -> Looks | None:
    """What the networks of seed 0 read of the first test image, by the weights that their runs left.

    Args:
        planned: a study; of its data sets the first is shown.

    Returns:
        None where the study shows none, or its data are not held in memory.
    """
    first = planned.study.trials[0].data
    data = load(source_of(first.name, planned.place.sources), first)
    if not (planned.study.looks and isinstance(data, ImageData)):
        return None
    image, found, missing = data.test.images[0], [], []
    for index, trial in enumerate(planned.study.trials):
        if trial.data != first:
            continue
        model = build(trial.network, data)
        assert isinstance(model, SpectrumNet), trial
        try:
            load_weights(model, Store(planned.place.root).weights_path(planned.training[index, 0].config))
            found.append(first_look(model, prepare(image[None], data), image, trial.title))
        except ValueError as error:  # weights deleted or broken, or an operator that cannot say: told in place
            missing.append((trial.title, str(error)))
    return Looks(image, f"class {data.classes[int(data.test.labels[0])]} of {data.name}", found, missing)


def interesting_position(image: Tensor, grid: tuple[int, int]) -> tuple[int, int]:
    """The (row, column) on `grid`, off its border, around which the image (C, H, W) varies most.

    >>> image = torch.zeros(1, 8, 8); image[0, 2, 5] = 255
    >>> interesting_position(image, (8, 8))
    (2, 5)
    """
    grey = image.float().mean(0)[None, None]
    local = torch.nn.functional.adaptive_avg_pool2d(grey, grid)
    around = torch.nn.functional.avg_pool2d(local, 3, 1, padding=1, count_include_pad=False)
    contrast = (local - around).abs()[0, 0]
    margin = (grid[0] // 4, grid[1] // 4)  # the middle: what a border cuts off says little about an operator
    inside = torch.zeros_like(contrast, dtype=torch.bool)
    inside[margin[0] : grid[0] - margin[0], margin[1] : grid[1] - margin[1]] = True
    index = int(torch.where(inside, contrast, -1.0).argmax())
    return index // grid[1], index % grid[1]


def first_look(model: SpectrumNet, x: Tensor, image: Tensor, title: str) -> Look:
    """What the first mixing layer of `model` reads.

    Args:
        model: the trained network.
        x: the image as the network gets it, (1, C, H, W).
        image: the same image as stored, (C, H, W) uint8, which decides the position.
        title: of the setting.
    """
    mixer = model.mixers[0]
    seen: list[Tensor] = []
    handle = mixer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.eval()
    try:
        with torch.no_grad():
            model(x)
    finally:
        handle.remove()
    at = interesting_position(image, (seen[0].shape[-2], seen[0].shape[-1]))
    with torch.no_grad():
        weights = looks(mixer, seen[0], at)[0].float().cpu()
    return Look(title, weights, at)


def picture(seen: Looks, colours: Sequence[str]) -> Figure:
    """The image with the position marked, then one panel a setting: the image, and what is read on top.

    Args:
        seen: at least one look.
        colours: of the title of each panel.
    """
    from matplotlib.colors import ListedColormap

    ink = ListedColormap(["#b3123a"])  # how much is read is how much ink there is
    image, found, columns = seen.image, seen.found, 5
    lines = -(-(len(found) + 1) // columns)
    figure = new_figure(9.2, 2.15 * lines)
    panels: list[Any] = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel in panels:
        panel.set_axis_off()
    _image(panels[0], image, faded=False)
    _mark(panels[0], image, found[0])
    panels[0].set_title("the image, and\nthe position asked", fontsize=8.5, color=THEME["ink"])
    for panel, look, colour in zip(panels[1:], found, colours, strict=False):
        _image(panel, image, faded=True)
        share = (look.weights / look.weights.max()).clamp(min=0).numpy()
        panel.imshow(share, cmap=ink, alpha=0.95 * share**0.6, extent=_extent(image), interpolation="nearest")
        _mark(panel, image, look)
        numbers = f"{look.positions:.1f} positions, {look.reach:.1f} away"
        panel.set_title(f"{plain(look.title)}\n", fontsize=8.5, color=colour, fontweight="bold", linespacing=1.5)
        panel.text(
            0.5, 1.03, numbers, fontsize=7.5, color=THEME["soft"], ha="center", va="bottom",
            transform=panel.transAxes,
        )  # fmt: skip
    return figure


def _extent(image: Tensor) -> tuple[float, float, float, float]:
    return (0.0, float(image.shape[2]), float(image.shape[1]), 0.0)


def _image(panel: Axes, image: Tensor, *, faded: bool) -> None:
    pixels = image.float().cpu() / 255
    grey = pixels.mean(0)
    shown = 1 - 0.3 * (1 - grey) if faded else (pixels.permute(1, 2, 0) if len(image) == 3 else grey)
    panel.imshow(shown.numpy(), cmap="gray", vmin=0, vmax=1, extent=_extent(image), interpolation="nearest")


def _mark(panel: Axes, image: Tensor, look: Look) -> None:
    from matplotlib.patches import Rectangle

    height = image.shape[1] / look.weights.shape[0]
    width = image.shape[2] / look.weights.shape[1]
    corner = (look.at[1] * width, look.at[0] * height)
    panel.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="white", lw=2.6))
    panel.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="#0b5fff", lw=1.4))
