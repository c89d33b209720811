"""``floe train``: train the adapters that a plan places."""

from pathlib import Path
from typing import Annotated, Any

import typer

from floe_kernels.allocation import Plan
from floe_kernels.cli.arguments import (
    DATA,
    MODEL,
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
from floe_kernels.pipeline.tune import train_plan

OPTIONS = (
    *MODEL, *DATA, "epochs", "steps", "batch_size", "accumulation", "learning_rate", "schedule",
    "lr_warm_up", "weight_decay", "clip", "eval_every", "checkpoint_seconds", "seed",
)  # fmt: skip


@takes_options(*[name for name in OPTIONS if name != "targets"])
def command(
    given: dict[str, Any],
    asked: dict[str, Any],
    plan: Annotated[Path, typer.Option(help="The plan, as floe plan and floe tune write it.")],
    out: Out = Path("runs/train"),
    resume: Resume = False,
) -> None:
    """Train a plan's adapters on data, evaluate them, and report."""
    chosen = Plan.load(plan)
    options = checked(asked_in(out, given) if resume else asked)
    progress = TerminalProgress()
    arguments = given if resume else {name: getattr(options, name) for name in asked}
    with (
        resumable(out, f"floe train --plan {plan} --out {out} --resume"),
        open_run(out, "train", arguments, resume=resume) as run,
    ):
        train_plan(run, options, chosen, progress)
        print_results(progress.console, run)
