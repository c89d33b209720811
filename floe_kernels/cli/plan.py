"""``floe plan``: turn scores and a budget into a plan."""

from pathlib import Path
from typing import Annotated, Any

import typer

from floe_kernels.cli.arguments import MODEL, AskedWrongly, checked, takes_options
from floe_kernels.cli.picture import print_plan
from floe_kernels.cli.progress import TerminalProgress
from floe_kernels.pipeline import files
from floe_kernels.pipeline.measurements import Measurement
from floe_kernels.pipeline.methods import LIST, check_options, make_plan, read_method
from floe_kernels.pipeline.tune import describe_model

OPTIONS = (
    "budget", "unit", "per", "lo", "hi", "beta", "keep", "refine", "percent", "pool", "how",
    "where", "compat", "experts", "rank", "top_k", "alpha", "dropout", "shared_a", "rslora",
    *MODEL, "seed",
)  # fmt: skip


@takes_options(*OPTIONS, rank=8)
def command(
    given: dict[str, Any],
    asked: dict[str, Any],
    scores: Annotated[
        list[Path] | None,
        typer.Argument(
            help="What floe score wrote; several files of --method sensitivity are several tasks. "
            "None: a plan for --model by a method that needs no scores."
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(help=f"{LIST}; mola-PRESET as in mola-8642; inverted-METHOD as a control."),
    ] = "floe",
    out: Annotated[Path, typer.Option(help="File for the plan.")] = Path("plan.json"),
) -> None:
    """Decide which linears get how many experts, draw it, and write the plan to a file."""
    progress = TerminalProgress()
    try:
        chosen = read_method(method)
    except ValueError as error:
        raise AskedWrongly(f"--method: {error}") from error
    options = checked(asked)
    try:
        check_options(chosen, given)
    except ValueError as error:
        raise AskedWrongly(str(error)) from error
    if not options.rank:
        raise AskedWrongly("--rank must be >= 1 here, got 0: floe tune searches for it")
    if scores:
        found = Measurement.join([Measurement.load(path) for path in scores])
    elif chosen.needs:
        raise AskedWrongly(
            f"--method {chosen.name} needs a file of scores: floe score --method {chosen.needs}"
        )
    else:
        found = describe_model(options, progress)
    files.check_writable(out.parent)
    plan = make_plan(
        chosen, found.modules, found if chosen.needs else None, options,
        rank=options.rank, seed=options.seed,
        base_model=found.model, fingerprint=found.fingerprint,
    )  # fmt: skip
    plan.save(out)
    print_plan(progress.console, plan)
    progress.say(f"In {out}; next: floe train --plan {out}")
