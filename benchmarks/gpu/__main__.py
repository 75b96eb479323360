"""`python -m benchmarks.gpu`: on a machine with a GPU, correctness first, then time and memory against the targets.

From the source tree, nothing installed. Results go to benchmarks/results/GPU-DATE.md and .json as they grow; rows that
are not run keep what a run of the same day, sources and versions has found. Exit code 0, 1 where a result is wrong or a
row did not run, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import OURS
from benchmarks.gpu import cases, machine, report, run

RESULTS = Path("benchmarks/results")
ROW_SECONDS = 150.0  # at most for one row


def _describe(device: torch.device, commit: str) -> dict[str, str] | str:
    """The machine, or why there is none; asked in another process, for one that used a GPU cannot be forked."""
    found: list[Any] = []

    def ask(tell: Any) -> None:
        if device.type == "cuda" and not torch.cuda.is_available():
            tell(f"no CUDA device (torch {torch.__version__}, built for CUDA {torch.version.cuda})")
        else:
            tell(machine.describe(device, commit))

    failed = run.apart(ask, 60, found.append)
    return found[0] if found else f"no CUDA device answers: {failed}"


def _earlier(file: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Rows that were measured before and belong into the same table."""
    if not file.exists():
        return {}
    found = json.loads(file.read_text())
    same = all(found["machine"].get(key) == results["machine"].get(key) for key in machine.SAME)
    return found["cases"] if same and all(found[k] == results[k] for k in ("tiny", "dtype")) else {}


def measure_rows(
    names: list[str], device: torch.device, dtype: torch.dtype, tiny: bool, out: Path, end: float, commit: str = ""
) -> int:
    """Measure, print, write; the exit code."""
    described = _describe(device, commit)
    if isinstance(described, str):
        print(f"benchmarks.gpu: {described}; nothing was measured", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    date, kind = datetime.date.today().isoformat(), str(dtype).removeprefix("torch.")
    results: dict[str, Any] = {"machine": described, "date": date, "dtype": kind, "tiny": tiny}
    slug = re.sub(r"[^a-z0-9]+", "-", described["gpu"].lower()).strip("-")
    file = out / f"{slug}-{date}.json"
    results["cases"] = _earlier(file, results)
    print("; ".join(f"{k} {v}" for k, v in described.items()), flush=True)
    good = True
    for name in names:
        title = cases.title(name, tiny)
        entry: dict[str, Any] = {"title": title, "rounds": {}, "rows": [{"who": OURS, "absent": "nothing measured"}]}
        left = end - time.monotonic()
        told = [entry]
        if left < 5:
            entry["rows"][0]["absent"] = "not run: the time was up"
        else:
            stopped = run.apart(
                lambda tell, name=name: run.measure(name, device, dtype, tiny, tell),
                min(left, ROW_SECONDS),
                told.append,
            )
            if stopped:
                told[-1]["rows"].append({"who": "the rest of this row", "absent": stopped})
        results["cases"][name] = told[-1]
        good &= not any("wrong" in row or run.WRONG in row.get("absent", "") for row in told[-1]["rows"])
        good &= "absent" not in told[-1]["rows"][0]
        file.write_text(json.dumps(results, indent=1) + "\n")
        file.with_suffix(".md").write_text(report.markdown(results))
        print(report.terminal(told[-1]), flush=True)
    if not tiny:
        print(f"\n{report.terminal_targets(results['cases'])}")
    print(f"\nwritten: {file.with_suffix('.md')} and .json")
    return 0 if good else 1


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="ROW", help=f"of: {', '.join(cases.CASES)} (default: all)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: checks the chain, the times mean nothing")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--minutes", type=float, default=8.5, help="for everything (default 8.5)")
    parser.add_argument("--out", type=Path, help=f"folder for the results (default: {RESULTS})")
    parser.add_argument("--commit", default="", help="of the source tree, where git cannot tell")
    args = parser.parse_args(argv)
    unknown = [name for name in args.only or () if name not in cases.CASES]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(cases.CASES)}")
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu goes with --tiny; for the CPU there is python -m benchmarks")
    out = args.out or (Path("runs/benchmarks") if args.tiny else RESULTS)
    end = time.monotonic() + args.minutes * 60
    dtype = getattr(torch, args.dtype)
    names, device = args.only or list(cases.CASES), torch.device(args.device)
    return measure_rows(names, device, dtype, args.tiny, out, end, args.commit)


if __name__ == "__main__":
    sys.exit(main())
