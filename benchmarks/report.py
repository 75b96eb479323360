"""The results as text: one table for the terminal and for Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from benchmarks.case import OURS
from benchmarks.cases import CASES, title
from benchmarks.targets import TARGETS, WORDS, Target, verdict

RATIOS = (("forward", "forward_ms"), ("both", "both_ms"), ("memory", "peak_mib"))
NUMBERS = {
    "forward ms": "forward_ms",
    "fwd + bwd ms": "both_ms",
    "peak MiB": "peak_mib",
    "resident MiB": "resident_mib",
}
HEAD = ("who", *NUMBERS, *(f"ratio {name}" for name, _ in RATIOS), "differs by")
NOTES = """\
Medians of rounds in which everyone takes turns, float32; forward without gradients, forward + backward with those of
inputs and parameters. A ratio is the other over Nearfold: above 1, Nearfold is faster or holds less.

Peak: what torch's allocator held at most during forward + backward (forward, where there is no other), beyond inputs
and parameters. Resident: the same of the whole process, in pages touched, with what torch does not see (scratch memory
of our engine, of oneDNN, of other libraries).

Whoever computes the same was compared first, on the same inputs, outputs and all gradients: "differs by" is the
largest relative difference (in float64; * in float32). The others compute something else and stand there for scale."""


def _cell(row: dict[str, Any], field: str) -> str:
    value = row.get(field)
    return "" if value is None else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _cells(row: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """One line of the table."""
    blank = [""] * (len(HEAD) - 2)
    if "absent" in row:
        return [row["who"], row["absent"], *blank]
    star = "*" if row.get("compared_in") == "float32" else ""
    differs = f"{row['difference']:.0e}{star}" if "difference" in row else "" if row["same"] else "another operator"
    if "wrong" in row:
        return [row["who"], f"WRONG: {row['wrong']} differs by {row['difference']:.1e}", *blank]
    ratios = [
        f"{row[field] / ours[field]:.2f}" if row["who"] != OURS and row.get(field) and ours.get(field) else ""
        for _, field in RATIOS
    ]
    return [row["who"], *(_cell(row, field) for field in NUMBERS.values()), *ratios, differs]


def lines(entry: dict[str, Any]) -> list[list[str]]:
    """The lines of one case."""
    ours = entry["rows"][0]
    if any("wrong" in row for row in entry["rows"]):
        keep = [row for row in entry["rows"] if "wrong" in row]
        return [_cells(row, ours) for row in keep] + [["no speed is reported: results differ", *[""] * (len(HEAD) - 1)]]
    return [_cells(row, ours) for row in entry["rows"]]


def target_lines(cases: dict[str, Any]) -> list[list[str]]:
    """Every target, by case: case, against whom, what, target, measured, met or missed."""
    order = {name: i for i, name in enumerate(CASES)}
    found, before = [], ""
    for target in sorted(TARGETS, key=lambda t: order[t.case]):
        found.append(
            [
                title(target.case) if target.case != before else "",
                _against(target),
                WORDS[target.what],
                *verdict(target, cases),
            ]
        )
        before = target.case
    return found


def tally(cases: dict[str, Any]) -> str:
    """How many targets are met."""
    results = Counter(line[-1] for line in target_lines(cases))
    return ", ".join(f"{results[word]} {word}" for word in ("met", "missed", "not measured") if results[word])


def _against(target: Target) -> str:
    return title(target.peer) if target.what == "growth" else target.peer


TARGET_HEAD = ("case", "against", "what", "target", "measured", "result")


def terminal(entry: dict[str, Any]) -> str:
    """One case, aligned."""
    return f"\n{entry['title']}   ({_rounds(entry)})\n{_aligned([HEAD, *lines(entry)])}"


def _rounds(entry: dict[str, Any]) -> str:
    return ", ".join(f"{n} rounds {WORDS[kind]}" for kind, n in entry["rounds"].items()) or "not timed"


def terminal_targets(cases: dict[str, Any]) -> str:
    """The targets, aligned."""
    return f"{_aligned([TARGET_HEAD, *target_lines(cases)], left=len(TARGET_HEAD))}\n  targets: {tally(cases)}"


def _aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns padded to one width; a line that is a sentence, not numbers, does not count."""
    numbers = [row for row in rows if any(row[2:])]
    widths = [max(len(row[i]) for row in numbers) for i in range(len(rows[0]))]
    text = []
    for row in rows:
        if not any(row[2:]):
            text.append("  ".join(row))
            continue
        cells = zip(row, widths, strict=True)
        text.append("  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(cells)))
    return "\n".join(f"  {line}".rstrip() for line in text)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Lines of Markdown; so many columns are words."""
    rule = "|".join("---" if i < left else "---:" for i in range(len(head)))
    return [f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)]


def markdown(results: dict[str, Any]) -> str:
    """The page: machine, targets, measurements."""
    cases = results["cases"]
    page = ["# Benchmarks", "", "; ".join(f"{k} {v}" for k, v in results["machine"].items()), "", "## Targets", ""]
    page += [tally(cases), "", *table(TARGET_HEAD, target_lines(cases), 3)]
    page += ["", "## Measurements", "", NOTES]
    for name in (name for name in CASES if name in cases):
        entry = cases[name]
        page += ["", f"### {entry['title']}", "", f"`{name}`, {entry['date']}, {_rounds(entry)}", ""]
        page += table(HEAD, lines(entry), 1)
    return "\n".join([*page, ""])
