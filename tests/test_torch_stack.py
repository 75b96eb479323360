"""The layers inside torch's own machinery: compilation, checkpointing, autocast, torch.func, DDP.

The checks take a device: tests/test_gpu.py runs them on CUDA. Nothing beyond torch and pytest is imported.
"""

from __future__ import annotations

import copy
import os
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from nearfold.nn import (
    ACmix2d,
    ConvNN2d,
    ConvNNAttention,
    DeformConv2d,
    GatedDeltaNet,
    KVTAttention,
    NeighborhoodAttention2d,
    SelectiveScan,
    deform_conv,
    knn_attention,
)

# how to make it, an input, and which of its axes torch.compile may leave open
LAYERS = {
    "ConvNN2d": (lambda: ConvNN2d(4, 4, 3), (2, 4, 5, 6), (0, 2, 3)),
    "ACmix2d": (lambda: ACmix2d(4, 4, 3, 3, 2), (2, 4, 5, 6), (0, 2, 3)),
    "ConvNNAttention": (lambda: ConvNNAttention(8, 2, k=3), (2, 7, 8), (0, 1)),
    "KVTAttention": (lambda: KVTAttention(8, 2, k=3), (2, 7, 8), (0, 1)),
    "NeighborhoodAttention2d": (lambda: NeighborhoodAttention2d(4, 2, 3), (2, 4, 5, 6), (0, 2, 3)),
    "DeformConv2d": (lambda: DeformConv2d(4, 4, 3), (2, 4, 5, 6), (0, 2, 3)),
    "SelectiveScan": (lambda: SelectiveScan(8, 4), (2, 7, 8), (0, 1)),
    "GatedDeltaNet": (lambda: GatedDeltaNet(8, 2, 3), (2, 7, 8), (0, 1)),
}
RANDOM = "random(9)"


def made(name: str, device: str = "cpu") -> tuple[nn.Module, Tensor]:
    """A layer whose parameters are all away from zero, and an input."""
    build, shape, _ = LAYERS[name]
    torch.manual_seed(0)
    layer = build()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return layer.to(device), torch.randn(shape).to(device)


def outcome(forward, layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, and the gradients of a loss in which no two numbers count alike, by name."""
    layer.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    y = forward(x)
    (y * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)).sum().backward()
    return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}


def compare(found: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Each by its own largest number, or by a little of the largest gradient: that of a key's bias is all rounding."""
    assert found.keys() == truth.keys() and len(found) > 1
    least = 0.05 * max(t.abs().max().item() for name, t in truth.items() if not name.startswith("y"))
    assert least > 0
    for name, t in truth.items():
        off = (found[name].double() - t.double()).abs().max() / max(t.abs().max().item(), least)
        assert off <= tolerance, f"{name} differs by {off:.1e}"


def check_one_graph(name: str, device: str = "cpu", backend: str = "aot_eager", tolerance: float = 1e-5) -> None:
    """Without a break, and without another graph for another batch or another grid."""
    layer, x = made(name, device)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    shape, open_axes = x.shape, LAYERS[name][2]

    def forward(t: Tensor) -> Tensor:
        for axis in open_axes:
            torch._dynamo.mark_dynamic(t, axis)  # an error where a size is built into the graph
        return compiled(t)

    for more in (0, 1, 4):
        x = torch.randn([n + more if axis in open_axes else n for axis, n in enumerate(shape)], device=device)
        compare(outcome(forward, layer, x), outcome(layer, layer, x), tolerance)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["ConvNN2d", "ACmix2d"])
def test_one_graph_serves_every_size(name):
    check_one_graph(name)


class Net(nn.Module):
    """The layers in a row; dropout, so that recomputation needs the same random numbers."""

    def __init__(self, candidates: str = "all") -> None:
        super().__init__()
        self.first = nn.Sequential(ConvNN2d(4, 8, 3, candidates=candidates), nn.Dropout(0.2), ACmix2d(8, 8, 3, 3, 2))
        self.second = nn.Sequential(ConvNNAttention(8, 2, k=3), nn.Dropout(0.2), KVTAttention(8, 2, k=3))
        self.reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.second(self.first(x).flatten(2).mT)
        between = checkpoint(self.first, x, use_reentrant=self.reentrant)
        return checkpoint(self.second, between.flatten(2).mT, use_reentrant=self.reentrant)


def network(candidates: str = "all", device: str = "cpu") -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return Net(candidates).to(device), torch.randn(4, 4, 4, 5).to(device)


def check_checkpointing(candidates: str, reentrant: bool, device: str = "cpu") -> None:
    """What runs again in the backward pass finds the same; reentrant, sums are in another order."""
    found = []
    for mode in (None, reentrant):
        net, x = network(candidates, device)
        net.reentrant = mode
        if candidates == RANDOM:
            net.first[0].sampler.copy_(torch.tensor([5, 0]))
        torch.manual_seed(1)
        watched = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)  # takes the same random numbers
        with watched if mode is None else nullcontext():
            losses = [net(t.requires_grad_()) for t in (x, -x)]  # two are under way before the first runs again
        upstream = [torch.linspace(-1, 1, y.numel(), device=device).view_as(y) for y in losses]
        torch.autograd.backward(losses, upstream)
        if candidates == RANDOM:
            assert net.first[0].sampler[1] == 2
        found.append({f"y{i}": y.detach() for i, y in enumerate(losses)})
        found[-1] |= {n: p.grad for n, p in net.named_parameters()}
    compare(found[1], found[0], tolerance=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("candidates", ["all", RANDOM])
def test_checkpointing_changes_nothing(candidates, reentrant):
    check_checkpointing(candidates, reentrant)


@pytest.mark.slow
def test_a_compiled_network_with_checkpoints():
    net, x = network()
    net.eval()  # compiled dropout draws other numbers
    truth = outcome(net, net, x)
    net.reentrant = False
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    compare(outcome(compiled, net, x), truth)


def test_random_candidates_are_not_drawn_again_by_compiled_code():
    """The layer's own generator is not torch's: recomputed, it would draw others, and gradients would be wrong."""
    net, x = network(RANDOM)
    net.reentrant = False
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="random candidates would be drawn anew"):
        outcome(torch.compile(net, fullgraph=True, backend="aot_eager"), net, x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_was_drawn_cannot_be_known(reentrant):
    """Without torch's random state, or with one state for two passes: refused, never guessed."""
    layer, x = ConvNN2d(4, 4, 3, candidates=RANDOM), torch.randn(2, 4, 5, 6, requires_grad=True)
    torch.manual_seed(0)
    y = checkpoint(layer, x, use_reentrant=reentrant, preserve_rng_state=False)
    with pytest.raises(RuntimeError, match="random candidates would be drawn anew"):
        y.sum().backward()
    passes = []
    for _ in range(2):
        torch.manual_seed(1)
        passes.append(checkpoint(layer, x, use_reentrant=reentrant))
    y = passes[0]
    with pytest.raises(RuntimeError, match="random candidates would be drawn anew"):
        y.sum().backward()


def test_only_passes_that_may_run_again_touch_torchs_generator():
    layer, x = ConvNN2d(4, 4, 3, candidates=RANDOM), torch.randn(2, 4, 5, 6)
    before = torch.get_rng_state()
    layer(x).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        for _ in range(200):
            layer(x)
    assert len(layer._draws._known) == 64 and layer.sampler[1] == 201


def check_autocast(name: str, device: str = "cpu") -> None:
    """As the oracle under autocast; parameters keep gradients in float32."""
    layer, x = made(name, device)
    found = {}
    for layer.backend in ("auto", "oracle"):
        with torch.autocast(device, torch.bfloat16):
            y = outcome(lambda t: layer(t).float(), layer, x)
        assert all(t.dtype == torch.float32 for t in y.values())
        found[layer.backend] = y
    compare(found["auto"], found["oracle"], tolerance=0.05)


@pytest.mark.parametrize("name", LAYERS)
def test_autocast(name):
    check_autocast(name)


def check_vmap(name: str, device: str = "cpu") -> None:
    """Over inputs, with gradients through it, and over the parameters of an ensemble."""
    layer, x = made(name, device)
    x = torch.stack([x, -x, x.flip(0)])
    truth = outcome(lambda t: torch.stack([layer(one) for one in t]), layer, x)
    compare(outcome(torch.func.vmap(layer), layer, x), truth)

    layers = [copy.deepcopy(layer) for _ in range(2)]
    with torch.no_grad():
        for p in layers[1].parameters():
            p.mul_(0.9).add_(0.05)
        parameters, buffers = torch.func.stack_module_state(layers)
        ensemble = torch.func.vmap(lambda p, b: torch.func.functional_call(layer, (p, b), (x[0],)))
        expected = torch.stack([one(x[0]) for one in layers])
        assert (expected[0] - expected[1]).abs().max() > 0.01
        torch.testing.assert_close(ensemble(parameters, buffers), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_vmap(name):
    check_vmap(name)


def check_derivatives(name: str, device: str = "cpu") -> None:
    """torch.func's own derivatives: on the oracle, and refused elsewhere, with the way out."""
    layer, x = made(name, device)
    parameters = dict(layer.named_parameters())

    def loss(p: dict[str, Tensor], t: Tensor) -> Tensor:
        y = torch.func.functional_call(layer, p, (t[None],))
        return (y * torch.linspace(-1, 1, y.numel(), device=device).view_as(y)).sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))
    ways = {
        "grad": lambda: torch.func.grad(loss)(parameters, x[0]),
        "vjp": lambda: torch.func.vjp(layer, x),
        "jacrev": lambda: torch.func.jacrev(layer)(x),
        "per sample": lambda: per_sample(parameters, x),
        "jvp": lambda: torch.func.jvp(layer, (x,), (x,)),
    }
    for way in ways.values():
        with pytest.raises(NotImplementedError, match=r"torch\.func.*backend='oracle'"):
            way()
    ordinary = [outcome(layer, layer, one[None]) for one in x]
    layer.backend = "oracle"
    found = per_sample(parameters, x)
    for i, truth in enumerate(ordinary):
        compare({n: t[i] for n, t in found.items() if n in truth}, {n: truth[n] for n in found if n in truth}, 1e-4)
    step = 1e-3
    _, tangent = torch.func.jvp(layer, (x,), (x,))
    numeric = (layer(x * (1 + step)) - layer(x * (1 - step))) / (2 * step)
    assert (tangent - numeric).norm() <= 0.01 * numeric.norm()


@pytest.mark.parametrize("name", ["ConvNN2d", "ACmix2d", "ConvNNAttention", "KVTAttention"])
def test_torch_func_is_refused_or_right(name):
    check_derivatives(name)


def test_functions_refuse_torch_func():
    """Forward mode would else be answered with zeros."""
    x = torch.randn(1, 2, 5, 4)
    offset, weight = torch.zeros(1, 18, 3, 2), torch.randn(2, 2, 3, 3)
    for work in (lambda t: knn_attention(t, t, t, 2), lambda t: deform_conv(t, offset, weight)):
        for way in (lambda f: torch.func.jvp(f, (x,), (x,)), lambda f: torch.func.vjp(f, x)):
            with pytest.raises(NotImplementedError, match=r"torch\.func.*torch\.autograd\.grad"):
                way(work)


def _without_dropout(device: str) -> tuple[Net, Tensor]:
    net, x = network(RANDOM, device)
    for layer in net.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return net, x


def _train(rank: int, port: int, out: str, device: str) -> None:
    """One of two processes: half of the batch, two steps."""
    torch.set_num_threads(1)
    store = torch.distributed.TCPStore("localhost", port, timeout=timedelta(seconds=120))
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    net, x = _without_dropout(device)
    if rank:
        with torch.no_grad():  # the first process's count, whatever one's own is: DDP sends it along
            for p in [*net.parameters(), net.first[0].sampler]:
                p.add_(1)
    parallel = DistributedDataParallel(net)
    mine = x[rank * 2 : rank * 2 + 2]
    found = [_gradients(parallel, net, mine) for _ in range(2)]
    if rank == 0:
        torch.save(found, out)
    torch.distributed.barrier()
    # Torch can stand still where a group ends: its destructor waits, with Python's lock, for a thread that frees its
    # last work, which takes that lock (docs/log.md, 2026-11-29).
    os._exit(0)


def _gradients(forward: nn.Module, net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    forward(x).square().mean().backward()
    return {n: p.grad.clone() for n, p in net.named_parameters()}


def check_two_processes(folder: Path, device: str = "cpu") -> None:
    """Gradients of every parameter, of candidates that both draw alike, at two steps."""
    # They meet here: two that met at a file (init_method="file://...") once did not end, docs/log.md.
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    arguments = (store.port, str(folder / "found"), device)
    both = torch.multiprocessing.spawn(_train, arguments, nprocs=2, join=False)
    give_up = time.monotonic() + 300
    try:
        while not both.join(timeout=1):
            assert time.monotonic() < give_up, "the processes do not end"
    finally:
        for process in both.processes:
            process.kill()
    net, x = _without_dropout(device)
    for found in torch.load(folder / "found", map_location=device):
        compare(found, _gradients(net, net, x))
    assert net.first[0].sampler[1] == 2


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
def test_two_processes_have_the_gradients_of_one(tmp_path):
    check_two_processes(tmp_path)
