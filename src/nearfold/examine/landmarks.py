"""Which operators of the catalogue look most as a layer does: their plain layers, measured on two photographs."""

from __future__ import annotations

import functools
import math

import torch

from nearfold.grammar import CATALOGUE
from nearfold.look.layers import features, plain_layer
from nearfold.look.measures import measure
from nearfold.look.mixing import mixing_matrix
from nearfold.look.picture import load_image
from nearfold.nn.mixer import TokenMixer

NAMES = (
    "pointwise", "conv", "conv_dilated", "convnext", "large_kernel", "deformable", "dcn_v3", "involution",
    "neighborhood", "swin", "swin_shifted", "halo", "maxvit_grid", "axial", "criss_cross", "bilateral", "blend",
    "convnn",
    "convnn_attention", "kvt", "local_nearest", "biformer", "vig", "attention", "attention_causal", "linear_attention",
    "xca", "pool_global", "mamba", "scan_cross", "retention", "s4nd",
)  # fmt: skip
"""Of the catalogue, one for each way to look."""
COMPARED = ("reach", "density", "window3", "before", "content", "translation")
ROWS = 32
FARTHEST = 32  # side of the largest grid on which they are measured
SCANS = ("mamba", "scan_cross", "retention")  # whose matrix takes seconds on more positions than
FEW = 256


@functools.lru_cache(maxsize=16)
def landmarks(grid: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """The measures of the catalogue's operators on a grid of two axes, by name; without scans on a large one.

    >>> round(landmarks((7, 7))["pool_global"]["reach"], 6)
    1.0
    """
    images = [features(load_image(f"sample:{name}.jpg"), (grid[0], grid[1])) for name in ("china", "flower")]
    rows = torch.randperm(math.prod(grid), generator=torch.Generator().manual_seed(0))[:ROWS].sort().values
    found = {}
    for name in NAMES:
        if name in SCANS and math.prod(grid) > FEW:
            continue
        op = CATALOGUE[name].operation.map(lambda part: part.sized(math.prod(grid)))
        layer = plain_layer(op, 1 if op.for_sequences else 2)
        assert not isinstance(layer, TokenMixer)
        matrices = []
        for x in images:
            tiled = x.repeat(1, layer.in_channels // x.shape[1], 1, 1)
            tiled = tiled.flatten(2) if op.for_sequences else tiled
            matrices.append(mixing_matrix(layer, tiled, rows=rows)[:, :4])
        kept = measure(torch.cat(matrices), grid, rows).mean()
        found[name] = kept | {"density": kept["spread"] / math.prod(grid)}
    return found


def nearest_words(measures: dict[str, float], density: float, grid: tuple[int, ...], count: int = 3) -> list[str]:
    """The operators of the catalogue that measure most alike, the nearest first.

    Compared are reach, window3, before, content and translation as they are, and the logarithm of the density; the
    distance is the root mean square of those that both have.
    """
    mine = measures | {"density": density}

    def apart(name: str) -> float:
        other = landmarks(grid)[name]
        differences = [_scaled(c, mine[c]) - _scaled(c, other[c]) for c in COMPARED]
        there = [d for d in differences if not math.isnan(d)]
        return math.sqrt(sum(d * d for d in there) / len(there)) if there else math.inf

    return sorted(landmarks(grid), key=apart)[:count]


def _scaled(name: str, value: float) -> float:
    return math.log10(max(value, 1e-6)) / 2 if name == "density" else value
