"""The first half hour on a GPU, rehearsed on the CPU: steps that hang, die or are deaf cost themselves alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks.gpu import contact, first, run, steps
from benchmarks.gpu.steps import Step

ROOT = Path(__file__).parents[1]

HANGS = (
    "import time, sys, subprocess; print('so far', flush=True); subprocess.Popen(['sleep', '617.25']); time.sleep(600)"
)
DIES = "import os, signal; print('about to', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"


def python(name: str, code: str, seconds: float = 60) -> Step:
    return Step(name, [sys.executable, "-c", code], seconds)


@pytest.mark.slow
def test_a_step_that_hangs_and_one_that_dies_cost_themselves_alone(tmp_path, capsys):
    found = [
        python("good", "print('early'); print('all is well')"),
        python("hangs", HANGS, 2),
        python("dies", DIES),
        python("deaf", DEAF, 2),
        python("fails", "import sys; print('a fault'); sys.exit(3)"),
        Step("absent", ["no-such-program"], 60),
        replace(python("idle", "print('3 skipped')"), says=first.PASSED),
        replace(python("busy", "print('2 passed, 1 skipped'); print('no errors')"), says=first.PASSED),
        python("last", "print('done')"),
    ]
    start = time.monotonic()
    assert first.do("smoke", tmp_path, found, minutes=2) == 1
    assert time.monotonic() - start < 60
    table = (tmp_path / "summary.md").read_text()
    for line in (
        "| smoke | good | good |",
        "| smoke | hangs | STOPPED |",
        "| smoke | dies | FAILED (-11) |",
        "| smoke | deaf | STOPPED |",
        "| smoke | fails | FAILED (3) |",
        "| smoke | absent | FAILED (127) |",
        "| smoke | idle | FAILED (1) |",
        "| smoke | busy | good |",
        "| smoke | last | good |",
    ):
        assert line in table
    assert "its last line: so far" in table and "killed by signal 11; its last line: about to" in table
    assert capsys.readouterr().out.rstrip().endswith(table.rstrip()), "the table is printed last"
    assert "early\nall is well" in (tmp_path / "smoke.log").read_text()
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "sleep 617.25" not in left, "what a stopped step had started is still there"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_tests_that_are_all_skipped_are_no_success(tmp_path):
    (step, *_) = first.correctness(tmp_path, "cuda", [])
    command = [*step.command[:-1], "1/1", "tests/test_gpu.py", "-k", "first_call"]
    (found,) = steps.run([replace(step, command=command)], time.monotonic() + 100, tmp_path / "log")
    assert found.code == 1 and "did not do its work" in found.said and "skipped" in found.said


def test_what_was_compiled_is_kept_for_the_next_part(tmp_path, capsys):
    tell = "import os; print(os.environ['TRITON_CACHE_DIR'])"
    for part in ("smoke", "table"):
        assert first.do(part, tmp_path, [python("where", tell)]) == 0
        assert f"| {tmp_path}/cache/triton |" in capsys.readouterr().out


def test_a_part_is_replaced_in_the_summary_and_the_others_stay(tmp_path):
    assert first.do("smoke", tmp_path, [python("one", "print(1)")]) == 0
    assert first.do("table", tmp_path, [python("two", "print(2)")]) == 0
    assert first.do("smoke", tmp_path, [python("three", "print('a | b')")]) == 0
    lines = (tmp_path / "summary.md").read_text().splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:]] == [["| table", "two"], ["| smoke", "three"]]
    assert "a / b" in lines[-1]
    assert sorted(file.name for file in tmp_path.iterdir() if file.is_file()) == [
        "smoke.log",
        "summary.md",
        "table.log",
    ]


def test_what_does_not_fit_into_the_time_is_not_begun(tmp_path):
    found = steps.run([python("late", "print(1)")], time.monotonic() + 1, tmp_path / "log")
    assert [(one.code, one.said) for one in found] == [(None, "not run: the time was up")]


def test_the_end_of_the_part_limits_a_step(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "FEWEST", 0.0)
    start = time.monotonic()
    (found,) = steps.run([python("long", DEAF, 600)], start + 1.5, tmp_path / "log")
    assert found.code is None and time.monotonic() - start < 20


@pytest.mark.slow
def test_a_step_that_cannot_be_killed_is_left_behind(tmp_path, monkeypatch):
    """As one is that waits for its device."""
    monkeypatch.setattr(steps, "PATIENCE", 0.2)
    asked = []
    monkeypatch.setattr(steps.os, "killpg", lambda pid, number: asked.append((pid, number)))
    found = steps.run(
        [python("stuck", DEAF, 2), python("next", "print('goes on')")], time.monotonic() + 60, tmp_path / "x"
    )
    pid = asked[0][0]
    monkeypatch.undo()
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert "could not be killed" in found[0].said and found[1].said == "goes on"


@pytest.mark.slow
def test_several_steps_at_a_time(tmp_path):
    wait = "import time; time.sleep(2); print('done')"
    start = time.monotonic()
    found = steps.run([python(str(i), wait) for i in range(4)], start + 60, tmp_path / "log", at_a_time=4)
    assert [one.name for one in found] == list("0123") and all(one.good for one in found)
    assert time.monotonic() - start < 7.5


def test_the_parts_fit_into_nine_minutes_and_eight_files(tmp_path):
    for part, made in first.PARTS.items():
        found = made(tmp_path, "cuda", [])
        assert found and all(step.seconds <= first.MINUTES * 60 for step in found), part
    assert first.MINUTES * 60 + steps.PATIENCE + 10 <= 540
    names = [step.name for step in first.smoke(tmp_path, "cuda", [])]
    assert names[0] == "ceilings" and names[-1] == contact.COMPILED and set(names[1:]) == set(contact.CONTACTS)


def test_the_rest_measures_again_what_has_no_time(tmp_path):
    assert [step.name for step in first.rest(tmp_path, "cuda", [])] == ["memcheck", "racecheck", "initcheck"]
    rows = {"knn": {"rows": [{"forward_ms": 1.0}]}, "acmix": {"rows": [{"absent": "stopped after 150 s"}]}}
    (tmp_path / "h200.json").write_text(json.dumps({"cases": rows}))
    assert first.rest(tmp_path, "cuda", [])[0].command[-2:] == ["--only", "acmix"]


def test_a_first_call_whose_kernels_do_not_run_or_whose_numbers_are_not_finite_is_told(monkeypatch):
    device = torch.device("cpu")
    assert contact.contact("select", device, torch.bfloat16, tiny=True)[1]
    monkeypatch.setattr(contact, "serves", lambda device: True)
    said, good = contact.contact("select", device, torch.bfloat16, tiny=True)
    assert not good and run.NOT_OURS in said
    monkeypatch.undo()
    monkeypatch.setitem(contact.CONTACTS, "bad", lambda *given: (lambda x: x.log(), (torch.zeros(3),)))
    said, good = contact.contact("bad", device, torch.bfloat16, tiny=True)
    assert not good and "NOT FINITE" in said


class Item:
    """As pytest collects it."""

    def __init__(self, name: str, *markers: str) -> None:
        self.name, self.markers = name, markers

    def get_closest_marker(self, name: str) -> str | None:
        return name if name in self.markers else None


def shared(pytestconfig: pytest.Config, share: str) -> list[str]:
    ours = pytestconfig.pluginmanager.get_plugin(str(ROOT / "conftest.py"))
    config = mock.Mock()
    config.getoption.return_value = share
    items = [Item("a"), Item("b", "inductor"), Item("c"), Item("d", "slow"), Item("e"), Item("f", "inductor")]
    ours.pytest_collection_modifyitems(config, items)
    return [item.name for item in items]


def test_shares_hold_every_test_once_and_what_inductor_compiles_last(pytestconfig):
    assert shared(pytestconfig, "1/1") == ["d", "a", "c", "e", "b", "f"]
    assert [shared(pytestconfig, f"{i}/4") for i in range(1, 5)] == [["d", "b"], ["a", "f"], ["c"], ["e"]]
    for wrong in ("0/4", "5/4", "4", "1/x", "/"):
        with pytest.raises(pytest.UsageError, match="the second of five"):
            shared(pytestconfig, wrong)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["smoke", "table"])
def test_a_part_runs_from_the_command_line(part, tmp_path):
    only = ["--only", "select", "scan"] if part == "smoke" else ["--only", "select"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.first", "--device", "cpu", "--out", tmp_path, "--part", part, *only],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert done.stdout.count("| good |") == (3 if part == "smoke" else 1)
    assert len([file for file in tmp_path.iterdir() if file.is_file()]) <= 8
