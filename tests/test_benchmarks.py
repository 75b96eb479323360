"""The benchmarks' chain at tiny shapes: every case is built and compared, and a wrong result gets no speed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import __main__, curves
from benchmarks.case import OURS
from benchmarks.cases import CASES, make
from benchmarks.gate import agrees, difference
from benchmarks.machine import describe, slug
from benchmarks.targets import TARGETS, Target, verdict


def written(folder: Path, what: str = "cpu", suffix: str = ".json") -> Path:
    """The one file of a kind in a folder of results."""
    (file,) = folder.glob(f"{what}-*{suffix}")
    return file


@pytest.mark.parametrize("name", CASES)
def test_every_peer_agrees_with_ours(name):
    case = make(name, small=True)
    same = {who: peer for who, peer in case.peers.items() if peer.same}
    assert same
    for who, peer in same.items():
        off, where = difference(case, peer)
        assert agrees(peer, off), f"{who}: {where} differs by {off}"


@pytest.mark.parametrize("name", ["convnn", "convnn_random", "knn_16384", "attention_tax"])
@pytest.mark.parametrize("break_it", ["output", "gradient", "nan"])
def test_the_gate_sees(name, break_it):
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            if break_it == "gradient":
                return y.clone()
            return y * (1 + 1e-6) if break_it == "output" else y.index_fill(0, torch.tensor([0]), float("nan"))

        @staticmethod
        def backward(ctx, grad):
            return grad * (1 + 1e-6) if break_it == "gradient" else grad

    case = make(name, small=True)
    peer = next(p for p in case.peers.values() if p.same and p.engine)
    broken = dataclasses.replace(peer, forward=lambda *inputs: Broken.apply(peer.forward(*inputs)))
    off, where = difference(case, broken)
    assert not agrees(broken, off)
    assert where.startswith("output") == (break_it != "gradient")


def test_the_gate_sees_a_parameter_whose_gradient_is_lost():
    case = make("attention_tax", small=True)
    (peer,) = case.peers.values()
    assert peer.gradients is not None
    gradients = peer.gradients
    changed = dataclasses.replace(peer, gradients=lambda: {**gradients(), "out_bias": torch.zeros(12)})
    off, where = difference(case, changed)
    assert not agrees(changed, off) and where == "gradient of out_bias"


@pytest.mark.slow
def test_a_run_writes_what_it_prints(tmp_path, capsys):
    assert __main__.main(["convnn", "--small", "--repeats", "1", "--out", str(tmp_path)]) == 0
    results = json.loads(written(tmp_path).read_text())
    rows = {row["who"]: row for row in results["cases"]["convnn"]["rows"]}
    assert rows[OURS].keys() >= {"forward_ms", "both_ms", "peak_mib", "resident_mib"}
    assert rows["naive"]["difference"] < 1e-9
    printed, page = capsys.readouterr().out, written(tmp_path, "cpu", ".md").read_text()
    for who in rows:
        assert who in printed and who in page
    assert results["machine"]["engine"] in page
    # another case is added to what is there
    assert __main__.main(["conv_tax", "--small", "--repeats", "1", "--out", str(tmp_path)]) == 0
    assert json.loads(written(tmp_path).read_text())["cases"].keys() == {"convnn", "conv_tax"}


def test_a_wrong_peer_gives_exit_code_1_and_no_speed(tmp_path, monkeypatch, capsys):
    spec = CASES["convnn"]

    def build(**arguments):
        case = spec.build(**arguments)
        naive = case.peers["naive"]
        wrong = dataclasses.replace(naive, forward=lambda x: naive.forward(x) * 1.001)
        return dataclasses.replace(case, peers={**case.peers, "naive": wrong})

    monkeypatch.setitem(CASES, "convnn", dataclasses.replace(spec, build=build))
    assert __main__.main(["convnn", "--small", "--repeats", "1", "--out", str(tmp_path)]) == 1
    entry = json.loads(written(tmp_path).read_text())["cases"]["convnn"]
    assert entry["rounds"] == {}
    assert not any(key.endswith("_ms") for row in entry["rows"] for key in row)
    for text in (capsys.readouterr().out, written(tmp_path, "cpu", ".md").read_text()):
        assert "WRONG: " in text and "differs by 1.0e-03" in text and "no speed is reported" in text


def test_an_absent_peer_is_listed(tmp_path, monkeypatch, capsys):
    spec = CASES["conv_tax"]
    absent = {"somebody": "not installed"}
    build = lambda **arguments: dataclasses.replace(spec.build(**arguments), absent=absent)  # noqa: E731
    monkeypatch.setitem(CASES, "conv_tax", dataclasses.replace(spec, build=build))
    assert __main__.main(["conv_tax", "--small", "--repeats", "1", "--out", str(tmp_path)]) == 0
    assert "somebody  not installed" in capsys.readouterr().out


def test_results_of_other_versions_are_not_kept_and_those_of_another_processor_stay_beside(tmp_path):
    command = ["conv_tax", "--small", "--repeats", "1", "--out", str(tmp_path)]
    older = {"machine": describe() | {"torch": "1.0"}, "cases": {"kvt": {}}}
    other = {"machine": describe() | {"processor": "another"}, "cases": {"kvt": {}}}
    for found in (older, other):
        (tmp_path / f"cpu-{slug(found['machine'])}.json").write_text(json.dumps(found))
    assert __main__.main(command) == 0
    files = {slug(f["machine"]): f for f in map(json.loads, (p.read_text() for p in tmp_path.glob("cpu-*.json")))}
    assert files[slug(other["machine"])] == other
    assert files[slug(describe())]["cases"].keys() == {"conv_tax"}


def test_committed_results_say_which_processor_they_are_of():
    files = sorted(Path(__main__.__file__).parent.glob("results/c*-*.json"))
    assert len(files) >= 2
    for file in files:
        assert file.stem.partition("-")[2] == slug(json.loads(file.read_text())["machine"])


def test_curves_are_drawn(tmp_path, capsys):
    assert __main__.main(["--curves", "--small", "--repeats", "1", "--out", str(tmp_path)]) == 0
    found = json.loads(written(tmp_path, "curves").read_text())["curves"]
    assert {name: len(points) for name, points in found.items()} == {n: len(c.small) for n, c in curves.CURVES.items()}
    assert written(tmp_path, "curves", ".png").stat().st_size > 10_000


def test_every_target_names_a_case_and_a_peer():
    for target in TARGETS:
        peers = make(target.case, small=True).peers if target.what != "growth" else CASES
        assert target.peer in peers


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (Target("a", "peer", "forward", 2.5), ("at least 2.5x as fast", "3.00x", "met")),
        (Target("a", "peer", "both", 2.5), ("at least 2.5x as fast", "2.00x", "missed")),
        (Target("a", "peer", "both", 0.5, most=True), ("at most 0.5x the time", "0.50x", "met")),
        (Target("a", "peer", "memory", 0.1, most=True), ("at most 0.1x the memory", "0.125x", "missed")),
        (Target("b", "a", "growth", 4.4, most=True), ("at most 4.4x the memory", "4.00x", "met")),
        (Target("c", "peer", "forward", 2), ("at least 2x as fast", "", "not measured")),
        (Target("a", "nobody", "forward", 2), ("at least 2x as fast", "", "not measured")),
    ],
)
def test_verdicts(target, expected):
    ours = {"who": OURS, "forward_ms": 1.0, "both_ms": 2.0, "peak_mib": 1.0}
    peer = {"who": "peer", "forward_ms": 3.0, "both_ms": 4.0, "peak_mib": 8.0}
    cases = {"a": {"rows": [ours, peer]}, "b": {"rows": [{**ours, "peak_mib": 4.0}]}}
    assert verdict(target, cases) == expected


def test_peers_that_only_check_are_not_timed():
    case = make("knn_16384", small=True)
    checks = {who for who, peer in case.peers.items() if not peer.timed}
    assert checks
    assert case.timed(backward=True).keys() == {OURS, *case.peers} - checks
