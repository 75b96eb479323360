"""`python -m benchmarks [CASE ...]`: correctness first, then time and memory, paired in one run.

Ours and every peer take turns, so that a slow moment of the machine hits all of them; medians of --repeats rounds.
A peer that computes the same is compared first, in float64, output and input gradient: where they differ no speed
is reported and the exit code is 1. Peak memory is what one forward + backward allocates at most at a time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler announces itself otherwise

import torch
from torch import Tensor

import nearfold
from benchmarks.cases import CASES, Case, Forward, make
from nearfold.study.measure import peak_bytes

TOLERANCE = 1e-9  # relative, compared in float64: in float32 near-ties are ranked by rounding, on either side


def step(case: Case, forward: Forward, x: Tensor, upstream: Tensor | None) -> Tensor:
    """Forward, and with ``upstream`` backward to the input and every parameter."""
    y = forward(x)
    if upstream is not None:
        x.grad = None
        for module in case.modules:
            module.zero_grad(set_to_none=True)
        y.backward(upstream)
    return y


def error(case: Case, peer: Forward, x: Tensor) -> float:
    """Largest relative difference of outputs and input gradients, in float64."""
    found = []
    for module in case.modules:
        module.double()
    x = x.detach().double().requires_grad_()
    upstream = torch.randn_like(case.ours(x))
    for forward in (case.ours, peer):
        y = step(case, forward, x, upstream)
        assert x.grad is not None
        found.append((y.detach(), x.grad.clone()))
    for module in case.modules:
        module.float()
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*found, strict=True))


def seconds(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def bench(name: str, repeats: int) -> list[dict[str, object]]:
    """Rows of one case: ours, then the peers with their ratios to ours."""
    case, x = make(name)
    x.requires_grad_()
    forwards: dict[str, Forward] = {"nearfold": case.ours}
    wrong: dict[str, float] = {}
    for peer, (forward, same) in case.peers.items():
        difference = error(case, forward, x) if same else 0.0
        if difference <= TOLERANCE:
            forwards[peer] = forward
        else:
            wrong[peer] = difference
    upstream = torch.randn_like(case.ours(x).detach())

    def forward_only(f: Forward) -> Callable[[], object]:
        def run() -> None:
            with torch.no_grad():
                f(x)

        return run

    both = {n: (lambda f=f: step(case, f, x, upstream)) for n, f in forwards.items()}
    fast = seconds({n: forward_only(f) for n, f in forwards.items()}, repeats)
    full = seconds(both, repeats)
    memory = {n: peak_bytes(run, x.device) for n, run in both.items()}
    rows: list[dict[str, object]] = []
    for n in forwards:
        rows.append(
            {
                "case": name,
                "what": f"{case.title} {case.shape}",
                "who": n,
                "forward_ms": fast[n] * 1e3,
                "both_ms": full[n] * 1e3,
                "peak_mib": memory[n] / 2**20,
                "forward_ratio": fast[n] / fast["nearfold"],
                "both_ratio": full[n] / full["nearfold"],
                "memory_ratio": memory[n] / memory["nearfold"],
                "target": case.target if n == "nearfold" else "",
            }
        )
    for n, difference in wrong.items():
        rows.append({"case": name, "what": case.title, "who": n, "wrong_by": difference})
    return rows


def markdown(rows: list[dict[str, object]], machine: dict[str, str]) -> str:
    """The table; a ratio above 1 means Nearfold is faster or smaller than that peer."""
    lines = [
        "# Benchmarks",
        "",
        ", ".join(f"{k} {v}" for k, v in machine.items()),
        "",
        "Medians of rounds in which everyone takes turns, float32. A ratio is the peer over Nearfold: above 1,",
        "Nearfold is faster (or holds less memory).",
        "",
        "| case | who | forward ms | forward + backward ms | peak MiB | ratio forward | ratio both | ratio memory |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        if "wrong_by" in r:
            lines.append(f"| {r['what']} | {r['who']} | differs by {r['wrong_by']:.1e}: no speed reported |||||| ")
            continue
        lines.append(
            f"| {r['what']} | {r['who']} | {r['forward_ms']:.1f} | {r['both_ms']:.1f} | {r['peak_mib']:.1f} "
            f"| {r['forward_ratio']:.2f} | {r['both_ratio']:.2f} | {r['memory_ratio']:.2f} |"
        )
    targets = [f"- {r['what']}: target {r['target']}" for r in rows if r.get("target")]
    return "\n".join([*lines, "", *targets, ""])


def processor() -> str:
    """The processor's name, where the system tells."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def main() -> int:
    """Run, print, write; exit code 1 when a result was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of: {', '.join(CASES)} (default: all)")
    parser.add_argument("--repeats", type=int, default=11, help="rounds; the median counts (default 11)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the table")
    args = parser.parse_args()
    unknown = [c for c in args.cases if c not in CASES]
    if unknown or args.repeats < 1:
        parser.error(f"unknown cases: {', '.join(unknown)}" if unknown else "--repeats must be at least 1")
    machine = {
        "date": datetime.date.today().isoformat(),
        "nearfold": nearfold.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    rows: list[dict[str, object]] = []
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.cases or CASES:
        rows += bench(name, args.repeats)
        table = markdown(rows, machine)  # written as it goes
        (args.out / "cpu.md").write_text(table)
        (args.out / "cpu.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
        print(f"{name} done", file=sys.stderr)
    print(table)
    return 1 if any("wrong_by" in r for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
