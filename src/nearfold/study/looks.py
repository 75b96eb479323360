"""Where each operator looks: one image, one position, and what the first mixing layer reads for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nearfold.look import looks
from nearfold.models import SpectrumNet
from nearfold.study.plots import THEME, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Look:
    """What one operator reads for one output position.

    Attributes:
        title: the operator.
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
        title: name of the operator.
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


def picture(image: Tensor, found: Sequence[Look], colours: Sequence[str]) -> Figure:
    """The image with the position marked, then one panel an operator: the image, and what is read on top.

    Args:
        image: (C, H, W) uint8.
        found: one look an operator.
        colours: of the title of each panel.
    """
    from matplotlib.colors import ListedColormap

    ink = ListedColormap(["#b3123a"])  # how much is read is how much ink there is
    columns = 5
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
