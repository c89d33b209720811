"""python -m benchmarks.compare BEFORE.jsonl AFTER.jsonl: what changed beyond the stated spreads.

Two runs agree on a ratio if its two intervals have a point in common. Exits 1 if they do not agree
on every ratio, or if a provider that was right is no longer.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import records, report
from benchmarks.spread import Spread

RATIOS = ("over_base", "overhead_over_best_peer")


class Change(NamedTuple):
    """One ratio in two runs."""

    op: str
    mode: str
    case: str
    provider: str
    ratio: str
    before: Spread | None
    after: Spread | None
    verdict: str  #: "same", "faster", "slower", or what became of the provider


def key(line: dict[str, Any]) -> tuple[str, ...]:
    """Return what identifies a measurement across runs."""
    return (line["machine"], line["op"], line["mode"], line["case"]["name"], line["provider"])


def changes(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> Iterator[Change]:
    """Yield every ratio that both runs have, and every provider that went wrong."""
    old = {key(line): line for line in before}
    for new in after:
        was = old.get(key(new))
        if was is None:
            continue
        _, op, mode, case, provider = key(new)
        change = partial(Change, op, mode, case, provider)
        if was["status"] == "ok" and new["status"] != "ok":
            yield change("error", None, None, f"now {new['status']}: {new['why']}")
            continue
        for ratio in RATIOS:
            if was.get(ratio) and new.get(ratio) and new["role"] != "base":
                a, b = Spread(*was[ratio]), Spread(*new[ratio])
                direction = "faster" if b.median < a.median else "slower"
                yield change(ratio, a, b, "same" if a.overlaps(b) else direction)


def table(found: list[Change]) -> str:
    """Return a table of changes."""
    header = ("operation", "case", "provider", "ratio", "before", "after", "verdict")
    cells = [
        [f"{c.op} {c.mode}", c.case, c.provider, c.ratio, report.with_spread(c.before),
         report.with_spread(c.after), c.verdict]
        for c in found
    ]  # fmt: skip
    return report.markdown(header, cells)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--all", action="store_true", help="show the ratios that agree, too")
    options = parser.parse_args(argv)
    found = list(changes(records.read(options.before), records.read(options.after)))
    different = [c for c in found if c.verdict != "same"]
    shown = found if options.all else different
    if shown:
        print(table(shown), end="\n\n")
    print(f"{len(found) - len(different)} of {len(found)} ratios agree within their spreads")
    return int(bool(different) or not found)


if __name__ == "__main__":
    raise SystemExit(main())
