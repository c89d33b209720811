"""python -m benchmarks.report RESULTS.jsonl --out FOLDER: tables (Markdown) and plots (SVG)."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def number(value: float | None, digits: int = 3) -> str:
    """Format for a table cell."""
    return "" if value is None else f"{value:.{digits}g}"


def with_spread(value: Sequence[float] | None) -> str:
    """Format [median, 20 %, 80 %]."""
    if value is None:
        return ""
    return f"{value[0]:.2f} ({value[1]:.2f} to {value[2]:.2f})"


def size(value: int | None) -> str:
    """Format bytes in MB."""
    return "" if value is None else f"{value / 1e6:.3g}"


COLUMNS = (
    "provider", "error", "ms (20 to 80 %)", "over base", "overhead / best peer's",
    "peak MB", "saved MB", "launches, fwd + bwd", "GFLOP/s", "GB/s", "of ceiling", "origin",
)  # fmt: skip


def row(line: dict[str, Any]) -> list[str]:
    """Return one provider's cells; a wrong provider has an error and no time."""
    status = line["status"]
    error = number(line["error"], 2)
    if status != "ok":
        note = {"wrong": "WRONG", "failed": "failed", "unavailable": "cannot run"}[status]
        return [line["provider"], error, f"{note}: {line['why']}", *[""] * 8, line["origin"]]
    fraction = line.get("fraction")
    return [
        line["provider"],
        error,
        with_spread(line.get("ms")),
        with_spread(line.get("over_base")),
        with_spread(line.get("overhead_over_best_peer")),
        size(line.get("peak_bytes")),
        size(line.get("saved_bytes")),
        " + ".join(str(n) for n in line.get("launches") or ()),
        number(line.get("gflops")),
        number(line.get("gbs")),
        "" if fraction is None else f"{100 * fraction:.0f} %",
        line["origin"],
    ]


def markdown(header: Iterable[str], rows: list[list[str]]) -> str:
    """Return a table, padded so that it also reads as text."""
    table = [list(header), *rows]
    widths = [max(len(r[i]) for r in table) for i in range(len(table[0]))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in table
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def title(line: dict[str, Any]) -> str:
    """Return the heading of one case's table."""
    c = line["case"]
    parts = [f"T={c['tokens']}", f"{c['inputs']}x{c.get('outputs', c['columns'])}"]
    parts += [f"E={c['experts']}, K={c['top_k']}"] if "experts" in c else []
    parts += [f"R={c['columns']}"]
    parts += [f"{c['samples']} samples"] if c.get("samples", 1) > 1 else []
    parts += [c["dtype"]] + (
        [f"{c['routing']} routing"] if c.get("routing", "even") != "even" else []
    )
    where = f"{line['machine']}, {line.get('threads', line['cores'])} cores"
    return f"{line['op']} {line['mode']}, {c['name']}: {', '.join(parts)}; {where}"


def summary(lines: list[dict[str, Any]]) -> str:
    """Return one row a case: ours, the best right peer, and how the overheads compare."""
    header = (
        "operation", "case", "base ms", "ours / base", "best peer", "peer / base",
        "our overhead / peer's", "of ceiling", "saved MB, ours", "saved MB, peer",
    )  # fmt: skip
    rows = []
    for case in by_case(lines):
        named = {r["provider"]: r for r in case}
        base = next((r for r in case if r["role"] == "base" and "ms" in r), None)
        for ours in (r for r in case if r["role"] == "ours"):
            peer = named.get(ours.get("best_peer", ""), {})
            of_ceiling = "" if "fraction" not in ours else f"{100 * ours['fraction']:.0f} %"
            label = ours["case"]["name"] + " (graphed)" * ("graphed" in ours["provider"])
            verdict = with_spread(ours.get("over_base"))
            rows.append([
                f"{ours['op']} {ours['mode']}",
                label,
                number(base["ms"][0]) if base else "",
                verdict if ours["status"] == "ok" else f"{ours['status'].upper()}: {ours['why']}",
                peer.get("provider", ""),
                with_spread(peer.get("over_base")),
                with_spread(ours.get("overhead_over_best_peer")),
                of_ceiling,
                size(ours.get("saved_bytes")),
                size(peer.get("saved_bytes")),
            ])  # fmt: skip
    return markdown(header, rows)


def by_case(lines: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Group records by machine, operation, mode and case, in the order they came."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for line in lines:
        key = (line["machine"], line["op"], line["mode"], line["case"]["name"])
        groups.setdefault(key, []).append(line)
    return list(groups.values())


def case_table(lines: list[dict[str, Any]]) -> str:
    """Return the table of one case: right providers from fast to slow, then the others."""
    order = {"ok": 0, "wrong": 1, "failed": 2, "unavailable": 3}
    ranked = sorted(
        lines, key=lambda r: (order[r["status"]], r["role"] != "base", r.get("ms", [0])[0])
    )
    worst = min(
        (r for r in lines if "rounds" in r),
        key=lambda r: r["quiet_rounds"] / r["rounds"],
        default=None,
    )
    noise = ""
    if worst and worst["quiet_rounds"] < worst["rounds"]:
        noise = (
            f"\nThe machine was shared: {worst['provider']} was undisturbed in "
            f"{worst['quiet_rounds']} of {worst['rounds']} rounds, the others in more.\n"
        )
    table = markdown(COLUMNS, [row(r) for r in ranked])
    return f"### {title(lines[0])}\n\n{table}\n{noise}"


def with_best_ceilings(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Recompute each fraction from the best ceilings any line of the machine and dtype saw.

    A ceiling is the most that a machine was seen to do; a run that measured it while disturbed
    would flatter everything it timed.
    """
    best: dict[tuple[str, str], list[float]] = {}
    for line in lines:
        if "fraction" in line:
            held = best.setdefault((line["machine"], line["case"]["dtype"]), [0.0, 0.0])
            held[0] = max(held[0], line["ceiling_gflops"])
            held[1] = max(held[1], line["ceiling_gbs"])
    fixed = []
    for line in lines:
        if "fraction" in line:
            flops, bandwidth = best[line["machine"], line["case"]["dtype"]]
            share = max(line["gflops"] / flops, line["gbs"] / bandwidth)
            line = {**line, "ceiling_gflops": flops, "ceiling_gbs": bandwidth, "fraction": share}
        fixed.append(line)
    return fixed


def last_of_each(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the last record of every measurement, in the order of first appearance."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for line in lines:
        found[line["machine"], line["op"], line["mode"], line["case"]["name"], line["provider"]] = (
            line
        )
    return list(found.values())


def main(argv: list[str] | None = None) -> None:
    from benchmarks import end_to_end, plots, records

    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="folder for report.md and plots; default: print")
    options = parser.parse_args(argv)
    everything = [line for path in options.results for line in records.read(path)]
    lines = with_best_ceilings(last_of_each(everything))
    layers = [line for line in lines if line["op"] != "training_step"]
    steps = [line for line in lines if line["op"] == "training_step"]
    commits = ", ".join(dict.fromkeys(line["commit"] for line in lines))
    versions = ", ".join(f"{k} {v}" for k, v in lines[-1]["versions"].items())
    kernels = ", ".join(lines[-1].get("kernels", ()))
    head = f"Commit {commits}; {versions}; our kernels for this device: {kernels or 'none'}.\n"
    parts = [head, summary(layers) + "\n"]
    parts += [end_to_end.table(group) for group in by_case(steps)]
    parts += [case_table(group) for group in by_case(layers)]
    text = "\n".join(parts)
    if options.out is None:
        print(text)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    for device in dict.fromkeys(line["device"] for line in lines):
        plots.draw([line for line in layers if line["device"] == device], options.out)
    (options.out / "report.md").write_text(text)


if __name__ == "__main__":
    main()
