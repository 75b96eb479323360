"""`nearfold align`: what a data set asks of an operator, in the three words, from its training images."""

from __future__ import annotations

import argparse
import json
import sys
import time

from nearfold.options import PIXELS, file, whole
from nearfold.study.alignment.profile import Profile, measure
from nearfold.study.alignment.recommend import DRAWS, confidence, points, scores
from nearfold.study.alignment.words import sentences, tables
from nearfold.study.document import Cell, Table
from nearfold.study.fourteen import FOURTEEN
from nearfold.train import load_data

EXAMPLES = """\
examples:
  nearfold align digits
  nearfold align path/to/cifar10 --image-size 20 --json cifar10.json
  nearfold align made:retrieval --limit 1000

Nothing is trained: every number is a ridge regression in closed form, on images that it was not fitted to, all of
them training images. What the measures are: docs/alignment.md."""
LIMIT, FEWEST = 2000, 200


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to its parser."""
    parser.add_argument(
        "data", metavar="DATA",
        help="digits, made:NAME (a task of known structure), or a folder, as for `nearfold train --data`",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=whole(FEWEST), default=LIMIT, metavar="N",
        help=f"at most so many training images, a tenth of which is put aside (default: {LIMIT})",
    )  # fmt: skip
    parser.add_argument("--image-size", type=whole(1, PIXELS), metavar="S", help="pixels (default: as they are)")
    parser.add_argument("--json", type=file, metavar="FILE", help="all numbers as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure, print the profile, what it means and what it points to: the exit code."""
    # a tenth of `limit` would be put aside for validation, which is not used here
    data = load_data(args.data, limit=args.limit, test_limit=1, image_size=args.image_size)
    profile = measure(data, args.limit, _Clock(args.data))
    print("\n".join(report(profile)))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        found = profile.to_dict() | {"operators": pointed(profile), "sentences": sentences(profile)}
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
        print(args.json)
    return 0


def pointed(profile: Profile) -> dict[str, dict[str, float | str]]:
    """The operators, the one that the data point to most first: notation, score, and how often it comes first."""
    notations = list(FOURTEEN.values())
    found, sure = scores(profile, notations), confidence(profile, notations)
    order = sorted(FOURTEEN.items(), key=lambda item: -found[item[1]])
    return {name: {"notation": n, "score": found[n], "first": sure[n]} for name, n in order}


def report(profile: Profile) -> list[str]:
    """The page of the terminal, as lines."""
    height, width = profile.grid
    lines = [
        f"{profile.name}: {profile.images:,} training images, a grid of {height} x {width} positions with "
        f"{profile.features} features each, {profile.classes} classes"
    ]
    for table in tables(profile):
        lines += ["", f"{table.caption}:", table.text(table.head)]
    lines += ["", "What it means:", *(f"  {sentence}" for sentence in sentences(profile))]
    if not points(profile):
        none = "No probe tells the labels clearly better than positions by themselves: no operator is pointed to."
        return [*lines, "", none]
    found = pointed(profile)
    rows = [
        [Cell(str(n)), Cell(name), Cell(f"{one['score']:.3f}"), Cell(f"{100 * float(one['first']):.0f} %")]
        for n, (name, one) in enumerate(found.items(), 1)
    ]
    table = Table("operators", ("", "operator", "score", "comes first"), rows, left=(1,))
    return [
        *lines, "", "Operators it points to:", table.text(table.head), "",
        f"Comes first: in so many of {DRAWS} draws of the images anew. Whether the rule is right it does not say.",
    ]  # fmt: skip


class _Clock:
    """Progress on a terminal's last line."""

    def __init__(self, what: str) -> None:
        self.what, self.began = what, time.monotonic()

    def __call__(self, done: int, of: int, name: str) -> None:
        if sys.stderr.isatty():
            text = f"{self.what}: {done} of {of} measures, {time.monotonic() - self.began:.0f} s: {name}"
            end = "" if done < of else "\n"
            print(f"\r\033[K{text[:110]}", end=end, file=sys.stderr, flush=True)
