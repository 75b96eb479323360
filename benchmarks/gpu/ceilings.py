"""`python -m benchmarks.gpu.ceilings`: what this machine can do at most, beside which every other time is read.

Medians by the device's events: a product of bfloat16 matrices, a copy, a kernel that does nothing, and FlashAttention,
from whose times the targets of `benchmarks.gpu.model` are derived.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu import cases, clock, machine
from benchmarks.measure import Run

SECONDS = {False: 3.0, True: 0.05}  # of each, by tiny


def _milliseconds(call: Callable[[], object], device: torch.device, tiny: bool) -> float:
    def once() -> None:
        call()

    times = clock.milliseconds({"it": Run(lambda: None, once)}, device, SECONDS[tiny])
    if times.failed:
        raise RuntimeError(times.failed["it"])
    return statistics.median(times.found["it"])


def measured(device: torch.device, tiny: bool) -> dict[str, str]:
    """What can be done, in words."""
    n, size = (64, 2**10) if tiny else (8192, 2**31)
    a, b = torch.randn(2, n, n, device=device).bfloat16().unbind()
    product = _milliseconds(lambda: a @ b, device, tiny)
    found = {f"bfloat16 product of {n}": f"{product:.3f} ms, {2 * n**3 / product / 1e9:.0f} TFLOPS"}
    source = torch.empty(size, dtype=torch.int8, device=device)
    into = torch.empty_like(source)
    copy = _milliseconds(lambda: into.copy_(source), device, tiny)
    found[f"copy of {size} bytes"] = f"{copy:.3f} ms, {2 * size / copy / 1e9:.2f} TB/s"
    one = torch.zeros(1, device=device)
    found["smallest kernel"] = f"{_milliseconds(one.zero_, device, tiny) * 1e3:.1f} us"
    for name, shape in (("knn", cases.TOKENS), ("knn_16384", cases.LONG)):
        q, k, v = torch.randn(3, *(cases.TINY_TOKENS if tiny else shape), device=device).bfloat16().unbind()
        forward = _milliseconds(lambda qkv=(q, k, v): _attention(*qkv), device, tiny)
        both = _milliseconds(lambda qkv=(q, k, v): _both(*qkv), device, tiny)
        found[f"FlashAttention, {name}"] = f"forward {forward:.3f} ms, forward + backward {both:.3f} ms"
    return found


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if query.is_cuda:
        return cases._flash(query, key, value)
    return torch.nn.functional.scaled_dot_product_attention(query, key, value)


def _both(*qkv: Tensor) -> None:
    given = [t.detach().requires_grad_() for t in qkv]
    y = _attention(*given)
    y.backward(torch.ones_like(y))


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.ceilings", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="tiny sizes")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    print("; ".join(f"{k} {v}" for k, v in machine.describe(device).items()))
    print("; ".join(f"{k}: {v}" for k, v in measured(device, args.tiny).items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
