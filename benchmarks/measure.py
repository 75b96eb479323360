"""Time and memory of one case: everyone takes turns, so that a slow moment of the machine hits all of them."""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.case import Case
from benchmarks.gate import engine_of
from nearfold.study.measure import peak_bytes

FEWEST = 3  # rounds, however long one takes
LONG = 1.0  # seconds after which memory is not measured again
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Run:
    """One call, and what is done before it, untimed."""

    clear: Callable[[], None]
    call: Callable[[], None]


def runs(case: Case, backward: bool, without: Collection[str] = ()) -> dict[str, Run]:
    """What is timed of each: forward without gradients, or forward and backward to inputs and parameters."""
    inputs = tuple(x.detach().requires_grad_(backward) for x in case.inputs)
    upstream = None
    if backward:
        with torch.no_grad():
            case.clear(inputs)
            upstream = torch.randn_like(case.ours(*inputs))
    found = {}
    for name, peer in case.timed(backward).items():

        def call(peer=peer) -> None:  # type: ignore[no-untyped-def]
            with engine_of(peer), torch.set_grad_enabled(backward):
                y = peer.forward(*inputs)
                if upstream is not None:
                    y.backward(upstream)

        if name not in without:
            found[name] = Run(lambda: case.clear(inputs), call)
    return found


def seconds(todo: dict[str, Run], repeats: int, budget: float) -> dict[str, list[float]]:
    """Seconds of every round of each: `repeats` rounds, or fewer where they would take longer than the budget."""
    times: dict[str, list[float]] = {name: [] for name in todo}
    _round(todo, times)  # warms up
    once = sum(sum(t) for t in times.values())
    rounds = max(min(FEWEST, repeats), min(repeats, int(budget / once)))
    times = {name: [] for name in todo}
    for i in range(rounds):
        _round(todo, times, i)
    return times


def _round(todo: dict[str, Run], times: dict[str, list[float]], first: int = 0) -> None:
    """One turn of each; who begins changes from round to round, as the one before leaves its mark on the caches."""
    names = list(todo)
    first %= len(names)
    for name in names[first:] + names[:first]:
        run = todo[name]
        run.clear()
        start = time.perf_counter()
        run.call()
        times[name].append(time.perf_counter() - start)


def allocated(run: Run) -> float:
    """Most MiB that torch's allocator held at one time during a call, beyond what was held before."""
    run.clear()
    return peak_bytes(run.call, torch.device("cpu")) / 2**20


def resident(run: Run) -> float | None:
    """The same of the whole process, in pages touched: also what torch does not see. None where the system is mute.

    The median of three calls, where they are short: the C library keeps some freed pages.
    """
    if not RESET.exists() or not STATUS.exists():
        return None
    found: list[float] = []
    start = time.perf_counter()
    while len(found) < 3 and (not found or time.perf_counter() - start < LONG):
        run.clear()
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        RESET.write_text("5")  # the high-water mark starts anew
        before = _status("VmRSS")
        run.call()
        found.append((_status("VmHWM") - before) / 1024)
    return statistics.median(found)


def _status(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1])
