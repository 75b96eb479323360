"""`python -m benchmarks.gpu.first --out DIR --part PART`: the first half hour on a GPU, in four parts.

smoke: what the machine can do, and every operator once at a real size. correctness: `pytest -m gpu`, in several
processes. table: `python -m benchmarks.gpu`. rest: the rows that are missing, then compute-sanitizer. Every part ends
by itself within nine minutes, and every step of it has a limit: one that hangs or dies costs itself alone.

DIR then holds at most eight files: PART.log, the results, and summary.md, of whose table the part's lines are printed
last. DIR/cache keeps what was compiled for the next part. Exit code 1 where a step did not end well.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from benchmarks import report
from benchmarks.gpu.contact import COMPILED, CONTACTS
from benchmarks.gpu.steps import Outcome, Step, lines, run

MINUTES = 8.5  # of a part; with the end of its last step within nine
CONTACT_SECONDS = 75.0
SANITIZED = "many_tiles and bfloat16 and (knn or convnn)"
PASSED = r"\b\d+ passed"
HEAD = ("part", "step", "result", "seconds", "what it said last")
PYTHON = (sys.executable, "-m")


def _devices(device: str) -> list[str]:
    return ["--device", device, *(["--tiny"] if device == "cpu" else [])]


def smoke(out: Path, device: str, names: list[str]) -> list[Step]:
    """The machine's ceilings, then every operator; what inductor compiles last."""
    chosen = names or [*(name for name in CONTACTS if name != COMPILED), COMPILED]
    found = [Step("ceilings", [*PYTHON, "benchmarks.gpu.ceilings", *_devices(device)], CONTACT_SECONDS)]
    return found + [
        Step(name, [*PYTHON, "benchmarks.gpu.contact", name, *_devices(device)], CONTACT_SECONDS) for name in chosen
    ]


def correctness(out: Path, device: str, names: list[str]) -> list[Step]:
    """The tests in shares, one process each; first those that inductor does not compile."""
    shares = max(1, min(12, (os.cpu_count() or 2) - 2))
    pytest = [*PYTHON, "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--tb=short"]
    threads = {"OMP_NUM_THREADS": "1"}
    return [
        Step(f"tests {i} of {shares}", [*pytest, "--share", f"{i}/{shares}"], MINUTES * 60, threads, PASSED)
        for i in range(1, shares + 1)
    ]


def table(out: Path, device: str, names: list[str]) -> list[Step]:
    """The benchmark."""
    only = ["--only", *names] if names else []
    minutes = ["--minutes", f"{MINUTES - 0.3}"]
    return [
        Step(
            "benchmark",
            [*PYTHON, "benchmarks.gpu", "--out", str(out), *minutes, *_devices(device), *only],
            MINUTES * 60,
        )
    ]


def rest(out: Path, device: str, names: list[str]) -> list[Step]:
    """The benchmark's rows that have no time yet, then memory accesses and races."""
    missing = names or unmeasured(out)
    again = [*PYTHON, "benchmarks.gpu", "--out", str(out), "--minutes", "3", *_devices(device), "--only", *missing]
    found = [Step("rows again", again, 200)] if missing else []
    pytest = [*PYTHON, "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py", "-k", SANITIZED]
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in ("memcheck", "racecheck", "initcheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *pytest]
        found.append(Step(tool, command, 150, alone, PASSED))
    return found


def unmeasured(out: Path) -> list[str]:
    """Rows of the latest results in which ours has no time."""
    results = sorted(out.glob("*.json"))
    if not results:
        return []
    rows = json.loads(results[-1].read_text())["cases"]
    return [name for name, entry in rows.items() if "forward_ms" not in entry["rows"][0]]


PARTS = {"smoke": smoke, "correctness": correctness, "table": table, "rest": rest}


def summary(out: Path, part: str, found: list[Outcome]) -> list[str]:
    """The table's lines for a part; summary.md has those of the other parts as well."""
    file = out / "summary.md"
    head = report.table(HEAD, [], 3)
    mine = report.table(HEAD, [[part, *line] for line in lines(found)], 3)[2:]
    before = file.read_text().splitlines()[2:] if file.exists() else []
    others = [line for line in before if not line.startswith(f"| {part} |")]
    file.write_text("\n".join([*head, *others, *mine]) + "\n")
    return [*head, *mine]


def do(part: str, out: Path, steps: list[Step], minutes: float = MINUTES, at_a_time: int = 1) -> int:
    """Run a part's steps; the exit code."""
    out.mkdir(parents=True, exist_ok=True)
    cache = out.resolve() / "cache"
    kept = {"TRITON_CACHE_DIR": str(cache / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}
    steps = [replace(step, environment=kept | step.environment) for step in steps]
    log = out / f"{part}.log"
    log.write_text(f"{part}, {datetime.datetime.now():%Y-%m-%d %H:%M}\n")
    found = run(steps, time.monotonic() + minutes * 60, log, at_a_time)
    print("\n".join(["", *summary(out, part, found)]))
    return 0 if all(one.good for one in found) else 1


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.first", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is found")
    parser.add_argument("--part", choices=tuple(PARTS), required=True)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="of smoke: operators; else: rows")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: tiny sizes, a rehearsal")
    args = parser.parse_args(argv)
    steps = PARTS[args.part](args.out, args.device, args.only)
    at_a_time = len(steps) if args.part == "correctness" else 1
    return do(args.part, args.out, steps, at_a_time=at_a_time)


if __name__ == "__main__":
    sys.exit(main())
