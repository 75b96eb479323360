"""Time on a device: everyone takes turns, by the device's own events, with a cold L2 cache."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from benchmarks.measure import Run

FEWEST, MOST = 5, 101  # rounds
FLUSH = 1 << 30  # bytes written before every call: many times any L2 cache, and some 0.2 ms for the host to run ahead


@dataclass(frozen=True)
class Times:
    """Milliseconds of every round by name, and why others have none."""

    found: dict[str, list[float]]
    failed: dict[str, str]


def reason(error: Exception) -> str:
    """In a line."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    return f"fails: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"


def milliseconds(todo: dict[str, Run], device: torch.device, seconds: float) -> Times:
    """Rounds in which each takes a turn, until the time is up; who fails is out."""
    flush = torch.empty(FLUSH if device.type == "cuda" else 0, dtype=torch.int8, device=device)
    failed, once = {}, 0.0
    for name, run in todo.items():
        try:
            _time(run, device, flush)  # compiles, and chooses algorithms
            once += _time(run, device, flush) / 1e3
        except Exception as error:
            failed[name] = reason(error)
            if isinstance(error, torch.cuda.OutOfMemoryError):
                run.clear()
                torch.cuda.empty_cache()
    names = [name for name in todo if name not in failed]
    times: dict[str, list[float]] = {name: [] for name in names}
    rounds = max(FEWEST, min(MOST, int(seconds / once))) if names and once else 0
    for i in range(rounds):
        first = i % len(names)  # who begins changes
        for name in names[first:] + names[:first]:
            times[name].append(_time(todo[name], device, flush))
    return Times(times, failed)


def _time(run: Run, device: torch.device, flush: torch.Tensor) -> float:
    run.clear()
    if device.type != "cuda":
        start = time.perf_counter()
        run.call()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()  # while the device does this, the host runs ahead
    begin.record()
    run.call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
