"""``floe plan``: turn scores into a plan."""

from pathlib import Path
from typing import Annotated, Any

import typer

from floe_kernels.allocation import POLICIES
from floe_kernels.cli.arguments import AskedWrongly, checked, takes_options
from floe_kernels.cli.progress import console
from floe_kernels.cli.tables import print_table
from floe_kernels.pipeline.score_file import ScoreFile

METHODS = ("floe", "uniform", "random", "by_position")


@takes_options(
    "keep", "experts", "rank", "top_k", "alpha", "dropout", "shared_a", "rslora", "refine", "seed",
    rank=8,
)  # fmt: skip
def command(
    given: dict[str, Any],
    asked: dict[str, Any],
    scores: Annotated[Path, typer.Argument(help="What floe score wrote.")],
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")] = "floe",
    out: Annotated[Path, typer.Option(help="File for the plan.")] = Path("plan.json"),
) -> None:
    """Choose the layers that get experts, and write the plan to a file."""
    if method not in METHODS:
        raise AskedWrongly(f"--method must be one of {', '.join(METHODS)}, got {method!r}")
    options = checked(asked)
    if not options.rank:
        raise AskedWrongly("--rank must be >= 1 here, got 0: floe tune searches for it")
    found = ScoreFile.load(scores)
    keywords: dict[str, Any] = {
        "experts": options.experts,
        "base_model": found.model,
        "fingerprint": found.fingerprint,
        **options.adapter(options.rank),
    }
    if method != "uniform":
        keywords["keep"] = options.keep
    if method == "random":
        keywords["seed"] = options.seed
    if method == "floe":
        keywords |= {"gradients": found.gradients, "refine": options.refine}
        plan = POLICIES[method](found.scores, found.modules, **keywords)
    else:
        plan = POLICIES[method](found.modules, **keywords)
    plan.save(out)
    layers = list(dict.fromkeys(spec.layer for spec in found.modules.values()))
    rows = [(name, f"{found.scores.get(name, 0.0):.4g}") for name in plan.layers()]
    print_table(console(), ("layer kept", "score"), rows)
    console().print(
        f"{len(plan.layers())} of {len(layers)} layers, {plan.parameters():,} trainable "
        f"parameters. In {out}; next: floe train --plan {out}"
    )
