"""`python -m benchmarks.gpu.model`: how fast the kernels can be at best on an H200, counted from their machine code.

No GPU is needed: the benchmark's rows are run on the meta device, at their sizes; what they launch is compiled for
sm_90, and the instructions of the main loops are counted. Written to benchmarks/results/gpu-model-VERSION.md, for the
version of Triton that compiled: another one compiles the same kernels quite differently.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks import report
from benchmarks.gpu import cases
from benchmarks.gpu.bounds import BYTES, LOST, TENSOR, Kernel, kernel, size
from nearfold.kernels import aggregate_torch
from nearfold.kernels.triton import compiled, launches
from nearfold.kernels.triton.launches import Launch

RESULTS = Path(__file__).parents[1] / "results"
ROWS = ("knn", "knn_16384", "knn_k36", "select", "convnn", "convnn_conv", "acmix", "neighbourhood")


@dataclass(frozen=True)
class Target:
    """Milliseconds that a row may take, and where that comes from; what the peer takes is estimated."""

    forward: float
    both: float | None
    why: str


TARGETS = {
    "knn": Target(0.98, 1.33, "FlashAttention-2 at 0.79 and 3.3 ms; 0.8x and 2.5x"),
    "knn_16384": Target(12.6, 14.7, "FlashAttention-2 at 12.6 and 51 ms; 1x and 3.5x"),
    "knn_k36": Target(1.57, 1.83, "as k = 9; 0.5x and 1.8x"),
    "select": Target(0.56, None, "35 % of a GEMM at 700 TFLOPS"),
    "convnn": Target(0.78, 1.6, "naive: its 1.26e9 scores pass through memory 15 and 30 times; 10x"),
    "convnn_conv": Target(0.52, 1.55, "cuDNN at 600 TFLOPS; at most 4x"),
    "acmix": Target(0.41, 1.2, "unfold: 2.5 GB pass through memory 8 and 24 times; 10x"),
    "neighbourhood": Target(0.7, 2.4, "FlexAttention over blocks of 128, at 100 TFLOPS; 1x"),
}


@dataclass
class Eager:
    """What PyTorch does around our kernels: how many kernels, and milliseconds to move their bytes or multiply."""

    count: Counter[str] = field(default_factory=Counter)
    bound: float = 0.0


class _Watch(TorchDispatchMode):
    """Counts what writes memory; a sort goes over its keys once a byte."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Eager()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        flat = [t for a in (*args, *(kwargs or {}).values()) for t in (a if isinstance(a, (list, tuple)) else (a,))]
        read = [t for t in flat if isinstance(t, Tensor)]
        made = [t for t in (y if isinstance(y, (list, tuple)) else (y,)) if isinstance(t, Tensor)]
        known = {t.untyped_storage()._cdata for t in read}
        is_view = all(t.untyped_storage()._cdata in known for t in made) and not name.endswith("_")
        if func.namespace != "aten" or name.startswith(("empty", "new_empty")) or is_view:
            return y
        moved = sum(map(size, {id(t): t for t in (*read, *made)}.values())) / BYTES
        if name == "sort":
            moved *= read[0].element_size()
        formula = flop_registry.get(func.overloadpacket)
        work = formula(*args, **(kwargs or {}), out_val=y) / TENSOR if formula else 0.0
        self.found.count[name] += 1
        self.found.bound += max(moved, work) * 1e3
        return y


@dataclass(frozen=True)
class Row:
    """A row of the benchmark, forward or forward and backward."""

    name: str
    backward: bool
    kernels: list[Kernel]
    eager: Eager

    @property
    def bound(self) -> float:
        """Milliseconds."""
        return sum(k.bound for k in self.kernels) + self.eager.bound

    @property
    def target(self) -> float | None:
        """Milliseconds."""
        found = TARGETS[self.name]
        return found.both if self.backward else found.forward


def asked(name: str, backward: bool, dtype: torch.dtype = torch.bfloat16) -> tuple[list[Launch], Eager]:
    """What a row launches, of ours and around it."""
    absent = mock.Mock(side_effect=ImportError("not asked for"))
    with mock.patch.multiple(cases, _flex=absent), mock.patch.object(cases.optional, "natten_neighbourhood", absent):
        case = cases.make(name, torch.device("meta"), dtype, tiny=False).case
    inputs = tuple(x.detach().requires_grad_(backward) for x in case.inputs)
    with launches.asked() as found, _Watch() as watch, torch.set_grad_enabled(backward):
        tiled = mock.Mock(side_effect=lambda *given, **named: iter(()))
        with mock.patch.object(aggregate_torch, "tiles", tiled):
            y = case.ours(*inputs)
            if backward:
                y.backward(torch.empty_like(y))
    if tiled.call_count:
        watch.found.count[TILED] = tiled.call_count
    return found, watch.found


def row(name: str, backward: bool) -> Row:
    """A row, modelled."""
    found, eager = asked(name, backward)
    return Row(name, backward, [kernel(launch) for launch in found], eager)


def rows(names: Iterable[str] = ROWS) -> list[Row]:
    """All of them, forward, then forward and backward."""
    return [row(n, b) for n in names for b in ((False, True) if TARGETS[n].both else (False,))]


ROW_HEAD = ("row", "pass", "bound, ms", "target, ms", "", "our kernels, ms", "PyTorch around them, ms")
KERNEL_HEAD = (
    *("kernel", "programs x warps", "registers", "shared", "stack", "programs at a time"),
    *("bound, ms", "by"),
)
LOOP_HEAD = (
    *("kernel", "unit", "instructions a unit, least", "all", "clocks a unit, integers", "reads, bytes a lane"),
    *("FFMA", "spills", "unrolled", "loops within"),
)
TILED = "walk over tiles, which is not counted"  # PyTorch's path of a word that has no kernel
PASS = {False: "forward", True: "forward + backward"}


def row_lines(found: list[Row]) -> list[list[str]]:
    """Bound and target."""
    lines = []
    for one in found:
        ours = sum(k.bound for k in one.kernels)
        around = f"{one.eager.bound:.3f} ({one.eager.count.total()} kernels)"
        target = one.target
        assert target is not None
        verdict = "below" if one.bound <= target else "ABOVE"
        if TILED in one.eager.count:
            verdict = "ABOVE: not all of it is a kernel"
        lines.append([one.name, PASS[one.backward], f"{one.bound:.3f}", f"{target:g}", verdict, f"{ours:.3f}", around])
    return lines


def kernel_lines(one: Row) -> list[list[str]]:
    """What every kernel takes."""
    lines = []
    for k in one.kernels:
        by = max(k.bounds, key=lambda unit: k.bounds[unit])
        size = f"{k.launch.grid[0]} x {k.launch.options['num_warps']}"
        lines.append(
            [k.name, size, *(str(n) for n in (k.registers, k.shared, k.stack, k.resident)), f"{k.bound:.3f}", by]
        )
    return lines


def loop_lines(one: Row) -> list[list[str]]:
    """What the main loops are made of."""
    lines = []
    for k in one.kernels:
        for c in (c for c in k.loops if c.main.trips):
            widths = ", ".join(f"{n} x {w}" for w, n in sorted(Counter(c.loads).items()))
            numbers = (f"{c.least:.1f}", f"{c.all:.1f}", f"{c.half:.1f}", widths)
            within = f"{c.within} x {c.main.within:.1f}" if c.within else ""
            lines.append([k.name, c.main.unit, *numbers, *map(str, (c.ffma, c.spills, c.unrolled)), within])
    return lines


NOTES = """\
From the machine code for sm_90, without a device; `python -m benchmarks.gpu.model` writes this page anew. A bound is
what 132 multiprocessors at 1.83 GHz need at least: the busiest of their units (a scheduler issues one instruction a
clock; integers and comparisons take two, special functions eight), or the bytes of every tensor once at 4.8 TB/s.
Nothing waits in it, and what a condition may skip is skipped. Targets are milliseconds derived from estimates of what
the others take, said below the first table. No time here was measured.

Instructions are counted as threads execute them: 32 for one of a warp. "Least" is the shortest way through a main loop,
with the expected rounds of the loops within it for data in random order (their instructions x rounds); "all" is every
instruction of it. What lies around main loops counts once; loops that such data do not enter are left out. Reads are of
global memory, number x bytes a lane; FFMA and spills are instructions of the loop. The targets for the code: at most 8
instructions a score, no FFMA in a product, reads of 8 bytes a lane where the layout allows, no spills."""


TITLE = "# The GPU kernels, counted"


def sources() -> str:
    """What the kernels' modules hold, in ten letters."""
    found = hashlib.sha256()
    for file in sorted(Path(compiled.__file__).parent.glob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()[:10]


def section(one: Row) -> list[str]:
    """A row's kernels."""
    page = ["", f"## {cases.title(one.name, tiny=False)}", ""]
    page += [*report.table(KERNEL_HEAD, kernel_lines(one), 1), "", *report.table(LOOP_HEAD, loop_lines(one), 2), ""]
    around = ", ".join(f"{n} {what}" for what, n in sorted(one.eager.count.items()))
    return [*page, f"Around them PyTorch runs {around or 'nothing'}."]


def miss_lines(found: list[Row]) -> list[str]:
    """Main loops that miss a target for the code, each once, with the row that asks for it first."""
    seen: dict[str, str] = {}
    for one in found:
        for k in one.kernels:
            gone = [LOST] if LOST in k.bounds else []
            for what in (*gone, *(miss for c in k.loops for miss in c.misses)):
                seen.setdefault(f"{k.name}: {what}", one.name)
    return [f"- {what} (`{name}`)." for what, name in seen.items()]


def markdown(found: list[Row]) -> str:
    """The page."""
    page = [TITLE, "", f"Triton {version('triton')}, kernels {sources()}.", "", NOTES, ""]
    page += report.table(ROW_HEAD, row_lines(found), 2)
    page += [""]
    page += [f"- `{name}`: {TARGETS[name].why}." for name in dict.fromkeys(one.name for one in found)]
    page += ["", "Main loops that miss a target for the code:", "", *(miss_lines(found) or ["- none."])]
    for name in dict.fromkeys(one.name for one in found):
        page += section(next(one for one in reversed(found) if one.name == name))
    return "\n".join([*page, ""])


def path() -> Path:
    """Where the page of this version of Triton is."""
    return RESULTS / f"gpu-model-triton-{version('triton')}.md"


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.model", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"print these alone, of: {', '.join(ROWS)}")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.rows if name not in ROWS]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(ROWS)}")
    page = markdown(rows(args.rows or ROWS))
    print(page)
    if not args.rows:
        path().write_text(page)
        print(f"written: {path()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
