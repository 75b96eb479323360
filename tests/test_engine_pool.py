"""The engine's own threads, which serve where torch brings no libgomp (macOS, Windows) and in forked children."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nearfold.kernels import engine

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or COMPILER is None, reason="needs Linux and a C++ compiler"),
]


def build(folder, *flags):
    """tests/helpers/own_threads.cpp, compiled; or the compiler's refusal of these flags."""
    cpp = ROOT / "src/nearfold/kernels/cpp"
    sources = [cpp / "threads.cpp", cpp / "pool.cpp", ROOT / "tests/helpers/own_threads.cpp"]
    command = [
        COMPILER,
        "-std=c++17",
        "-O1",
        "-g",
        *flags,
        f"-I{cpp}",
        *sources,
        "-o",
        folder / "own",
        "-ldl",
        "-pthread",
    ]
    return folder / "own", subprocess.run(command, capture_output=True, text=True, timeout=120)


def run(program, case):
    return subprocess.run([program, case], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    program, built = build(tmp_path_factory.mktemp("plain"), "-Wall", "-Wextra", "-Werror")
    assert built.returncode == 0, built.stderr
    return program


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """Under ThreadSanitizer, which is there: it finds a race."""
    program, built = build(tmp_path_factory.mktemp("sanitized"), "-fsanitize=thread")
    if built.returncode != 0:
        pytest.skip("this compiler has no ThreadSanitizer")
    found = run(program, "race")
    if "unexpected memory mapping" in found.stderr:
        pytest.skip("ThreadSanitizer does not run on this kernel")
    assert found.returncode != 0 and "data race" in found.stderr, found.stderr
    return program


@pytest.mark.parametrize("case", ["alone", "callers", "fork", "refused", "stopped", "signals"])
def test_own_threads(plain, case):
    done = run(plain, case)
    assert done.returncode == 0, done.stderr
    if case == "alone":  # 300 loops of four threads
        assert done.stdout == "3 threads made\n"


@pytest.mark.parametrize("case", ["alone", "callers", "stopped", "signals"])
def test_own_threads_without_races(sanitized, case):
    done = run(sanitized, case)
    assert done.returncode == 0, done.stderr[:4000]


CHILD = """
import os, sys, threading, time
import torch
from nearfold.kernels import engine
from nearfold.nn.functional import knn_attention
torch.manual_seed(0)
q = torch.randn(1, 4, 300, 16)
truth = knn_attention(q, q, q, 9)
if os.fork():  # OpenMP's threads do not survive it
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]) and 1)
torch.set_num_threads(3)
there = len(os.listdir("/proc/self/task"))  # torch makes some of its own for that
same = []
def call():
    for _ in range(20):
        same.append(torch.equal(knn_attention(q, q, q, 9), truth))
for _ in range(2):
    callers = [threading.Thread(target=call) for _ in range(4)]
    for each in callers: each.start()
    for each in callers: each.join()
assert len(same) == 160 and all(same)
until = time.monotonic() + 20
while len(os.listdir("/proc/self/task")) > there + 8 and time.monotonic() < until:
    time.sleep(0.1)  # callers that are joined, and on their way out
print("equal, by", engine.get().thread_source(), "threads:", len(os.listdir("/proc/self/task")) - there)
"""  # ends while they wait for work


@pytest.mark.skipif(engine.get() is None, reason="needs the compiled engine")
def test_callers_of_several_python_threads():
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "equal, by own threads" in done.stdout
    assert int(done.stdout.split()[-1]) <= 4 * 2, done.stdout  # what four callers at a time want, and are kept
