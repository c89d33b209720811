"""Times providers in turn, so that whatever disturbs the machine disturbs all of them.

A sample is the mean of a few calls in a row. A round takes one sample of every provider, in a new
random order; ratios are taken within rounds. Each call uses the next of several sets of inputs,
which together do not fit in the cache.

On a shared CPU the kernel tells how long our threads were ready but not running. A sample in which
that was more than :data:`DISTURBED` of the time is taken again, for any provider alike.
"""

import gc
import os
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks.registry import Step

#: A sample lasts at least so long, in seconds: a clock's tick and a wake-up are then noise.
SAMPLE = {"cpu": 4e-3, "cuda": 2e-3}


#: Share of a sample's time for which a thread of ours may wait for a core.
DISTURBED = 0.03
#: Times a disturbed sample is taken anew, and times the budget that may be spent in all.
RETAKES, PATIENCE = 5, 3.0


class Sample(NamedTuple):
    """One provider's time in one round."""

    seconds: float  #: a call
    waited: float  #: share of that time for which threads of ours waited for a core
    epoch: int = 0

    @property
    def quiet(self) -> bool:
        """Whether the machine left us alone."""
        return self.waited <= DISTURBED


def waited() -> float:
    """Return for how many seconds this process's threads were runnable but did not run.

    Zero where the kernel does not say (schedstat is Linux's).
    """
    total = 0
    try:
        for task in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{task}/schedstat") as file:
                total += int(file.read().split()[1])
    except (OSError, IndexError, ValueError):
        return total / 1e9  # a thread ended, or there is no schedstat
    return total / 1e9


class Clock:
    """Times blocks of calls on one device."""

    def __init__(self, device: str) -> None:
        self.device = device

    def time(self, steps: Sequence[Step], mode: str) -> float:
        """Run one call on each step and return the mean seconds of a call."""
        if mode == "fwd":
            total = self._block([step.forward for step in steps])
        elif mode == "bwd":  # each graph is built outside the clock
            total = sum(self._block([partial(s.backward, s.forward())]) for s in steps)
        else:
            total = self._block([partial(_both, step) for step in steps])
        return total / len(steps)

    def _block(self, work: Sequence[Callable[[], Any]]) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for call in work:
                call()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3
        start = time.perf_counter()
        for call in work:
            call()
        return time.perf_counter() - start

    def sample(self, steps: Sequence[Step], mode: str) -> tuple[float, float]:
        """Return the mean seconds of a call, and the share of the time spent waiting for a core."""
        if self.device == "cuda":  # the device is ours alone
            return self.time(steps, mode), 0.0
        waited_before, start = waited(), time.perf_counter()
        seconds = self.time(steps, mode)
        return seconds, (waited() - waited_before) / max(time.perf_counter() - start, 1e-9)


def _both(step: Step) -> None:
    step.backward(step.forward())


def interleave(
    steps: dict[str, list[Step]],
    mode: str,
    device: str,
    seconds: float,
    rounds: tuple[int, int] = (5, 60),
    epoch: int = 0,
) -> dict[str, list[Sample]]:
    """Return samples of every provider, one a round.

    Args:
        steps: Per provider, one step for each set of inputs.
        mode: "fwd", "bwd" or "fwdbwd".
        device: "cpu" or "cuda".
        seconds: Stop after the round in which so much time has passed, if enough rounds were quiet;
            after :data:`PATIENCE` times so much, as soon as there are enough rounds at all.
        rounds: Fewest and most rounds.
        epoch: Which this is; decides the order within rounds.
    """
    clock, order = Clock(device), random.Random(epoch)
    block = {}
    for name, sets in steps.items():
        clock.time(sets[:2], mode)  # loads, compiles, fills caches of plans
        once = clock.time(sets[:1], mode)
        block[name] = max(1, min(4 * len(sets), round(SAMPLE[device] / max(once, 1e-6))))
    samples: dict[str, list[Sample]] = {name: [] for name in steps}
    cursor, quiet_rounds, start = 0, 0, time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for done in range(1, rounds[1] + 1):
            names = list(steps)
            order.shuffle(names)
            for name in names:
                sets = steps[name]
                tries: list[tuple[float, float]] = []
                while not tries or (tries[-1][1] > DISTURBED and len(tries) <= RETAKES):
                    chosen = [sets[(cursor + i) % len(sets)] for i in range(block[name])]
                    cursor += block[name]
                    tries.append(clock.sample(chosen, mode))
                    if time.perf_counter() - start > PATIENCE * seconds:
                        break
                best = min(tries, key=lambda t: t[1])
                samples[name].append(Sample(*best, epoch))
            quiet_rounds += all(rows[-1].quiet for rows in samples.values())
            spent = time.perf_counter() - start
            enough = seconds if quiet_rounds >= rounds[0] else PATIENCE * seconds
            if done >= rounds[0] and spent > enough:
                break
    finally:
        gc.enable()
    return samples
