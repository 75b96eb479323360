"""`look`: a photograph, a place in it, and what every operator reads for it, as one picture.

Shape legend: F features, C channels, h, w the grid of patches, M outputs, N positions.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold._images import picture, read_file
from nearfold.grammar import Operation
from nearfold.look.layers import SHARPNESS, STEP, Reading, features, read

if TYPE_CHECKING:
    import numpy
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure

DEFAULT = ("conv", "attention", "convnn", "swin", "mamba", "deformable")
"""The operators that `look` shows when none are named."""
CELLS = 196  # a mixing matrix is drawn with about so many cells on a side
MARK = "#0b5fff"
HOW_TO_READ = """\
Above: the position asked (blue).

To the right, for every operator: the image in grey, and in colour how much it reads each patch for the position \
asked. Patches without colour are not read.

Below each: its whole mixing matrix, a line for each output position and a column for each input position, in raster \
order. The blue marks at its edges are the position asked: its line is the picture above, unrolled."""
CAPTION = """\
No layer here is trained. A patch is described by 8 numbers (its colour, contrast, slopes and edges, each normalised \
over the image, then each patch to one length). Queries, keys and values are these numbers themselves, the query \
times {sharpness:g}, and all heads see all of them. Kernels average their slots. The slots of a deformable window \
slide uphill, towards brighter patches. A scan writes and reads the features (B and C), each step is {step:g}, \
without the skip D; gates are half open. Tables, and the maps that generate kernels, are random (seed 0). Heads and \
channels are averaged. Colours follow the square root of the weight: above up to the largest of the row, below up to \
the strongest hundredth of the matrix, of which every cell of the picture shows the strongest of its weights."""


def look(
    image: str | Path | numpy.ndarray[Any, Any] | Tensor,
    operations: Sequence[str | Operation] = DEFAULT,
    at: tuple[int, int] | None = None,
    *,
    size: int = 28,
) -> Figure:
    """Draw what operations read of a photograph for one position, and their mixing matrices.

    The image becomes a grid of ``size`` x ``size`` patches with 8 features each: brightness, red - green, blue -
    yellow, contrast, the slopes of brightness down and right, horizontal and vertical edges; each normalised over the
    image, then each patch to one length. An untrained layer with random weights would say little, so that the layers
    are plain ones:

    - query, key, value and out are the features themselves (identity, no biases; the query times 2). The features are
      repeated for every head, so that each sees them all;
    - kernels average their slots (next to softmax: they are ones); position tables are zero;
    - each slot of a `deformable` window slides along the gradient of brightness at the place where the window has it;
    - a `scan` writes and reads the features (B and C), with a step of 0.01, no skip D, and gates half open;
    - what nothing stands for (`table`, the maps of `generated`, learned encodings) stays random, from seed 0;
    - a `table` is made for as many positions as the grid has, and windows for sequences run over the raster order.

    The weights come from `nearfold.look.mixing_matrix`, averaged over heads or channels.

    Args:
        image: a path, ``sample:china.jpg`` or ``sample:flower.jpg`` (scikit-learn's), or an array: (H, W) or
            (H, W, 3), uint8 or from 0 to 1.
        operations: in the notation, or names of the catalogue.
        at: (row, column) of the position asked, in pixels of the image; default its middle.
        size: patches along each side.

    Returns:
        A figure that belongs to no window; ``.savefig("look.png")`` writes it.

    Raises:
        ValueError: what is not an image or an operation, or a position outside.

    >>> figure = look(torch.rand(32, 32, 3), ["conv", "all | row | softmax(heads=2)"], (10, 20), size=8)
    >>> [text.get_text() for text in figure.axes[1].texts][-1]
    'Convolution 3x3'
    """
    pixels = load_image(image)
    height, width = pixels.shape[1:]
    at = place(pixels, at)
    if type(size) is not int or not 2 <= size <= min(height, width):
        raise ValueError(
            f"size must be an integer from 2 to {min(height, width)}, as the image is {height} x {width}, got {size!r}"
        )
    if not operations:
        raise ValueError(f"name at least one operation, such as {', '.join(DEFAULT)}")
    x = features(pixels, (size, size))
    patch = (at[0] * size // height, at[1] * size // width)
    caption = CAPTION.format(sharpness=SHARPNESS, step=STEP)
    return draw(pixels, [read(op, x, patch) for op in operations], at, caption)


# --- the image


def place(pixels: Tensor, at: tuple[int, int] | None) -> tuple[int, int]:
    """The position asked of an image (3, H, W), by default its middle.

    Raises:
        ValueError: it is outside.
    """
    height, width = pixels.shape[1:]
    at = (height // 2, width // 2) if at is None else at
    if len(at) != 2 or not (0 <= at[0] < height and 0 <= at[1] < width):
        raise ValueError(
            f"at={tuple(at)} is outside the image, which has {height} rows and {width} columns: rows 0 to "
            f"{height - 1}, columns 0 to {width - 1}"
        )
    return at


def load_image(image: str | Path | numpy.ndarray[Any, Any] | Tensor) -> Tensor:
    """An image as (3, H, W), float32 from 0 to 1.

    >>> load_image(torch.zeros(4, 5)).shape
    torch.Size([3, 4, 5])
    """
    if isinstance(image, str | Path):
        image = _opened(str(image))
    raw = torch.as_tensor(image)
    if raw.dim() == 2:
        raw = raw[..., None].expand(-1, -1, 3)
    if raw.dim() != 3 or raw.shape[2] not in (3, 4) or min(raw.shape) == 0:
        raise ValueError(f"an image is (H, W) or (H, W, 3), got an array of shape {tuple(raw.shape)}")
    pixels = raw[..., :3].permute(2, 0, 1).float() / (1 if raw.is_floating_point() else 255)
    if not (pixels.min() >= 0 and pixels.max() <= 1):
        raise ValueError(
            f"an image is uint8, or floating point from 0 to 1, got values from {float(raw.min()):g} to "
            f"{float(raw.max()):g}"
        )
    return pixels


def _opened(name: str) -> Any:
    """Pixels (H, W, 3) of a file, or of one of scikit-learn's sample photographs."""
    import numpy

    if name.startswith("sample:"):
        from sklearn.datasets import load_sample_image

        samples = ("china.jpg", "flower.jpg")
        if name[7:] not in samples:
            raise ValueError(f"{name}: the sample photographs are {' and '.join('sample:' + s for s in samples)}")
        return numpy.array(load_sample_image(name[7:]))
    if not Path(name).exists():
        raise ValueError(f"{name}: no such file (without one of your own: sample:china.jpg)")
    return numpy.array(picture(read_file(Path(name)), name, "RGB"))


# --- the picture: measures in inches, from the upper left corner

CELL, PANEL, LINE = 3.5, 2.6, 0.17
LEFT, RIGHT = 0.5, 0.4  # for the labels of axes


def _patch(at: tuple[int, int], pixels: Tensor, row: Tensor) -> tuple[int, int]:
    """In which cell of a row (h, w) a pixel of an image lies."""
    (height, width), (h, w) = pixels.shape[1:], row.shape
    return at[0] * h // height, at[1] * w // width


def draw(pixels: Tensor, readings: Sequence[Reading], at: tuple[int, int], about: str) -> Figure:
    """Draw an image and what was read of it.

    Args:
        pixels: (3, H, W), from 0 to 1.
        readings: at least one; each has a grid of its own.
        at: the pixel asked, row and column.
        about: what is said below.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(4, len(readings) + 1)
    cells: list[Reading | None] = [None, *readings]
    bands = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    headings = [max(sum(map(len, _heading(reading))) for reading in band if reading is not None) for band in bands]
    tall = PANEL * min(max(pixels.shape[1] / pixels.shape[2], 0.3), 2.0)
    caption = textwrap.fill(about, int(15.5 * CELL * columns))
    below = LINE * (caption.count("\n") + 2)
    height = below + sum(LINE * n + tall + PANEL + 1.0 for n in headings)
    figure = Figure(figsize=(CELL * columns + RIGHT, height), dpi=130)
    FigureCanvasAgg(figure)

    def panel_at(left: float, top: float, width: float, tall: float) -> Axes:
        whole = figure.get_figwidth()
        return figure.add_axes((left / whole, 1 - (top + tall) / height, width / whole, tall / height))

    top = 0.0
    for band, lines in zip(bands, headings, strict=True):
        first = top + 0.25 + LINE * lines
        for column, reading in enumerate(band):
            left = LEFT + CELL * column
            panel = panel_at(left, first, PANEL, tall)
            if reading is None:
                _show_image(panel, pixels, readings[0].row, at)
                continue
            _show_row(panel, panel_at(left + PANEL + 0.07, first, 0.09, tall), pixels, reading, at)
            _show_matrix(panel_at(left, first + tall + 0.2, PANEL, PANEL), reading)
        top = first + tall + PANEL + 0.75
    figure.text(LEFT / figure.get_figwidth(), below / height, caption, va="top", fontsize=8, color="#555555")
    return figure


def _heading(reading: Reading) -> tuple[list[str], list[str]]:
    """Lines above a panel: its name, and what is said about it."""
    notation = textwrap.wrap(reading.notation, 44 if reading.title else 38)
    return ([reading.title], [*notation, reading.summary]) if reading.title else (notation, [reading.summary])


def _show_heading(panel: Axes, name: Sequence[str], about: Sequence[str]) -> None:
    lines = [(line, True) for line in name] + [(line, False) for line in about]
    for above, (line, bold) in enumerate(reversed(lines)):
        panel.annotate(
            line, (0, 1), xytext=(0, 5 + 72 * LINE * above), xycoords="axes fraction", textcoords="offset points",
            fontsize=9 if bold else 8, fontweight="bold" if bold else "normal",
            color="#222222" if bold else "#555555", annotation_clip=False,
        )  # fmt: skip


def _show_image(panel: Axes, pixels: Tensor, row: Tensor, at: tuple[int, int]) -> None:
    panel.imshow(pixels.permute(1, 2, 0).numpy(), extent=_extent(pixels), interpolation="nearest", aspect="auto")
    panel.set_axis_off()
    _mark(panel, pixels, row, _patch(at, pixels, row))
    grid = " x ".join(map(str, row.shape))
    where = f"row {at[0]}, column {at[1]} of {pixels.shape[1]} x {pixels.shape[2]} pixels"
    _show_heading(panel, ["The image, and the position asked"], [where, f"seen as {grid} patches"])
    text = "\n".join(textwrap.fill(line, 46) for line in HOW_TO_READ.split("\n"))
    panel.annotate(
        text, (0, 0), xytext=(0, -14), xycoords="axes fraction", textcoords="offset points",
        va="top", fontsize=8, color="#333333", linespacing=1.35, annotation_clip=False,
    )  # fmt: skip


def _show_row(panel: Axes, side: Axes, pixels: Tensor, reading: Reading, at: tuple[int, int]) -> None:
    from matplotlib.cm import ScalarMappable

    extent = _extent(pixels)
    grey = 0.62 + 0.38 * pixels.mean(0)
    panel.imshow(grey.numpy(), cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="nearest", aspect="auto")
    most = float(reading.row.abs().max()) or 1.0
    colours, norm = _colours(reading.signed, most)
    panel.imshow(
        reading.row.numpy(), cmap=colours, norm=norm, extent=extent, interpolation="nearest", aspect="auto"
    )  # fmt: skip
    panel.set_axis_off()
    _mark(panel, pixels, reading.row, _patch(at, pixels, reading.row))
    _show_heading(panel, *_heading(reading))
    marks = [0.0, most / 4, most]
    bar = panel.figure.colorbar(ScalarMappable(norm, colours), cax=side)
    bar.set_ticks([-m for m in marks[:0:-1]] + marks if reading.signed else marks)
    bar.minorticks_off()
    side.yaxis.set_major_formatter("{x:.2g}")
    side.tick_params(labelsize=7, length=2, pad=2)
    bar.set_label("weight", fontsize=7.5, labelpad=4)


def _show_matrix(panel: Axes, reading: Reading) -> None:
    pooled = _pooled(reading.matrix)
    some = pooled.abs()[pooled != 0]
    # a few entries far above the others would leave these without colour
    most = float(some.quantile(0.99)) if len(some) else 1.0
    colours, norm = _colours(reading.signed, most)
    outputs, inputs = reading.matrix.shape
    extent = (0, inputs, outputs, 0)
    panel.imshow(pooled.numpy(), cmap=colours, norm=norm, aspect="auto", interpolation="nearest", extent=extent)
    for edge, marker in ((0, ">"), (inputs, "<")):
        panel.plot(edge, reading.line + 0.5, marker, color=MARK, markersize=6, clip_on=False)
    panel.set(xlim=(0, inputs), ylim=(outputs, 0), xticks=[0, inputs], yticks=[0, outputs])
    panel.tick_params(labelsize=7, length=2, colors="#555555")
    for spine in panel.spines.values():
        spine.set(color="#888888", linewidth=0.8)
    panel.set_xlabel("input position (raster order)", fontsize=7.5, labelpad=-6, color="#333333")
    panel.set_ylabel("output position", fontsize=7.5, labelpad=-10, color="#333333")


def _pooled(matrix: Tensor) -> Tensor:
    """Smaller, every cell the weight in it that is furthest from zero: single points stay visible.

    >>> _pooled(torch.eye(2 * CELLS)).shape == (CELLS, CELLS)
    True
    """
    size = [min(n, CELLS) for n in matrix.shape]
    high, low = (F.adaptive_max_pool2d(m[None, None], size)[0, 0] for m in (matrix, -matrix))
    return torch.where(high >= low, high, -low)


def _colours(signed: bool, most: float) -> tuple[Colormap, Normalize]:
    """Colours that fade into the background at zero, on a scale of square roots; two hues where weights are signed."""
    import numpy
    from matplotlib import colormaps
    from matplotlib.colors import FuncNorm, ListedColormap

    scale = numpy.linspace(-1 if signed else 0, 1, 513)
    base = colormaps["RdBu_r"](0.5 + scale / 2) if signed else colormaps["inferno_r"](0.1 + 0.75 * scale)
    base[:, 3] = numpy.where(scale == 0, 0, 0.25 + 0.7 * numpy.abs(scale))
    norm = FuncNorm(
        (lambda w: numpy.sign(w) * numpy.sqrt(numpy.abs(w)), lambda r: numpy.sign(r) * r**2),
        vmin=-most if signed else 0, vmax=most,
    )  # fmt: skip
    return ListedColormap(base), norm


def _extent(pixels: Tensor) -> tuple[float, float, float, float]:
    return (0.0, float(pixels.shape[2]), float(pixels.shape[1]), 0.0)


def _mark(panel: Axes, pixels: Tensor, row: Tensor, patch: tuple[int, int]) -> None:
    """A frame around a patch, not over it, and marks at the edges that find it where patches are small."""
    from matplotlib.patches import Rectangle

    height, width = pixels.shape[1:]
    high, wide = height / row.shape[0], width / row.shape[1]
    top, left = max(0.0, (patch[0] - 0.3) * high), max(0.0, (patch[1] - 0.3) * wide)
    bottom, right = min(height, (patch[0] + 1.3) * high), min(width, (patch[1] + 1.3) * wide)
    thick = min(1.5, 16 * PANEL / row.shape[1])  # a fifth of a patch: its neighbours stay visible too
    for colour, line in (("white", 1.9 * thick), (MARK, thick)):
        panel.add_patch(
            Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, lw=line, clip_on=False)
        )
    panel.plot(0, (patch[0] + 0.5) * high, ">", color=MARK, markersize=5, clip_on=False)
    panel.plot((patch[1] + 0.5) * wide, height, "^", color=MARK, markersize=5, clip_on=False)
    panel.set(xlim=(0, width), ylim=(height, 0))
