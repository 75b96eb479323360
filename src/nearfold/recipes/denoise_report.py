"""The table and the picture of `nearfold.recipes.denoise`."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from torch import Tensor

from nearfold.recipes.photographs import TEST, psnr


def spread(numbers: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation.

    >>> spread([1.0, 2.0, 3.0])
    (2.0, 1.0)
    """
    return statistics.mean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else float("nan")


TWINS = ("conv", "conv, deeper")
"""Every network is compared with these: equal parameters, and equal multiply-adds."""


def ahead(results: list[dict[str, Any]], name: str, of: str) -> tuple[float, float, int, int]:
    """How far a network is ahead of another with the same seed: mean, deviation, and in how many photographs of all."""
    own, other = ({r["seed"]: r["test"] for r in results if r["network"] == network} for network in (name, of))
    apart = [[own[seed][t] - other[seed][t] for t in TEST] for seed in own]
    return *spread([statistics.mean(a) for a in apart]), sum(d > 0 for a in apart for d in a), len(own) * len(TEST)


def rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for every network of the runs at one strength of the noise.

    ``psnr`` is mean and sample standard deviation over the seeds of the test photographs' mean PSNR.
    """
    made = []
    for name in dict.fromkeys(r["network"] for r in results):
        own = [r for r in results if r["network"] == name]
        made.append(
            {
                "network": name,
                "parameters": own[0]["parameters"],
                "kmacs": own[0]["macs_per_pixel"] / 1000,
                "seconds": statistics.mean(r["cpu_seconds"] for r in own),
                "psnr": spread([statistics.mean(r["test"].values()) for r in own]),
                "ahead": [ahead(results, name, twin) if name != twin else None for twin in TWINS],
                "test": {t: statistics.mean(r["test"][t] for r in own) for t in TEST},
            }
        )
    return made


References = dict[str, dict[str, float]]
"""Name: PSNR of every test photograph."""
COLUMNS = (
    "network",
    "parameters",
    "kMACs a pixel",
    "CPU s to train",
    "PSNR",
    *(f"ahead of {twin}" for twin in TWINS),
    *TEST,
)


def markdown(
    results: list[dict[str, Any]], references: dict[float, References], networks: dict[str, tuple[str, int, str]]
) -> str:
    """The tables, one for every strength of the noise."""
    seeds = len({r["seed"] for r in results})
    lines = [
        "# Denoising",
        "",
        "Written by `python -m nearfold.recipes.denoise`. PSNR in dB on "
        f"{len(TEST)} test photographs: mean and sample standard",
        f"deviation over {seeds} seeds. Ahead: the same of the difference with the same seed, and in how many of the",
        "photographs and seeds it is positive. Then every photograph. What is compared, how, and what it says:",
        "[docs/denoising.md](../../docs/denoising.md).",
    ]
    for sigma, classical in references.items():
        table = [COLUMNS, ("---", *["---:"] * (len(COLUMNS) - 1))]
        for name, of in classical.items():
            table.append(
                (name, "", "", "", f"{statistics.mean(of.values()):.2f}", "", "", *(f"{of[t]:.2f}" for t in TEST))
            )
        for row in rows([r for r in results if r["sigma"] == sigma]):
            table.append(
                (
                    row["network"],
                    f"{row['parameters']:,}",
                    f"{row['kmacs']:.1f}",
                    f"{row['seconds']:.0f}",
                    "{:.3f} ± {:.3f}".format(*row["psnr"]),
                    *("{:+.3f} ± {:.3f}, {} of {}".format(*a) if a else "" for a in row["ahead"]),
                    *(f"{row['test'][t]:.2f}" for t in TEST),
                )
            )
        lines += ["", f"## sigma {sigma:g}", "", *("| " + " | ".join(cells) + " |" for cells in table)]
    lines += ["", "## The networks", "", "| network | mixing layers | blocks | |", "|---|---|---:|---|"]
    for name, (operation, depth, why) in networks.items():
        notation = operation.replace("|", "\\|")
        lines.append(f"| {name} | `{notation}` | {depth} | {why} |")
    return "\n".join(lines) + "\n"


def picture(panels: dict[str, Tensor], corner: tuple[int, int], file: Path, side: int = 96) -> None:
    """A detail of images (1, 1, H, W) next to one another; the last one is the truth."""
    from matplotlib.figure import Figure

    *_, truth = panels.values()
    top, left = corner
    figure = Figure(figsize=(2 * len(panels), 2.2), layout="constrained")
    for axes, (title, image) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        axes.imshow(image[0, 0, top : top + side, left : left + side].numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set_title(title if image is truth else f"{title}, {psnr(image, truth):.2f} dB", fontsize=8)
        axes.axis("off")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
