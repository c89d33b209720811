"""Times providers in turn, so that whatever disturbs the machine disturbs all of them.

A sample is the mean of a few calls in a row. A round takes one sample of every provider, in a new
random order; ratios are taken within rounds. Each call uses the next of several sets of inputs,
which together do not fit in the cache.
"""

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.registry import Step

#: A sample lasts at least so long, in seconds: a clock's tick and a wake-up are then noise.
SAMPLE = {"cpu": 4e-3, "cuda": 2e-3}


@dataclass
class Samples:
    """Seconds per call of every provider, one row a round; and which epoch each round was in."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    epochs: list[int] = field(default_factory=list)


def calls(step: Step, mode: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """Return (untimed preparation, timed call)."""
    if mode == "fwd":
        return lambda: None, lambda _: step.forward()
    if mode == "bwd":
        return step.forward, step.backward
    return lambda: None, lambda _: step.backward(step.forward())


class Clock:
    """Times blocks of calls on one device."""

    def __init__(self, device: str) -> None:
        self.device = device

    def time(self, steps: Sequence[Step], mode: str) -> float:
        """Run one call on each step and return the mean seconds of a call."""
        total = 0.0
        if mode == "bwd":  # each call's graph is built outside the clock
            for step in steps:
                prepare, run = calls(step, mode)
                state = prepare()
                total += self._block([lambda run=run, state=state: run(state)])
            return total / len(steps)
        return self._block([lambda s=s: calls(s, mode)[1](None) for s in steps]) / len(steps)

    def _block(self, work: list[Callable[[], Any]]) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for call in work:
                call()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3
        start = time.perf_counter()
        for call in work:
            call()
        return time.perf_counter() - start


def interleave(
    steps: dict[str, list[Step]],
    mode: str,
    device: str,
    seconds: float,
    rounds: tuple[int, int] = (5, 60),
    seed: int = 0,
) -> dict[str, list[float]]:
    """Return seconds per call, one sample of every provider a round.

    Args:
        steps: Per provider, one step for each set of inputs.
        mode: "fwd", "bwd" or "fwdbwd".
        device: "cpu" or "cuda".
        seconds: Stop after the round in which so much time has passed.
        rounds: Fewest and most rounds.
        seed: Of the order within rounds.
    """
    clock, order = Clock(device), random.Random(seed)
    block = {}
    for name, sets in steps.items():
        clock.time(sets[:2], mode)  # loads, compiles, fills caches of plans
        once = clock.time(sets[:1], mode)
        block[name] = max(1, min(4 * len(sets), round(SAMPLE[device] / max(once, 1e-6))))
    samples: dict[str, list[float]] = {name: [] for name in steps}
    cursor, start = 0, time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for round_ in range(rounds[1]):
            names = list(steps)
            order.shuffle(names)
            for name in names:
                sets = steps[name]
                chosen = [sets[(cursor + i) % len(sets)] for i in range(block[name])]
                cursor += block[name]
                samples[name].append(clock.time(chosen, mode))
            if round_ + 1 >= rounds[0] and time.perf_counter() - start > seconds:
                break
    finally:
        gc.enable()
    return samples
