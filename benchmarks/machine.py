"""What the measurements were made on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch

import nearfold
from nearfold.kernels import engine

INSTRUCTIONS = {"AVX2": "avx2", "AVX-512": "avx512f", "AVX-512 BF16": "avx512_bf16", "AMX": "amx_tile"}
PEERS = ("scikit-learn", "faiss-cpu", "natten")
SAME = ("processor", "threads", "torch", "nearfold", "engine")  # measurements with another of these do not compare


def _fields(path: str) -> dict[str, str]:
    """`name : value` lines of a file of the system; empty where there is none."""
    file = Path(path)
    lines = file.read_text().splitlines() if file.exists() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def describe() -> dict[str, str]:
    """Machine, threads and versions, in words."""
    cpu, memory = _fields("/proc/cpuinfo"), _fields("/proc/meminfo")
    flags = cpu.get("flags", cpu.get("Features", "")).split()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    total = memory.get("MemTotal", "").removesuffix(" kB")
    return {
        "processor": cpu.get("model name") or platform.processor() or platform.machine(),
        "instructions": ", ".join(name for name, flag in INSTRUCTIONS.items() if flag in flags) or "unknown",
        "cores": str(cores),
        "threads": str(torch.get_num_threads()),
        "memory": f"{int(total) / 2**20:.0f} GiB" if total else "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "nearfold": nearfold.__version__,
        "engine": engine.describe(),
        **{package: _version(package) for package in PEERS},
    }


def slug(machine: dict[str, str]) -> str:
    """A file name's part for the processor and the engine's instruction set: each has results of its own.

    >>> slug({"processor": "Intel(R) Xeon(R) Gold 6330 CPU @ 2.00GHz", "engine": "C++ (amx)"})
    'intel-xeon-gold-6330-amx'
    """
    words = re.sub(r"\((R|TM)\)|@.*|\b(CPU|Processor)\b", " ", machine["processor"])
    engine = re.search(r"\((\w+)\)", machine["engine"])
    return "-".join(re.findall(r"[a-z0-9]+", f"{words} {engine[1] if engine else 'pytorch'}".lower()))


def comparable(one: dict[str, str], other: dict[str, str]) -> bool:
    """Whether measurements described so belong into one table."""
    return all(one.get(key) == other.get(key) for key in SAME)
