"""These tests run in Triton's interpreter, on the CPU: a process of their own, started by tests/test_triton.py."""

from __future__ import annotations

import os
from types import ModuleType

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_ignore_collect(collection_path, config):
    """Outside the interpreter nothing here can be imported."""
    return None if INTERPRETED or collection_path.name == "conftest.py" else True


def pytest_configure(config):
    """Let the interpreter prepare `triton.language` once in a launch, not at every call of a device function.

    At each call it looks through all members of the language for what it has not yet replaced by its own, and after
    the first finds nothing: a third of these tests' time. Another version of Triton may be built otherwise: then the
    tests are slower, and the same.
    """
    if not INTERPRETED:
        return
    from triton import language
    from triton.runtime import interpreter

    scope, prepare = getattr(interpreter, "_LangPatchScope", None), getattr(interpreter, "_patch_lang", None)
    if scope is None or prepare is None:
        return
    prepared: set[tuple[bool, bool]] = set()

    def restore(self, original=scope.restore):
        prepared.clear()
        original(self)

    def once(fn):
        modules = [value for value in fn.__globals__.values() if isinstance(value, ModuleType)]
        sees = (language in modules, language.core in modules)
        if sees in prepared:
            return scope()
        prepared.add(sees)
        return prepare(fn)

    scope.restore, interpreter._patch_lang = restore, once


@pytest.fixture(autouse=True)
def _seeded():
    import torch

    torch.manual_seed(0)
