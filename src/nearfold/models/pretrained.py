"""Weights that come with the package: small networks trained on all of CIFAR-10, each with the record of its run.

A folder a network, as `save_pretrained` writes it (weights in bfloat16), and ``record.json``: data, recipe, accuracies
of all seeds, and the digest of the weights. ``recipes/pretrained.py`` makes folder and model card from a study's runs.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nearfold.models.hub import WEIGHTS

FOLDER = Path(__file__).parent / "weights"
RECORD = "record.json"


@dataclass(frozen=True)
class Pretrained:
    """A network whose weights come along.

    Attributes:
        name: as `create` takes it.
        data: name of the data set it was trained on.
        mean: of each channel, 0..1, taken from images before they go in.
        std: what they are then divided by.
        classes: names of the classes, in the order of the logits.
        correct: test images that these weights classify correctly, in float32.
        tested: test images.
        accuracies: of all seeds, as trained; those of seed `seed` are the ones that come along.
        seed: of the weights.
        recipe: as in `nearfold.train.Recipe`, what is not its default.
        sha256: of the file of weights.
    """

    name: str
    data: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]
    correct: int
    tested: int
    accuracies: dict[str, float]
    seed: int
    recipe: dict[str, Any]
    sha256: str

    @property
    def folder(self) -> Path:
        """Where weights and record are."""
        return FOLDER / self.name

    @property
    def accuracy(self) -> float:
        """Share of the test images that these weights classify correctly."""
        return self.correct / self.tested


@functools.cache
def pretrained() -> dict[str, Pretrained]:
    """All networks whose weights come along, by name.

    >>> all(p.accuracy > 0.5 for p in pretrained().values())
    True
    """
    found = {}
    for path in sorted(FOLDER.glob(f"*/{RECORD}")):
        fields = json.loads(path.read_text(encoding="utf-8"))
        lists = {name: tuple(fields[name]) for name in ("mean", "std", "classes")}
        found[path.parent.name] = Pretrained(path.parent.name, **(fields | lists))
    return found


def weights_of(name: str) -> Pretrained:
    """The record of a network's weights, whose file has been checked.

    Raises:
        ValueError: none come along, or the file is not the one that the record is of.
    """
    known = pretrained()
    if name not in known:
        there = ", ".join(known) or "none"
        raise ValueError(f"pretrained: no weights come along for {name!r}; there are those of {there}")
    entry = known[name]
    file = entry.folder / WEIGHTS
    digest = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "no file"
    if digest != entry.sha256:
        raise ValueError(
            f"{file} is not what was trained (sha256 {digest[:12]}, wanted {entry.sha256[:12]}): reinstall"
        )
    return entry


def table(pattern: str = "*") -> str:
    """The networks whose weights come along and whose names match a shell pattern, one a line.

    Raises:
        ValueError: when none does.
    """
    known = {name: entry for name, entry in pretrained().items() if fnmatch.fnmatchcase(name, pattern)}
    if not known:
        there = ", ".join(pretrained()) or "none"
        raise ValueError(f"no weights come along for {pattern!r}; there are those of {there}")
    wide = max(map(len, known))
    lines = [f"{'':{wide}}  {'trained on':12} {'test acc. %':>11}  {'all seeds, mean':>15}  seeds  {'MB':>4}"]
    for name, p in known.items():
        mean = sum(p.accuracies.values()) / len(p.accuracies)
        size = (p.folder / WEIGHTS).stat().st_size / 1e6
        lines.append(
            f"{name:{wide}}  {p.data:12} {100 * p.accuracy:>11.2f}  {100 * mean:>15.2f}  {len(p.accuracies):>5}  "
            f"{size:>4.1f}"
        )
    return "\n".join(lines)
