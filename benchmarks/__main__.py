"""`python -m benchmarks [CASE ...]`: correctness first, then time and memory, paired in one run.

Ours and every peer take turns; medians. A peer that computes the same is compared first, outputs and all gradients:
where they differ no speed is reported and the exit code is 1. The table goes to the terminal, and with the machine
described to cpu-PROCESSOR.json and .md, as it grows; cases that are not run keep the results that are there, if those
are of the same machine and versions. With --curves, time over the number of positions and of neighbours, drawn,
instead.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler announces itself otherwise

from benchmarks import curves, report
from benchmarks.cases import CASES
from benchmarks.machine import comparable, describe, slug
from benchmarks.run import measure_case


def _earlier(file: Path, machine: dict[str, str]) -> dict[str, Any]:
    """Cases that were measured before and belong into the same table."""
    if not file.exists():
        return {}
    found = json.loads(file.read_text())
    return found.get("cases", {}) if comparable(found["machine"], machine) else {}


def run_cases(names: list[str], out: Path, repeats: int, budget: float, small: bool) -> int:
    """Measure, print, write; 1 when a result was wrong."""
    results: dict[str, Any] = {"machine": describe()}
    file = out / f"cpu-{slug(results['machine'])}.json"
    results["cases"] = _earlier(file, results["machine"])
    print("; ".join(f"{k} {v}" for k, v in results["machine"].items()))
    wrong = False
    for name in names:
        entry = measure_case(name, repeats, budget, small)
        wrong |= any("wrong" in row for row in entry["rows"])
        results["cases"][name] = entry
        file.write_text(json.dumps(results, indent=1) + "\n")
        file.with_suffix(".md").write_text(report.markdown(results))
        print(report.terminal(entry), flush=True)
    if not small:
        print(f"\n{report.terminal_targets(results['cases'])}")
    return int(wrong)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="CASE", help=f"of: {', '.join(CASES)} (default: all)")
    parser.add_argument("--curves", action="store_true", help=f"the curves: {', '.join(curves.CURVES)} (default: all)")
    parser.add_argument("--repeats", type=int, default=31, help="rounds at most; the median counts (default 31)")
    parser.add_argument(
        "--seconds", type=float, default=8, help="for all rounds of a case, for each of both (default 8)"
    )
    parser.add_argument("--small", action="store_true", help="tiny shapes: checks the chain, the speeds mean nothing")
    parser.add_argument("--out", type=Path, help="folder for the results (default: benchmarks/results)")
    args = parser.parse_args(argv)
    known = curves.CURVES if args.curves else CASES
    unknown = [name for name in args.names if name not in known]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    out = args.out or Path("runs/benchmarks" if args.small else "benchmarks/results")
    out.mkdir(parents=True, exist_ok=True)
    work = curves.run_curves if args.curves else run_cases
    return work(args.names or list(known), out, args.repeats, args.seconds, args.small)


if __name__ == "__main__":
    sys.exit(main())
