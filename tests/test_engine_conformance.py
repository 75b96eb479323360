"""The conformance suite on every instruction set of the compiled engine."""

import pytest
import torch
from helpers.engine_draws import SETS

from nearfold import parse
from nearfold.kernels import engine
from nearfold.lower import lower
from nearfold.lower.verdict import Facts
from nearfold.testing import CASES, conform, poisoned_empties

# ---- the conformance suite on every instruction set ------------------------------------------------------------------


def _uses_kernels(text):
    facts = [Facts(part, 2, torch.float64, "cpu", True) for part in parse(text).parts]
    return any(lower(f) in ("knn", "local") for f in facts)


KERNEL_CASES = [name for name, text in CASES.items() if _uses_kernels(text)]


def _conform(name, isa, grid, dtype):
    text = CASES[name]
    if "window" in text and ("padding=0" in text or "padding=1" in text) and min(grid) < 3:
        pytest.skip("a window without padding needs room")
    with engine.forced(isa), poisoned_empties():
        conform(text, grid, dtype)


def cells(first, *others):
    """An instruction set and a value each: all values for the best set, the first for every set; the others slow."""
    return [
        pytest.param(
            isa, value, id=f"{value}-{isa}", marks=[] if value == first or isa == SETS[0] else [pytest.mark.slow]
        )
        for isa in SETS
        for value in (first, *others)
    ]


@pytest.mark.parametrize(("isa", "grid"), cells((7, 6), (1, 1), (13,)))
@pytest.mark.parametrize("name", KERNEL_CASES)
def test_conformance(name, grid, isa):
    if len(grid) == 1 and "(" in CASES[name].split("|")[0] and "window((" in CASES[name]:
        pytest.skip("a window of two axes")
    _conform(name, isa, grid, torch.float64)


@pytest.mark.parametrize(("isa", "dtype"), cells(torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", KERNEL_CASES)
def test_conformance_in_low_precision(name, dtype, isa):
    _conform(name, isa, (6, 7), dtype)
