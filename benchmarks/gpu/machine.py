"""What the measurements were made on."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

import nearfold

ROOT = Path(__file__).parents[2]
SECONDS = 20.0  # for a program to say it
SAME = ("gpu", "torch", "triton", "sources")  # measurements with another of these stand in another table


def _said(*command: str) -> str:
    """A program's first line; empty where it is missing or fails, or does not end: it may wait for its device."""
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT, start_new_session=True
        )
    except OSError:
        return ""
    try:
        said, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return ""
    return said.strip().partition("\n")[0] if process.returncode == 0 else ""


def commit() -> str:
    """Of the source tree; "+" where it was changed since."""
    name = _said("git", "rev-parse", "--short", "HEAD")
    return f"{name}{'+' if _said('git', 'status', '--porcelain') else ''}" if name else "unknown"


def sources() -> str:
    """What the package's modules hold, in ten letters: a copy of the tree may know no commit."""
    found = hashlib.sha256()
    for path in sorted((ROOT / "src" / "nearfold").rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:10]


def clock() -> str:
    """Of the multiprocessors, now and at most."""
    now, _, most = _said("nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm", "--format=csv,noheader").partition(", ")
    return f"{now} of {most}" if most else "unknown"


def describe(device: torch.device, known_commit: str = "") -> dict[str, str]:
    """Device and versions, in words."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "absent"
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "nearfold": nearfold.__version__,
        "commit": known_commit or commit(),
        "sources": sources(),
    }
    if device.type != "cuda":
        return {"gpu": "cpu", **versions}
    found = torch.cuda.get_device_properties(device)
    return {
        "gpu": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": str(found.multi_processor_count),
        "memory": f"{found.total_memory / 2**30:.0f} GiB",
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown",
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        **versions,
    }
