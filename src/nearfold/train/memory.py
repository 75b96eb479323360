"""The peak memory of a piece of work, in MiB."""

from __future__ import annotations

from pathlib import Path

import torch

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
