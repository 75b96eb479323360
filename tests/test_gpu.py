"""On a CUDA device every lowering equals the oracle, and at sizes of many tiles the layers equal their definitions.

Nothing beyond torch, NumPy and pytest is imported, so that this runs on a bare machine: `python -m pytest -m gpu`.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import cases
from benchmarks.gpu.gate import TOLERANCE, judge
from nearfold.testing import BUDGET, CASES, conform

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# function of benchmarks.gpu.cases and its arguments: sizes that no tile divides, one neighbour, all of them
SIZES = {
    "knn": (cases.knn, {"shape": (2, 3, 1031, 64), "k": 9, "naive": False, "most": 6}),
    "knn, k=1": (cases.knn, {"shape": (1, 2, 513, 32), "k": 1, "naive": False, "most": 2}),
    "knn, k=36": (cases.knn, {"shape": (1, 2, 700, 128), "k": 36, "naive": False, "most": 2}),
    "knn, odd d": (cases.knn, {"shape": (1, 2, 257, 40), "k": 5, "naive": False, "most": 2}),
    "knn, k=N": (cases.knn, {"shape": (1, 2, 7, 16), "k": 7, "naive": False, "most": 2}),
    "select": (cases.search, {"shape": (2, 3, 1031, 64), "k": 9, "gemm": 64}),
    "select, k=100": (cases.search, {"shape": (1, 1, 1500, 24), "k": 100, "gemm": 64}),
    "convnn": (cases.convnn, {"shape": (3, 64, 33, 31), "k": 9, "naive": False, "conv": False, "many": 3}),
    "convnn, k=4": (cases.convnn, {"shape": (2, 24, 17, 19), "k": 4, "naive": False, "conv": False, "many": 2}),
    "acmix": (cases.acmix, {"shape": (3, 64, 33, 31), "window": 7, "heads": 4, "many": 3}),
    "neighbourhood": (cases.neighbourhood, {"shape": (3, 64, 33, 31), "window": 7, "heads": 4, "many": 3}),
}


@pytest.fixture(autouse=True)
def _float32_is_float32(monkeypatch):
    """cuDNN rounds float32 to TF32 unless told otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_on_cuda(name, dtype):
    conform(CASES[name], (7, 6), dtype, device="cuda")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_many_tiles(name, dtype):
    build, arguments = SIZES[name]
    torch.manual_seed(0)
    verdict = judge(build(torch.device("cuda"), dtype, **arguments))
    assert verdict.right, f"{verdict.where} differs by {verdict.difference:.1e}"
    assert verdict.repeats, "a second run gives other bits"
