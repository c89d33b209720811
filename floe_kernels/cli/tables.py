"""Tables on the terminal."""

from collections.abc import Iterable, Sequence
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from floe_kernels.pipeline.results import HEADINGS, remarks, results
from floe_kernels.pipeline.runs import Run


def print_table(
    console: Console, headings: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: int = 1
) -> None:
    """Print a table whose columns from ``numbers`` on are set like numbers.

    Args:
        console: Where.
        headings: Of the columns.
        rows: Their cells, as text.
        numbers: Index of the first column of numbers.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for i, heading in enumerate(headings):
        word = max(map(len, heading.split()), default=0)
        side: Literal["left", "right"] = "right" if i >= numbers else "left"
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
    left = [
        name
        for name in ("plan.json", "adapter", "history.jsonl", "report.html")
        if (run.folder / name).exists()
    ]
    if left:
        console.print(f"In {run.folder}: {', '.join(left)}")
