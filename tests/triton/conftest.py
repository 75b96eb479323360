"""These tests run in Triton's interpreter, on the CPU: a process of their own, started by tests/test_triton.py."""

from __future__ import annotations

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_ignore_collect(collection_path, config):
    """Outside the interpreter nothing here can be imported."""
    return None if INTERPRETED or collection_path.name == "conftest.py" else True


@pytest.fixture(autouse=True)
def _seeded():
    import torch

    torch.manual_seed(0)
