"""Files that are replaced whole or not at all, and paths that stay inside the folder that they are looked for in."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, writer: str = "") -> Iterator[Path]:
    """Give a name to write to; once it is written and on the disk, it takes the place of `path`.

    Whatever happens on the way, `path` holds either its old or its new content, and may be read by whom the umask
    allows, whoever writes it. Where several may write at once, each has a name as `writer`.
    """
    temporary = path.with_name(f"{path.name}{writer}.partial")
    temporary.unlink(missing_ok=True)  # of a process that died; a link there would lead what is written elsewhere
    with open(temporary, "xb") as new:
        mode = stat.S_IMODE(os.fstat(new.fileno()).st_mode)
    yield temporary
    os.chmod(temporary, mode)  # safetensors makes a file of its own, for its owner only
    to_disk(temporary)
    os.replace(temporary, path)
    to_disk(path.parent)  # the new name must be on the disk too


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def inside(root: Path, path: Path) -> Path:
    """Return `path`, which may not exist yet, if no ``..`` and no link on the way leads out of the folder `root`.

    Raises:
        ValueError: It leads out.

    >>> inside(Path("runs"), Path("runs/store")).name
    'store'
    >>> inside(Path("runs"), Path("runs/../precious"))
    Traceback (most recent call last):
    ValueError: runs/../precious leads out of the folder runs: nothing there is read or changed
    """
    try:
        ours = path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError):  # a link to itself; a name with a NUL
        ours = False
    if not ours:
        raise ValueError(f"{path} leads out of the folder {root}: nothing there is read or changed")
    return path


def is_own_file(path: Path) -> bool:
    """Return whether a path is a file itself: no link, no folder, no pipe or device that a reader would wait for."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):
        return False
