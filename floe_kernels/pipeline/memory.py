"""How much memory a stretch of work needed at most, so that two of them can be compared."""

import ctypes
import gc
import threading
import time
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SAMPLING_S = 0.01


class PeakMemory:
    """The highest memory use since this object was made.

    On CUDA, what torch allocated there. On the CPU, resident memory of the whole process, libraries
    included: freed memory is first handed back to the system, and then Linux is asked to forget its
    own high-water mark (``/proc/self/clear_refs``), which misses nothing. Where that is not allowed
    a thread looks 100 times a second. Without ``/proc`` nothing is measured.

    Args:
        device: Where the work is done.

    Attributes:
        method: How it is measured, in words.

    Example:
        >>> peak = PeakMemory(torch.device("cpu"))
        >>> before = peak.read()
        >>> block = torch.ones(32, 1024, 1024)
        >>> before is None or peak.read() - before > 100e6
        True
        >>> peak.close()
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._highest, self._open = device, 0, True
        gc.collect()
        if device.type == "cuda":
            self.method = "CUDA memory that torch allocated"
            torch.cuda.reset_peak_memory_stats(device)
            return
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)  # freed memory that malloc keeps would count for whoever comes next
        self.method = "not measured: the system has no /proc"
        if _status("VmRSS") is None:
            return
        try:
            CLEAR.write_text("5")
            self.method = "resident memory of the process, high-water mark of Linux"
        except OSError:
            self.method = "resident memory of the process, looked at 100 times a second"
            threading.Thread(target=self._watch, daemon=True).start()

    def read(self) -> int | None:
        """Return the peak so far in bytes, or None where it cannot be measured."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        # the kernel's counters are exact to a few pages a processor, so keep the highest seen
        now = _status("VmHWM" if "high-water" in self.method else "VmRSS")
        if now is not None:
            self._highest = max(self._highest, now)
        return self._highest or None

    def close(self) -> None:
        """Stop looking."""
        self._open = False

    def _watch(self) -> None:
        while self._open:
            self.read()
            time.sleep(SAMPLING_S)


def _status(key: str) -> int | None:
    """Return a field of Linux's process status in bytes, or None."""
    try:
        for line in STATUS.read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
