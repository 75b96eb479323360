"""Surgery on weights that others trained: a reader of text whose attention looks at its k best keys only.

`python -m nearfold.recipes.ocr` takes PP-OCRv4's recogniser out of a wheel (`pip install rapidocr-onnxruntime==1.4.4
onnx onnxruntime`), checks it against onnxruntime, puts other operations in place of its two attention layers with
`nearfold.convert`, and says how much it then reads of printed and of handwritten lines: without training, and after a
short one on other lines, which the untouched network gets, too. It writes benchmarks/results/ocr.json and ocr.md and
docs/pictures/ocr.png; docs/ocr.md says what came out. Below ten minutes on two idle cores; `--quick` is a rehearsal on
a few lines, `--time` measures times alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nearfold.recipes.ocr_lines import COUNTED, WIDTHS, Marks, marks, pooled, share
from nearfold.recipes.ocr_network import HEIGHT, STRIDE, Recogniser, difference, load
from nearfold.recipes.ocr_report import markdown, picture
from nearfold.recipes.ocr_tune import Seen, Tuning, seen, tune
from nearfold.study.measure import environment, timed
from nearfold.surgery import Report, Rule, convert

TOKENS = WIDTHS["printed"] // STRIDE
NEAREST = "nearest({k}, scaled) | ranked | softmax(heads={{heads}})"
WINDOW = "window({k}) | box | softmax(heads={{heads}})"
WAS = "as it was"
NETWORKS: dict[str, str | None] = {
    WAS: None,
    **{f"{k} best keys": NEAREST.format(k=k) for k in (TOKENS, 32, 16, 8, 4)},
    **{f"{k} keys around": WINDOW.format(k=k) for k in (17, 9, 5)},
}
"""Name: what its attention becomes. The windows are there to say whether it matters which keys are kept."""
EXACT = f"{TOKENS} best keys"
"""All of a line's: this must read what the network reads."""
TUNED = (WAS, "8 best keys", "4 best keys")
TIMED = (WAS, EXACT, "8 best keys", "4 best keys")
ALLOWED = 1e-4
"""By how much a probability may differ from onnxruntime's."""


@dataclass(frozen=True)
class Settings:
    """How much of everything."""

    test: int | None = None
    """Lines of a kind; None: as many as there are."""
    train: int = 240
    """Lines of a kind."""
    seeds: int = 3
    """Of training."""
    rounds: int = 15
    """Of the measurement of times: every network takes its turn in each."""
    tokens: tuple[int, ...] = (TOKENS, 1024)
    """Of the attention layer alone, in that measurement."""
    tuning: Tuning = field(default_factory=Tuning)


QUICK = Settings(test=3, train=4, seeds=1, rounds=2, tokens=(TOKENS,), tuning=Tuning(steps=2, batch=2))


def converted(net: Recogniser, operation: str | None) -> tuple[Recogniser, Report | None]:
    """A copy of the network with another operation as its attention, and what `convert` says of it."""
    made = copy.deepcopy(net)
    if operation is None:
        return made, None
    rule = Rule(operation, kind="attention", name="blocks.*")
    return made, convert(made, rule, input_size=(3, HEIGHT, WIDTHS["printed"]))


def said(report: Report | None) -> dict[str, Any]:
    """What `convert` reports of the layers, and the multiply-adds of both at one line of 640 pixels.

    Its count of the old layers is left out: torch's counter does not see the products of their fused attention. They
    are those of the nearest neighbours that are all.
    """
    if report is None:
        return {}
    rows = report.replaced
    return {
        "layers": len(rows),
        "grade": rows[0].grade,
        "operation": rows[0].to,
        "difference": report.difference_seen,
        "macs": sum(row.flops_after or 0 for row in rows) // 2,
    }


def examined(net: Recogniser, test: dict[str, Seen]) -> dict[str, Marks]:
    """What the network reads of the test lines, by kind."""
    return {kind: marks(net.texts(part.features), part.texts) for kind, part in test.items()}


def scores(own: dict[str, Marks], other: dict[str, Marks] | None) -> dict[str, Any]:
    """Shares of characters and lines with their intervals, and by how much they are above another network's."""

    def numbers(one: Marks, two: Marks | None) -> dict[str, list[float]]:
        found = {what: share(what, one, two) for what in COUNTED}
        return {what: [e.mean, e.low, e.high] for what, e in found.items()}

    return {
        kind: {"read": numbers(one, None)} | ({"ahead": numbers(one, other[kind])} if other else {})
        for kind, one in own.items()
    }


def untrained(net: Recogniser, test: dict[str, Seen]) -> tuple[list[dict[str, Any]], dict[str, dict[str, Marks]]]:
    """A row for every network of the table, and what it read."""
    rows, found = [], {}
    for name, operation in NETWORKS.items():
        made, report = converted(net, operation)
        found[name] = examined(made, test)
        rows.append({"network": name, **said(report), **scores(found[name], found[WAS] if name != WAS else None)})
        print(f"{name}: {_line(rows[-1])}", flush=True)
    return rows, found


def trained(
    net: Recogniser, data: list[Seen], test: dict[str, Seen], before: dict[str, dict[str, Marks]], settings: Settings
) -> list[dict[str, Any]]:
    """A row for every trained network, over the seeds; ahead of the untouched network after the same training."""
    rows: list[dict[str, Any]] = []
    control: dict[str, Marks] | None = None
    for name in TUNED:
        seconds, each = [], []
        for seed in range(settings.seeds):
            made, _ = converted(net, NETWORKS[name])
            seconds.append(tune(made, data, settings.tuning, seed))
            each.append(examined(made, test))
        own = {kind: pooled([marks[kind] for marks in each]) for kind in test}
        gained = {kind: part["ahead"] for kind, part in scores(own, before[name]).items()}
        rows.append({"network": name, "seconds": statistics.median(seconds), **scores(own, control), "gained": gained})
        control = control or own
        print(f"{name}, trained for {statistics.median(seconds):.0f} s: {_line(rows[-1])}", flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    return "; ".join(
        "{}: {:.1f} % of the characters, {:.1f} % of the lines".format(
            kind, *(100 * row[kind]["read"][what][0] for what in ("characters", "lines"))
        )
        for kind in WIDTHS
    )


@torch.no_grad()
def times(net: Recogniser, settings: Settings) -> list[dict[str, Any]]:
    """Median milliseconds for one line of the whole network, and of its first attention layer alone.

    The networks take turns in every round. ``ratio``: over the untouched one's time in the same round, median.
    """
    nets = {name: converted(net, NETWORKS[name])[0] for name in TIMED}
    rows = []
    for tokens in (None, *settings.tokens):
        x = torch.randn(1, 3, HEIGHT, WIDTHS["printed"]) if tokens is None else torch.randn(1, tokens, 120)
        took: dict[str, list[float]] = {name: [] for name in nets}
        for turn in range(settings.rounds + 1):
            for name, one in nets.items():
                module = one if tokens is None else one.attention(0)
                call = partial(module, x) if tokens is None else partial(module, x, x, x, need_weights=False)
                seconds = timed(call, x.device)
                if turn:  # the first one warms up
                    took[name].append(seconds)
        for name, own in took.items():
            ratio = statistics.median(a / b for a, b in zip(own, took[WAS], strict=True))
            ms = 1000 * statistics.median(own)
            rows.append({"network": name, "tokens": tokens, "milliseconds": ms, "ratio": ratio})
    return rows


def run(settings: Settings, runs: Path, only_times: bool = False) -> tuple[dict[str, Any], Recogniser, Seen]:
    """Everything that the page says, the network, and the printed test lines.

    Raises:
        ImportError: the wheel, onnx or onnxruntime is not installed.
        RuntimeError: the network is not the one that onnxruntime runs.
    """
    net = load()
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "environment": environment()}
    found["onnxruntime"] = {str(width): difference(net, width) for width in (320, 640, 163)}
    worst = max(found["onnxruntime"].values())
    print(f"largest difference of a probability from onnxruntime's: {worst:.1e}", flush=True)
    if not worst <= ALLOWED:
        raise RuntimeError(
            f"the network differs from onnxruntime by {worst:.1e}, allowed are {ALLOWED}: nothing follows"
        )
    found["times"] = times(net, settings)
    if only_times:
        return found, net, Seen(torch.empty(0), ())
    test = {kind: seen(net, kind, "test", settings.test, 0, runs) for kind in WIDTHS}
    train = [seen(net, kind, "train", settings.train, 0, runs) for kind in WIDTHS]
    found["lines"] = {
        kind: {"test": len(part.texts), "characters": sum(len(t.replace(" ", "")) for t in part.texts)}
        for kind, part in test.items()
    }
    found["train"] = {"lines": settings.train, "seeds": settings.seeds} | vars(settings.tuning)
    found["untrained"], before = untrained(net, test)
    found["trained"] = trained(net, train, test, before, settings)
    return found, net, test["printed"]


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m nearfold.recipes.ocr", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a rehearsal on a few lines")
    parser.add_argument("--time", action="store_true", help="only the times, printed")
    parser.add_argument("--steps", type=int, help=f"of training (default: {Tuning.steps})")
    parser.add_argument("--runs", type=Path, default=Path("runs/ocr"), help="features of lines (default: runs/ocr)")
    parser.add_argument("--out", type=Path, help="the folder benchmarks and docs are in (default: .)")
    given = parser.parse_args(argv)
    settings = QUICK if given.quick else Settings()
    if given.steps is not None:
        if given.steps < 1:
            parser.error(f"--steps must be at least 1, got {given.steps}")
        settings = replace(settings, tuning=replace(settings.tuning, steps=given.steps))
    try:
        found, net, printed = run(settings, given.runs, given.time)
    except (ImportError, RuntimeError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(markdown(found))
    if given.time:
        return
    out = given.out or (given.runs / "quick" if given.quick else Path())
    tables = out / "benchmarks/results"
    tables.mkdir(parents=True, exist_ok=True)
    (tables / "ocr.json").write_text(json.dumps(found, indent=1) + "\n")
    (tables / "ocr.md").write_text(markdown(found))
    nets = {name: converted(net, NETWORKS[name])[0] for name in (EXACT, "8 best keys")}
    picture(nets, printed, out / "docs/pictures/ocr.png")


if __name__ == "__main__":
    main()
