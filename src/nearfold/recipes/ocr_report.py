"""The tables and the picture of `nearfold.recipes.ocr`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from nearfold import _images
from nearfold.look import mixing_matrix
from nearfold.recipes.ocr_lines import COUNTED, WIDTHS, lines
from nearfold.recipes.ocr_network import STRIDE, Recogniser
from nearfold.recipes.ocr_tune import Seen

WHATS = tuple(COUNTED)


def percent(numbers: list[float] | None, sign: str = "") -> str:
    """A share and its interval in percent.

    >>> percent([0.5, 0.4, 0.625]), percent([0.01, -0.01, 0.02], "+"), percent(None)
    ('50.0 [40.0, 62.5]', '+1.0 [-1.0, +2.0]', '')
    """
    if numbers is None:
        return ""
    return "{:{s}.1f} [{:{s}.1f}, {:{s}.1f}]".format(*(round(100 * n, 1) + 0.0 for n in numbers), s=sign)


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """A table in Markdown; numbers stand right.

    >>> table(["network", "k"], [["a", "8"]])
    ['| network | k |', '|---|---:|', '| a | 8 |']
    """
    ruled = "|---|" + "---:|" * (len(columns) - 1)
    first, *others = ["| " + " | ".join(cells) + " |" for cells in (columns, *rows)]
    return [first, ruled, *others]


def _read(row: dict[str, Any], part: str, sign: str = "") -> list[str]:
    """A part of the scores of both kinds, characters and lines."""
    return [percent(row[kind].get(part, {}).get(what), sign) for kind in WIDTHS for what in WHATS]


def markdown(found: dict[str, Any]) -> str:
    """The tables of what `run` found; only the times where that is all there is."""
    where = ", ".join(f"{name} {value}" for name, value in found["environment"].items())
    lines_ = [
        "# Reading text with fewer keys",
        "",
        "Written by `python -m nearfold.recipes.ocr`. What is compared, how, and what it says:",
        "[docs/ocr.md](../../docs/ocr.md).",
        "",
        f"{found['date']}; {where}.",
        "",
        "Largest difference of a probability from onnxruntime's: "
        + ", ".join(f"{value:.1e} at {width} pixels" for width, value in found["onnxruntime"].items())
        + ".",
    ]
    both = [f"{kind}: {what}" for kind in WIDTHS for what in WHATS]
    if "untrained" in found:
        counts = "; ".join(
            f"{kind}: {n['test']} lines, {n['characters']} characters" for kind, n in found["lines"].items()
        )
        lines_ += [
            "",
            f"Percent that is read, with 95 % intervals over the lines ({counts}).",
            "",
            "## Without training",
            "",
        ]
        lines_ += table(["attention", *both], [[r["network"], *_read(r, "read")] for r in found["untrained"]])
        lines_ += ["", "By how much more than the network as it was, line by line:", ""]
        lines_ += table(["attention", *both], [[r["network"], *_read(r, "ahead", "+")] for r in found["untrained"][1:]])
        lines_ += ["", "What `convert` reports of both layers, and their multiply-adds at 80 tokens:", ""]
        lines_ += table(
            ["attention", "is now", "grade", "difference of the output", "million multiply-adds"],
            [
                [
                    r["network"],
                    "`{}`".format(r["operation"].replace("|", "\\|")),
                    r["grade"],
                    f"{r['difference']:.1e}",
                    f"{r['macs'] / 1e6:.2f}",
                ]
                for r in found["untrained"][1:]
            ],
        )
        t = found["train"]
        lines_ += [
            "",
            "## After training",
            "",
            f"{t['seeds']} seeds, {t['steps']} steps of {t['batch']} lines, learning rate {t['lr']:g}.",
            "",
        ]
        lines_ += table(
            ["attention", "seconds", *both],
            [[r["network"], f"{r['seconds']:.0f}", *_read(r, "read")] for r in found["trained"]],
        )
        lines_ += ["", "By how much more than the network as it was after the same training:", ""]
        lines_ += table(["attention", *both], [[r["network"], *_read(r, "ahead", "+")] for r in found["trained"][1:]])
        lines_ += ["", "By how much more than the same network before its training:", ""]
        gained = [
            [r["network"], *_read({k: {"gained": g} for k, g in r["gained"].items()}, "gained", "+")]
            for r in found["trained"]
        ]
        lines_ += table(["attention", *both], gained)
    lines_ += [
        "",
        "## Times",
        "",
        "One line; medians, the networks in turn. Ratio: over the network as it was, round by round.",
        "",
    ]
    lines_ += table(
        ["what", "attention", "ms", "ratio"],
        [
            [
                "whole network, 640 pixels" if r["tokens"] is None else f"one attention layer, {r['tokens']} tokens",
                r["network"],
                f"{r['milliseconds']:.2f}",
                f"{r['ratio']:.2f}",
            ]
            for r in found["times"]
        ],
    )
    return "\n".join(lines_) + "\n"


@torch.no_grad()
def reading(net: Recogniser, features: torch.Tensor, block: int) -> torch.Tensor:
    """By how much every token of a line reads every other one in a block, mean of the heads: (N, N)."""
    caught: list[torch.Tensor] = []
    attention = net.attention(block)
    hook = attention.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    try:
        net.read_features(features)
    finally:
        hook.remove()
    return mixing_matrix(attention.mixer, caught[0])[0].mean(0)


def picture(nets: dict[str, Recogniser], printed: Seen, file: Path, line: int = 0, token: int = 20) -> None:
    """Where one token of a test line looks, in both blocks of every network (converted ones)."""
    from matplotlib.figure import Figure

    image = lines("printed", "test", line + 1).images[line, 0]
    columns = min(image.shape[1], int(image.ne(0).any(0).nonzero().max()) + 1)
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = iter(figure.subplots(2 * len(nets), 1))
    for name, net in nets.items():
        for block in range(len(net.blocks)):
            row = reading(net, printed.features[line : line + 1], block)[token]
            at = next(axes)
            at.imshow(image[:, :columns].numpy(), cmap="gray", vmin=-1.5, vmax=1.5)
            shade = (row / row.max()).repeat_interleave(STRIDE)[None, :columns].numpy()
            at.imshow(shade, cmap="Reds", alpha=0.6 * shade, extent=(0, columns, image.shape[0], 0), vmin=0, vmax=1)
            at.axvspan(token * STRIDE, (token + 1) * STRIDE, fill=False, edgecolor="tab:blue")
            at.set_title(f"block {block + 1}, {name}", fontsize=8)
            at.axis("off")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=90)
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = _images.picture(drawn.getvalue(), "the figure", "RGB")
    whole.quantize(64).save(file, optimize=True)  # noise is large in more colours
