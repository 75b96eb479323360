"""One case from start to end: compared, then timed and measured."""

from __future__ import annotations

import datetime
import statistics
from typing import Any

from benchmarks import cases
from benchmarks.case import OURS, Case
from benchmarks.gate import agrees, difference
from benchmarks.measure import allocated, resident, runs, seconds

Row = dict[str, Any]


def measure_case(name: str, repeats: int, budget: float, small: bool = False) -> dict[str, Any]:
    """Title, date, rounds and rows of one case."""
    return measure(cases.make(name, small), cases.title(name, small), repeats, budget)


def measure(case: Case, title: str, repeats: int, budget: float, memory: bool = True) -> dict[str, Any]:
    """As `measure_case`, of a case that stands in no table.

    A peer whose results differ gets ``wrong`` and no numbers, and so does ours.
    """
    rows: dict[str, Row] = {OURS: {"who": OURS, "same": True}}
    for who, peer in case.peers.items():
        rows[who] = {"who": who, "same": peer.same}
        if peer.same:
            off, where = difference(case, peer)
            rows[who] |= {"difference": off, "compared_in": str(peer.dtype).removeprefix("torch.")}
            if not agrees(peer, off):
                rows[who]["wrong"] = where
    rounds = {}
    if not any("wrong" in row for row in rows.values()):
        for kind in ("forward", "both") if case.backward else ("forward",):
            rounds[kind] = _time(case, kind, repeats, budget, rows, memory)
    rows |= {who: {"who": who, "absent": why} for who, why in case.absent.items()}
    today = datetime.date.today().isoformat()
    return {"title": title, "date": today, "rounds": rounds, "rows": list(rows.values())}


def _time(case: Case, kind: str, repeats: int, budget: float, rows: dict[str, Row], memory: bool) -> int:
    """Add times and memory to the rows; how many rounds there were."""
    todo = runs(case, kind == "both")
    times = seconds(todo, repeats, budget)
    for who, found in times.items():
        rows[who] |= {f"{kind}_ms": statistics.median(found) * 1e3, f"{kind}_least_ms": min(found) * 1e3}
    last = "both" if case.backward else "forward"
    if memory and kind == last:
        for who, run in todo.items():
            counted = who not in case.peers or case.peers[who].allocator
            rows[who] |= {"peak_mib": allocated(run) if counted else None, "resident_mib": resident(run)}
    return len(times[OURS])
