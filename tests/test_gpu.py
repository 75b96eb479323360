"""On a CUDA device every lowering equals the oracle, and at sizes of many tiles the layers equal their definitions.

And inside torch's own machinery (tests/test_torch_stack.py, on CUDA) and CUDA graphs they give what they give alone.

Nothing beyond torch, NumPy and pytest is imported, so that this runs on a bare machine: `python -m pytest -m gpu`.
Every operator's first call is made in a process of its own: an illegal access there fails one test, and not all after.
"""

from __future__ import annotations

import contextlib
import pkgutil
import sys
import time
from pathlib import Path

import pytest
import test_torch_stack as stack
import torch
from torch import Tensor

from benchmarks.gpu import cases, contact, steps
from benchmarks.gpu.gate import TOLERANCE, judge
from benchmarks.gpu.run import launched
from nearfold.kernels import cuda
from nearfold.kernels import triton as triton_kernels
from nearfold.kernels.select import select
from nearfold.nn import ConvNN2d, knn_attention
from nearfold.testing import BUDGET, CASES, conform

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# function of benchmarks.gpu.cases and its arguments: sizes that no tile divides, one neighbour, all of them
SIZES = {
    "knn": (cases.knn, {"shape": (2, 3, 1031, 64), "k": 9, "naive": False, "most": 6}),
    "knn, k=1": (cases.knn, {"shape": (1, 2, 513, 32), "k": 1, "naive": False, "most": 2}),
    "knn, k=36": (cases.knn, {"shape": (1, 2, 700, 128), "k": 36, "naive": False, "most": 2}),
    "knn, odd d": (cases.knn, {"shape": (1, 2, 257, 40), "k": 5, "naive": False, "most": 2}),
    "knn, k=N": (cases.knn, {"shape": (1, 2, 7, 16), "k": 7, "naive": False, "most": 2}),
    "select": (cases.search, {"shape": (2, 3, 1031, 64), "k": 9, "gemm": 64}),
    "select, k=100": (cases.search, {"shape": (1, 1, 1500, 24), "k": 100, "gemm": 64}),
    "convnn": (cases.convnn, {"shape": (3, 64, 33, 31), "k": 9, "naive": False, "conv": False, "many": 3}),
    "convnn, k=4": (cases.convnn, {"shape": (2, 24, 17, 19), "k": 4, "naive": False, "conv": False, "many": 2}),
    "acmix": (cases.acmix, {"shape": (3, 64, 33, 31), "window": 7, "heads": 4, "many": 3}),
    "neighbourhood": (cases.neighbourhood, {"shape": (3, 64, 33, 31), "window": 7, "heads": 4, "many": 3}),
}


@pytest.fixture(autouse=True)
def _float32_is_float32(monkeypatch):
    """cuDNN rounds float32 to TF32 unless told otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.inductor) if n == contact.COMPILED else n for n in contact.CONTACTS]
)
def test_first_call(name, tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu.contact", name]
    here = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    log = tmp_path / "log"
    (outcome,) = steps.run([steps.Step(name, command, 120, here)], time.monotonic() + 120, log)
    assert outcome.good, log.read_text()[-4000:]


@pytest.mark.parametrize("name", sorted(m.name for m in pkgutil.iter_modules(triton_kernels.__path__)))
def test_the_kernels_load(name):
    """Where they do not, PyTorch's path passes the tests below."""
    assert cuda.kernels(name, torch.zeros(1, device="cuda")) is not None


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_on_cuda(name, dtype):
    conform(CASES[name], (7, 6), dtype, device="cuda")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_many_tiles(name, dtype):
    build, arguments = SIZES[name]
    torch.manual_seed(0)
    with launched() as kernels:
        verdict = judge(build(torch.device("cuda"), dtype, **arguments))
    assert kernels, "PyTorch's path is right, too, and is not what this is about"
    assert verdict.right, f"{verdict.where} differs by {verdict.difference:.1e}"
    assert verdict.repeats, "a second run gives other bits"


@pytest.mark.parametrize("name", SIZES)
def test_the_threshold_at_sizes_of_many_tiles(name, monkeypatch):
    monkeypatch.setenv("NEARFOLD_SELECT", "threshold")
    test_sizes_of_many_tiles(name, torch.bfloat16)


@pytest.mark.parametrize("spread", [0.0, 1.0], ids=["ties everywhere", "none"])
def test_two_passes_find_what_the_threshold_finds(spread, monkeypatch):
    """Scores of whole numbers are exact in both, whatever the tensor cores add first; of others only the order is."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 3, 3000, 64, device="cuda").mul(1.5).round().bfloat16()
    key = key + spread * torch.randn_like(key)
    found = {}
    for how in ("threshold", "two_pass"):
        monkeypatch.setenv("NEARFOLD_SELECT", how)
        found[how] = _search(query, key)
    (score, index), (other, other_index) = found["threshold"], found["two_pass"]
    if spread == 0:
        assert torch.equal(score, other) and torch.equal(index, other_index)
    else:
        torch.testing.assert_close(other, score, rtol=1e-5, atol=1e-4)
        assert (index == other_index).float().mean() > 0.999


def _search(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    at = torch.arange(key.shape[2], device="cuda")
    return select(query, key, 9, "dot", False, at, at, [len(at)], [0, -1, 1], False, 0.0)


# torch's own machinery


@pytest.mark.inductor
@pytest.mark.parametrize("name", stack.LAYERS)
def test_one_compiled_graph_serves_every_size(name):
    stack.check_one_graph(name, "cuda", "inductor", tolerance=1e-4)


@pytest.mark.parametrize("name", stack.LAYERS)
def test_autocast(name):
    stack.check_autocast(name, "cuda")


@pytest.mark.parametrize("name", stack.LAYERS)
def test_vmap(name):
    stack.check_vmap(name, "cuda")


@pytest.mark.parametrize("name", ["ConvNN2d", "ACmix2d", "ConvNNAttention", "KVTAttention"])
def test_torch_func_is_refused_or_right(name):
    stack.check_derivatives(name, "cuda")


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("candidates", ["all", stack.RANDOM])
def test_checkpointing_changes_nothing(candidates, reentrant):
    stack.check_checkpointing(candidates, reentrant, "cuda")


def test_two_processes_have_the_gradients_of_one(tmp_path):
    stack.check_two_processes(tmp_path, "cuda")


# CUDA graphs


@contextlib.contextmanager
def no_waiting():
    """An error where the host waits for the device: a graph cannot hold that."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def check_graph(forward, x: Tensor, parameters: list[Tensor], tolerance: float = 1e-5) -> None:
    """Output and gradients, captured once, replayed on other numbers, as they are without a graph."""

    def step(t: Tensor) -> dict[str, Tensor]:
        y = forward(t)
        upstream = torch.linspace(-1, 1, y.numel(), device="cuda", dtype=y.dtype).view_as(y)
        found = torch.autograd.grad(y, [t, *parameters], upstream, allow_unused=True)
        return {"y": y.detach()} | {str(i): d for i, d in enumerate(found) if d is not None}

    held = x.clone().requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, and lets libraries allocate
            step(held)
    torch.cuda.current_stream().wait_stream(side)
    with no_waiting():
        step(held)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(held)
    for other in (x.flip(0), 2 * x - 1, torch.randn_like(x.float()).to(x.dtype)):
        with torch.no_grad():
            held.copy_(other)
        graph.replay()
        again = {name: t.clone() for name, t in captured.items()}
        graph.replay()
        assert all(torch.equal(again[name], t) for name, t in captured.items()), "a second replay gives other bits"
        stack.compare(again, step(other.clone().requires_grad_()), tolerance)


@pytest.mark.parametrize("name", stack.LAYERS)
def test_a_graph_replays_a_layer(name):
    layer, x = stack.made(name, "cuda")
    check_graph(layer, x, list(layer.parameters()))


@pytest.mark.parametrize("how", ["threshold", "two_pass"])
def test_a_graph_replays_attention_of_many_tiles(how, monkeypatch):
    monkeypatch.setenv("NEARFOLD_SELECT", how)
    x = torch.randn(3, 1, 2, 2100, 64, device="cuda").bfloat16()
    check_graph(lambda t: knn_attention(*t.unbind(), 9), x, [], tolerance=2e-2)


def test_a_graph_draws_new_candidates_at_every_replay():
    """The count of draws is on the device, and counts on."""
    layer, x = ConvNN2d(4, 4, 3, candidates="random(20)").cuda(), torch.randn(2, 4, 9, 9, device="cuda")
    for _ in range(3):
        layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        y = layer(x)
    layer.sampler[1] = 0
    replayed = []
    for _ in range(3):
        graph.replay()
        replayed.append(y.clone())
    assert layer.sampler[1] == 3
    layer.sampler[1] = 0
    with torch.no_grad():
        for i in range(3):
            torch.testing.assert_close(layer(x), replayed[i])
    assert not torch.allclose(replayed[0], replayed[1])
