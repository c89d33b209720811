"""``floe show``: what a run came to."""

from pathlib import Path
from typing import Annotated

import typer

from floe_kernels.cli.progress import console
from floe_kernels.cli.tables import print_results
from floe_kernels.pipeline.runs import load_run

PHASES = ("base", "search", "score", "plan", "trained")


def command(
    folder: Annotated[Path, typer.Argument(help="The run's folder.")] = Path("runs/demo"),
) -> None:
    """Show a run's results so far; reads only."""
    run = load_run(folder)
    out = console()
    done = [phase for phase in PHASES if phase in run.state]
    out.print(f"floe {run.command} on {run.arguments.get('model')}; done: {', '.join(done) or '-'}")
    print_results(out, run)
    if "report" not in run.state:
        out.print(f"Not finished. To go on: floe {run.command} --out {folder} --resume")
