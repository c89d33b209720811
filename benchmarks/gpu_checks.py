"""python -m benchmarks.gpu_checks: our kernels on the device, before anything is timed.

Results against float64 in both regimes, bit equality from run to run, no host sync, and a CUDA
graph replayed with other tokens. On a CPU every step runs, without sync mode and without a graph.
"""

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks import registry
from benchmarks.check import Checker, one_line
from benchmarks.graphed import GraphedStep
from benchmarks.registry import Operation, Provider

#: Dense and grouped regimes, ragged shapes, uneven, hot and shared experts, float32 adapters.
CASES = {
    "moe_lora": (
        "T1-bf16", "T64-bf16", "T512-fp32", "R1024-E64-bf16", "uneven-with-zero-bf16",
        "hot-large-R-bf16", "hydralora-q-bf16", "fp32-adapter",
    ),
    "grad_square": ("r16-len128-bf16", "r64-len8-bf16", "r16-ragged-bf16", "r16-len32-fp32"),
    "fisher": ("dense-r16-len512-bf16", "routed-r16-len32-bf16"),
}  # fmt: skip
SMALL = {"moe_lora": ("T64-bf16", "R1024-E64-bf16"), "grad_square": ("r16-ragged-bf16",)}
#: Tokens of a case here: enough for every tile to be ragged, few enough for compute-sanitizer.
TOKENS, FEW_TOKENS = 1000, 130


def chosen(small: bool) -> Iterator[tuple[Operation, Any]]:
    """Yield (operation, case), cut to a number of tokens that no tile divides."""
    operations = registry.load()
    for name, cases in (SMALL if small else CASES).items():
        known = {c.name: c for c in operations[name].cases()}
        for case in cases:
            tokens = FEW_TOKENS if small else TOKENS
            yield operations[name], operations[name].limit(known[case], tokens)


def ours(op: Operation) -> Provider:
    return op.providers["ours"]


def results(op: Operation, case: Any, device: str) -> None:
    """Every result as near to float64 as plain PyTorch is."""
    verdict = Checker(op, case, device).verdict(ours(op))
    assert verdict.status == "ok", f"{verdict.status}: {verdict.why}"


def repeats(op: Operation, case: Any, device: str) -> None:
    """The same bits, run after run."""
    step = ours(op).build(op.inputs(case, device, 3))
    first = {name: value.clone() for name, value in step.results().items()}
    for _ in range(3):
        for name, value in step.results().items():
            assert torch.equal(first[name], value), f"{name} changed from one run to the next"


@contextmanager
def no_sync(device: str) -> Iterator[None]:
    """Raise wherever the host waits for the device."""
    if device != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def syncs(op: Operation, case: Any, device: str) -> None:
    """No host sync in forward or backward, after the first call has compiled."""
    step = ours(op).build(op.inputs(case, device, 4))
    step.backward(step.forward())
    with no_sync(device):
        step.backward(step.forward())


def graph(op: Operation, case: Any, device: str) -> None:
    """A captured step, replayed after other tokens were written into its input."""
    inputs, other = op.inputs(case, device, 5), op.inputs(case, device, 6)
    step: Any = ours(op).build(inputs)
    graphed = GraphedStep(step).bind("fwdbwd") if device == "cuda" else None
    moved = inputs._replace(x=other.x.clone())
    inputs.x.copy_(other.x)  # the leaf shares this memory
    if graphed:
        for value in graphed.captured.values():
            value.fill_(float("nan"))
        graphed.graph.replay()
        torch.cuda.synchronize()
        got = graphed.captured
    else:
        got = step.results()
    for name, value in ours(op).build(moved).results().items():
        assert torch.equal(got[name], value), f"{name} differs from the eager run"


CHECKS: dict[str, Callable[[Operation, Any, str], None]] = {
    "results": results,
    "repeats": repeats,
    "syncs": syncs,
    "graph": graph,
}
#: An operation that keeps running sums would add the warm-up's to them.
UNGRAPHED = ("fisher",)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_checks", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--small", action="store_true", help="few tokens, for compute-sanitizer")
    parser.add_argument("--only", default=",".join(CHECKS), help="checks, comma separated")
    options = parser.parse_args(argv)
    failed = 0
    for name in options.only.split(","):
        for op, case in chosen(options.small):
            if name == "graph" and op.name in UNGRAPHED:
                continue
            try:
                CHECKS[name](op, case, options.device)
                print(f"ok      {name:8} {op.name} {case.name}", flush=True)
            except Exception as error:
                failed += 1
                where = traceback.extract_tb(sys.exc_info()[2])[-1]
                why = one_line(error)
                place = f"{where.filename.rsplit('/', 1)[-1]}:{where.lineno}"
                print(f"FAILED  {name:8} {op.name} {case.name}: {why} ({place})", flush=True)
    print(f"{failed} checks failed")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
