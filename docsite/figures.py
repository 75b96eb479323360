"""What the interactive figures of docs/idea.md show: read from the library's own layers, so that it is what runs."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import torch
from torch import Tensor

from docsite.pages import Staged
from nearfold.grammar import parse
from nearfold.look.layers import features, plain_layer, read
from nearfold.look.picture import load_image
from nearfold.lower import oracle
from nearfold.lower.call import Call
from nearfold.lower.execute import execute
from nearfold.lower.selection import select

ASSETS = Path(__file__).parent / "assets"
SIDE = 12
NEAREST, STEPS = 25, 10  # the largest k, and steps of lambda from 0 to 1
SHOWN = {
    "Convolution 3x3": "window(3) | box | kernel",
    "Dilated convolution": "window(3, dilation=2) | box | depthwise",
    "Neighbourhood attention": "window(5, mode=inside) | box | softmax(heads=4)",
    "Swin, shifted": "block(6, scaled(bias=table), shift=3) | box | softmax(heads=4)",
    "Deformable convolution": "deformable(3) | box | kernel",
    "ConvNN": "nearest(9, cosine, self) | ranked | kernel",
    "k-NN attention": "nearest(9, scaled) | ranked | softmax(heads=8)",
    "Self-attention": "all | row | softmax(heads=8)",
    "Causal attention": "all | causal | softmax(heads=8)",
    "Mamba": "scan(state=16) | causal | selective",
}
"""Operators side by side on one grid; every one of them is an operation of the catalogue, or near one."""


def image() -> Tensor:
    """A square of the sample photograph (3, H, W)."""
    return load_image("sample:flower.jpg")[:, :, 110:537]


def ranked(notation: str) -> Tensor:
    """For every query the positions that an operation selects, in its own order: (N, k).

    >>> ranked("nearest(3, blend(0), self) | ranked | kernel")[0].tolist()
    [0, 1, 12]
    """
    layer, found = plain_layer(parse(notation)), []

    def spy(call: Call) -> Tensor:
        found.append(select(call).index[0, 0])
        return oracle.run(call)

    x = features(image(), (SIDE, SIDE)).repeat(1, layer.in_channels // 8, 1, 1)
    with torch.no_grad():
        execute(layer.operation, layer.tensors(), x, lambda *_: spy, out_channels=layer.made_channels)
    return found[0]


def weights(notation: str) -> Tensor:
    """How much every output reads every input, in shares of its largest: (N, N), from -127 to 127."""
    matrix = read(notation, features(image(), (SIDE, SIDE)), (0, 0)).matrix
    return (matrix / matrix.abs().amax(1, keepdim=True).clamp(min=1e-30) * 127).round().to(torch.int8)


def data() -> dict[str, object]:
    """Everything that the figures need; bytes are base64, one a position."""
    cells = torch.nn.functional.adaptive_avg_pool2d(image(), (SIDE, SIDE))
    lams = [step / STEPS for step in range(STEPS + 1)]
    orders = [ranked(f"nearest({NEAREST}, blend({lam:g}), self) | ranked | kernel") for lam in lams]
    return {
        "side": SIDE,
        "nearest": NEAREST,
        "cells": _bytes((cells.permute(1, 2, 0) * 255).round().to(torch.uint8)),
        "lams": lams,
        "orders": [_bytes(order.to(torch.uint8)) for order in orders],
        "operators": [{"name": n, "notation": op, "rows": _bytes(weights(op))} for n, op in SHOWN.items()],
    }


def _bytes(numbers: Tensor) -> str:
    return base64.b64encode(numbers.contiguous().numpy().tobytes()).decode()


def write(staged: Staged) -> None:
    """Put the figures' data, script and style. The data are a script: a page from a folder may load no other file."""
    said = json.dumps(data())
    script = (ASSETS / "figures.js").read_text(encoding="utf-8")
    staged.put("assets/figures.js", f"const NEARFOLD = {said};\n{script}")
    staged.put("assets/site.css", (ASSETS / "site.css").read_text(encoding="utf-8"))
