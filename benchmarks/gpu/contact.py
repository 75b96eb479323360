"""`python -m benchmarks.gpu.contact NAME`: one operator's first forward and backward on a device, at a real size.

In a process of its own, for a kernel that hangs or reads where it must not. Prints one line: seconds of the first call,
in which kernels are compiled, and of the second, and what was launched. Exit code 1 where a number is not finite, or
none of our kernels ran; a second call that gives other bits is told.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.gpu import cases
from benchmarks.gpu.run import NOT_OURS, launched, serves
from nearfold.nn import DeformConv2d, KVTAttention, NeighborhoodAttention2d, SelectiveScan

Made = tuple[Callable[..., Tensor], tuple[Tensor, ...]]
IMAGE, TINY_IMAGE = (32, 64, 56, 56), (2, 8, 9, 10)
TOKENS, TINY_TOKENS = (8, 2048, 256), (2, 30, 16)
COMPILED = "compiled"  # by inductor: the last


def _row(name: str) -> Callable[[torch.device, torch.dtype, bool], Made]:
    def made(device: torch.device, dtype: torch.dtype, tiny: bool) -> Made:
        case = cases.make(name, device, dtype, tiny).case
        return case.ours, case.inputs

    return made


def _layer(build: Callable[[bool], nn.Module], shape: cases.Shape, tiny_shape: cases.Shape) -> Callable[..., Made]:
    def made(device: torch.device, dtype: torch.dtype, tiny: bool) -> Made:
        torch.manual_seed(0)
        layer = build(tiny).to(device, dtype)
        return layer, (torch.randn(tiny_shape if tiny else shape, device=device).to(dtype),)

    return made


def _threshold(device: torch.device, dtype: torch.dtype, tiny: bool) -> Made:
    case = cases.make("knn", device, dtype, tiny).case
    return case.peers[cases.THRESHOLD].forward, case.inputs


def _compiled(device: torch.device, dtype: torch.dtype, tiny: bool) -> Made:
    layer, inputs = CONTACTS["convnn"](device, dtype, tiny)
    return torch.compile(layer, backend="inductor" if device.type == "cuda" else "aot_eager"), inputs


CONTACTS: dict[str, Callable[[torch.device, torch.dtype, bool], Made]] = {
    "select": _row("select"),
    "knn": _row("knn"),
    "threshold": _threshold,
    "convnn": _row("convnn"),
    "acmix": _row("acmix"),
    # not the benchmark's row: that compiles its peers
    "neighbourhood": _layer(
        lambda tiny: NeighborhoodAttention2d(*(8, 2, 5) if tiny else (64, 4, 7)), IMAGE, TINY_IMAGE
    ),
    "kvt": _layer(lambda tiny: KVTAttention(16 if tiny else 256, 4, k=9), TOKENS, TINY_TOKENS),
    "deformable": _layer(lambda tiny: DeformConv2d(*(8, 8, 3) if tiny else (64, 64, 3)), IMAGE, TINY_IMAGE),
    "scan": _layer(lambda tiny: SelectiveScan(16 if tiny else 256, 16), TOKENS, TINY_TOKENS),
    COMPILED: _compiled,
}


def contact(name: str, device: torch.device, dtype: torch.dtype, tiny: bool) -> tuple[str, bool]:
    """What happened, in a line, and whether it is as it should be."""
    forward, inputs = CONTACTS[name](device, dtype, tiny)
    outcomes, seconds = [], []
    with launched() as kernels:
        for _ in range(2):
            start = time.perf_counter()
            outcomes.append(_once(forward, inputs))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
    first, second = outcomes
    faults, remarks = [], []
    if not all(t.isfinite().all() for t in first if t.is_floating_point()):
        faults.append("NOT FINITE")
    if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
        remarks.append("OTHER BITS in a second call")
    if serves(device) and not kernels:
        faults.append(NOT_OURS)
    ran = ", ".join(f"{n} {kernel}" for kernel, n in sorted(kernels.items()))
    said = f"first {seconds[0]:.2f} s, then {seconds[1] * 1e3:.1f} ms; launched {ran or 'nothing of ours'}"
    return "; ".join([*faults, *remarks, said]), not faults


def _once(forward: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Output and gradients of the inputs, where it has any."""
    given = [x.detach().requires_grad_() for x in inputs]
    y = forward(*given)
    if not y.requires_grad:
        return [y]
    generator = torch.Generator(y.device).manual_seed(1)
    y.backward(torch.randn(y.shape, dtype=y.dtype, device=y.device, generator=generator))
    return [y.detach(), *(x.grad for x in given if x.grad is not None)]


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.contact", description=__doc__)
    parser.add_argument("name", choices=tuple(CONTACTS))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="tiny shapes")
    args = parser.parse_args(argv)
    said, good = contact(args.name, torch.device(args.device), torch.bfloat16, args.tiny)
    print(said)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
