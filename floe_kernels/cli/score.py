"""``floe score``: how much every layer has to learn from the data."""

from pathlib import Path
from typing import Annotated, Any

import typer

from floe_kernels.cli.arguments import DATA, MODEL, checked, takes_options
from floe_kernels.cli.progress import TerminalProgress
from floe_kernels.cli.tables import print_table
from floe_kernels.pipeline import files
from floe_kernels.pipeline.score_file import ScoreFile
from floe_kernels.pipeline.tune import score_layers

OPTIONS = (
    *MODEL, *DATA, "experts", "top_k", "rank", "alpha", "dropout", "shared_a", "rslora", "variant",
    "score_samples", "warm_up_steps", "batch_size", "learning_rate", "seed",
)  # fmt: skip


@takes_options(*OPTIONS, rank=8)
def command(
    given: dict[str, Any],
    asked: dict[str, Any],
    out: Annotated[Path, typer.Option(help="File for the scores.")] = Path("scores.json"),
) -> None:
    """Score every layer by Fisher information, and write the scores to a file."""
    progress = TerminalProgress()
    options = checked(asked)
    files.check_writable(out.parent)
    found = score_layers(options, progress)
    ScoreFile.save(found, out)
    order = sorted(found.scores, key=lambda name: -found.scores[name])
    rows = [(name, f"{found.scores[name]:.4g}", str(i)) for i, name in enumerate(order, 1)]
    print_table(progress.console, ("layer", f"score ({options.variant})", "place"), rows)
    progress.say(f"In {out}; next: floe plan {out}")
