"""The machine a result comes from: its processor and its threads, never its name."""

import os
import platform
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


def _cpu_model() -> str:
    try:
        for line in CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine() or "unknown processor"
