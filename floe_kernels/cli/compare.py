"""``floe compare``: several methods and their controls at one cost."""

from pathlib import Path
from typing import Annotated, Any

import typer

from floe_kernels.cli.arguments import (
    DATA,
    MODEL,
    AskedWrongly,
    Out,
    Resume,
    asked_in,
    checked,
    resumable,
    takes_options,
)
from floe_kernels.cli.progress import TerminalProgress
from floe_kernels.cli.tables import print_comparison
from floe_kernels.pipeline.compare import USUAL, compare
from floe_kernels.pipeline.methods import LIST, Method, read_method
from floe_kernels.pipeline.runs import load_run, open_run

OPTIONS = (
    *MODEL, *DATA, "budget", "unit", "per", "lo", "hi", "beta", "keep", "refine", "pool", "how",
    "where", "rank", "top_k", "alpha", "dropout", "shared_a", "rslora", "variant", "score_samples",
    "warm_up_steps", "spectrum", "cache", "part", "epochs", "steps", "batch_size", "accumulation",
    "learning_rate", "schedule", "lr_warm_up", "weight_decay", "clip", "checkpoint_seconds", "seed",
)  # fmt: skip
SEEDS = 3


@takes_options(*OPTIONS, rank=8, score_samples=32)
def command(
    given: dict[str, Any],
    asked: dict[str, Any],
    methods: Annotated[
        str,
        typer.Option(
            help=f"Comma separated: {LIST}, mola-PRESET as in mola-8642, inverted-METHOD."
        ),
    ] = USUAL,
    seeds: Annotated[int, typer.Option(help="Trainings of each method.")] = SEEDS,
    out: Out = Path("runs/compare"),
    resume: Resume = False,
) -> None:
    """Score once, plan with every method at one cost, train every plan with every seed.

    Without --budget a plan may spend five experts a layer, as in the methods' papers. One table
    and one plot say which layers each method chose, what it cost and what it reached.
    """
    progress = TerminalProgress()
    if resume:
        kept = load_run(out).arguments
        methods = kept.get("methods", USUAL) if methods == USUAL else methods
        seeds = kept.get("seeds", SEEDS) if seeds == SEEDS else seeds
    chosen = _read(methods)
    if seeds < 1:
        raise AskedWrongly(f"--seeds must be >= 1, got {seeds}")
    options = checked(asked_in(out, given) if resume else asked)
    if not options.rank:
        raise AskedWrongly("--rank must be >= 1 here, got 0: floe tune searches for it")
    own = {"methods": methods, "seeds": seeds}
    arguments = {**given, **own} if resume else {**options.to_json(), **own}
    with (
        resumable(out, f"floe compare --out {out} --resume"),
        open_run(out, "compare", arguments, resume=resume) as run,
    ):
        compare(run, options, chosen, seeds, progress)
        print_comparison(progress.console, run)


def _read(text: str) -> list[Method]:
    try:
        chosen = [read_method(name) for name in text.split(",") if name.strip()]
    except ValueError as error:
        raise AskedWrongly(f"--methods: {error}") from error
    if not chosen or len(set(chosen)) < len(chosen):
        raise AskedWrongly(f"--methods must be different and at least one, got {text!r}")
    return chosen
