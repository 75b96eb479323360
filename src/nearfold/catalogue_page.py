"""The catalogue as one page: every operator with its notation, paper, costs and a picture of what it mixes.

The page asks for nothing outside itself. Texts reach it through a template with autoescaping.
"""

from __future__ import annotations

import base64
import math
import re
import struct
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nearfold._pages import environment
from nearfold.grammar import Entry
from nearfold.grammar.complexity import c_d
from nearfold.look.layers import features, plain_layer
from nearfold.look.mixing import mixing_matrix
from nearfold.lower import explain

if TYPE_CHECKING:
    pass

SIDE = 8  # of the map that matrices are drawn of
CHANNELS = 64  # of the layer whose costs are told
COLOURS = ((58, 124, 201), (219, 104, 52))  # of positive and negative weights, on white and on black
HEADS = ("Name", "Notation", "Family", "Paper", "Year", "Parameters", "MFLOPs", "C_D", "Runs on")
KINDS = ("name", "code", "family", "source", "number", "number", "number", "number", "runs")


@dataclass(frozen=True)
class Cell:
    """A cell: its text, what it is sorted by (None: its text), a line under it, and where it leads."""

    text: str
    sort: float | None = None
    under: str = ""
    link: str = ""


@dataclass(frozen=True)
class Row:
    """An operator: a data URI of its picture, or why there is none, and the cells of `HEADS`."""

    name: str
    title: str
    family: str
    words: Sequence[str]
    picture: str
    missing: str
    cells: Sequence[Cell]


def page(families: Mapping[str, Sequence[tuple[Entry, int | None]]]) -> str:
    """The catalogue, or a part of it, as one HTML document.

    Args:
        families: by name, entries with the years of their papers (None where the source says none).

    >>> from nearfold import CATALOGUE
    >>> text = page({"fixed window": [(CATALOGUE["conv"], None)]})
    >>> text.startswith("<!doctype html>"), text.count("<img ")
    (True, 1)
    """
    rows = [_row(family, entry, year) for family, entries in families.items() for entry, year in entries]
    return environment("nearfold.look").get_template("ops.html.jinja").render(
        title="The periodic table of operators",
        rows=rows,
        families=list(families),
        heads=HEADS,
        kinds=KINDS,
        notes=(
            f"Matrix: a row for every output position, a column for every input position, on a map of {SIDE} x {SIDE} "
            f"positions in raster order (a sequence of {SIDE * SIDE} where the operator is for sequences). Blue weighs "
            "positive, orange negative; the strongest weight has the full colour, and heads are averaged. Drawn by "
            "nearfold.mixing_matrix of a layer with plain weights, on features of a made picture, a disc and a ramp.",
            f"Parameters and MFLOPs (forward, one input) of a layer of {CHANNELS} channels on the same map. C_D counts "
            "what has to be said to describe the operator: docs/complexity.md. Runs on: what runs it on a CPU.",
        ),
        made="Made by nearfold ops --html.",
    )  # fmt: skip


def _row(family: str, entry: Entry, year: int | None) -> Row:
    op = entry.operation
    told = explain(op, (1, CHANNELS, *((SIDE * SIDE,) if op.for_sequences else (SIDE, SIDE))))
    backends = "+".join(dict.fromkeys(part.backend for part in told.parts))
    flops, score = told.forward_flops / 1e6, c_d(op)
    picture, missing = "", ""
    try:
        picture = drawn(matrix_of(entry))
    except ValueError as error:
        missing = f"No picture: {error}"
    found = re.fullmatch(r"(arXiv|doi) (\S+)", entry.source)
    where = {"arXiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}
    cells = (
        Cell(entry.title, under=entry.name),
        Cell(entry.notation),
        Cell(family),
        Cell(entry.source, link=where[found[1]] + found[2] if found else ""),
        Cell("" if year is None else str(year), math.nan if year is None else year),
        Cell(f"{told.parameters:,}", told.parameters),
        Cell(f"{flops:.3g}", flops),
        Cell(f"{score:g}", score),
        Cell(backends),
    )
    return Row(entry.name, entry.title, family, entry.words, picture, missing, cells)


def matrix_of(entry: Entry) -> Tensor:
    """The mixing matrix (M, N) of an operator with plain weights, heads averaged, on a small map of a made picture."""
    op = entry.operation.map(lambda part: part.sized(SIDE * SIDE))
    layer = plain_layer(op, 1 if op.for_sequences else 2)
    x = _made(SIDE, SIDE).repeat(1, layer.in_channels // 8, 1, 1)
    context = _made(SIDE // 2, SIDE // 2).repeat(1, layer.in_channels // 8, 1, 1) if op.needs_context else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of slots that so small a map cannot fill
        matrix = mixing_matrix(layer, x.flatten(2) if op.for_sequences else x, context=context)[0].mean(0)
    if not matrix.isfinite().all() or not matrix.any():
        raise ValueError("its matrix on this map is zero, or no number")
    return matrix


def _made(rows: int, columns: int) -> Tensor:
    """Features (1, 8, rows, columns) of a made picture: a ramp, and a disc on it."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 96), torch.linspace(0, 1, 96), indexing="ij")
    disc = ((x - 0.62).square() + (y - 0.4).square() < 0.09).float()
    pixels = torch.stack([0.2 + 0.5 * x + 0.3 * disc, 0.3 + 0.4 * y * (1 - disc), 0.6 - 0.3 * x * y + 0.2 * disc])
    return features(pixels, (rows, columns))


def drawn(matrix: Tensor) -> str:
    """A matrix (M, N) as a PNG in a data URI.

    >>> drawn(torch.eye(2))[:22]
    'data:image/png;base64,'
    """
    return "data:image/png;base64," + base64.b64encode(png(matrix)).decode()


def png(matrix: Tensor) -> bytes:
    """A matrix (M, N) as a PNG file: how strong a weight is says the alpha channel, on any ground.

    >>> png(torch.eye(2))[1:4]
    b'PNG'
    """
    share = matrix / matrix.abs().amax().clamp(min=1e-30)
    # the root: weak weights are seen beside strong ones
    level = (share.abs().sqrt() * 127).round().to(torch.uint8) + (share < 0).to(torch.uint8) * 128
    rows, columns = level.shape
    palette = b"".join(bytes(colour) * 128 for colour in COLOURS)
    alpha = bytes(round(255 * i / 127) for i in range(128)) * 2
    raw = b"".join(b"\0" + bytes(line) for line in level.tolist())
    head = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"PLTE", palette), (b"tRNS", alpha), (b"IDAT", zlib.compress(raw, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
