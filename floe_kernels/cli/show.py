"""``floe show``: what a run came to, or what a plan looks like."""

from pathlib import Path
from typing import Annotated

import typer

from floe_kernels.allocation import Plan
from floe_kernels.cli.picture import print_plan
from floe_kernels.cli.progress import console
from floe_kernels.cli.tables import print_comparison, print_results
from floe_kernels.pipeline.runs import load_run

PHASES = ("base", "search", "score", "plan", "trained")


def command(
    what: Annotated[Path, typer.Argument(help="A run's folder, or a plan: plan.json.")] = Path(
        "runs/demo"
    ),
) -> None:
    """Show a run's results so far, or draw a plan's experts layer by layer; reads only."""
    out = console()
    if what.is_file():
        print_plan(out, Plan.load(what))
        return
    run = load_run(what)
    done = [phase for phase in PHASES if phase in run.state]
    out.print(f"floe {run.command} on {run.arguments.get('model')}; done: {', '.join(done) or '-'}")
    if run.command == "compare":
        print_comparison(out, run)
    else:
        print_results(out, run)
    if "report" not in run.state:
        out.print(f"Not finished. To go on: floe {run.command} --out {what} --resume")
