"""python -m benchmarks.run --op moe_lora --mode fwdbwd --device cpu --providers all"""

import argparse
import fnmatch
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import records, registry, report
from benchmarks.measure import measure

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
    add("--until", type=float, help="start no case that would not end by then (Unix time)")
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
        options.op, options.cases, options.seconds, options.epochs = "all", "quick", 6.0, 3
    names = list(operations) if options.op == "all" else options.op.split(",")
    everything, longest = [], 0.0
    for op in (operations[name] for name in names):
        if options.mode not in op.modes:
            continue
        providers = op.choose(options.providers, options.device)
        for case in select(op, options.cases):
            if options.until and time.time() + longest > options.until:
                print(f"no time left for {case.name}")
                break
            start = time.perf_counter()
            lines = measure(
                op, case, options.mode, providers, options.device, options.seconds,
                options.epochs, (5, options.rounds),
            )  # fmt: skip
            lines = [records.complete(line, options.device) for line in lines]
            everything += lines
            print(report.case_table(lines))
            longest = max(longest, time.perf_counter() - start)
            print(f"({time.perf_counter() - start:.0f} s)\n", flush=True)
            if options.out:
                records.append(options.out, lines)
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
