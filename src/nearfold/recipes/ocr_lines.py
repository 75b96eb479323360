"""Lines of text as pictures, what a reader made of them, and how much of it is right.

Printed lines: descriptions of data sets that come with scikit-learn, in fonts that come with matplotlib, blurred and
with noise. Written lines: scikit-learn's handwritten digits, six in a row. Whatever is in one part (training,
validation, test) is in no other: other descriptions, other fonts, other pictures of digits. The file seems to have the
13 writers one after another, about 138 pictures each; 147 pictures are left out before the test's, so that no writer
should be on both sides.

Shape legend: B lines, W columns of pixels. Grey values from -1 (black) to 1 (white).
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nearfold.recipes.ocr_network import HEIGHT
from nearfold.study.statistics import LEVEL, Estimate
from nearfold.train.seeds import derive

if TYPE_CHECKING:
    from PIL.Image import Image

PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...], range]] = {
    "train": (
        ("wine_data", "covtype", "kddcup99", "rcv1", "olivetti_faces", "california_housing", "lfw"),
        ("DejaVuSans-Bold", "DejaVuSerif-Italic", "DejaVuSansMono-Bold", "STIXGeneral", "STIXGeneralBol"),
        range(0, 750),
    ),
    "validation": (
        ("iris", "digits"),
        ("DejaVuSans-Oblique", "DejaVuSerif-Bold", "STIXGeneralItalic"),
        range(750, 900),
    ),
    "test": (("breast_cancer", "diabetes"), ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono"), range(1047, 1797)),
}
"""Part: scikit-learn's descriptions, matplotlib's fonts, and numbers of scikit-learn's digits."""
LETTERS, DIGITS = 32, 6
"""Characters of a printed line at most, and of a written one."""
WIDTHS = {"printed": 640, "digits": 320}
"""Columns of pixels of a line, by kind."""
SIZE = 30
"""Of a font."""
BLUR, NOISE = (0.5, 1.5), (20.0, 80.0)
"""Of a printed line, drawn between these: radius in pixels, and sigma in grey values of 256."""
DRAWS = 2000
"""Of the bootstrap."""


@dataclass(frozen=True)
class Lines:
    """Pictures (B, 3, 48, W), and what is written there."""

    images: Tensor
    texts: tuple[str, ...]


def lines(kind: str, part: str, count: int | None = None, seed: int = 0) -> Lines:
    """Lines of a kind ("printed" or "digits") of a part; the same for the same seed.

    Args:
        kind: a key of :data:`WIDTHS`.
        part: a key of :data:`PARTS`.
        count: how many; None: as many as there are without anything twice. More than that are made by drawing again:
            other noise and fonts, other rows of digits.
        seed: of fonts, noise and order.

    Raises:
        ValueError: for another kind or part.
    """
    for name, given, known in (("kind", kind, WIDTHS), ("part", part, PARTS)):
        if given not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {given!r}")
    rng = np.random.default_rng(derive(seed, kind, part))
    made = (_printed if kind == "printed" else _digits)(part, count, rng)
    return Lines(torch.stack([prepared(image, WIDTHS[kind]) for image, _ in made]), tuple(text for _, text in made))


def _printed(part: str, count: int | None, rng: np.random.Generator) -> list[tuple[Image, str]]:
    fonts, wrapped = PARTS[part][1], passages(part)
    texts = [wrapped[i % len(wrapped)] for i in range(len(wrapped) if count is None else count)]
    return [(drawn(text, fonts[int(rng.integers(len(fonts)))], rng), text) for text in texts]


def passages(part: str) -> list[str]:
    """Lines of at most 32 characters of a part's descriptions, without their rules and tables' borders.

    What all descriptions say ("class :Attribute Information:") is left to the test.
    """
    own = _wrapped(PARTS[part][0])
    tested = set(_wrapped(PARTS["test"][0])) if part != "test" else set()
    return [line for line in own if line not in tested]


def _wrapped(names: Sequence[str]) -> list[str]:
    folder = files("sklearn.datasets.descr")
    text = " ".join((folder / f"{name}.rst").read_text(encoding="utf-8") for name in names)
    words = [word for word in text.split() if word.isascii() and any(c.isalnum() for c in word)]
    return textwrap.wrap(" ".join(words), LETTERS)


def drawn(text: str, font: str, rng: np.random.Generator) -> Image:
    """A line in a font of matplotlib, dark on white, blurred and with noise."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFilter, ImageFont

    face = ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf", f"{font}.ttf")), SIZE)
    page = Image.new("L", (int(face.getlength(text)) + 16, HEIGHT), 255)
    ImageDraw.Draw(page).text((8, 6), text, font=face, fill=30)
    soft = np.asarray(page.filter(ImageFilter.GaussianBlur(rng.uniform(*BLUR))), np.float64)
    noisy = soft + rng.uniform(*NOISE) * rng.standard_normal(soft.shape)
    return Image.fromarray(noisy.clip(0, 255).round().astype(np.uint8))


def _digits(part: str, count: int | None, rng: np.random.Generator) -> list[tuple[Image, str]]:
    from PIL import Image
    from sklearn.datasets import load_digits

    data, numbers = load_digits(), np.array(PARTS[part][2])
    rows = len(numbers) // DIGITS if count is None else count
    rounds = -(-rows * DIGITS // len(numbers))
    order = np.concatenate([rng.permutation(numbers) for _ in range(max(1, rounds))])[: rows * DIGITS]
    made = []
    for row in order.reshape(rows, DIGITS):
        small = [Image.fromarray((255 - data.images[i] * 255 / 16).astype(np.uint8)) for i in row]
        large = [
            np.pad(np.asarray(s.resize((32, 40), Image.Resampling.BICUBIC)), 4, constant_values=255) for s in small
        ]
        made.append((Image.fromarray(np.concatenate(large, 1)), "".join(str(data.target[i]) for i in row)))
    return made


def prepared(image: Image, width: int) -> Tensor:
    """A picture as the recogniser wants it, (3, 48, width): as wide as its shape asks for, and grey (0) behind.

    A picture that would be wider is squeezed.
    """
    from PIL import Image

    own = min(width, max(1, round(image.width * HEIGHT / image.height)))
    small = np.asarray(image.convert("RGB").resize((own, HEIGHT), Image.Resampling.BILINEAR), np.float32)
    made = torch.zeros(3, HEIGHT, width)
    made[:, :, :own] = torch.from_numpy(small / 127.5 - 1).movedim(-1, 0)
    return made


def edits(read: str, truth: str) -> int:
    """Characters to insert, to remove or to exchange at least, to make one of the other (Levenshtein's distance).

    >>> edits("kitten", "sitting")
    3
    """
    row = list(range(len(truth) + 1))
    for i, a in enumerate(read, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(truth, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


@dataclass(frozen=True)
class Marks:
    """Of every line: the edits it would take, its length, and 1 where it is read without a fault. Spaces do not count.

    Where a line was read by several networks that are one but for the seed, these are means.
    """

    wrong: np.ndarray
    length: np.ndarray
    right: np.ndarray


def marks(read: Sequence[str], truth: Sequence[str]) -> Marks:
    """What is right of the lines that were read.

    >>> marks(["ab c", "xy"], ["abc", "y"])
    Marks(wrong=array([0., 1.]), length=array([3., 1.]), right=array([1., 0.]))
    """
    pairs = [(a.replace(" ", ""), b.replace(" ", "")) for a, b in zip(read, truth, strict=True)]
    wrong = np.array([float(edits(a, b)) for a, b in pairs])
    return Marks(wrong, np.array([float(len(b)) for _, b in pairs]), (wrong == 0).astype(float))


def pooled(several: Sequence[Marks]) -> Marks:
    """The means of several networks' marks of the same lines."""
    found = (np.mean([getattr(m, name) for m in several], 0) for name in ("wrong", "length", "right"))
    return Marks(*found)


COUNTED: dict[str, Callable[[Marks], tuple[np.ndarray, np.ndarray]]] = {
    "characters": lambda m: (m.length - m.wrong, m.length),
    "lines": lambda m: (m.right, np.ones_like(m.right)),
}
"""What a share may be of: how much of every line is read, and of how much."""


def share(what: str, own: Marks, other: Marks | None = None, seed: int = 0) -> Estimate:
    """The share of the characters or lines that is read; or by how much it is above another network's.

    Of characters it is 1 - edits / characters. The interval is over draws of the lines with replacement (percentiles of
    the bootstrap), the same ones for both networks.

    Args:
        what: a key of :data:`COUNTED`.
        own: what a network made of the lines.
        other: what another one made of the same lines.
        seed: of the draws.
    """
    read, of = COUNTED[what](own)
    read = read - COUNTED[what](other)[0] if other is not None else read
    drawn = np.random.default_rng(seed).integers(len(of), size=(DRAWS, len(of)))
    low, high = np.quantile(read[drawn].sum(1) / of[drawn].sum(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(read.sum() / of.sum()), float(low), float(high), len(of), float("nan"))
