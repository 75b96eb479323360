"""Compiles the engine for platforms that are not here, with Zig's Clang; runs nothing of it.

    pip install ziglang nanobind
    python packaging/cross.py [TARGET ...]

The bindings see this Python's headers, which is near enough for a check except on Windows: there they are left out.
Nothing is linked, which would need the other platform's Python. Windows is compiled with MinGW's headers: what MSVC's
own would say is not seen.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
CPP = ROOT / "src/nearfold/kernels/cpp"
X86 = ["generic", "avx2", "avx512"]
TARGETS = {
    "x86_64-linux-gnu.2.28": [*X86, "amx"],
    "x86_64-linux-musl": X86,
    "aarch64-linux-gnu.2.28": ["generic"],
    "aarch64-macos": ["generic"],
    "x86_64-macos": X86,
    "x86_64-windows-gnu": X86,
}
STRICT = "-std=gnu++17 -Wno-unused-const-variable -Werror"


def cmake_lists() -> dict[str, list[str]]:
    """What CMakeLists.txt sets to lists of words: sources, and flags of instruction sets."""
    found: dict[str, list[str]] = {}
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    for name, words in re.findall(r"^ *set\((strict|added|all|\w+_flags) (.*)\)$", text, re.MULTILINE):
        # of `strict` the last one is of GCC and Clang
        found[name] = [w for word in words.split() for w in (found[word[2:-1]] if word[0] == "$" else [word])]
    return found


def commands(target: str) -> dict[str, list[str]]:
    """What to run for every object of a platform."""
    import nanobind

    said = cmake_lists()
    start = [sys.executable, "-m", "ziglang", "c++", "-target", target, *said["strict"], *STRICT.split()]
    found = {}
    for isa in TARGETS[target]:
        flags = [
            *said.get(f"{isa}_flags", []),
            f"-DNEARFOLD_ISA={isa}",
            *(["-DNEARFOLD_BASE=avx512"] if isa == "amx" else []),
        ]
        for name in said["added" if isa == "amx" else "all"]:
            found[f"{isa}/{name}"] = [*start, *flags, "-c", str(CPP / f"{name}.cpp")]
    sets = [f"-DNEARFOLD_{isa.upper()}" for isa in TARGETS[target] if isa != "generic"]
    headers = ["-isystem", nanobind.include_dir(), "-isystem", sysconfig.get_path("include")]
    bindings = [] if "windows" in target else CPP.glob("module*.cpp")
    for path in sorted([*bindings, CPP / "threads.cpp", CPP / "pool.cpp"]):
        found[path.stem] = [*start, "-include", "stdio.h", *sets, *headers, "-c", str(path)]
    return found


def main() -> None:
    """One line a platform; the compiler's words where something fails."""
    failed = False
    for target in sys.argv[1:] or TARGETS:
        if target not in TARGETS:
            raise SystemExit(f"target {target!r} is none of {', '.join(TARGETS)}")
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
            jobs = {
                name: pool.submit(subprocess.run, [*command, "-o", f"{folder}/{i}.o"], capture_output=True, text=True)
                for i, (name, command) in enumerate(commands(target).items())
            }
            wrong = {name: job.result().stderr for name, job in jobs.items() if job.result().returncode}
        print(f"{target}: {len(jobs) - len(wrong)} of {len(jobs)} objects compiled", flush=True)
        for name, said in wrong.items():
            print(f"  {name}:\n{said[:3000]}", file=sys.stderr)
        failed |= bool(wrong)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
