"""A user's own Python file: it is executed, and whatever it raises is a ValueError that names it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from nearfold.options import line


def guarded(spec: str, make: Callable[[], Any]) -> Any:
    """What a user's own code makes; ValueError that names the code, whatever it raises.

    >>> guarded("mine.py:make", lambda: 1 / 0)
    Traceback (most recent call last):
    ValueError: mine.py:make: ZeroDivisionError: division by zero
    """
    try:
        return make()
    except (Exception, SystemExit) as error:
        raise ValueError(f"{spec}: {type(error).__name__}: {line(error)}") from error


@contextmanager
def executed(path: Path, spec: str = "") -> Iterator[ModuleType]:
    """Execute a Python file, and have it as a module.

    Args:
        path: the file. Its folder is on ``sys.path`` meanwhile, so that it finds its neighbours, as when it is run.
        spec: what to call it in errors; default: the path.

    Raises:
        ValueError: there is no such file, it is no Python, or it raises something.
    """
    spec = spec or str(path)
    if "\0" in str(path) or not path.is_file():
        raise ValueError(f"{spec}: there is no file {path}")
    plan = importlib.util.spec_from_file_location(f"nearfold_file_{path.stem}", path)
    if plan is None or plan.loader is None:
        raise ValueError(f"{spec}: {path} is not a Python file")
    module = importlib.util.module_from_spec(plan)
    folder, execute = str(path.parent), plan.loader.exec_module
    sys.modules[plan.name] = module  # dataclasses and pickle look their module up
    sys.path.insert(0, folder)
    try:
        guarded(spec, lambda: execute(module))
        yield module
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
