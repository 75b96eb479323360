"""`python -m benchmarks --curves`: time of k-NN attention over the number of positions, and of neighbours.

Every point is compared with the naive formulation first, in float64, outputs and gradients. Results go to
curves-PROCESSOR.json, as they grow, and are drawn to the .png beside it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import build, plot
from benchmarks.machine import comparable, describe, slug
from benchmarks.run import measure

HEADS, FEATURES = 4, 64
WHOLE = 2048  # positions up to which all queries are compared, not a sample
PYTORCH_PATH = 4096  # positions up to which ours is timed without the engine


@dataclass(frozen=True)
class Curve:
    """Points of a curve: (positions, neighbours)."""

    points: tuple[tuple[int, int], ...]
    small: tuple[tuple[int, int], ...]


CURVES: dict[str, Curve] = {
    "positions": Curve(tuple((256 << i, 9) for i in range(7)), ((20, 9), (40, 9))),
    "neighbours": Curve(tuple((4096, 1 << i) for i in range(8)), ((40, 1), (40, 4))),
}


def _point(N: int, k: int, repeats: int, budget: float) -> dict[str, Any]:
    torch.manual_seed(0)
    check = "checks" if N <= WHOLE else "samples"
    case = build.knn_attention((1, HEADS, N, FEATURES), k, check, pytorch_path=N <= PYTORCH_PATH)
    return {"N": N, "k": k, **measure(case, f"N={N}, k={k}", repeats, budget, memory=False)}


def run_curves(names: list[str], out: Path, repeats: int, budget: float, small: bool) -> int:
    """Measure, print, write, draw; 1 when a result was wrong."""
    results: dict[str, Any] = {"machine": describe(), "heads": HEADS, "features": FEATURES, "curves": {}}
    file = out / f"curves-{slug(results['machine'])}.json"
    if file.exists():
        earlier = json.loads(file.read_text())
        results["curves"] = earlier["curves"] if comparable(earlier["machine"], results["machine"]) else {}
    wrong = False
    for name in names:
        curve = CURVES[name]
        points = results["curves"][name] = []
        for N, k in curve.small if small else curve.points:
            point = _point(N, k, repeats, budget)
            wrong |= any("wrong" in row for row in point["rows"])
            points.append(point)
            file.write_text(json.dumps(results, indent=1) + "\n")
            print(_line(point), flush=True)
    plot.draw(results, file.with_suffix(".png"))
    return int(wrong)


def _line(point: dict[str, Any]) -> str:
    found = [f"{point['title']:15}"]
    for row in point["rows"]:
        if "wrong" in row:
            found.append(f"{row['who']} WRONG: {row['wrong']} differs by {row['difference']:.1e}")
        elif "both_ms" in row:
            found.append(f"{row['who']} {row['forward_ms']:.2f} / {row['both_ms']:.2f} ms")
    return "  ".join(found)
