"""A row of the GPU's benchmark says which of our kernels ran, and gets no time where none did."""

from __future__ import annotations

import pytest
import torch

from benchmarks.case import OURS
from benchmarks.gpu import run
from nearfold.kernels import cuda


def measured(name: str) -> dict:
    told: list[dict] = []
    with cuda.interpreted():
        run.measure(name, torch.device("cpu"), torch.float32, True, told.append)
    return told[-1]


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.clock.FEWEST", 1)


def test_a_row_names_the_kernels_it_launched():
    entry = measured("select")
    assert entry["rows"][0]["who"] == OURS and entry["rows"][0]["forward_ms"] > 0
    assert entry["kernels"].keys() == {"threshold._select_kernel"}  # of so few keys


def test_a_row_whose_kernels_do_not_load_fails(monkeypatch):
    """As with NEARFOLD_ENGINE=off, which the benchmark once set itself."""
    monkeypatch.setenv("NEARFOLD_ENGINE", "off")
    cuda._load.cache_clear()
    try:
        entry = measured("select")
    finally:
        cuda._load.cache_clear()
    assert entry["rows"][0]["absent"] == run.NOT_OURS and entry["rounds"] == {}
