"""``floe tune``: everything, from the data to the trained adapter."""

from pathlib import Path
from typing import Any

from floe_kernels.cli.arguments import (
    CHOSEN_BY,
    TUNING,
    AskedWrongly,
    Out,
    Resume,
    asked_in,
    checked,
    resumable,
    takes_options,
)
from floe_kernels.cli.progress import TerminalProgress, console
from floe_kernels.cli.tables import print_results
from floe_kernels.pipeline.distributed import is_first, open_shared, processes
from floe_kernels.pipeline.progress import SILENT
from floe_kernels.pipeline.tune import tune


@takes_options(*TUNING, **CHOSEN_BY)
def command(
    given: dict[str, Any],
    asked: dict[str, Any],
    out: Out = Path("runs/tune"),
    resume: Resume = False,
) -> None:
    """Search the rank, score and choose linears, or layers, train them, evaluate, and report.

    Under torchrun every process computes its share of each batch: torchrun --nproc-per-node 2
    -m floe_kernels tune ...
    """
    options = checked(asked_in(out, given) if resume else asked)
    arguments = given if resume else options.to_json()
    with processes() as number:
        if number > 1 and options.storage:
            raise AskedWrongly(
                "--storage is for processes that take trials of their own, and torchrun's share "
                "each trial: leave one of the two out"
            )
        progress = TerminalProgress() if is_first() else SILENT
        with (
            resumable(out, f"floe tune --out {out} --resume"),
            open_shared(out, "tune", arguments, resume=resume) as run,
        ):
            tune(run, options, progress)
            if is_first():
                print_results(console(), run)
