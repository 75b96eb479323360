"""The committed count of the GPU kernels' instructions is that of the present kernels, and its arithmetic holds."""

from __future__ import annotations

import importlib
import random

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.gpu import bounds, model, work
from nearfold.kernels.triton import launches, sass
from nearfold.nn.functional import knn_attention


@pytest.fixture(scope="module")
def page() -> str:
    if not model.path().exists():
        pytest.skip(f"no table for this version of Triton: {model.path().name} (python -m benchmarks.gpu.model)")
    return model.path().read_text()


def lasting(page: str) -> list[str]:
    """Without the line that names the sources, which a comment changes."""
    return [line for line in page.splitlines() if not line.startswith("Triton ")]


AGAIN = "the kernels have changed: python -m benchmarks.gpu.model"


@pytest.mark.parametrize("name", ["select"])
def test_the_table_is_of_these_kernels(name, page):
    found = model.row(name, backward=False)
    assert "\n".join(model.section(found)) in page, AGAIN
    (line,) = model.report.table(model.ROW_HEAD, model.row_lines([found]), 2)[2:]
    assert line in page, AGAIN


@pytest.mark.slow
def test_the_whole_table_is_of_these_kernels(page):
    assert lasting(model.markdown(model.rows())) == lasting(page), AGAIN


@pytest.mark.parametrize("name", model.ROWS)
def test_every_kernel_of_the_benchmark_says_what_its_loops_do(name):
    for backward in (False, True) if model.TARGETS[name].both else (False,):
        found, around = model.asked(name, backward)
        assert found and around.count
        assert {launch.name for launch in found} <= work.WORK.keys()
        mains = [main for launch in found for main in work.WORK[launch.name](launch.arguments)]
        assert all(main.trips >= 0 and main.units > 0 for main in mains) and any(main.trips > 0 for main in mains)


def test_every_kernel_that_says_what_its_loops_do_is_there():
    for name in work.WORK:
        module, _, kernel = name.partition(".")
        assert hasattr(importlib.import_module(f"nearfold.kernels.triton.{module}"), kernel), f"{name} is gone"


def searched(N: int, which: str) -> bounds.Kernel:
    """Of a search's kernels one, among N keys of 64 features."""
    q = torch.empty(1, 4, N, 64, device="meta", dtype=torch.bfloat16)
    with launches.asked() as asked:
        knn_attention(q, q, q, 9)
    return bounds.kernel(next(one for one in asked if one.name == which))


@pytest.mark.parametrize("which", ["two_pass._note_kernel", "threshold._select_kernel"])
def test_more_work_takes_longer_in_proportion(which, monkeypatch):
    """Twice the queries and twice the keys: four times the instructions, and insertions by the logarithm."""
    monkeypatch.setenv("NEARFOLD_SELECT", which.partition(".")[0])
    small, large = (searched(N, which) for N in (4096, 8192))
    assert small.launch.grid[0] * 2 == large.launch.grid[0]
    assert 3 < large.bounds["issue"] / small.bounds["issue"] <= 4
    assert large.bounds["memory"] == pytest.approx(2 * small.bounds["memory"], rel=0.01)
    assert "score" in {loop.main.unit for loop in small.loops} and small.resident >= 1


def test_the_threshold_is_charged_for_the_queries_that_are_left_to_it(monkeypatch):
    """Of 4096 at k = 9 there are nine, which one of 64 programs does."""
    left = searched(4096, "threshold._select_kernel")
    monkeypatch.setenv("NEARFOLD_SELECT", "threshold")
    whole = searched(4096, "threshold._select_kernel")
    (few,), (all_of_them,) = left.loops, whole.loops
    assert few.main.trips * 64 == all_of_them.main.trips == 64


@pytest.mark.parametrize(("which", "passes"), [("two_pass._note_kernel", 2), ("threshold._select_kernel", 1)])
def test_no_unit_is_exceeded_by_what_the_tensor_cores_need(which, passes, monkeypatch):
    """The search's products, from the instructions, are those of the definition, in every pass."""
    monkeypatch.setenv("NEARFOLD_SELECT", which.partition(".")[0])
    wanted = passes * 2 * 4 * 4096**2 * 64 / bounds.TENSOR * 1e3
    assert searched(4096, which).bounds["tensor cores"] == pytest.approx(wanted, rel=1e-3)


def test_what_is_around_main_loops_counts_once_and_what_reads_nothing_is_found():
    """An outer loop of two instructions around one that reads, and behind them one that reads nothing."""
    text = "/*0000*/ MOV R1, R2 ; /*0010*/ LDG.E R1, R2 ; /*0020*/ @P0 BRA 0x10 ; /*0030*/ @P1 BRA 0x0 ;"
    text += " /*0040*/ FADD R1, R1, R1 ; /*0050*/ @P1 BRA 0x40 ; /*0060*/ EXIT ;"
    code = sass.instructions(text)
    found = sass.loops(code)
    mains = [work.Main("read", 4, 1), work.Main("sum", 4, 1, hot=False)]
    chosen = bounds._chosen(found, mains)
    assert [loop.start for loop in chosen] == [0x10, 0x40]
    assert [i.name for i in bounds._once(code, found, chosen)] == ["MOV", "BRA", "EXIT"]
    assert bounds._unrolled(found, chosen, [0, 1, 0]) == [1, 1]


def test_unrolled_loops_are_found_by_their_order():
    """Where it is that of the loops before; else by what they read: loops of two reads and of one."""
    text = "/*0000*/ LDG.E R1, R2 ; /*0010*/ LDG.E R1, R2 ; /*0020*/ @P0 BRA 0x0 ; /*0030*/ LDG.E R1, R2 ;"
    found = sass.loops(sass.instructions(text + " /*0040*/ @P1 BRA 0x30 ; /*0050*/ EXIT ;"))
    assert bounds._unrolled(found, found, [1, 1]) == [2, 1]
    assert bounds._unrolled(found, found, [1, 2]) == [2, 1]
    assert bounds._unrolled(found, found, [0, 1, 2]) == [1, 1]
    assert bounds._unrolled(found, found[:1], [1, 0, 0]) == [2]


@pytest.mark.parametrize(("k", "classes", "rows"), [(9, 64, 1), (9, 64, 32), (36, 128, 8)])
def test_as_many_are_noted_as_random_data_make(k, classes, rows):
    draw, total, trials = random.Random(0), 0, 300
    for _ in range(trials):
        most = 0
        for _ in range(rows):
            seen: set[int] = set()
            many = 0
            while len(seen) < k:
                seen.add(draw.randrange(classes))
                many += 1
            most = max(most, many)
        total += most
    assert total / trials == pytest.approx(work.noted(k, classes, rows), rel=0.02)


@pytest.mark.parametrize(("k", "tiles", "rows", "width"), [(9, 20, 64, 64), (3, 50, 16, 16)])
def test_insertions_are_as_many_as_random_data_make(k, tiles, rows, width):
    draw, total, trials = random.Random(0), 0, 12
    for _ in range(trials):
        best = [[0.0] * k for _ in range(rows)]
        for _ in range(tiles):
            most = 0
            for i in range(rows):
                tile = [draw.random() for _ in range(width)]
                kept = sorted([*best[i], *tile])[-k:]
                most = max(most, len(set(kept) - set(best[i])))
                best[i] = kept
            total += most
    assert total / trials == pytest.approx(work.insertions(k, tiles, rows), rel=0.05)
