"""Which files pytest reads. Here at the root it also makes the source tree importable without an installation."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

TRITON = Path(__file__).parent / "nearfold" / "kernels" / "triton"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """None: as usual."""
    if collection_path.suffix != ".py":
        return None
    # a bare machine with a GPU may lack what the other tests and modules import
    if config.getoption("markexpr") == "gpu" and "mark.gpu" not in collection_path.read_text():
        return True
    if collection_path.parent == TRITON and importlib.util.find_spec("triton") is None:
        return True
    return None


LONG = ("test_triton.py", "test_train_parallel.py", "test_train_survival.py", "test_study_engine.py")
"""Files of tests that take long: first, so that no process is left with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put them first; the order is otherwise kept."""
    items.sort(key=lambda item: item.path.name not in LONG)
