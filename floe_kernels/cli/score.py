"""``floe score``: how much every layer has to learn, by one of four measurements."""

from pathlib import Path
from typing import Annotated, Any

import typer

from floe_kernels.cli.arguments import (
    CHOSEN_BY,
    DATA,
    MODEL,
    AskedWrongly,
    checked,
    takes_options,
)
from floe_kernels.cli.progress import TerminalProgress
from floe_kernels.cli.tables import print_table
from floe_kernels.pipeline import files
from floe_kernels.pipeline.measurements import MEASURES, Measurement
from floe_kernels.pipeline.picture import bar
from floe_kernels.pipeline.tune import measure_model

OPTIONS = (
    *MODEL, *DATA, "experts", "top_k", "rank", "alpha", "dropout", "shared_a", "rslora", "variant",
    "per", "score_samples", "warm_up_steps", "spectrum", "cache", "part", "batch_size",
    "learning_rate", "seed",
)  # fmt: skip
NEXT = {"fisher": "floe", "sensitivity": "lora_smoe", "spectral": "alphalora"}


@takes_options(*OPTIONS, rank=8, **CHOSEN_BY)
def command(
    given: dict[str, Any],
    asked: dict[str, Any],
    method: Annotated[
        str,
        typer.Option(
            help="fisher: of the adapters (FLoE). sensitivity: squared gradients of the frozen "
            "matrices, task by task (LoRA-SMoE). spectral: tails of their spectra, without data "
            "(AlphaLoRA). influence: of training samples on validation loss (LayerIF)."
        ),
    ] = "fisher",
    out: Annotated[Path, typer.Option(help="File for the scores.")] = Path("scores.json"),
) -> None:
    """Score every layer of a model, and write the scores to a file."""
    if method not in MEASURES:
        raise AskedWrongly(f"--method must be one of {', '.join(MEASURES)}, got {method!r}")
    progress = TerminalProgress()
    options = checked(asked)
    files.check_writable(out.parent)
    found = measure_model(options, method, progress)
    found.save(out)
    scores = by_layer(found)
    order = sorted(scores, key=lambda name: -scores[name])
    top = max(scores.values(), default=0.0)
    place = {name: str(i) for i, name in enumerate(order, 1)}
    rows = [(name, f"{s:.4g}", place[name], bar(max(s, 0.0), top)) for name, s in scores.items()]
    what = f"{method} ({found.variant})" if found.variant else method
    print_table(progress.console, ("layer", what, "place", ""), rows, bars=True)
    for task, report in (found.stability or {}).items():
        if report:
            progress.say(trust(task, report))
    method = NEXT.get(method, "layerif")
    budget = "" if method in ("floe", "lora_smoe") else " --budget 160"
    progress.say(f"In {out}; next: floe plan {out} --method {method}{budget}")


def by_layer(found: Measurement) -> dict[str, float]:
    """Return a score for every layer: those of its linears averaged (spectral) or summed.

    Args:
        found: What was measured.
    """
    layers: dict[str, list[float]] = {}
    for name, score in found.scores.items():
        layer = found.modules[name].layer if name in found.modules else name
        layers.setdefault(layer, []).append(score)
    mean = found.method == "spectral"
    return {name: sum(s) / (len(s) if mean else 1) for name, s in layers.items()}


def trust(task: str, report: dict[str, Any]) -> str:
    """Say in a line how stable a task's ranking is.

    Args:
        task: Its name.
        report: As a measurement keeps it.
    """
    words = []
    for name, what in (("kendall_tau", "Kendall tau"), ("corrected", "overlap beyond chance")):
        spread = report[name]
        if spread["mean"] is not None:
            words.append(
                f"{what} {spread['mean']:.2f} ({spread['low']:.2f} to {spread['high']:.2f})"
            )
    return (
        f"{task}: would {report['samples']} other samples rank the {report['units']} linears "
        f"alike? {', '.join(words)}; 1 is the same, 0 is chance."
    )
