"""The tables of docs/alignment.md about data: what `nearfold align` found.

    python recipes/alignment_data.py [FILE.json ...]

The files are those of `nearfold align DATA --json FILE.json`. They are kept in benchmarks/results/alignment.json, so
that one can be measured again, and the page shows all of them.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from nearfold.study.alignment import Profile, points
from nearfold.study.alignment.command import pointed
from nearfold.study.alignment.labels import ITSELF
from nearfold.study.alignment.words import sentences
from nearfold.study.document import Cell, Table
from nearfold.study.fourteen import FOURTEEN

ROOT = Path(__file__).parents[1]
PAGE, KEPT = ROOT / "docs" / "alignment.md", ROOT / "benchmarks" / "results" / "alignment.json"
IN_WORDS = ("digits", "cifar10", "made:characters", "made:photographs")
"""Of these the page says what the command says."""
MARKED = re.compile(r"(<!-- (data|words): [^>]*-->\n).*?(<!-- end -->)", re.DOTALL)
DIGITS = 4
"""Decimals that are kept."""


def kept() -> dict[str, Profile]:
    """The profiles by the name of their data."""
    found = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else {}
    return {name: Profile.from_dict(profile) for name, profile in found.items()}


def rounded(value: Any) -> Any:
    """All numbers in JSON with `DIGITS` decimals."""
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items() if name not in ("value", "error")}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(value, DIGITS) if isinstance(value, float) else value


def table(profiles: dict[str, Profile]) -> str:
    """One row for every data set: by itself, the probe that tells most, and the operators that come first."""
    rows = []
    for name, profile in profiles.items():
        base = profile.labels[ITSELF].value
        best = max((n for n in profile.labels if n != ITSELF), key=lambda n: profile.labels[n].value)
        order = list(pointed(profile).items())
        pointed_to = (
            [f"{key}, {100 * float(one['first']):.0f} %" for key, one in order[:2]] if points(profile) else ["none", ""]
        )
        numbers = (f"{profile.images:,}", f"{base:.2f}", best, f"{profile.labels[best].value:.2f}")
        rows.append([Cell(text) for text in (name, *numbers, *pointed_to)])
    head = ("data", "images", "by itself", "what tells most", "above chance", "first, how often", "second")
    return Table("data", head, rows, left=(0, 3, 5, 6)).markdown(head)


def in_words(profiles: dict[str, Profile]) -> str:
    """What the command says of each of `IN_WORDS`."""
    parts = []
    for name in IN_WORDS:
        if name in profiles:
            profile = profiles[name]
            order = [f"{key} ({100 * float(one['first']):.0f} %)" for key, one in list(pointed(profile).items())[:3]]
            said = "\n".join(f"- {sentence}" for sentence in sentences(profile))
            parts.append(
                f"**{name}**, {profile.images:,} training images, {profile.grid[0]} x {profile.grid[1]} positions:\n\n"
                f"{said}\n- operators, and how often each comes first: {', '.join(order)}.\n"
            )
    return "\n".join(parts)


def filled(page: str, profiles: dict[str, Profile]) -> str:
    """The page with its marked parts written anew."""
    made = {"data": table, "words": in_words}
    return MARKED.sub(lambda found: found[1] + made[found[2]](profiles) + found[3], page)


def main() -> None:
    """Keep the files' profiles, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE.json")
    profiles = kept()
    for file in parser.parse_args().files:
        profile = Profile.from_dict(rounded(json.loads(file.read_text(encoding="utf-8"))))
        profiles[profile.name] = profile
    content = {name: rounded(profiles[name].to_dict()) for name in sorted(profiles)}
    KEPT.write_text(json.dumps(content, separators=(",", ":")).replace("},", "},\n") + "\n", encoding="utf-8")
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), kept()), encoding="utf-8")
    print(f"{len(profiles)} data sets, {len(FOURTEEN)} operators: {PAGE}")


if __name__ == "__main__":
    main()
