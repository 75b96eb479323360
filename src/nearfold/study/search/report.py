"""What a search leaves: a summary to read, and all of it as JSON. Every sentence is computed from the runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import nearfold
from nearfold.examine import XRay, xray
from nearfold.study.compare import points
from nearfold.study.engine import duration
from nearfold.study.search.halving import Tried
from nearfold.study.search.search import Finalist, Found, written
from nearfold.study.statistics import Estimate, estimate
from nearfold.study.store import write_each
from nearfold.study.tasks import build
from nearfold.train import load_weights, prepare

IMAGES = 16
"""Validation images that the winner's layers are examined on."""


def verdict(found: Found) -> str:
    """The comparison on the test images, in a sentence."""
    ours, known, difference = found.best("search"), found.best("known"), found.difference
    if difference.low > 0:
        word = "is better than"
    elif difference.high < 0:
        word = "is worse than"
    else:
        word = "is not found different from"
    return (
        f"The best of the search, {name(ours)}, {word} the best known operator, {name(known)}: {points(difference)} "
        f"on {len(found.data.test):,} test images, paired over {difference.n} seeds."
    )


def name(finalist: Finalist) -> str:
    """Title and notation, or the notation alone."""
    notation = f"`{finalist.tried.notation}`"
    if finalist.title == finalist.tried.notation:  # nothing is exchanged
        return finalist.title
    return f"{finalist.title} ({notation})" if finalist.title else notation


def examined(found: Found) -> XRay:
    """The x-ray of the winner's layers, with the weights of its first new seed."""
    network, seed = found.winner.tried.network, min(found.winner.results)
    model = build(network, found.data)
    load_weights(model, found.runs.weights(network, seed))
    return xray(model, prepare(found.data.val.images[:IMAGES], found.data), network=False)


def summary(found: Found, command: str, seen: XRay) -> str:
    """The summary, in Markdown."""
    s = found.settings
    heads = " | ".join((*found.networks.heads, *(["ms"] if s.budget.measured else [])))
    bound = "" if s.model is None and not s.budget.measured else "at most "
    columns = "--:|" * (heads.count("|") + 1)
    lines = [
        f"# Search on {s.data}",
        "",
        verdict(found),
        "",
        f"The winner by validation, {'a known one' if found.winner.side == 'known' else 'found by the search'}:",
        "",
        *(f"    {line}" for line in found.winner.tried.notation.split("; ")),
        "",
        f"Budget of every network: {bound}{s.budget}. Images: {len(found.data.train):,} to train on, "
        f"{len(found.data.val):,} to choose by, {len(found.data.test):,} to test once. "
        f"Made with nearfold {nearfold.__version__} by `{command}`.",
        "",
        "## The finalists",
        "",
        f"Trained anew with {s.seeds} seeds; validation chooses, and of each side the first alone is tested.",
        "",
        f"| side | operator | {heads} | in the search, % | validation, % | test, % |",
        f"|---|---|{columns}--:|--:|--:|",
        *(_row(found, one) for one in found.finalists),
        "",
        "## What it took",
        "",
        _counted(found),
        "",
        "| spent on | runs | failed | epochs | training time |",
        "|---|--:|--:|--:|--:|",
        *(
            f"| {_SIDES[side]} | {spent.runs} | {spent.failed} | {spent.epochs:,} | {duration(spent.seconds)} |"
            for side, spent in found.spent.items()
        ),
        "",
        *_notes(found),
        "## What the winner reads",
        "",
        f"`nearfold xray` of one of its networks, on {IMAGES} validation images.",
        "",
        "```",
        str(seen),
        "```",
        "",
        "## The known operators",
        "",
        f"One seed, {s.epochs} epochs, validation accuracy in %.",
        "",
        f"| operator | notation | {heads} | validation |",
        f"|---|---|{columns}--:|",
        *(
            f"| {title} | {_cell(one.notation)} | {_cost(found, one)} | {100 * one.values[s.epochs]:.1f} |"
            for title, one in sorted(found.known.items(), key=lambda entry: -entry[1].values[s.epochs])
        ),
        "",
        "## The trials",
        "",
        "In the order of how far they came, with validation accuracy in % by epochs.",
        "",
        f"| operator | {heads} | validation |",
        f"|---|{columns}---|",
        *(
            f"| {_cell(one.notation)} | {_cost(found, one)} | "
            + ", ".join(f"{epochs}: {100 * value:.1f}" for epochs, value in one.values.items())
            + " |"
            for one in sorted(found.tried, key=lambda one: one.rank, reverse=True)
        ),
    ]
    return "\n".join(lines) + "\n"


_SIDES = {"known": "known operators", "search": "the search", "finalists": "finalists of both"}


def _row(found: Found, one: Finalist) -> str:
    tested = one in (found.best("search"), found.best("known"))
    test = _accuracy(list(one.test.values())) if tested else "not tested"
    values = [result["val_accuracy"] for result in one.results.values()]
    first = 100 * one.tried.values[found.settings.epochs]
    return (
        f"| {one.side} | {f'{one.title} {_cell(one.tried.notation)}'.strip()} | {_cost(found, one.tried)} | "
        f"{first:.1f} | {_accuracy(values)} | {test} |"
    )


def _cost(found: Found, one: Tried) -> str:
    latency = [] if one.latency_ms is None else [f"{one.latency_ms:.2f}"]
    return " | ".join([*found.networks.cells(one.network), *latency])


def _accuracy(values: Sequence[float]) -> str:
    e: Estimate = estimate(values).cut(0.0, 1.0)
    return f"{100 * e.mean:.1f} ({100 * e.low:.1f} to {100 * e.high:.1f})"


def _cell(notation: str) -> str:
    return f"`{notation.replace('|', chr(92) + '|')}`"


def _counted(found: Found) -> str:
    refused = sum(found.refused.values())
    reasons = ", ".join(f"{count} {why}" for why, count in sorted(found.refused.items(), key=lambda entry: -entry[1]))
    lengths = sorted({epochs for one in found.tried for epochs in one.values})
    trained = ", ".join(f"{sum(e in one.values for one in found.tried)} for {e} epoch{'s'[: e > 1]}" for e in lengths)
    return (
        f"{len(found.tried) + refused} operations were proposed; {refused} of them were not trained"
        + (f" ({reasons})" if refused else "")
        + f". {len(found.tried)} were: {trained}. The search chose its finalists among {len(found.tried)} operations, "
        f"the other side its own among {len(found.known)}, all of them trained for {found.settings.epochs} epochs."
    )


def _notes(found: Found) -> list[str]:
    lines = [f"- {title} was left out: {why}." for title, why in found.left_out.items()]
    if found.outside:
        lines.append(f"- Outside the space, so that they guide no proposal: {', '.join(found.outside)}.")
    lines += [f"- Layer {name} is kept: {why}." for name, why in found.kept.items()]
    if found.before is not None:
        lines.append(
            f"- As it is, before it was trained on, the network gets {100 * found.before:.1f} % of the validation "
            "images right. Where that is far below what it was trained to, it wants images normalised otherwise: "
            "--mean and --std say how."
        )
    return [*lines, ""] if lines else []


def record(found: Found, command: str, seen: XRay) -> dict[str, Any]:
    """The search as JSON."""
    s, difference = found.settings, found.difference
    return {
        "nearfold": nearfold.__version__, "torch": torch.__version__, "command": command,
        "settings": written(s), "before": found.before, "kept": dict(found.kept),
        "images": {part: len(getattr(found.data, part)) for part in ("train", "val", "test")},
        "proposed": len(found.tried) + sum(found.refused.values()), "trials": len(found.tried),
        "refused": dict(found.refused), "left_out": dict(found.left_out), "outside": list(found.outside),
        "spent": {side: asdict(spent) for side, spent in found.spent.items()},
        "known": [_tried(one) | {"title": title} for title, one in found.known.items()],
        "tried": [_tried(one) for one in found.tried],
        "finalists": [
            {"side": one.side, "title": one.title, "notation": one.tried.notation,
             "validation": {seed: result["val_accuracy"] for seed, result in one.results.items()},
             "test": one.test if one in (found.best("search"), found.best("known")) else None}
            for one in found.finalists
        ],
        "difference": asdict(difference), "verdict": verdict(found), "winner": found.winner.tried.notation,
        "xray": seen.to_dict(),
    }  # fmt: skip


def _tried(one: Any) -> dict[str, Any]:
    kept = ("hidden", "convert")
    network = {name: value for name, value in one.network.items() if name in kept}
    latency = {} if one.latency_ms is None else {"latency_ms": one.latency_ms}
    return {"notation": one.notation, **network, **latency, "validation": dict(one.values)}


def leave(found: Found, command: str, folder: Path) -> tuple[str, list[Path]]:
    """Write summary.md and result.json: the summary, and the paths."""
    seen = examined(found)
    text = summary(found, command, seen)
    content = record(found, command, seen)
    paths = write_each(
        {folder / "summary.md": lambda: text, folder / "result.json": lambda: json.dumps(content, indent=1) + "\n"}
    )
    return text, paths


__all__ = ["examined", "leave", "record", "summary", "verdict"]
