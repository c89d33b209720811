"""``floe demo``: the whole of FLoE on a real model in a few minutes."""

from pathlib import Path
from typing import Annotated, Any

import typer

from floe_kernels.cli.arguments import TUNING, Out, asked_in, checked, resumable, takes_options
from floe_kernels.cli.progress import TerminalProgress
from floe_kernels.cli.tables import print_results
from floe_kernels.pipeline.demo import DEFAULTS, demo
from floe_kernels.pipeline.runs import CONFIG, clear_run, load_run, open_run


@takes_options(*TUNING, **DEFAULTS)
def command(
    given: dict[str, Any],
    asked: dict[str, Any],
    out: Out = Path("runs/demo"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw the run there away.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run there; it does so anyway.")
    ] = False,
) -> None:
    """Tune SmolLM2-135M on Python's standard library, next to all layers and random ones."""
    progress = TerminalProgress()
    there = (out / CONFIG).exists()
    if fresh and there:
        clear_run(out)
        there = False
    if there and "report" in load_run(out).state:
        print_results(progress.console, load_run(out))
        progress.say(
            "This run is finished. To start over: floe demo --fresh (make demo ARGS=--fresh)"
        )
        return
    if there:
        progress.say(f"going on with the run in {out}; --fresh starts over")
    options = checked(asked_in(out, given) if there else asked)
    arguments = given if there else options.to_json()
    with (
        resumable(out, f"floe demo --out {out}"),
        open_run(out, "demo", arguments, resume=there) as run,
    ):
        demo(run, options, progress)
        print_results(progress.console, run)
