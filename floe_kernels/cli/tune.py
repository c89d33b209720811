"""``floe tune``: everything, from the data to the trained adapter."""

from pathlib import Path
from typing import Any

from floe_kernels.cli.arguments import (
    TUNING,
    Out,
    Resume,
    asked_in,
    checked,
    resumable,
    takes_options,
)
from floe_kernels.cli.progress import TerminalProgress
from floe_kernels.cli.tables import print_results
from floe_kernels.pipeline.runs import open_run
from floe_kernels.pipeline.tune import tune


@takes_options(*TUNING)
def command(
    given: dict[str, Any],
    asked: dict[str, Any],
    out: Out = Path("runs/tune"),
    resume: Resume = False,
) -> None:
    """Search the rank, score and choose layers, train them, evaluate, and report."""
    options = checked(asked_in(out, given) if resume else asked)
    progress = TerminalProgress()
    arguments = given if resume else options.to_json()
    with (
        resumable(out, f"floe tune --out {out} --resume"),
        open_run(out, "tune", arguments, resume=resume) as run,
    ):
        tune(run, options, progress)
        print_results(progress.console, run)
