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
    return sum(t.numel() * t.element_size() for t in inputs if isinstance(t, Tensor))


def input_sets(op: Operation, case: Any, device: str, seed: int) -> list[Any]:
    """Draw enough sets of inputs that together they do not fit in the cache; at least two."""
    first = op.inputs(case, device, seed)
    wanted = CACHES * roofline.cache_bytes(device) / tensor_bytes(first)
    count = max(2, min(MOST_SETS, int(wanted) + 1))
    return [first, *(op.inputs(case, device, seed + i) for i in range(1, count))]


def measure(
    op: Operation,
    case: Any,
    mode: str,
    providers: list[Provider],
    device: str,
    seconds: float = 15.0,
    epochs: int = 3,
    rounds: tuple[int, int] = (5, 60),
) -> list[dict[str, Any]]:
    """Return one record for every provider; see ``records.py`` for what a line means."""
    checker = Checker(op, case, device)
    verdicts = {p.name: checker.verdict(p) for p in providers}
    checked = checker.tokens
    del checker  # its float64 tensors are large
    right = [p for p in providers if verdicts[p.name].status == "ok"]
    samples: dict[str, list[Sample]] = {p.name: [] for p in right}
    extras: dict[str, dict[str, Any]] = {p.name: {} for p in right}
    for epoch in range(epochs):
        sets = input_sets(op, case, device, seed=1000 * epoch)
        steps: dict[str, list[Step]] = {}
        for p in right:
            if verdicts[p.name].status == "ok":
                try:
                    steps[p.name] = [p.build(inputs).bind(mode) for inputs in sets]
                    if epoch == 0:
                        extras[p.name] = memory.extras(steps[p.name][0], device)
                except Exception as error:
                    steps.pop(p.name, None)
                    verdicts[p.name] = Verdict("failed", one_line(error))
        timed = interleave(steps, mode, device, seconds / epochs, rounds, seed=epoch)
        for name, row in timed.items():
            samples[name] += row
        del steps, sets, timed
        if device == "cuda":
            torch.cuda.empty_cache()
    samples = {n: s for n, s in samples.items() if verdicts[n].status == "ok"}
    return [
        record(op, case, mode, p, verdicts[p.name], samples, extras, providers, checked, device)
        for p in providers
    ]


def best_peer(
    samples: dict[str, list[Sample]],
    providers: list[Provider],
    base: list[Sample],
    graphed: bool = False,
) -> str | None:
    """Return the fastest right peer; a graph is a peer of graphs alone."""
    peers = [
        p.name
        for p in providers
        if p.role == "peer" and p.name in samples and (graphed or not p.graphed)
    ]
    return min(peers, key=lambda n: ratio(samples[n], base).median, default=None)


def record(
    op: Operation,
    case: Any,
    mode: str,
    provider: Provider,
    verdict: Verdict,
    samples: dict[str, list[Sample]],
    extras: dict[str, dict[str, Any]],
    providers: list[Provider],
    checked: int,
    device: str,
) -> dict[str, Any]:
    """Put together one provider's line."""
    line: dict[str, Any] = {
        "op": op.name,
        "mode": mode,
        "case": describe(case),
        "provider": provider.name,
        "role": provider.role,
        "origin": provider.origin,
        "status": verdict.status,
        "why": verdict.why,
        "error": verdict.error,
        "errors": verdict.errors,
        "allowed": verdict.allowed,
        "checked_tokens": checked,
    }
    bases = [p for p in providers if p.role == "base" and p.name in samples]
    # a graph has no launches to pay for, so its floor is the graphed base
    base = next((p.name for p in bases if p.graphed == provider.graphed), None)
    if provider.name not in samples or base not in samples:
        return line
    mine, floor = samples[provider.name], samples[base]
    seconds = seconds_spread(mine)
    flops, moved = op.cost(case, mode)
    line |= {
        "ms": rounded(Spread(*(1e3 * s for s in seconds))),
        "rounds": len(mine),
        "quiet_rounds": sum(s.quiet for s in mine),
        "over_base": rounded(ratio(mine, floor)),
        **extras[provider.name],
    }
    peer = best_peer(samples, providers, floor, provider.graphed)
    if provider.role == "ours" and peer:
        line["best_peer"] = peer
        overhead = overhead_ratio(mine, samples[peer], floor)
        line["overhead_over_best_peer"] = rounded(overhead) if overhead else None
        line["over_best_peer"] = rounded(ratio(mine, samples[peer]))
    if provider.role != "base":
        line |= roofline.achieved(flops, moved, seconds.median, case.dtype, device)
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
