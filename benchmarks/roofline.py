"""This machine's own ceilings, measured, and what fraction of them a time is."""

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from benchmarks.registry import Step
from benchmarks.timing import DISTURBED, Clock


@cache
def cache_bytes(device: str) -> int:
    """Return the size of the last cache before memory."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = [
        int(f.read_text().strip().rstrip("K")) * 1024
        for f in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(sizes, default=32 * 2**20)


class _Work(Step):
    def __init__(self, run: Callable[[], torch.Tensor]) -> None:
        self.run = run

    def forward(self) -> torch.Tensor:
        return self.run()


def _best(run: Callable[[], torch.Tensor], device: str) -> float:
    """Return the least seconds of a call: until enough were undisturbed, or patience ends."""
    clock, work = Clock(device), [_Work(run)]
    clock.time(work, "fwd")
    seconds, quiet, start = [], 0, time.perf_counter()
    while quiet < 7 and time.perf_counter() - start < 5.0:
        taken, waited = clock.sample(work, "fwd")
        seconds.append(taken)
        quiet += waited <= DISTURBED
    return min(seconds)


@cache
def peak_flops(dtype: torch.dtype, device: str) -> float:
    """Return FLOP/s of a large square matrix product of random numbers."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / _best(lambda: a @ b, device)


@cache
def peak_bandwidth(device: str) -> float:
    """Return bytes/s of a copy far larger than the cache, read plus written."""
    count = (2**30 if device == "cuda" else max(2**26, 2 * cache_bytes(device))) // 4 * 4
    source = torch.randint(2**31 - 1, (count // 4,), device=device, dtype=torch.int32)
    target = torch.empty_like(source)
    return 2 * count / _best(lambda: target.copy_(source), device)


def achieved(
    flops: float, moved: float, seconds: float, dtype: torch.dtype, device: str
) -> dict[str, float]:
    """Return the rates of the least work, and the floor's share of the time."""
    floor = max(flops / peak_flops(dtype, device), moved / peak_bandwidth(device))
    return {
        "gflops": round(flops / seconds / 1e9, 3),
        "gbs": round(moved / seconds / 1e9, 3),
        "ceiling_gflops": round(peak_flops(dtype, device) / 1e9, 1),
        "ceiling_gbs": round(peak_bandwidth(device) / 1e9, 1),
        "fraction": round(floor / seconds, 4),
    }
