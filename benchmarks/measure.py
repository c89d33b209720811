"""Measures one case: checks every provider, times the right ones in turn, counts memory."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from benchmarks import memory, roofline
from benchmarks.check import Checker, Verdict, one_line
from benchmarks.registry import Operation, Provider, Step
from benchmarks.spread import Spread, overhead_ratio, ratio
from benchmarks.spread import seconds as seconds_spread
from benchmarks.timing import Sample, interleave

#: Sets of inputs are drawn until they hold so many times the last cache, and no more than so many.
CACHES, MOST_SETS = 2.0, 48


def tensor_bytes(inputs: Any) -> int:
    """Count what the tensors of a tuple hold, tuples in it included."""
    if isinstance(inputs, Tensor):
        return inputs.numel() * inputs.element_size()
    return sum(map(tensor_bytes, inputs)) if isinstance(inputs, tuple) else 0


def input_sets(op: Operation, case: Any, device: str, seed: int) -> list[Any]:
    """Draw enough sets of inputs that together they do not fit in the cache; at least two."""
    first = op.inputs(case, device, seed)
    wanted = CACHES * roofline.cache_bytes(device) / tensor_bytes(first)
    count = max(2, min(MOST_SETS, int(wanted) + 1))
    return [first, *(op.inputs(case, device, seed + i) for i in range(1, count))]


class Measurement:
    """One case in one mode: checked at once, then timed epoch by epoch."""

    def __init__(
        self, op: Operation, case: Any, mode: str, providers: list[Provider], device: str
    ) -> None:
        self.op, self.case, self.mode, self.device = op, case, mode, device
        self.providers = providers
        checker = Checker(op, case, device)
        self.checked = checker.tokens
        self.verdicts = {p.name: checker.verdict(p) for p in providers}
        self.samples: dict[str, list[Sample]] = {}
        self.extras: dict[str, dict[str, Any]] = {}

    def right(self) -> list[Provider]:
        """Return the providers that are right, and have not failed since."""
        return [p for p in self.providers if self.verdicts[p.name].status == "ok"]

    def time(self, epoch: int, seconds: float, rounds: tuple[int, int] = (5, 60)) -> None:
        """Draw inputs, build every right provider on them, and time these in turn."""
        sets = input_sets(self.op, self.case, self.device, seed=1000 * epoch)
        steps: dict[str, list[Step]] = {}
        for p in self.right():
            try:
                steps[p.name] = [p.build(inputs).bind(self.mode) for inputs in sets]
                if p.name not in self.extras:
                    self.extras[p.name] = memory.extras(steps[p.name][0], self.device)
            except Exception as error:  # one that was right may not fit twice in memory
                steps.pop(p.name, None)
                self.samples.pop(p.name, None)
                self.verdicts[p.name] = Verdict("failed", one_line(error))
        timed = interleave(steps, self.mode, self.device, seconds, rounds, epoch)
        for name, row in timed.items():
            self.samples[name] = self.samples.get(name, []) + row
        del steps, sets
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def lines(self) -> list[dict[str, Any]]:
        """Return one record for every provider; see ``records.py`` for what a line means."""
        return [self.record(p) for p in self.providers]

    def best_peer(self, base: list[Sample], graphed: bool) -> str | None:
        """Return the fastest right peer; a graph is a peer of graphs alone."""
        peers = [
            p.name
            for p in self.providers
            if p.role == "peer" and p.name in self.samples and (graphed or not p.graphed)
        ]
        return min(peers, key=lambda n: ratio(self.samples[n], base).median, default=None)

    def record(self, provider: Provider) -> dict[str, Any]:
        """Put together one provider's line."""
        verdict, samples = self.verdicts[provider.name], self.samples
        line: dict[str, Any] = {
            "op": self.op.name,
            "mode": self.mode,
            "case": describe(self.case),
            "provider": provider.name,
            "role": provider.role,
            "origin": provider.origin,
            "status": verdict.status,
            "why": verdict.why,
            "error": verdict.error,
            "errors": verdict.errors,
            "allowed": verdict.allowed,
            "checked_tokens": self.checked,
        }
        bases = [p for p in self.providers if p.role == "base" and p.name in samples]
        # a graph has no launches to pay for, so its floor is the graphed base
        base = next((p.name for p in bases if p.graphed == provider.graphed), None)
        if provider.name not in samples or base not in samples:
            return line
        mine, floor = samples[provider.name], samples[base]
        seconds = seconds_spread(mine)
        flops, moved = self.op.cost(self.case, self.mode)
        line |= {
            "ms": rounded(Spread(*(1e3 * s for s in seconds))),
            "rounds": len(mine),
            "quiet_rounds": sum(s.quiet for s in mine),
            "epochs": len({s.epoch for s in mine}),
            "over_base": rounded(ratio(mine, floor)),
            **self.extras[provider.name],
        }
        peer = self.best_peer(floor, provider.graphed)
        if provider.role == "ours" and peer:
            line["best_peer"] = peer
            overhead = overhead_ratio(mine, samples[peer], floor)
            line["overhead_over_best_peer"] = rounded(overhead) if overhead else None
            line["over_best_peer"] = rounded(ratio(mine, samples[peer]))
        if provider.role != "base":
            line |= roofline.achieved(flops, moved, seconds.median, self.case.dtype, self.device)
        return line


def rounded(value: Spread) -> list[float]:
    """Return [median, 20 %, 80 %] to six digits."""
    return [float(f"{v:.6g}") for v in value]


def describe(case: Any) -> dict[str, Any]:
    """Return the case as JSON can hold it, without what is empty."""
    facts = {f.name: getattr(case, f.name) for f in dataclasses.fields(case) if f.name != "tags"}
    facts |= {n: getattr(case, n) for n in ("experts", "columns") if hasattr(case, n)}
    for name in ("dtype", "adapter_dtype"):
        if facts.get(name) is not None:
            facts[name] = str(facts[name]).removeprefix("torch.")
    if "ranks" in facts and case.equal_rank is not None:
        facts["ranks"] = case.equal_rank
    return {n: v for n, v in facts.items() if v not in (None, "", False)}
