"""python -m benchmarks.run --op moe_lora --mode fwdbwd --device cpu --providers all"""

import argparse
import fnmatch
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import records, registry, report
from benchmarks.measure import Measurement

#: What a quick run measures: about five minutes on two cores, compilation included.
QUICK = {
    "moe_lora": (
        "T512-bf16", "T512-fp32", "T1-bf16", "R1024-E64-bf16", "uneven-ranks-bf16",
        "llama1b-kv-bf16",
    ),
    "fisher": ("dense-r16-len512-bf16", "routed-r16-len128-bf16"),
    "grad_square": ("r16-len512-bf16", "r16-len32-bf16"),
}  # fmt: skip


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    add = parser.add_argument
    add("--op", default="moe_lora", help="operations, comma separated, or all")
    add("--mode", default="fwdbwd", choices=("fwd", "bwd", "fwdbwd"))
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--providers", default="all", help="names, comma separated; the base is always there")
    add("--cases", default="quick", help="names, patterns or tags, comma separated; or all")
    add("--quick", action="store_true", help="every operation's quick cases, about five minutes")
    add("--list", action="store_true", help="print what there is, and stop")
    add("--threads", type=int, default=2)
    add("--seconds", type=float, default=15.0, help="timing of one case, if left alone")
    add("--epochs", type=int, default=3, help="times to draw and allocate everything anew")
    add("--rounds", type=int, default=60, help="most rounds in an epoch")
    add("--peer-path", action="append", default=[], help="folder of a peer's own copy")
    add("--together", action="store_true", help="finish each case before the next begins")
    add(
        "--until",
        type=float,
        help="with --together: start no case that would end later (Unix time)",
    )
    add("--out", type=Path, help="results file to add to, JSON lines")
    return parser.parse_args(argv)


def select(op: registry.Operation, wanted: str) -> list[Any]:
    """Return the cases that carry a tag or match a pattern, in the order of the words."""
    cases = op.cases()
    if wanted == "all":
        return cases
    words = list(QUICK[op.name]) if wanted == "quick" else wanted.split(",")
    chosen = [
        c for w in words for c in cases if w in getattr(c, "tags", ()) or fnmatch.fnmatch(c.name, w)
    ]
    return list(dict.fromkeys(chosen))


def show(operations: dict[str, registry.Operation]) -> None:
    """Print every operation's cases and providers."""
    for op in operations.values():
        print(f"{op.name}: {', '.join(c.name for c in op.cases())}")
        for p in op.providers.values():
            print(f"    {p.name} ({p.role}; {p.origin}; {', '.join(p.devices)})")


def begin(op: registry.Operation, case: Any, options: argparse.Namespace) -> Measurement:
    providers = op.choose(options.providers, options.device)
    return Measurement(op, case, options.mode, providers, options.device)


def time_once(this: Measurement, epoch: int, options: argparse.Namespace) -> None:
    this.time(epoch, options.seconds / options.epochs, (5, options.rounds))


def in_passes(chosen: list[Any], options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Go through all cases once an epoch, so that a case's epochs lie minutes apart."""
    started = []
    for epoch in range(options.epochs):
        for place, (op, case) in enumerate(chosen):
            start = time.perf_counter()
            if epoch == 0:
                started.append(begin(op, case, options))
            time_once(started[place], epoch, options)
            spent = time.perf_counter() - start
            print(
                f"[{epoch + 1}/{options.epochs}] {op.name} {case.name}: {spent:.0f} s", flush=True
            )
            if epoch + 1 == options.epochs:
                yield started[place].lines()


def case_by_case(chosen: list[Any], options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Finish each case before the next, and start none that would not end in time."""
    longest = 0.0
    for op, case in chosen:
        if options.until and time.time() + longest > options.until:
            print(f"no time left for {case.name}")
            return
        start = time.perf_counter()
        this = begin(op, case, options)
        for epoch in range(options.epochs):
            time_once(this, epoch, options)
        longest = max(longest, time.perf_counter() - start)
        yield this.lines()


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    sys.path += options.peer_path
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    operations = registry.load()
    if options.list:
        show(operations)
        return
    if options.quick:
        options.op, options.cases, options.seconds, options.epochs = "all", "quick", 8.0, 4
    names = list(operations) if options.op == "all" else options.op.split(",")
    chosen = [
        (op, case)
        for op in (operations[name] for name in names)
        if options.mode in op.modes
        for case in select(op, options.cases)
    ]
    everything: list[dict[str, Any]] = []
    for lines in case_by_case(chosen, options) if options.together else in_passes(chosen, options):
        lines = [records.complete(line, options.device) for line in lines]
        print(report.case_table(lines), flush=True)
        if options.out:
            records.append(options.out, lines)
        everything += lines
    if not everything:
        raise SystemExit(f"no case of {', '.join(names)} is called or tagged {options.cases!r}")
    if options.quick and options.device == "cpu":
        from benchmarks import end_to_end

        small = ["--layers", "4", "--seconds", "12", "--threads", str(options.threads)]
        steps = end_to_end.run(end_to_end.arguments(small))
        print(end_to_end.table(steps))
        if options.out:
            records.append(options.out, steps)
    print(report.summary(report.with_best_ceilings(everything)))


if __name__ == "__main__":
    main()
