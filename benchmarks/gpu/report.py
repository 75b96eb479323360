"""The results as text."""

from __future__ import annotations

from typing import Any

from benchmarks import report
from benchmarks.case import OURS
from benchmarks.gpu.cases import CASES, CURVE, FLASH, TARGETS, THRESHOLD, title
from benchmarks.targets import WORDS, Target, verdict

NO_MEMORY = "out of memory"
NOTES = """\
Medians of rounds in which everyone takes turns, by the device's events, with a cold L2 cache; where the device waits
for the host, that counts. Forward without gradients, forward + backward with those of inputs and parameters. A ratio
is the other over Nearfold: above 1, Nearfold is faster or holds less. Peak: what torch's allocator held at most during
forward + backward, beyond inputs and parameters.

Nearfold's outputs and gradients were first compared with the definition in float64: "differs by" is the relative
difference (in the Euclidean norm) of the tensor that is nearest to its bound; where only a search is measured, that of
the scores it found. For the others it is that of their output, for information: what computes similarities in half
precision finds other neighbours."""


def target_lines(cases: dict[str, Any], tiny: bool) -> list[list[str]]:
    """Case, against whom, what, target, measured, met or missed."""
    found, before = [], ""
    for target in TARGETS:
        asked, ratio, result = verdict(target, cases)
        if result == "not measured" and _only_ours(target, cases):
            ratio, result = NO_MEMORY, "met"
        name = title(target.case, tiny) if target.case != before else ""
        found.append([name, target.peer, WORDS[target.what], asked, ratio, result])
        before = target.case
    return found


def _only_ours(target: Target, cases: dict[str, Any]) -> bool:
    """Whether the other had too little memory for what ours did."""
    rows = {row["who"]: row for row in cases.get(target.case, {}).get("rows", [])}
    field = f"{target.what}_ms"
    return field in rows.get(OURS, {}) and rows.get(target.peer, {}).get("absent") == NO_MEMORY


CURVE_HEAD = ("N", "what", "nearfold", THRESHOLD, FLASH)


def curve_lines(cases: dict[str, Any]) -> list[list[str]]:
    """N, what, and of everyone the time in ms or the memory in MiB."""
    found = []
    for name, N in CURVE.items():
        rows = {row["who"]: row for row in cases.get(name, {}).get("rows", [])}
        for what, key in (("forward", "forward_ms"), ("both", "both_ms"), ("memory", "peak_mib")):
            numbers = [rows.get(who, {}).get(key) for who in (OURS, THRESHOLD, FLASH)]
            if any(numbers):
                unit = "MiB" if what == "memory" else "ms"
                found.append([str(N), f"{WORDS[what]}, {unit}", *("" if n is None else f"{n:.2f}" for n in numbers)])
    return found


def markdown(results: dict[str, Any]) -> str:
    """The page: device, targets, measurements."""
    cases, tiny = results["cases"], results["tiny"]
    page = ["# Benchmarks on a GPU", "", "; ".join(f"{k} {v}" for k, v in results["machine"].items()), ""]
    page += [f"{results['dtype']}, {results['date']}", ""]
    if tiny:
        page += ["Tiny shapes: a check of the command. Its times mean nothing, and no speed is claimed.", ""]
    else:
        page += ["## Targets", "", *report.table(report.TARGET_HEAD, target_lines(cases, tiny), 3), ""]
        if lines := curve_lines(cases):
            page += ["## Growth with N", "", *report.table(CURVE_HEAD, lines, 2), ""]
    page += ["## Measurements", "", NOTES]
    for name in (name for name in CASES if name in cases):
        entry = cases[name]
        page += ["", f"### {entry['title']}", "", f"`{name}`: {'; '.join(_remarks(entry))}", ""]
        page += report.table(report.HEAD, report.lines(entry), 1)
    return "\n".join([*page, ""])


def _remarks(entry: dict[str, Any]) -> list[str]:
    rounds = ", ".join(f"{n} rounds {WORDS[kind]}" for kind, n in entry["rounds"].items()) or "not timed"
    remarks = [rounds]
    if "repeats" in entry:
        remarks.append(f"a second run gives {'the same bits' if entry['repeats'] else 'OTHER BITS'}")
    if entry.get("kernels"):
        remarks.append(f"launched {', '.join(f'{n} {name}' for name, n in entry['kernels'].items())}")
    if "clock" in entry:
        remarks.append(f"clock {entry['clock']}")
    return remarks


def terminal(entry: dict[str, Any]) -> str:
    """One row, aligned."""
    return f"{report.terminal(entry)}\n  {'; '.join(_remarks(entry)[1:])}".rstrip()


def terminal_targets(cases: dict[str, Any]) -> str:
    """The targets."""
    return "\n".join(report.table(report.TARGET_HEAD, target_lines(cases, False), 3))
