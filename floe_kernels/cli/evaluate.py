"""``floe evaluate``: the held-out loss of a model, with or without an adapter."""

from pathlib import Path
from typing import Annotated, Any

import typer

from floe_kernels.cli.arguments import DATA, MODEL, checked, takes_options
from floe_kernels.cli.progress import TerminalProgress
from floe_kernels.pipeline.tune import evaluate_adapter

OPTIONS = (*MODEL, *DATA, "batch_size", "seed")
UNUSED = ("targets", "max_samples")


@takes_options(*[name for name in OPTIONS if name not in UNUSED])
def command(
    given: dict[str, Any],
    asked: dict[str, Any],
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of an adapter; without one, the base.")
    ] = None,
) -> None:
    """Evaluate on the held-out part of the data; with one seed it is always the same part."""
    progress = TerminalProgress()
    found = evaluate_adapter(checked(asked), adapter, progress)
    progress.say(
        f"held-out loss {found.loss:.4f} nats a token, perplexity {found.perplexity:.4g}, "
        f"over {found.tokens:,} tokens"
    )
