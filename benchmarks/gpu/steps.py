"""Commands one after another, or several at a time, each with a limit: one that hangs or dies costs itself alone."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

PATIENCE = 5.0  # seconds that a killed process has to be gone
FEWEST = 5.0  # seconds without which no step is begun
KEPT = 200_000  # of a step's output, its last bytes


@dataclass(frozen=True)
class Step:
    """A command and the seconds it may take.

    Attributes:
        name: in the table.
        command: program and arguments.
        seconds: at most.
        environment: added to this process's.
        says: a pattern in its output, without which it has not done its work: all tests may have been skipped.
    """

    name: str
    command: Sequence[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    says: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a step ended: the exit code, None where it was stopped or not begun; its last line, or what happened."""

    name: str
    code: int | None
    seconds: float
    said: str

    @property
    def good(self) -> bool:
        """Whether it ended well."""
        return self.code == 0


@dataclass
class _Running:
    step: Step
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    start: float
    limit: float


def run(steps: Sequence[Step], end: float, log: Path, at_a_time: int = 1) -> list[Outcome]:
    """Run all until `end` (time.monotonic), write what they print into `log`, and say how each ended, in their order.

    A step is killed with all processes it started. One that cannot be killed, as it waits for its device, is left.
    """
    waiting, running = list(steps), list[_Running]()
    found: dict[str, Outcome] = {}
    while waiting or running:
        while waiting and len(running) < at_a_time:
            step = waiting.pop(0)
            left = end - time.monotonic()
            if left < FEWEST:
                found[step.name] = Outcome(step.name, None, 0.0, "not run: the time was up")
                continue
            try:
                running.append(_begin(step, min(step.seconds, left)))
            except OSError as error:
                found[step.name] = Outcome(step.name, 127, 0.0, f"does not start: {error}")
        for one in list(running):
            over = time.monotonic() - one.start >= one.limit
            if one.process.poll() is not None or over:
                running.remove(one)
                found[one.step.name] = outcome = _end(one, log)
                print(f"{outcome.seconds:6.1f} s  {outcome.name}: {outcome.said}", flush=True)
        time.sleep(0.05 if running else 0.0)
    return [found[step.name] for step in steps]


def _begin(step: Step, limit: float) -> _Running:
    output = tempfile.TemporaryFile()  # noqa: SIM115 (until the step has ended)
    process = subprocess.Popen(
        list(step.command),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env={**os.environ, **step.environment},
        start_new_session=True,
    )
    return _Running(step, process, output, time.monotonic(), limit)


def _end(one: _Running, log: Path) -> Outcome:
    """What became of it; it is gone, or left behind, afterwards."""
    took = time.monotonic() - one.start
    code, left = one.process.poll(), ""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(one.process.pid, signal.SIGKILL)  # also what it has started and not waited for
    if code is None:
        try:
            one.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            left = ", and could not be killed"
    size = one.output.seek(0, os.SEEK_END)
    one.output.seek(max(0, size - KEPT))
    text = one.output.read().decode(errors="replace")
    one.output.close()
    with log.open("a") as file:
        file.write(f"\n===== {one.step.name}: {' '.join(one.step.command)}\n{text}")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else "printed nothing"
    if code is None:
        return Outcome(one.step.name, None, took, f"stopped after {took:.0f} s{left}; its last line: {last}")
    if code == 0 and not re.search(one.step.says, text):
        return Outcome(one.step.name, 1, took, f"did not do its work: {last}")
    return Outcome(one.step.name, code, took, last if code >= 0 else f"killed by signal {-code}; its last line: {last}")


def lines(found: Sequence[Outcome]) -> list[list[str]]:
    """For a table: step, result, seconds, what it said."""
    verdict: dict[Any, str] = {0: "good", None: "STOPPED"}
    return [
        [
            one.name,
            verdict.get(one.code, f"FAILED ({one.code})"),
            f"{one.seconds:.1f}",
            one.said.replace("|", "/")[:200],
        ]
        for one in found
    ]
