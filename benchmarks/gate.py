"""Correctness first: outputs and every gradient of ours and of a peer, on the case's own inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.case import Case, Peer
from nearfold.kernels import engine

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
SMALL = 1e-2  # a gradient that is zero but for rounding is measured by the largest one times this


@contextlib.contextmanager
def engine_of(peer: Peer) -> Iterator[None]:
    """The compiled engine, or for a peer that asks for it the PyTorch path."""
    with contextlib.nullcontext() if peer.engine else engine.forced(engine.OFF):
        yield


@contextlib.contextmanager
def _modules_in(case: Case, dtype: torch.dtype) -> Iterator[None]:
    for module in case.modules():
        module.to(dtype)
    try:
        yield
    finally:
        for module in case.modules():
            module.float()


def _gradients(case: Case, peer: Peer) -> dict[str, Tensor]:
    if peer.gradients is not None:
        return peer.gradients()
    named = () if case.module is None else case.module.named_parameters()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named}


def _results(
    case: Case, peer: Peer, inputs: tuple[Tensor, ...], part_of: Peer, upstream: Tensor | None
) -> dict[str, Tensor]:
    """The output, and with ``upstream`` the gradients at inputs and parameters."""
    case.clear(inputs)
    with engine_of(peer), torch.set_grad_enabled(upstream is not None):
        y = part_of.part(peer.forward(*inputs), *inputs)
        found = {"output": y.detach()}
        if upstream is not None:
            y.backward(upstream)
            found |= {f"gradient of input {i}": x.grad for i, x in enumerate(inputs) if x.grad is not None}
            found |= {f"gradient of {name}": g for name, g in _gradients(case, peer).items()}
    return {name: t.clone() for name, t in found.items()}


def difference(case: Case, peer: Peer) -> tuple[float, str]:
    """Largest relative difference of ours and the peer's results, and where; NaN where either has NaN."""
    backward = case.backward and peer.backward
    inputs = tuple(x.detach().to(peer.dtype).requires_grad_(backward) for x in case.inputs)
    ours = Peer(case.ours)
    with _modules_in(case, peer.dtype):
        upstream = None
        if backward:
            upstream = torch.randn_like(_results(case, ours, inputs, peer, None)["output"])
        found, wanted = (_results(case, p, inputs, peer, upstream) for p in (ours, peer))
        case.clear(inputs)
    if {n: t.shape for n, t in found.items()} != {n: t.shape for n, t in wanted.items()}:
        return float("inf"), "shapes"
    largest = max((t.abs().max().item() for n, t in wanted.items() if n != "output"), default=0.0)
    worst = 0.0, "output"
    for name, b in wanted.items():
        scale = b.abs().max().item() if name == "output" else max(b.abs().max().item(), SMALL * largest)
        off = (found[name] - b).abs().max().item()
        off = off / scale if scale else off
        if not off <= worst[0]:
            worst = off, name
        if off != off:
            break
    return worst


def agrees(peer: Peer, off: float) -> bool:
    """Whether a difference is no more than rounding."""
    return off <= TOLERANCE[peer.dtype]
