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


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--op", default="moe_lora", help="an operation, or all")
    parser.add_argument("--mode", default="fwdbwd", choices=("fwd", "bwd", "fwdbwd"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--providers", default="all", help="names, comma separated")
    parser.add_argument("--cases", default="quick", help="tags or name patterns, comma separated; or all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=15.0, help="timing of one case")
    parser.add_argument("--epochs", type=int, default=3, help="times to draw and allocate anew")
    parser.add_argument("--rounds", type=int, default=60, help="most rounds in an epoch")
    parser.add_argument("--peer-path", action="append", default=[], help="folder of a peer's copy")
    parser.add_argument("--out", type=Path, help="results file to add to (JSON lines)")
    return parser.parse_args(argv)


def select(cases: list[Any], wanted: str) -> list[Any]:
    """Return the cases that carry a tag or match a pattern."""
    if wanted == "all":
        return cases
    words = wanted.split(",")
    chosen = [c for c in cases if any(w in c.tags or fnmatch.fnmatch(c.name, w) for w in words)]
    if not chosen:
        raise SystemExit(f"no case has a tag or a name like {wanted!r}")
    return chosen


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    sys.path += options.peer_path
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    operations = registry.load()
    names = list(operations) if options.op == "all" else options.op.split(",")
    for name in names:
        op = operations[name]
        providers = op.choose(options.providers, options.device)
        for case in select(op.cases(), options.cases):
            start = time.perf_counter()
            lines = measure(
                op, case, options.mode, providers, options.device, options.seconds,
                options.epochs, (5, options.rounds),
            )  # fmt: skip
            lines = [records.complete(line, options.device) for line in lines]
            print(report.case_table(lines))
            print(f"({time.perf_counter() - start:.0f} s)\n", flush=True)
            if options.out:
                records.append(options.out, lines)


if __name__ == "__main__":
    main()
