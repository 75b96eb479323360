"""The committed count of the GPU kernels' instructions is that of the present kernels, and its arithmetic holds."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.gpu import bounds, model, work
from nearfold.kernels.triton import launches
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
        assert all(main.trips > 0 for launch in found for main in work.WORK[launch.name](launch.arguments))


def test_more_work_takes_longer_in_proportion():
    """Twice the queries and twice the keys: four times the instructions, and insertions by the logarithm."""
    found = []
    for N in (4096, 8192):
        q = torch.empty(1, 4, N, 64, device="meta", dtype=torch.bfloat16)
        with launches.asked() as asked:
            knn_attention(q, q, q, 9)
        found.append(bounds.kernel(next(one for one in asked if one.name.startswith("select"))))
    small, large = found
    assert small.launch.grid[0] * 2 == large.launch.grid[0]
    assert 3 < large.bounds["issue"] / small.bounds["issue"] <= 4
    assert large.bounds["memory"] == pytest.approx(2 * small.bounds["memory"], rel=0.01)
    assert small.loops[0].main.unit == "score" and small.resident >= 1


def test_no_unit_is_exceeded_by_what_the_tensor_cores_need():
    """The search's products alone, from the instructions, are those of the definition."""
    q = torch.empty(1, 4, 4096, 64, device="meta", dtype=torch.bfloat16)
    with launches.asked() as asked:
        knn_attention(q, q, q, 9)
    found = bounds.kernel(next(one for one in asked if one.name.startswith("select")))
    wanted = 2 * 4 * 4096**2 * 64 / bounds.TENSOR * 1e3
    assert found.bounds["tensor cores"] >= wanted * 0.999


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
