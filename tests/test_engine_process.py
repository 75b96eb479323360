"""Which code of the compiled engine runs, in which process and on whose threads."""

import os
import subprocess
import sys

import pytest
import torch
from helpers.cells import slow_but

from nearfold.kernels import engine
from nearfold.kernels.aggregate import aggregate
from nearfold.kernels.select import select

SETS = [name for name in engine.names() if name != engine.OFF]
every_set = pytest.mark.parametrize("isa", SETS)
compiled = pytest.mark.skipif(not SETS, reason="needs the compiled engine")


# ---- which code runs -------------------------------------------------------------------------------------------------


@compiled
def test_forced_is_what_runs():
    before = engine.get().chosen()
    for isa in SETS:
        with engine.forced(isa):
            assert engine.get().chosen() == isa and isa in engine.describe()
            with engine.forced(engine.OFF):
                assert engine.get() is None and engine.describe() == "PyTorch"
            assert engine.get().chosen() == isa
    assert engine.get().chosen() == before
    with pytest.raises(ValueError, match="is not one of this machine's"), engine.forced("avx9000"):
        pass
    with pytest.raises(ZeroDivisionError), engine.forced("generic"):
        raise ZeroDivisionError
    assert engine.get().chosen() == before


@pytest.mark.skipif(len(SETS) < 2, reason="needs two instruction sets")
def test_instruction_sets_round_differently():
    """Were one set's code linked in place of another's, they would not."""
    torch.manual_seed(0)
    q, at = torch.randn(1, 1, 200, 130), torch.arange(200)
    value, index = torch.randn(1, 200, 64), torch.randint(0, 200, (1, 200, 9, 1))
    weight = torch.randn(64, 64, 9)
    found = {}
    for isa in SETS:
        with engine.forced(isa):
            score = select(q, q, 9, "dot", False, at, at, [200], [0, -1, 1], False, 0.0)[0]
            found[isa] = score, aggregate(value, index, None, weight, 1)
    for isa in SETS[:-1]:  # "generic" rounds its products, the others do not
        for a, b in zip(found[isa], found["generic"], strict=True):
            assert not torch.equal(a, b), isa


def run_python(code, *args, timeout=120, **environ):
    """Standard output of a fresh interpreter; a hang and a crash are failures."""
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code, *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "2", **environ},
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


LAYERS_TWICE = """
import torch
from nearfold.nn import ConvNN2d, KVTAttention, ACmix2d
torch.manual_seed(0)
for layer, x in [(ConvNN2d(8, 8), torch.randn(2, 8, 9, 8)), (KVTAttention(8, 2, k=5), torch.randn(2, 50, 8)),
                 (ACmix2d(8, 8, num_heads=2), torch.randn(2, 8, 9, 8))]:
    for _ in range(3):
        y = layer(x)
        y.sum().backward()
    inner = layer if hasattr(layer, "backend") else layer.mixer
    inner.backend = "oracle"
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-5)
from nearfold.kernels import engine
print("serves:", engine.describe())
"""
BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "nearfold.kernels._engine":
            raise ImportError("blocked")
sys.meta_path.insert(0, Blocker())
"""


def test_without_the_engine_one_notice():
    said = run_python(BLOCKED + LAYERS_TWICE, NEARFOLD_ENGINE="")
    assert "serves: PyTorch" in said
    assert said.count("installed without its compiled CPU engine") == 1 and said.count("RuntimeWarning") == 1, said


@pytest.mark.slow
def test_switched_off_silently():
    said = run_python(LAYERS_TWICE, NEARFOLD_ENGINE="off")
    assert "serves: PyTorch" in said and "RuntimeWarning" not in said


@compiled
def test_an_instruction_set_from_the_environment():
    assert "serves: C++ (generic)" in run_python(LAYERS_TWICE, NEARFOLD_ENGINE="generic")


NONSENSE = """
import torch
from nearfold.nn.functional import knn_attention
q = torch.randn(1, 1, 5, 4)
for _ in range(2):
    try:
        knn_attention(q, q, q, 2)
    except (ValueError, ImportError) as error:
        print(type(error).__name__, error)
"""


@compiled
@pytest.mark.slow
def test_nonsense_in_the_environment_is_refused():
    said = run_python(NONSENSE, NEARFOLD_ENGINE="nonsense")
    assert said.count("ValueError instruction set 'nonsense' is not one of this machine's") == 2, said
    assert "generic" in said


@pytest.mark.slow
def test_asking_for_an_engine_that_is_not_there():
    said = run_python(BLOCKED + NONSENSE, NEARFOLD_ENGINE="avx2")
    assert said.count("ImportError NEARFOLD_ENGINE='avx2' asks for the compiled engine, but it is not there") == 2, said


# ---- processes and pools ---------------------------------------------------------------------------------------------

ONE_POOL = """
import os, sys
if "sklearn" in sys.argv:
    import sklearn.cluster  # brings an OpenMP runtime of its own
import torch
from nearfold.nn.functional import knn_attention
from nearfold.kernels import engine
torch.set_num_threads(3)
torch.randn(1 << 20).exp()
before = len(os.listdir("/proc/self/task"))
q = torch.randn(1, 4, 500, 16, requires_grad=True)
with torch.no_grad():
    knn_attention(q, q, q, 9)
print("new threads:", len(os.listdir("/proc/self/task")) - before)
print("source:", engine.get().thread_source())
print("libgomp:", any("/torch/lib/libgomp" in line for line in open("/proc/self/maps")))
"""


@compiled
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
@pytest.mark.parametrize("first", slow_but(["torch"], ["torch", "sklearn"]))
def test_threads_are_those_of_torch(first):
    if first == "sklearn":
        pytest.importorskip("sklearn")
    said = run_python(ONE_POOL, first)
    if "libgomp: False" in said:
        pytest.skip("this torch has no libgomp")
    assert "source: torch's OpenMP" in said
    assert "new threads: 0" in said, said


FORK = """
import os, sys, time, warnings
warnings.simplefilter("ignore")
import torch
from nearfold.kernels import engine
from nearfold.nn.functional import knn_attention
torch.set_num_threads(2)
torch.manual_seed(0)
q = torch.randn(1, 4, 500, 16)
torch.randn(1 << 20).exp()  # torch's pool is there
if sys.argv[1] == "engine":
    knn_attention(q, q, q, 9)

def child():
    torch.set_num_threads(2)
    x = q.clone().requires_grad_()
    y = knn_attention(x, x, x, 9)
    torch.set_num_threads(1)  # an OpenMP pool of torch's own does not survive fork: its operators need one thread
    total = y.square().sum()
    torch.set_num_threads(2)
    total.backward()
    print(engine.get().thread_source(), flush=True)
    return y.detach(), x.grad

def results_of_a_child(depth):
    here, there = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(here)
        try:
            tensors = results_of_a_child(depth - 1) if depth > 1 else child()
            with os.fdopen(there, "wb") as pipe:
                torch.save(tensors, pipe)
        finally:
            os._exit(0)
    os.close(there)
    with os.fdopen(here, "rb") as pipe:
        data = pipe.read()
    os.waitpid(pid, 0)
    import io
    return torch.load(io.BytesIO(data))

found = results_of_a_child(1)
again = results_of_a_child(2)
truth = child()
for f, a, t in zip(found, again, truth):
    assert torch.equal(f, t) and torch.equal(a, t)
print("equal")
"""


@compiled
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("used", slow_but(["engine"], ["engine", "torch"]))
def test_a_forked_child_finishes(used):
    """Whether the parent had called the engine or torch alone: a pool of threads does not survive a fork."""
    said = run_python(FORK, used, timeout=60)
    assert "equal" in said and said.count("own threads") == 2 and "torch's OpenMP" in said


LOADER = """
import torch
from nearfold.nn import ConvNN2d
torch.manual_seed(0)
layer = ConvNN2d(4, 4).eval()
images = torch.randn(12, 4, 9, 8)

class Features(torch.utils.data.Dataset):
    def __len__(self):
        return 12
    def __getitem__(self, i):
        torch.set_num_threads(1 + i % 2)
        with torch.no_grad():
            return layer(images[i][None])[0]

truth = torch.cat(list(torch.utils.data.DataLoader(Features(), 4)))
loader = torch.utils.data.DataLoader(Features(), 4, num_workers=2, multiprocessing_context="fork", timeout=30)
for _ in range(2):
    torch.testing.assert_close(torch.cat(list(loader)), truth, rtol=1e-5, atol=1e-6)
print("equal")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_workers_of_a_loader():
    assert "equal" in run_python(LOADER, timeout=120)


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------

INTERRUPTED = """
import os, signal, sys, threading, time
import torch
from nearfold.kernels import engine
from nearfold.kernels.select import select
if sys.argv[2] == "own threads" and os.fork():  # the pool does not survive it
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]) and 1)
torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)

def neighbours(n):
    q, at = torch.randn(1, 1, n, 64, dtype=torch.float64), torch.arange(n)
    return select(q, q, 9, "euclidean", False, at, at, [n], [0, -1, 1], False, 0.0)

def handler(*given):
    if seen:
        signal.default_int_handler(*given)
    seen.append("goes on")  # a handler that raises nothing stops nothing
    threading.Timer(0.5, sent).start()

def sent():
    now[0] = time.monotonic()
    os.kill(os.getpid(), signal.SIGINT)

before = torch.get_rng_state()
truth, now, seen = neighbours(500), [0.0], []
with engine.forced("generic"):
    signal.signal(signal.SIGINT, handler)
    threading.Timer(0.5, sent).start()
    try:
        neighbours(100_000)
    except KeyboardInterrupt:
        print(seen, f"KeyboardInterrupt after {time.monotonic() - now[0]:.3f} s", flush=True)
torch.set_rng_state(before)
for a, b in zip(neighbours(500), truth):
    assert torch.equal(a, b)
print("the same, by", engine.get().thread_source())
"""


@compiled
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("threads", "source"),
    [
        (2, "torch's OpenMP"),
        pytest.param(1, "torch's OpenMP", marks=pytest.mark.slow),
        pytest.param(2, "own threads", marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_ends_a_long_kernel(threads, source):
    """Minutes of work; an answer within two seconds on a busy machine, and the next call is right."""
    said = run_python(INTERRUPTED, str(threads), source, timeout=60)
    assert "['goes on'] KeyboardInterrupt after" in said and f"the same, by {source}" in said, said
    assert float(said.split("after ")[1].split()[0]) < 2, said
