"""Turns records into tables."""

from collections.abc import Iterable
from typing import Any


def number(value: float | None, digits: int = 3) -> str:
    """Format for a table cell."""
    return "" if value is None else f"{value:.{digits}g}"


def with_spread(value: list[float] | None) -> str:
    """Format [median, 20 %, 80 %]."""
    if value is None:
        return ""
    return f"{value[0]:.2f} ({value[1]:.2f} to {value[2]:.2f})"


def size(value: int | None) -> str:
    """Format bytes in MB."""
    return "" if value is None else f"{value / 1e6:.3g}"


COLUMNS = (
    "provider", "error", "ms (20 to 80 %)", "over base", "overhead / best peer's",
    "peak MB", "saved MB", "launches", "GFLOP/s", "GB/s", "of ceiling", "origin",
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
        number(line.get("launches")),
        number(line.get("gflops")),
        number(line.get("gbs")),
        "" if fraction is None else f"{100 * fraction:.0f} %",
        line["origin"],
    ]


def markdown(header: Iterable[str], rows: list[list[str]]) -> str:
    """Return a table, padded so that it also reads as text."""
    table = [list(header), *rows]
    widths = [max(len(r[i]) for r in table) for i in range(len(table[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in table]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def title(line: dict[str, Any]) -> str:
    """Return the heading of one case's table."""
    c = line["case"]
    return (
        f"{line['op']} {line['mode']}, {c['name']}: T={c['T']} {c['I']}x{c['O']} E={c['E']} "
        f"R={c['R']} K={c['K']} {c['dtype']}, routing {c['routing']}, {line['machine']}"
    )


def case_table(lines: list[dict[str, Any]]) -> str:
    """Return the table of one case: right providers from fast to slow, then the others."""
    order = {"ok": 0, "wrong": 1, "failed": 2, "unavailable": 3}
    ranked = sorted(
        lines, key=lambda r: (order[r["status"]], r["role"] != "base", r.get("ms", [0])[0])
    )
    return f"### {title(lines[0])}\n\n{markdown(COLUMNS, [row(r) for r in ranked])}\n"
