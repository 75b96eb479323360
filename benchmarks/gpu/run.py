"""One row from start to end: compared, then timed; and the same in a process of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from benchmarks.case import OURS, Forward
from benchmarks.gpu import cases, machine
from benchmarks.gpu.clock import milliseconds, reason
from benchmarks.gpu.gate import judge, peer_difference
from benchmarks.measure import runs
from nearfold.kernels import cuda
from nearfold.study.measure import peak_bytes

Entry = dict[str, Any]
END = "end"
WRONG = "WRONG"
NOT_OURS = "none of Nearfold's kernels was launched: what ran is PyTorch's path"
PATIENCE = 2.0  # seconds that a process has to end by itself, and again after it was killed
SECONDS = {False: 5.0, True: 0.05}  # for all rounds, forward, and again for forward and backward; by tiny


def serves(device: torch.device) -> bool:
    """Whether our kernels must run on this device."""
    return device.type == "cuda" or cuda.is_interpreted()


@contextlib.contextmanager
def launched() -> Iterator[Counter[str]]:
    """How often each of our kernels is launched within it, once it has ended; nothing where there is no Triton."""
    count: Counter[str] = Counter()
    try:
        from nearfold.kernels.triton import launches
    except ImportError:
        yield count
        return
    with launches.seen() as found:
        yield count
    count.update(launch.name for launch in found)


def measure(name: str, device: torch.device, dtype: torch.dtype, tiny: bool, tell: Callable[[Entry], None]) -> None:
    """Tell the row's entry, whenever there is more of it. Ours gets ``wrong`` and nobody a time where it is wrong."""
    entry: Entry = {"title": cases.title(name, tiny), "rounds": {}, "rows": [{"who": OURS, "same": True}]}
    ours: Entry = entry["rows"][0]
    torch.backends.cudnn.allow_tf32 = False  # float32, where it is asked for, is float32 for everyone
    try:
        checked = cases.make(name, device, dtype, tiny)
        with launched() as kernels:
            found = judge(checked)
    except Exception as error:  # whatever a kernel does must not end the other rows
        ours["absent"] = reason(error)
        tell(entry)
        return
    ours["difference"], entry["repeats"] = found.difference, found.repeats
    if not found.right:
        ours["wrong"] = found.where
        tell(entry)
        return
    entry["kernels"] = dict(sorted(kernels.items()))
    if serves(device) and not kernels:
        ours["absent"] = NOT_OURS
        tell(entry)
        return
    case, rows = checked.case, {OURS: ours}
    for who, peer in case.peers.items():
        rows[who] = {"who": who, "same": peer.same}
        if who in checked.also:
            rows[who] |= _also(checked, peer.forward, serves(device))
        elif peer.same:
            try:
                rows[who]["difference"] = peer_difference(checked, peer.forward)
            except Exception as error:
                rows[who]["absent"] = reason(error)
    rows |= {who: {"who": who, "absent": why} for who, why in case.absent.items()}
    rows |= {who: {"who": who, "same": True, "peak_mib": mib} for who, mib in checked.held.items()}
    entry["rows"] = list(rows.values())
    for kind in ("forward", "both") if case.backward else ("forward",):
        out = [who for who, row in rows.items() if "absent" in row]
        todo = runs(case, kind == "both", without=out)
        times = milliseconds(todo, device, SECONDS[tiny])
        for who, why in times.failed.items():
            rows[who]["absent"] = why
        for who, t in times.found.items():
            part = checked.share.get(who, 1.0)
            rows[who] |= {f"{kind}_ms": statistics.median(t) * part, f"{kind}_least_ms": min(t) * part}
            entry["rounds"][kind] = len(t)
        if device.type == "cuda":
            entry["clock"] = machine.clock()
        tell(entry)
    for who, run in todo.items():
        if device.type == "cuda" and "absent" not in rows[who]:
            run.clear()
            rows[who]["peak_mib"] = peak_bytes(run.call, device) / 2**20
    tell(entry)


def _also(checked: cases.Checked, forward: Forward, kernels_must_run: bool) -> Entry:
    """What is ours in another way is judged as ours is, on a few parts, and gets no time either where it is wrong."""
    try:
        with launched() as kernels:
            found = judge(replace(checked, case=replace(checked.case, ours=forward), parts=checked.parts[:4]))
    except Exception as error:
        return {"absent": reason(error)}
    told: Entry = {"difference": found.difference}
    if not found.right or not found.repeats:
        told["absent"] = f"{WRONG}: {found.where if not found.right else 'a second run'} differs"
    elif kernels_must_run and not kernels:
        told["absent"] = NOT_OURS
    return told


def end_process(process: BaseProcess) -> bool:
    """End a process, and say whether it is gone; one that waits for its device cannot be killed, and is left behind."""
    process.join(PATIENCE)
    if not process.is_alive():
        return True
    process.kill()
    process.join(PATIENCE)
    if not process.is_alive():
        return True
    multiprocessing.process._children.discard(process)  # or Python would wait for it before it ends itself
    return False


def apart(work: Callable[[Callable[[Any], None]], None], seconds: float, took: Callable[[Any], None]) -> str:
    """Run `work` in a process of its own, and pass on what it tells; an empty string, or why it did not end well.

    A kernel that hangs, or that ruins the process's device context, costs its own row.
    """
    context = multiprocessing.get_context("fork")  # what is imported stays so: seconds a row
    receiver, sender = context.Pipe(duplex=False)

    def inside() -> None:
        receiver.close()
        torch.set_num_threads(1)  # a fork has lost its parent's pool of threads
        work(sender.send)
        sender.send(END)

    process = context.Process(target=inside)
    process.start()
    sender.close()
    end = time.monotonic() + seconds
    try:
        while receiver.poll(max(0.0, end - time.monotonic())):
            told = receiver.recv()
            if told == END:
                return ""
            took(told)
        left = "" if end_process(process) else ", and its process could not be killed"
        return f"stopped after {seconds:.0f} s{left}"
    except EOFError:  # it ended before its end
        process.join(10)
        return f"its process ended with code {process.exitcode}"
    finally:
        end_process(process)
        receiver.close()
