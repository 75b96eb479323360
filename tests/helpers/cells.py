"""Which cells of a parametrisation are quick."""

from __future__ import annotations

from collections.abc import Iterable

import pytest


def slow_but(quick: Iterable[str], names: Iterable[str]) -> list:
    """The names as parameters: those in `quick` as they are, all others slow."""
    quick, names = list(quick), list(names)
    gone = set(quick) - set(names)
    assert not gone, f"no longer there: {sorted(gone)}"
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]
