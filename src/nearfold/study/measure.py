"""What a model costs: parameters, FLOPs, images per second, peak memory of one training step.

Every model is measured by the same few lines, apart from its training: the same batch, the same loss, forward
and backward in training mode. The numbers say nothing about data loading or the optimizer.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import nearfold

STEPS, SECONDS = 20, 2.0
"""Timed steps at most, and for how long; the median counts."""


@dataclass(frozen=True)
class Cost:
    """The costs of one model.

    Attributes:
        parameters: trainable numbers.
        flops: floating-point operations of one image's forward pass in evaluation mode (a multiply and an
            add are two).
        latency_ms: milliseconds of one image's forward pass in evaluation mode; on the CPU, on one thread.
        images_per_second: batch size over the time of a forward and backward pass; on the CPU, on one thread.
        peak_memory_mib: most MiB allocated at one time during that pass, beyond what was held before it
            (parameters, the batch). On the CPU from torch.profiler, on CUDA from the allocator.
    """

    parameters: int
    flops: int
    latency_ms: float
    images_per_second: float
    peak_memory_mib: float


def machine(device: str) -> str:
    """What costs were measured on: the name of the GPU, or of the processor where the system tells it.

    Args:
        device: as in `nearfold.train.Recipe`.
    """
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):  # not Linux
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment(device: str = "cpu") -> dict[str, str]:
    """Machine and versions, by name.

    Args:
        device: that the networks ran on, as in `nearfold.train.Recipe`.
    """
    return {
        "nearfold": nearfold.__version__,
        "PyTorch": torch.__version__,
        "Python": platform.python_version(),
        "processor": f"{machine('cpu')}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        **({"GPU": machine(device)} if device != "cpu" and torch.cuda.is_available() else {}),
    }


def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters.

    >>> count_parameters(nn.Linear(3, 2))
    8
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def count_flops(model: nn.Module, image_shape: tuple[int, ...]) -> int:
    """FLOPs of the forward pass of one image (C, H, W), counted on the meta device: nothing is computed.

    >>> count_flops(nn.Conv2d(3, 4, 1), (3, 5, 5)) == 2 * 3 * 4 * 25
    True
    """
    ghost = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ghost(torch.empty(1, *image_shape, device="meta"))
    return int(counter.get_total_flops())


def measure(model: nn.Module, images: Tensor, labels: Tensor) -> Cost:
    """Measure `model` on one batch: images (B, C, H, W) floating, labels (B,) int64, on the model's device.

    The model is left as it was: a copy is measured. On the CPU it runs on one thread: several, on a machine
    with other work to do, wait for each other, and what is measured is then that work.
    """
    model = copy.deepcopy(model).train()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure(model, images, labels)
    finally:
        torch.set_num_threads(threads)


def _measure(model: nn.Module, images: Tensor, labels: Tensor) -> Cost:
    def step() -> None:
        F.cross_entropy(model(images), labels).backward()
        model.zero_grad(set_to_none=True)

    def glance() -> None:
        with torch.no_grad():
            model(images[:1])

    per_batch = _median_seconds(step, images.device)
    peak = peak_bytes(step, images.device)
    model.eval()
    return Cost(
        parameters=count_parameters(model),
        flops=count_flops(model, tuple(images.shape[1:])),
        latency_ms=1000 * _median_seconds(glance, images.device),
        images_per_second=len(images) / per_batch,
        peak_memory_mib=peak / 2**20,
    )


def _median_seconds(step: Callable[[], None], device: torch.device) -> float:
    step()  # warm up: lazy initialisation and caches belong to no operator
    seconds: list[float] = []
    while len(seconds) < STEPS and sum(seconds) < SECONDS:
        seconds.append(timed(step, device))
    return statistics.median(seconds)


def timed(step: Callable[[], None], device: torch.device) -> float:
    """Seconds that a step takes, on CUDA until its work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """Most bytes held at one time during `step`, beyond what was held before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler prints its start and stop otherwise
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    assert peak > 0, "the profiler reported no allocation"
    return peak
