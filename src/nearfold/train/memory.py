"""The peak memory of a piece of work, in MiB; and whether a network fits images and memory, before it is made."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from nearfold.options import line

_MIB = 2**20


class PeakMemory:
    """Measures the peak memory of the work between its creation and :meth:`mib`.

    CUDA: the most that torch had allocated on the device at one time (``max_memory_allocated``), the
    model and the data included.

    CPU: how far the process's resident memory rose above where it stood at creation. On Linux the
    process's high-water mark is reset first, so earlier peaks do not hide later ones; where that is
    refused, and on other systems, the growth of the lifetime mark (``ru_maxrss``) is reported, which is
    0 when the process peaked higher before. Either way, memory that the process had freed but not
    returned to the system, and now uses again, is not counted.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._mark_resets = False
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: reset the high-water mark
            self._mark_resets = True
        except OSError:
            pass  # the lifetime mark serves instead, as documented
        self._start = self._high_water_mark()

    def mib(self) -> float:
        """Return the peak so far, in MiB."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / _MIB
        return max(0, self._high_water_mark() - self._start) / _MIB

    def _high_water_mark(self) -> int:
        if self._mark_resets:
            status = Path("/proc/self/status").read_text()
            mark = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
            if mark is not None:
                return int(mark.split()[1]) * 1024
            self._mark_resets = False
        import resource
        import sys

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def require_trainable(build: Callable[[], nn.Module], size: Sequence[int]) -> None:
    """Find out, without making a weight, whether a network runs on images and can be held in memory.

    Args:
        build: Makes the network; here on torch's meta device.
        size: Channels, height and width of an image.

    Raises:
        ValueError: It cannot be built or run, or its weights, gradients and the averages of an optimizer are more than
            the memory of this machine.

    >>> require_trainable(lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(4)), (1, 4, 4))
    Traceback (most recent call last):
    ValueError: the network does not run on images of 1 x 4 x 4: Given input size: (4x2x2)...
    """
    try:
        with torch.device("meta"):
            model = build().eval()
            _require_memory(model)
            model(torch.empty(2, *size))
    except (RuntimeError, NotImplementedError) as error:
        image = " x ".join(map(str, size))
        raise ValueError(f"the network does not run on images of {image}: {line(error)}") from error


def _require_memory(model: nn.Module) -> None:
    needed = 4 * sum(weight.numel() * weight.element_size() for weight in model.parameters())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise ValueError(
            f"this network takes at least {needed / 2**30:,.0f} GiB for weights, gradients and their averages, "
            f"and this machine has {memory / 2**30:,.0f} GiB: make it smaller"
        )
