"""Which cells of a parametrisation are quick, which slow, and which only thorough."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest

CELLS = 12
"""Slow cells of one parametrised test that `make slow` runs, evenly spaced over its parameters."""
EACH_ITS_OWN = ("test_docs.py", "test_howto.py", "test_study_claims.py")
"""Files whose cells run different code, each of them: all are slow."""

OF_ONE_PART = (
    "test_engine_sanitized.py::test_the_engine_runs_clean_under_sanitizers",
    "test_gpu_model.py::test_the_whole_table_is_of_these_kernels",
    "test_triton.py::test_kernels_in_the_interpreter[test_aggregate]",
    "test_triton.py::test_kernels_in_the_interpreter[test_two_pass]",
    "test_triton_compile.py::test_every_kernel_compiles_and_fits[80-largest]",
    "test_triton_compile.py::test_every_kernel_compiles_and_fits[90-extremes]",
    "test_triton_compile.py::test_what_is_launched_compiles_and_fits[aggregate]",
    "test_triton_compile.py::test_what_is_launched_compiles_and_fits[others]",
)
"""Minutes each, and nothing but a change to the kernels breaks them: CONTRIBUTING.md says when to run them."""


def leave_a_sample(items: Sequence[pytest.Item]) -> None:
    """Mark the slow cells that are not of the sample, and `OF_ONE_PART`, thorough: `make thorough` runs them."""
    for item in items:
        if item.nodeid.endswith(OF_ONE_PART):
            item.add_marker(pytest.mark.thorough)
    cells: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("slow") and item.path.name not in EACH_ITS_OWN:
            test, parametrised, _ = item.nodeid.partition("[")
            if parametrised:
                cells.setdefault((str(item.path), test), []).append(item)
    for found in cells.values():
        kept = {found[round(i * (len(found) - 1) / (CELLS - 1))].nodeid for i in range(CELLS)}
        for item in found:
            if item.nodeid not in kept:
                item.add_marker(pytest.mark.thorough)


def slow_but(quick: Iterable[str], names: Iterable[str]) -> list:
    """The names as parameters: those in `quick` as they are, all others slow."""
    quick, names = list(quick), list(names)
    gone = set(quick) - set(names)
    assert not gone, f"no longer there: {sorted(gone)}"
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]
