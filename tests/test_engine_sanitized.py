"""The compiled engine under AddressSanitizer and UndefinedBehaviorSanitizer: conformance and bad calls run clean.

Built into a temporary folder, with the generic set of instructions and the best that this machine has; a sample of the
cases, in both. Whatever a sanitizer finds ends the process, with its report. To look for more:

    NEARFOLD_CALLS=20000 python -m pytest -m slow tests/test_engine_sanitized.py
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CALLS = int(os.environ.get("NEARFOLD_CALLS", "250"))  # bad calls; the conformance cases grow along
ROOT = Path(__file__).parents[1]


def runtime(name):
    """The compiler's shared library of a sanitizer, or None."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return None
    asked = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True)
    return asked.stdout.strip() if os.path.isabs(asked.stdout.strip()) else None


def missing():
    """What a build needs and is not here, or None."""
    if sys.platform != "linux":
        return "needs Linux"
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            return f"needs {tool}"
    if importlib.util.find_spec("nanobind") is None:
        return "needs nanobind"
    if not (runtime("libasan.so") and runtime("libubsan.so")):
        return "this compiler has no sanitizers' libraries"
    return None


def build(folder, best):
    """The engine's shared library, built with the sanitizers."""
    configure = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}"]
    configure += ["-DCMAKE_BUILD_TYPE=Debug", "-DNEARFOLD_SANITIZE=address,undefined"]
    configure += [f"-DNEARFOLD_SETS={'' if best == 'generic' else best}"]
    for command in (configure, ["cmake", "--build", folder, "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (library,) = Path(folder).glob("_engine*.so")
    return library


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=missing() or "")
def test_the_engine_runs_clean_under_sanitizers(tmp_path):
    pytest.importorskip("hypothesis")
    from nearfold.kernels import engine
    from nearfold.testing import CASES, GRIDS

    if engine.get() is None:
        pytest.skip("needs the compiled engine, to know the best instruction set")
    library = build(tmp_path / "build", engine.names()[0])
    environment = os.environ | {
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # Python leaks; what is huge is refused
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    environment.pop("NEARFOLD_ENGINE", None)
    for what in ("finds", "conformance", "operators", "engine"):
        command = [sys.executable, __file__, str(library), what, str(tmp_path / "last")]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
        report = f"{done.stdout[-1500:]}{done.stderr[-6000:]}"
        if what == "finds":  # the sanitizers are there at all
            assert done.returncode != 0 and "AddressSanitizer" in report, report
            continue
        last = (tmp_path / "last").read_text() if (tmp_path / "last").exists() else "the start"
        assert done.returncode == 0, f"{what}, at {last}:\n{report}"
        asked = min(CALLS, len(CASES) * len(GRIDS)) if what == "conformance" else CALLS
        assert int(done.stdout.split()[0]) > asked / 4, report


def sanitized(library):
    """Make the library the engine of this process, before the package loads its own."""
    import nearfold.kernels  # noqa: F401 the package alone loads no engine

    spec = importlib.util.spec_from_file_location("nearfold.kernels._engine", library)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def conformance(last, sets):
    """A sample of the suite's cases, in every instruction set; how many ran."""
    from nearfold.kernels import engine
    from nearfold.testing import CASES, GRIDS, conform

    count = 0
    for at, (name, grid) in enumerate((name, grid) for name in CASES for grid in GRIDS):
        if at * CALLS % (len(CASES) * len(GRIDS)) >= CALLS:
            continue
        Path(last).write_text(f"{name} {grid} {sets[at % len(sets)]}")
        with engine.forced(sets[at % len(sets)]):
            try:
                conform(CASES[name], grid)
            except ValueError as refused:
                assert "does not fit" in str(refused), refused
        count += 1
    print(count)


def main(library, what, last):
    """One of the runs, in a process of its own."""
    module = sanitized(library)
    if what == "finds":
        import ctypes

        ctypes.CDLL(None).free(ctypes.c_void_p(1 << 20))  # no such memory: the sanitizer ends the process
        return
    if what == "conformance":
        return conformance(last, module.names())
    import test_engine_misuse

    test_engine_misuse.CALLS[what] = CALLS
    test_engine_misuse.main(last, what)


if __name__ == "__main__":
    main(*sys.argv[1:])
