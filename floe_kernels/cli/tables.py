"""Tables on the terminal."""

from collections.abc import Iterable, Sequence
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from floe_kernels.pipeline.comparison import HEADINGS as COMPARED
from floe_kernels.pipeline.comparison import comparison, notes
from floe_kernels.pipeline.picture import strip
from floe_kernels.pipeline.report_search import search_words
from floe_kernels.pipeline.results import HEADINGS, remarks, results
from floe_kernels.pipeline.runs import RESULTS, Run


def print_table(
    console: Console,
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numbers: int = 1,
    bars: bool = False,
) -> None:
    """Print a table whose columns from ``numbers`` on are set like numbers.

    Args:
        console: Where.
        headings: Of the columns.
        rows: Their cells, as text.
        numbers: Index of the first column of numbers.
        bars: The last column holds bars, which start on the left.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for i, heading in enumerate(headings):
        word = max(map(len, heading.split()), default=0)
        drawn = bars and i == len(headings) - 1
        side: Literal["left", "right"] = "right" if i >= numbers and not drawn else "left"
        table.add_column(Text(heading), justify=side, no_wrap=i == 0, min_width=word)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table, soft_wrap=False)


def print_results(console: Console, run: Run) -> None:
    """Print what a run came to, and where the rest of it is.

    Args:
        console: Where.
        run: The run.
    """
    rows = results(run.state)
    if rows:
        print_table(console, HEADINGS, [row.texts() for row in rows])
    for line in remarks(run.state):
        console.print(line)
    if "search" in run.state:
        _print_front(console, run)
    _print_files(console, run, ("plan.json", "adapter", "history.jsonl", "report.html"))


def _print_front(console: Console, run: Run) -> None:
    """Print the trials on the Pareto front, where there is one, and how the search ended."""
    found = run.state["search"]
    front = [t for t in run.history.of("trial") if t["number"] in found.get("front", [])]
    if front:
        rows = [
            (", ".join(f"{n} {v}" for n, v in t["params"].items()), f"{t['loss']:.4f}",
             f"{t['parameters']:,}")
            for t in sorted(front, key=lambda t: t["parameters"])
        ]  # fmt: skip
        print_table(console, ("on the Pareto front", "loss", "trainable parameters"), rows)
    for line in search_words(found)[1:]:
        console.print(line)


def print_comparison(console: Console, run: Run) -> None:
    """Print a comparison's table so far, and a strip of the layers that each method chose.

    Args:
        console: Where.
        run: Of ``floe compare``.
    """
    rows = comparison(run)
    if rows:
        print_table(console, COMPARED, [row.texts() for row in rows])
        top = max(value for row in rows for value in row.by_layer)
        drawn = [(row.title, strip(row.by_layer, top)) for row in rows]
        print_table(
            console, ("method", f"experts by layer; a full block is {top:g}"), drawn, bars=True
        )
    for line in notes(run, rows):
        console.print(line)
    _print_files(console, run, ("plans", RESULTS, "report.html"))


def _print_files(console: Console, run: Run, names: Sequence[str]) -> None:
    left = [name for name in names if (run.folder / name).exists()]
    if left:
        console.print(f"In {run.folder}: {', '.join(left)}")
