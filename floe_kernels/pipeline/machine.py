"""The machine a result comes from: its processor and its threads, never its name."""

import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CPUINFO = Path("/proc/cpuinfo")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return what a reader needs to compare times.

    Args:
        device: Where the work is done.

    Returns:
        ``processor``, ``threads``, ``cores``, ``python`` and ``torch``.

    Example:
        >>> describe_machine(torch.device("cpu"))["threads"] >= 1
        True
    """
    on_gpu = device.type == "cuda"
    return {
        "processor": torch.cuda.get_device_name(device) if on_gpu else _cpu_model(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def fastest_threads(work: Callable[[], object]) -> int:
    """Find out whether all of torch's threads or one alone do some work faster.

    On a machine that others keep busy, threads that wait for each other can be ten times slower
    than one. The number of threads is left as it was.

    Args:
        work: A short piece of it; done five times.

    Returns:
        All of torch's threads, or 1 where that takes less than 0.8 of the time.

    Example:
        >>> fastest_threads(lambda: None) >= 1
        True
    """
    most = torch.get_num_threads()
    if most == 1:
        return 1
    best = {most: math.inf, 1: math.inf}
    work()
    try:
        for threads in (most, 1, most, 1):
            torch.set_num_threads(threads)
            start = time.perf_counter()
            work()
            best[threads] = min(best[threads], time.perf_counter() - start)
    finally:
        torch.set_num_threads(most)
    return 1 if best[1] < 0.8 * best[most] else most


def _cpu_model() -> str:
    try:
        for line in CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine() or "unknown processor"
