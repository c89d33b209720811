"""A comparison's page: one table, and one plot of which layers each method chose."""

from floe_kernels.allocation import Plan
from floe_kernels.pipeline import files
from floe_kernels.pipeline.comparison import HEADINGS, comparison, notes
from floe_kernels.pipeline.map_plots import choice_plot
from floe_kernels.pipeline.report import REPORT, asked
from floe_kernels.pipeline.report_page import page, paragraph, section, table
from floe_kernels.pipeline.runs import Run


def write_comparison(run: Run) -> None:
    """Write ``report.html`` into a comparison's folder, from the runs that are finished.

    Args:
        run: The run.

    Raises:
        ImportError: matplotlib is missing.
        OSError: The file cannot be written.
    """
    files.write_text(run.folder / REPORT, render_comparison(run))
    run.finish("report", {"file": REPORT})


def render_comparison(run: Run) -> str:
    """Return the page."""
    rows = comparison(run)
    parts = []
    if rows:
        parts.append(
            section(
                "Methods at one cost",
                table(HEADINGS, [row.texts() for row in rows], numbers=1),
                *map(paragraph, notes(run, rows)),
            )
        )
        titles = {row.title: row.by_layer for row in rows}
        parts.append(
            section(
                "Which layers each method chose, and what it reached",
                choice_plot(titles, {row.title: row.losses for row in rows}),
                paragraph(
                    "Colour: experts of the layer, averaged over its linears (of methods that "
                    "draw, the first seed's). Points: held-out loss of every seed; line: mean."
                ),
            )
        )
    each = [(r.title, str(seed), f"{loss:.4f}") for r in rows for seed, loss in enumerate(r.losses)]
    if each:
        parts.append(section("Every run", table(("method", "seed", "loss"), each, numbers=1)))
    plans = sorted((run.folder / "plans").glob("*.json"))
    if plans:
        listed = [(path.name, f"{Plan.load(path).parameters():,}") for path in plans]
        parts.append(section("Plans", table(("file", "trainable parameters"), listed, numbers=1)))
    title = f"floe compare: {run.arguments.get('model', '')}"
    return page(title, run.state.get("machine", {}), [*parts, asked(run)])
