"""Ctrl-C that is not lost: Python drops a KeyboardInterrupt that is raised in a destructor or a callback of its own."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_pressed = threading.Event()


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Within it, in the main thread, Ctrl-C is raised as always, and again by the next `check`."""
    if threading.current_thread() is not threading.main_thread() or (
        signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return

    def press(number: int, frame: FrameType | None) -> None:
        _pressed.set()
        signal.default_int_handler(number, frame)

    _pressed.clear()
    signal.signal(signal.SIGINT, press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _pressed.clear()


def check() -> None:
    """Raise KeyboardInterrupt where Ctrl-C was pressed, and dropped.

    >>> check()
    """
    if _pressed.is_set():
        raise KeyboardInterrupt
