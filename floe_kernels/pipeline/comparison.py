"""What a comparison came to: a row for every method, over its seeds."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from floe_kernels.pipeline.history import History
from floe_kernels.pipeline.runs import RESULTS, Run

HEADINGS = (
    "method", "loss", "sd", "below uniform", "error", "layers", "experts", "million trained",
    "s a step",
)  # fmt: skip
CONTROL = "uniform"


class Compared(NamedTuple):
    """One method over all seeds that are done; None is what cannot be said."""

    title: str
    loss: float  #: held out, mean over the seeds
    deviation: float | None  #: standard deviation over the seeds
    gain: float | None  #: how far below uniform's, mean over the seeds that both have
    error: float | None  #: standard error of ``gain``
    layers: float  #: layers with experts, mean over the seeds
    experts: float  #: those of a layer counted once, mean over the seeds
    parameters: float
    seconds: float | None  #: of a step, median over the seeds
    by_layer: list[float]  #: experts of each layer, of the first seed
    losses: list[float]  #: seed by seed

    def texts(self) -> tuple[str, ...]:
        """Return the row as people read it, in the order of ``HEADINGS``."""
        return (
            self.title,
            f"{self.loss:.4f}",
            "-" if self.deviation is None else f"{self.deviation:.4f}",
            "-" if self.gain is None else f"{self.gain:+.4f}",
            "-" if self.error is None else f"{self.error:.4f}",
            f"{round(self.layers, 1):g}",
            f"{round(self.experts, 1):g}",
            f"{self.parameters / 1e6:.3f}",
            "-" if self.seconds is None else f"{self.seconds:.2f}",
        )


def compared(lines: Sequence[Mapping[str, Any]]) -> list[Compared]:
    """Read the rows off the lines of finished runs, methods in the order of their first one.

    Args:
        lines: Of ``results.jsonl``.

    Example:
        >>> same = {"layers": 1, "experts": 2, "parameters": 9, "seconds_per_step": 1.0,
        ...         "experts_by_layer": [2.0]}
        >>> lines = [{"method": m, "seed": s, "loss": loss, **same}
        ...          for m, s, loss in (("uniform", 0, 3.0), ("floe", 0, 2.0), ("floe", 1, 9.0))]
        >>> [(row.title, row.loss, row.gain) for row in compared(lines)]
        [('uniform', 3.0, 0.0), ('floe', 5.5, 1.0)]
    """
    by_method: dict[str, dict[int, Mapping[str, Any]]] = {}
    for line in lines:
        by_method.setdefault(line["method"], {})[line["seed"]] = line
    control = by_method.get(CONTROL, {})
    rows = []
    for title, runs in by_method.items():
        losses = [run["loss"] for run in runs.values()]
        gains = [control[s]["loss"] - run["loss"] for s, run in runs.items() if s in control]
        seconds = [run["seconds_per_step"] for run in runs.values() if run["seconds_per_step"]]
        itself = title == CONTROL
        rows.append(
            Compared(
                title,
                statistics.fmean(losses),
                statistics.stdev(losses) if len(losses) > 1 else None,
                statistics.fmean(gains) if gains else None,
                None
                if itself or len(gains) < 2
                else statistics.stdev(gains) / math.sqrt(len(gains)),
                statistics.fmean(run["layers"] for run in runs.values()),
                statistics.fmean(run["experts"] for run in runs.values()),
                statistics.fmean(run["parameters"] for run in runs.values()),
                statistics.median(seconds) if seconds else None,
                list(next(iter(runs.values()))["experts_by_layer"]),
                losses,
            )
        )
    return rows


def comparison(run: Run) -> list[Compared]:
    """Read the rows off a run's folder; reads only.

    Args:
        run: Of ``floe compare``.
    """
    return compared(History(run.folder / RESULTS, mend=False).of("run"))


def notes(run: Run, rows: Sequence[Compared]) -> list[str]:
    """Return what a reader of the table must know.

    Args:
        run: Of ``floe compare``.
        rows: Of the table.
    """
    lines = []
    base, seeds = run.state.get("base"), max((len(row.losses) for row in rows), default=0)
    if base:
        lines.append(
            f"Loss is held out, in nats a token, over {base['tokens']:,} tokens; the base model's "
            f"is {base['loss']:.4f}."
        )
        if base.get("note"):
            lines.append(f"Mind that {base['note']}.")
    if len({len(row.losses) for row in rows}) > 1:
        lines.append("The comparison is not finished: methods differ in their number of seeds.")
    if seeds == 1:
        lines.append("One seed tells no difference between methods from chance.")
    elif seeds:
        lines.append(
            f"{seeds} seeds draw adapters, data order and random plans; scores were taken once. "
            "Below uniform is the mean over paired seeds, with its standard error: less than twice "
            "the error may be chance."
        )
    if rows:
        lines.append(
            "Experts of a layer are counted once for its linears (on average); parameters that "
            "train are in millions."
        )
    return lines
