"""The GPU benchmark's chain on the CPU: tiny shapes, the same code; and what is wrong gets no speed."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from benchmarks.case import OURS
from benchmarks.gpu import __main__, cases, gate, machine, report, run

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def only(folder: Path) -> tuple[dict, str]:
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text()), file.with_suffix(".md").read_text()


def in_process(out: Path, *arguments: str) -> int:
    return __main__.main(["--device", "cpu", "--tiny", "--out", str(out), *arguments])


@pytest.mark.slow
def test_every_row_is_written(tmp_path, capsys):
    assert in_process(tmp_path) == 0
    printed = capsys.readouterr().out
    results, page = only(tmp_path)
    assert results["cases"].keys() == cases.CASES.keys()
    for name, entry in results["cases"].items():
        rows = {row["who"]: row for row in entry["rows"]}
        assert rows[OURS]["forward_ms"] > 0 and rows[OURS]["difference"] < 0.01, name
        assert ("both_ms" in rows[OURS]) == (name != "select")
        assert (cases.THRESHOLD in rows) == (name in ("knn", "knn_16384", "select", *cases.CURVE))
        assert entry["repeats"] and entry["title"] in page and entry["title"] in printed
    assert "no speed is claimed" in page and "## Targets" not in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_command_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and "no CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())


def test_rows_are_added_to_the_table(tmp_path):
    assert in_process(tmp_path, "--only", "select") == 0
    assert in_process(tmp_path, "--only", "knn") == 0
    assert only(tmp_path)[0]["cases"].keys() == {"select", "knn"}
    assert in_process(tmp_path, "--only", "knn", "--dtype", "float32") == 0
    assert only(tmp_path)[0]["cases"].keys() == {"knn"}


@pytest.mark.parametrize("fault", ["scaled", "one row", "nan", "gradient", "no gradient"])
def test_a_wrong_kernel_gets_no_speed(tmp_path, monkeypatch, capsys, fault):
    right = cases.knn_attention

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            y = y.clone()
            if fault == "scaled":
                y *= 1.02
            if fault == "one row":  # of one head: 6 of 280 queries
                y[0, 0, :6] = y[0, 0, 6:12].clone()
            if fault == "nan":
                y[0, 0, 3, 2] = float("nan")
            return y

        @staticmethod
        def backward(ctx, grad):
            return grad * (1.05 if fault == "gradient" else 0.0 if fault == "no gradient" else 1.0)

    monkeypatch.setattr(cases, "knn_attention", lambda *given: Wrong.apply(right(*given)))
    assert in_process(tmp_path, "--only", "knn") == 1
    results, page = only(tmp_path)
    entry = results["cases"]["knn"]
    assert entry["rows"][0]["wrong"].startswith("gradient" if "gradient" in fault else "output")
    assert entry["rounds"] == {} and not any(key.endswith("_ms") for row in entry["rows"] for key in row)
    for text in (capsys.readouterr().out, page):
        assert "WRONG: " in text and "no speed is reported" in text


def test_a_wrong_search_is_seen(monkeypatch):
    right = cases.select

    def second_best(query, key, k, *rest):
        score, index = right(query, key, k + 1, *rest)
        return score[..., 1:], index[..., 1:]

    assert gate.judge(cases.make("select", CPU, torch.bfloat16, tiny=True)).right
    monkeypatch.setattr(cases, "select", second_best)
    assert not gate.judge(cases.make("select", CPU, torch.bfloat16, tiny=True)).right


def test_a_lost_parameter_gradient_and_other_bits_are_seen():
    checked = cases.make("convnn", CPU, torch.bfloat16, tiny=True)
    layer, calls = checked.case.module, []

    def ours(x):
        calls.append(1)
        y = layer(x)
        return y - layer.bias[:, None, None] + layer.bias.detach()[:, None, None] + 1e-3 * len(calls)

    verdict = gate.judge(dataclasses.replace(checked, case=dataclasses.replace(checked.case, ours=ours)))
    assert not verdict.right and verdict.where == "gradient of bias" and not verdict.repeats


def test_a_row_that_fails_costs_only_itself(tmp_path, monkeypatch, capsys):
    def broken(*given):
        raise RuntimeError("illegal memory access\nand much more")

    monkeypatch.setattr(cases, "knn_attention", broken)
    assert in_process(tmp_path, "--only", "knn", "select") == 1
    results, page = only(tmp_path)
    assert results["cases"]["knn"]["rows"][0]["absent"] == "fails: RuntimeError: illegal memory access"
    assert "illegal memory access" in page and "forward_ms" in results["cases"]["select"]["rows"][0]

    monkeypatch.setattr(run, "judge", lambda checked: os._exit(11))
    assert in_process(tmp_path, "--only", "select") == 1
    assert "ended with code 11" in only(tmp_path)[1]
    assert "ended with code 11" in capsys.readouterr().out


@pytest.mark.slow
def test_a_process_that_hangs_is_stopped():
    told = []

    def work(tell):
        tell("so far")
        time.sleep(60)

    assert run.apart(work, 0.5, told.append) == "stopped after 0 s"
    assert told == ["so far"]


@pytest.mark.slow
def test_a_process_that_cannot_be_killed_is_left_behind(monkeypatch):
    """As one is that waits for its device. Python does not wait for it either when it ends."""
    monkeypatch.setattr(run, "PATIENCE", 0.2)
    monkeypatch.setattr(BaseProcess, "kill", lambda self: None)
    told, start = [], time.monotonic()

    def work(tell):
        tell(os.getpid())
        time.sleep(60)

    said = run.apart(work, 0.5, told.append)
    took = time.monotonic() - start
    waited_for = multiprocessing.active_children()
    os.kill(told[0], signal.SIGKILL)
    os.waitpid(told[0], 0)
    assert said == "stopped after 0 s, and its process could not be killed" and took < 20
    assert told[0] not in [child.pid for child in waited_for]


@pytest.mark.slow
def test_a_process_that_ignores_signals_is_killed():
    told = []

    def work(tell):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        tell(os.getpid())
        time.sleep(60)

    assert run.apart(work, 0.5, told.append) == "stopped after 0 s"
    with pytest.raises(ProcessLookupError):
        os.kill(told[0], 0)


def test_a_program_that_says_nothing_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(machine, "SECONDS", 0.2)
    killed = []
    monkeypatch.setattr(subprocess.Popen, "kill", lambda self: killed.append(self))  # and cannot be killed
    start = time.monotonic()
    assert machine._said("sleep", "60") == "" and time.monotonic() - start < 20
    (process,) = killed
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert machine._said("echo", "a\nb") == "a" and machine._said("false") == machine._said("no-such-program") == ""


def test_a_row_without_our_kernels_fails(tmp_path, monkeypatch, capsys):
    """On a device where they must run: PyTorch's path is right, and is not what the row is about."""
    monkeypatch.setattr(run, "serves", lambda device: True)
    assert in_process(tmp_path, "--only", "knn", "select") == 1
    results, page = only(tmp_path)
    for entry in results["cases"].values():
        assert entry["rows"][0]["absent"] == run.NOT_OURS and entry["kernels"] == {} and entry["rounds"] == {}
        assert not any(key.endswith("_ms") for row in entry["rows"] for key in row)
    assert run.NOT_OURS in page and run.NOT_OURS in capsys.readouterr().out


def test_the_other_way_without_our_kernels_fails():
    checked = cases.make("select", CPU, torch.bfloat16, tiny=True)
    forward = checked.case.peers[cases.THRESHOLD].forward
    assert run._also(checked, forward, kernels_must_run=True)["absent"] == run.NOT_OURS
    assert "absent" not in run._also(checked, forward, kernels_must_run=False)


def test_no_row_starts_when_the_time_is_up(tmp_path):
    assert in_process(tmp_path, "--only", "knn", "--minutes", "0") == 1
    assert "the time was up" in only(tmp_path)[1]


def test_targets_name_rows_and_peers():
    for target in cases.TARGETS:
        checked = cases.make(target.case, CPU, torch.bfloat16, tiny=True)
        assert target.peer in {*checked.case.peers, *checked.held}
    assert {target.case for target in cases.TARGETS} == cases.CASES.keys() - cases.CURVE.keys()


def test_a_peer_without_enough_memory_is_beaten():
    rows = [{"who": OURS, "forward_ms": 1.0, "both_ms": 2.0}, {"who": "naive", "absent": report.NO_MEMORY}]
    lines = report.target_lines({"convnn": {"rows": rows}}, tiny=False)
    assert [line[-2:] for line in lines if line[1] == "naive"] == [["out of memory", "met"]] * 2
    assert all(line[-1] == "not measured" for line in lines if line[1] != "naive")


def test_the_other_search_is_asked_for_and_judged(tmp_path, monkeypatch, capsys):
    right, asked = cases.select, []

    def search(query, key, k, *rest):
        asked.append(os.environ.get("NEARFOLD_SELECT", ""))
        score, index = right(query, key, k + 1, *rest)
        wrong = asked[-1] == "threshold"
        return score[..., wrong:][..., :k], index[..., wrong:][..., :k]

    monkeypatch.setattr(cases, "select", search)
    checked = cases.make("select", CPU, torch.bfloat16, tiny=True)
    checked.case.peers[cases.THRESHOLD].forward(*checked.case.inputs)
    checked.case.ours(*checked.case.inputs)
    assert asked == ["threshold", ""]
    assert in_process(tmp_path, "--only", "select") == 1
    rows = {row["who"]: row for row in only(tmp_path)[0]["cases"]["select"]["rows"]}
    assert rows[OURS]["forward_ms"] > 0 and "forward_ms" not in rows[cases.THRESHOLD]
    assert "WRONG: output" in capsys.readouterr().out


def test_the_growth_is_a_table():
    rows = [{"who": OURS, "forward_ms": 1.0, "both_ms": 2.0, "peak_mib": 3.0}, {"who": cases.FLASH, "forward_ms": 4.0}]
    lines = report.curve_lines({"curve_2048": {"rows": rows}})
    assert lines == [
        ["2048", "forward, ms", "1.00", "", "4.00"],
        ["2048", "forward + backward, ms", "2.00", "", ""],
        ["2048", "peak extra memory, MiB", "3.00", "", ""],
    ]
