"""Every operator of the library in core ATen, for exporters: same results, more memory, no gradient of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from nearfold.export.table import neighbours, points, scans, slots, torchs, windows
from nearfold.kernels import (  # noqa: F401, they register the operators
    choose,
    corners,
    edges,
    entmax,
    fast_weights,
    grouped_conv,
    local_attention,
    long_conv,
    sampled,
    scan,
    slot_scores,
    weigh,
)

_PLAIN = (
    *(slots.aggregate, slots.slot_scores, slots.largest, slots.entmax),
    *(windows.local_scores, windows.local_sum, windows.local_attention, windows.long_conv),
    *(points.corners, points.sampled),
    *(scans.selective_scan, scans.fast_weights),
)

LEFT_OUT = {
    "drawn": "draws candidates in training",
    "nearest_points": "is a function of ragged point sets, and in no layer",
}
"""Operators that stay as they are, and why; with them those that compute gradients."""


def decompositions(stable_topk: bool = False) -> dict[Any, Callable[..., Any]]:
    """What every operator of the library is in core ATen: for ``ExportedProgram.run_decompositions``.

    The functions compute the same, ties and NaN included. They hold all scores of a search, and all neighbours of a
    query, and have no gradients of their own.

    Args:
        stable_topk: whether the topk of what will run takes the lowest index of equal scores, as ONNX's TopK does.
            torch's takes any, so that without it score and index are ranked together.

    >>> import torch
    >>> from nearfold.export import decompositions
    >>> from nearfold.nn import ConvNN2d
    >>> program = torch.export.export(ConvNN2d(4, 4, k=3).eval(), (torch.zeros(1, 4, 5, 5),))
    >>> program = program.run_decompositions(decompositions())
    >>> any("nearfold" in str(node.target) for node in program.graph.nodes)
    False
    """
    best = neighbours.first if stable_topk else neighbours.keyed
    table: dict[str, Callable[..., Any]] = {made.__name__: made for made in _PLAIN}
    table |= {"slot_softmax": weigh.formula, "grouped_conv": grouped_conv.formula}
    table |= {made.__name__: functools.partial(made, best=best) for made in (neighbours.select, neighbours.choose)}
    found = {getattr(torch.ops.nearfold, name).default: made for name, made in table.items()}
    return found | (torchs.table() if stable_topk else {})
