"""Which files pytest reads. At the root it also makes benchmarks/ importable, and src/ where nothing is installed."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "src"
TRITON = SOURCE / "nearfold" / "kernels" / "triton"

# Before torch is loaded, and for the processes that tests start: several tests at once have more threads than there are
# cores, and those that wait for one another would otherwise spin, and take the time of those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if importlib.util.find_spec("nearfold") is None:
    sys.path.insert(0, str(SOURCE))


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


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--share 2/5`: of five processes the second one's tests, where xdist is not installed."""
    parser.addoption("--share", default="1/1", metavar="I/N", help="every N-th test alone, from the I-th on")


def _share(config: pytest.Config) -> tuple[int, int]:
    given = config.getoption("share")
    i, slash, n = given.partition("/")
    if not (slash and i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise pytest.UsageError(f"--share is {given!r}, not as in 2/5: the second of five processes")
    return int(i), int(n)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The slow ones first, so that no process is left with one of them at the end; last what inductor compiles.

    The order is otherwise kept.
    """
    items.sort(
        key=lambda item: (item.get_closest_marker("slow") is None, item.get_closest_marker("inductor") is not None)
    )
    i, n = _share(config)
    if n > 1:
        config.hook.pytest_deselected(items=[item for at, item in enumerate(items) if at % n != i - 1])
        items[:] = items[i - 1 :: n]
